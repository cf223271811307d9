"""The real step at full shape without memory: what it would hold and do, operator by operator.

Tensors are fake (`FakeTensorMode`: shape, dtype, device, no storage), so an 8B model at 120K tokens runs on a laptop. The
step is the engine's own, in the model's own class; a GPU is pretended, so that backends are chosen and buffers made as
there. One dispatch mode sees every operator:

* memory: storages, counted while they live. What an operator takes for itself is invisible to a trace of shapes; for
  FlashAttention's backward it is added from its source (`SCRATCH`), for it is several GB at 120K tokens.
* operations: torch's own formulas (`torch.utils.flop_counter`), but attention by the pairs it computes: half a square
  when causal, and no segment's queries meet another's keys.
* integers and short vectors stay real: lengths and masks steer Python, and nothing else in a step depends on values.

Tests hold it against torch's MemTracker and FlopCounterMode, whose cost a call grows with the number of modules, and
against measured peaks. What it gives up: allocator fragmentation, CUDA's own context, time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..kernels import spend as _spend  # registers the operator
from ..kernels.gpu import pretending
from . import attention
from .completions import completion_policy_loss
from .model import save_memory
from .packing import Group
from .planner_memory import Setting
from .planner_shape import Row

del _spend
aten = torch.ops.aten
REAL_ELEMENTS = 1 << 20
"""Tensors made from nothing stay real up to this size: a row's numbers, never a layer's."""


@dataclass
class Traced:
    """What a step held, in bytes, and did, in operations. `peak` counts the model itself; `kinds` splits operations."""

    peak: int = 0
    alive: int = 0
    flops: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    peak_operator: str = ""


class StepTrace(TorchDispatchMode):
    """Counts what runs within it, on top of a `FakeTensorMode` that allows real inputs."""

    def __init__(self, *holding: nn.Module) -> None:
        super().__init__()
        self.made = Traced()
        self._sizes: dict[int, int] = {}
        for module in holding:
            for tensor in (*module.parameters(), *module.buffers()):
                self._hold(tensor)
            for parameter in module.parameters():
                if parameter.grad is not None:
                    self._hold(parameter.grad)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with _disable_current_modes():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if not given and isinstance(result, FakeTensor) and _stays_real(result):
            with _disable_current_modes():
                return func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._hold(tensor)
        scratch = SCRATCH[func._overloadpacket](*args) if func._overloadpacket in SCRATCH else 0
        if self.made.alive + scratch > self.made.peak:
            self.made.peak, self.made.peak_operator = self.made.alive + scratch, str(func)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        flops = FLOPS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if flops is not None:
            spent = int(flops(*args, **kwargs, out_val=result))
            self.made.flops += spent
            kind = "attention" if "attention" in str(func) else "products"
            self.made.kinds[kind] = self.made.kinds.get(kind, 0) + spent

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.made.alive += size
        self.made.peak = max(self.made.peak, self.made.alive)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.made.alive -= self._sizes.pop(key)


def _stays_real(made: Tensor) -> bool:
    return not made.is_floating_point() or made.numel() <= REAL_ELEMENTS


def trace(model: Callable[[], nn.Module], step: Callable[[Any], object]) -> Traced:
    """Runs step(model()) without memory; the caller pretends a GPU around it where one is meant.

    `model` is called with the meta device as default. Its trainable parameters get gradients before the step, which is
    how every micro-batch but an update's first finds them.
    """
    with torch.device("meta"):
        made = model()
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        _as_fake(made)
    with fake, StepTrace(made) as tracer:
        kept = step(made)
    del kept
    return tracer.made


def _as_fake(model: nn.Module) -> None:
    """Meta tensors become fake ones of the CPU, whose operators carry a device; shared ones stay shared."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    fake = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                    fake.grad = torch.empty_like(fake) if fake.requires_grad else None
                    known[id(parameter)] = fake
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def trace_step(
    config: PreTrainedConfig, setting: Setting, row: Row, *, capability: tuple[int, int] | None = (9, 0)
) -> Traced:
    """Forward and backward of one packed row by the engine's own step, in the model's own class, on one GPU.

    Args:
        capability: of the GPU that is pretended; None traces what a CPU does.

    Raises:
        ValueError: a setting of several GPUs, or one that the model isn't put under here.
    """
    if setting.gpus > 1 or setting.sp > 1 or setting.offload_activations or setting.liger:
        raise ValueError(
            "only one GPU's step without offloading and fused modules can be traced: the rest of a plan is formulas"
        )
    groups = [
        Group(torch.zeros(row.prompt, dtype=torch.long), [torch.zeros(row.completion, dtype=torch.long)] * row.size)
        for _ in range(row.groups)
    ]
    advantages = torch.ones(row.loss_rows)

    def step(model: Any) -> None:
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if setting.autocast else nullcontext()
        with autocast:
            made = completion_policy_loss(
                model, groups, None, advantages, kind="grpo", normalizer=1.0, shared_prefix=row.shared
            )
        made.loss.backward()

    with pretending(capability) if capability else nullcontext():
        return trace(lambda: _model(config, setting), step)


