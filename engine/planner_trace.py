"""The real step at full shape without memory: what one rank would hold, do and send, operator by operator.

An 8B model at 120K tokens runs on a laptop (`planner_tracer`). The step is the engine's own, in the model's own class; a
GPU is pretended, so that backends are chosen and buffers made as there, and so are the other ranks (`planner_ranks`):
sequence parallelism and FSDP2 run as they are, with messages that bring nothing. Offloaded activations are counted on the
host, and an optimizer's state by an update made before.

Tests hold it against torch's MemTracker and FlopCounterMode, whose cost a call grows with the number of modules, and
against measured peaks. What it gives up: allocator fragmentation, CUDA's own context, time, and the order of streams: a
copy or a message is done when it is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..kernels.gpu import pretending
from . import attention
from .completions import completion_policy_loss
from .liger import bind
from .mesh import ParallelConfig, make_mesh
from .model import save_memory
from .packing import Group
from .planner_liger import traced_kernels
from .planner_memory import Setting
from .planner_ranks import one_of
from .planner_shape import Row
from .planner_tracer import Traced, trace
from .sharding import Weights, place


def trace_step(
    config: PreTrainedConfig,
    setting: Setting,
    row: Row,
    *,
    capability: tuple[int, int] | None = (9, 0),
    rank: int = 0,
) -> Traced:
    """Forward and backward of one packed row by the engine's own step, in the model's own class, as `rank` sees it.

    Args:
        capability: of the GPU that is pretended; None traces what a CPU does.
        rank: the last Ulysses rank of the first ring rank is the fullest of a row.

    Raises:
        ValueError: a setting that can't be traced, or within a process group.
    """
    if setting.ring > 1 and setting.schedule == "ring-flash-attn":
        raise ValueError("ring-flash-attn's kernels can't be traced: plan with parallel.schedule = ring or all-gather")
    # "auto" would measure links that aren't there, and this holds more
    schedule = "all-gather" if setting.schedule == "auto" else setting.schedule
    groups = [
        Group(torch.zeros(row.prompt, dtype=torch.long), [torch.zeros(row.completion, dtype=torch.long)] * row.size)
        for _ in range(row.groups)
    ]
    advantages = torch.ones(row.loss_rows)
    parallel = ParallelConfig(ring=setting.ring, ulysses=setting.ulysses, schedule=schedule, shard=setting.shard)
    with ExitStack() as stack:
        stack.enter_context(one_of(setting.gpus, rank))
        stack.enter_context(pretending(capability) if capability else nullcontext())
        mesh = make_mesh(parallel, "cpu") if setting.gpus > 1 else None

        def prepare(model: Any) -> Callable[[Any], object]:
            compute = torch.bfloat16 if setting.autocast else None
            weights = Weights(model)  # where it is already
            if mesh is not None and setting.shard:
                weights = place(model, mesh, compute=compute, device=torch.device("cpu"))

            def loss() -> Any:
                return completion_policy_loss(
                    model, groups, None, advantages, kind="grpo", normalizer=1.0, shared_prefix=row.shared,
                    mesh=mesh if setting.sp > 1 else None,
                )  # fmt: skip

            def step(_: Any) -> None:
                autocast = torch.autocast("cpu", dtype=torch.bfloat16) if setting.autocast else nullcontext()
                with autocast:
                    made = weights.run(loss)
                made.loss.backward()

            return step

        return trace(lambda: _model(config, setting), _nothing, prepare=prepare)


def _nothing(_: Any) -> None:
    raise AssertionError("the step is made with the model")


def _model(config: PreTrainedConfig, setting: Setting) -> Any:
    dtype = torch.float32 if setting.dtype == "float32" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    if setting.lora is not None:
        from .lora import add_lora  # peft is an extra

        add_lora(model, setting.lora)
    model.train()
    if setting.liger:
        bind(model, traced_kernels(), verify=False)
    save_memory(model, setting.gradient_checkpointing, setting.offload_activations, setting.tile_tokens, verify=False)
    return model
