"""The flash-attention packages behind the contract of `attention`: used where they can be imported, never needed.

    flash-attn  FlashAttention-2, package flash-attn: the kernels that ring-flash-attn calls
    fa3         FlashAttention-3 for Hopper: the folder hopper/ of flash-attn, module flash_attn_interface
    fa4         FlashAttention-4 for Hopper and Blackwell, package flash-attn-4

The functions inside are called, since what the packages export keeps each backward to the out and lse of its own
forward. All three make delta = sum of dout * out from the out that they are handed, so merged ones may be passed. They
take a whole row of segments in bf16 or fp16, sum in fp32, and round out and gradients to the inputs' dtype: partial
results that are merged or added carry that rounding. lse is [H, T], fp32, natural log; for a query without keys one says
+inf and another -inf, and here it is -inf.

What is inside a package may change with a release: the parameters of its functions are compared with what is passed
here, and a release that differs is refused by name. Written from the sources of flash-attn 2.8.3.post2 (hopper/ in it
too), hopper/ of 2026 and flash-attn-4 4.0.0b36; not run on a GPU yet.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import attention_cuda
from .attention_cuda import LARGEST_HEAD, Bounds, Gradients, spans, without_keys
from .gpu import BLACKWELL, CONSUMER_BLACKWELL, HOPPER, OLDEST, capability

LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
FORWARD = ("q", "k", "v", *LENGTHS, "softmax_scale", "causal")
BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *LENGTHS, "softmax_scale", "causal", "deterministic")  # fmt: skip
OTHER_NAMES = {"softmax_lse": "lse", "causal": "is_causal", "out": "out_"}
"""What some of the functions call the same thing."""
UNUSED = (
    "k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx", "leftpad_k",
    "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale",
)  # fmt: skip
"""FlashAttention-3's forward serves decoding too, and its first release gives none of these a default."""


@dataclass(frozen=True)
class Package:
    """Where the two functions are, and what they are told beside `FORWARD` and `BACKWARD`."""

    module: str
    distribution: str
    functions: tuple[str, str]
    constants: tuple[Mapping[str, Any], Mapping[str, Any]]
    oldest: tuple[int, int]
    beyond: tuple[int, int] = field(default=(99, 0))
    """The first compute capability that it has no kernels for."""


PACKAGES = {
    "flash-attn": Package(
        "flash_attn.flash_attn_interface", "flash-attn",
        ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        ({"dropout_p": 0.0},
         {"dropout_p": 0.0, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}),
        oldest=OLDEST,
    ),
    "fa3": Package(
        "flash_attn_interface", "flash-attn-3", ("_flash_attn_forward", "_flash_attn_backward"),
        (dict.fromkeys(UNUSED), {"sequed_q": None, "sequed_k": None}), oldest=HOPPER, beyond=BLACKWELL,
    ),
    "fa4": Package(
        "flash_attn.cute.interface", "flash-attn-4", ("_flash_attn_fwd", "_flash_attn_bwd"), ({"return_lse": True}, {}),
        oldest=HOPPER,
    ),
}  # fmt: skip
DETERMINISTIC_HEAD = 192
"""FlashAttention-3 refuses a deterministic backward above it."""
BLACKWELL_HEADS = 128
"""FlashAttention-4 on Blackwell takes head dimensions up to this, and `LARGEST_HEAD` on the GPUs with tensor memory."""


def unsuited(name: str, q: Tensor) -> str | None:
    """Why a package can't take such queries (keys and values are like them), None if it can."""
    reason = attention_cuda.unsuited(q)
    if reason:
        return reason
    package, found = PACKAGES[name], capability(q.device)
    if not package.oldest <= found < package.beyond:
        return f"it has no kernels for compute capability {found}"
    head = q.shape[-1]
    takes = found < BLACKWELL or head <= BLACKWELL_HEADS or (head == LARGEST_HEAD and found < CONSUMER_BLACKWELL)
    if name == "fa4" and not takes:
        return f"it has no kernels for a head dimension of {head} on compute capability {found}"
    return _load(name)[1]