def _model(config: PreTrainedConfig, setting: Setting) -> Any:
    dtype = torch.float32 if setting.dtype == "float32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    if setting.lora is not None:
        from .lora import add_lora  # peft is an extra

        add_lora(model, setting.lora)
    model.train()
    save_memory(model, setting.gradient_checkpointing, False, setting.tile_tokens, verify=False)
    return model


def attention_pairs(queries: Sequence[int], keys: Sequence[int], causal: bool) -> int:
    """Pairs of a query and a key that cumulative lengths name; causal: without the half above the diagonal."""
    pairs = 0
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        pairs += (b - a) * (b - a + 1) // 2 if causal else (b - a) * (d - c)
    return pairs


def _bounds(cumulative: Tensor) -> list[int]:
    with _disable_current_modes():  # a real tensor: lengths always are
        return cumulative.tolist()


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *others: Any, **_: Any) -> int:
    del k, v
    causal = others[3]
    return 4 * attention_pairs(_bounds(cu_q), _bounds(cu_k), causal) * q.shape[1] * q.shape[2]


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, *others: Any,
    **_: Any,
) -> int:  # fmt: skip
    del dout, k, v, out, lse
    causal = others[3]
    return 10 * attention_pairs(_bounds(cu_q), _bounds(cu_k), causal) * q.shape[1] * q.shape[2]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    del v, dropout
    batch, heads, rows, width = q.shape
    pairs = rows * (rows + 1) // 2 if causal else rows * k.shape[2]
    return 4 * batch * heads * width * pairs


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, causal: bool, **_: Any
) -> int:
    del out, lse
    return _cpu_forward(q, k, v, dropout, causal) * 10 // 4


def _spent(flops: int, **_: Any) -> int:
    return flops


def _product(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return 2 * left.numel() * right.shape[-1]


def _added_product(total: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    del total
    return _product(left, right)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.longreach.spend: _spent,
    aten._flash_attention_forward: _flash_forward,
    aten._flash_attention_backward: _flash_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
    aten.mm: _product,  # torch's own formulas don't know the overloads with a wider result
    aten.addmm: _added_product,
    aten.addmm_: _added_product,  # nor the one in place at all
}
"""Operations of attention: 4 E a pair and head forward, 10 E backward, where scores are computed again."""


def _flash_scratch(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *_: Any) -> int:
    """FlashAttention-2's own buffers in a backward over segments: fp32 sums of dq, one fp32 a row and head, and with
    grouped keys dk and dv for every query head before they are added up."""
    del dout, v, out, lse
    (tokens, heads, width), (keys, key_heads) = q.shape, k.shape[:2]
    sums = 4 * tokens * heads * (width + 1)
    return sums + (2 * keys * heads * width * q.element_size() if heads != key_heads else 0)


SCRATCH: dict[Any, Callable[..., int]] = {aten._flash_attention_backward: _flash_scratch}
"""Bytes that an operator takes from torch's allocator for itself while it runs."""