def unordered(name: str, q: Tensor) -> str | None:
    """Why a backward of such queries can't be bitwise repeatable, None if it can."""
    if name == "fa3" and q.shape[-1] > DETERMINISTIC_HEAD:
        return f"deterministic=True goes up to a head dimension of {DETERMINISTIC_HEAD} there, and this one is {q.shape[-1]}"  # fmt: skip
    if name == "fa3" and "is_causal" not in _parameters(_load(name)[0][1]):
        return "this release's backward takes deterministic=True and pays no heed to it: install one of 2026"
    if name == "fa4" and capability(q.device) >= CONSUMER_BLACKWELL:
        return f"it has no deterministic backward for compute capability {capability(q.device)}"
    return None


@lru_cache(maxsize=len(PACKAGES))
def _load(name: str) -> tuple[tuple[Callable[..., Any], ...], str | None]:
    """The two functions, or none and the reason why."""
    package = PACKAGES[name]
    try:
        module = importlib.import_module(package.module)
    except ImportError as error:
        return (), f"{package.distribution} can't be imported ({error})"
    functions = tuple(getattr(module, function, None) for function in package.functions)
    for function, called, told, constants in zip(functions, package.functions, (FORWARD, BACKWARD), package.constants, strict=True):  # fmt: skip
        differs = f"it has no {called}" if function is None else _difference(function, called, {*told, *constants})
        if differs:
            return (), f"this release of {package.distribution} is another than the one known here: {differs}"
    return tuple(f for f in functions if f is not None), None


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """By name. torch wraps some of the functions as custom operators, which show no parameters of their own."""
    return inspect.signature(getattr(function, "_init_fn", function)).parameters


def _difference(function: Callable[..., Any], called: str, told: set[str]) -> str | None:
    known = _parameters(function)
    spelled = _spelled(function, dict.fromkeys(told)).keys()
    unknown = sorted(spelled - known.keys())
    needed = sorted(name for name, x in known.items() if x.default is x.empty and name not in spelled)
    if unknown:
        return f"its {called} takes no {unknown[0]}"
    return f"its {called} needs {needed[0]}" if needed else None


def _spelled(function: Callable[..., Any], told: Mapping[str, Any]) -> dict[str, Any]:
    known = _parameters(function)
    return {name if name in known else OTHER_NAMES.get(name, name): value for name, value in told.items()}


def _call(name: str, stage: int, lengths: tuple[Any, ...], **told: Any) -> Any:
    functions, reason = _load(name)
    assert reason is None, reason  # `choose` has asked `unsuited`
    told = {**told, **dict(zip(LENGTHS, lengths, strict=True)), **PACKAGES[name].constants[stage]}
    return functions[stage](**_spelled(functions[stage], told))


def _nothing(bounds_q: Bounds, bounds_k: Bounds) -> bool:
    """Whether no query sees a key: an empty launch, which not every release survives."""
    return all(a == b or c == d for (a, b), (c, d) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True))


def forward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds_q: Bounds,
    bounds_k: Bounds,
    causal: bool,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out [T, H, E], rounded to q's dtype whatever `out_dtype` says, and lse [H, T] in fp32."""
    if _nothing(bounds_q, bounds_k):
        lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q, dtype=out_dtype), lse
    lengths = spans(bounds_q, bounds_k, q.device)
    out, lse, *_ = _call(name, 0, lengths, q=q, k=k, v=v, softmax_scale=scale, causal=causal)
    for rows in without_keys(bounds_q, bounds_k):
        out[rows], lse[:, rows] = 0.0, -torch.inf
    return out.to(out_dtype), lse


def backward(
    name: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds_q: Bounds, bounds_k: Bounds,
    causal: bool, scale: float, grad_dtype: torch.dtype, deterministic: bool = False,
) -> Gradients:  # fmt: skip
    """dq, dk, dv, rounded to q's dtype."""
    # zeros: a kernel may leave alone the rows of a segment whose other side is empty
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not _nothing(bounds_q, bounds_k):
        # exp(score - inf) = 0 in every release; what -inf gives differs
        lse = lse.float().masked_fill(lse == -torch.inf, torch.inf).contiguous()
        _call(
            name, 1, spans(bounds_q, bounds_k, q.device), dout=dout.to(q.dtype), q=q, k=k, v=v, out=out.to(q.dtype),
            softmax_lse=lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, causal=causal, deterministic=deterministic,
        )  # fmt: skip
    return dq.to(grad_dtype), dk.to(grad_dtype), dv.to(grad_dtype)
