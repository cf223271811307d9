"""Memory of one GPU, part by part, at each moment that can be the peak. Formulas alone: bytes from shapes and settings.

    weights      parameters in their dtype; sharded, a rank's share
    gathered     what FSDP2 holds of whole weights and gradients at once (`planner_sharding`)
    gradients    of what trains, in its dtype: there from an update's first micro-batch to its last
    optimizer    AdamW's two averages: 8 bytes a parameter, 2 with 8-bit states, none on the GPU if offloaded
    saved        a checkpointed layer's input, D wide, or all that a layer keeps (`planner_layer`); offloaded, two layers'
    layer peak   the layer that is computed again and differentiated
    loss         a chunk of rows against the whole vocabulary, fp32 sums of the head's gradient, rows of hidden states
    generator    weights of its own where the trainer's are sharded, keys and values of a batch, scores while sampling

The moments: a layer's backward, the loss, sharded the head's gathering and its gradients; generation. All but the last are
held against a trace of the real step within 10 %, on the rank that has most of a row (`planner_cut`). What it gives up: the allocator's
fragmentation and CUDA's context, for which `Gpu.usable` leaves room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .generate import LOGITS_BYTES, PREFILL_TOKENS
from .planner_cut import Share, fullest
from .planner_layer import WIDE, Compute, LayerBytes, layer_bytes
from .planner_setting import Servers as Servers
from .planner_setting import Setting as Setting
from .planner_setting import trained_parameters as trained_parameters
from .planner_shape import ModelShape, Row
from .planner_sharding import gathered_bytes

KEPT_BYTES = 2500 << 20
"""Budget of a chunk of the loss on a GPU: `kernels.linear_logprob_triton.KEPT_BYTES`, which needs Triton to be read."""
BLOCK_BYTES = 640 << 20
"""Of a block of the loss in two passes: `kernels.linear_logprob_triton.BLOCK_BYTES`."""
PART_BYTES = 3 * WIDE / 128
"""Bytes a score that the parts' results of a chunk take."""
SAMPLING_BYTES = 3 * LOGITS_BYTES
"""The generator's fp64 scores while it samples, with what is made of them."""
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0 + 2 * WIDE / 256, "adamw-offload": 0.0}
"""A trained parameter's state on the GPU, by `optimizer.kind`; 8-bit states have one fp32 scale for 256 entries."""
OFFLOADED_STATE = 4 * WIDE
"""Bytes on the host of a trained parameter with "adamw-offload": a copy, its gradient and two averages. The gradient on the
GPU stays until the update, since it is summed and clipped first."""
OFFLOADED = 2
"""Layers whose inputs are on the GPU while those of all are offloaded: the one that computes and the next."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part at the peak's moment, and of its host."""

    parts: Mapping[str, float]
    moment: str
    moments: Mapping[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def compute_of(setting: Setting, tokens: float, prompts: int = 0) -> Compute:
    """How a layer computes under this setting, of a row of `prompts` prompt tokens, of which a rank holds `tokens`."""
    gathers = setting.ring > 1 and setting.schedule != "ring"
    return Compute(
        size=setting.computed,
        residual=setting.residual,
        frozen=setting.lora is not None,
        adapters=frozenset(setting.lora.targets if setting.lora else ()),
        fused=setting.liger,
        tile=min(1.0, setting.tile_tokens / tokens) if setting.tile_tokens else 0.0,
        merged=None if setting.sp == 1 else 0.5 * min(2, setting.ring - 1),  # of two, one reads by its later half
        gathered=prompts / setting.ulysses / tokens if gathers else 0.0,
    )


def training_memory(shape: ModelShape, setting: Setting, row: Row) -> Memory:
    """The peak of an update's later micro-batch, whose packed row is `row`, on the rank that has most of it."""
    made = [_training(shape, setting, share, row.prompt_tokens) for share in fullest(shape, setting, row)]
    return max(made, key=lambda memory: memory.total)


def _training(shape: ModelShape, setting: Setting, share: Share, prompts: int) -> Memory:
    tokens = share.tokens
    how = compute_of(setting, tokens, prompts)
    layer = layer_bytes(shape, how, share.prompt_share)
    state = state_parts(shape, setting)
    rope = 2 * shape.head_dim * how.residual * tokens
    input_bytes = how.residual * shape.hidden * tokens
    moments: dict[str, dict[str, float]] = {}
    if setting.gradient_checkpointing:
        on_gpu = min(OFFLOADED, shape.layers) if setting.offload_activations else shape.layers
        saved = on_gpu * input_bytes
        running = layer.backward * tokens
    else:
        on_gpu = shape.layers
        saved = on_gpu * layer.saved * tokens
        running = (layer.backward - layer.saved) * tokens
    cast, gathered = _cast_weights(shape, setting), gathered_bytes(shape, setting)
    moments["a layer's backward"] = {
        **state, "gathered weights": gathered.in_layers, "saved activations": saved + rope,
        "peak in a layer": running + _weight_peak(shape, setting) + cast.layer,
        "loss workspace": _waiting_gradient(shape, setting),
    }  # fmt: skip
    moments["the loss"] = {
        **state, "gathered weights": gathered.root, "saved activations": saved + rope,
        "loss workspace": loss_bytes(shape, setting, share) + cast.model,
    }  # fmt: skip
    if setting.sharded:
        moments["gathering the head"] = {**state, "gathered weights": gathered.at_start}
        moments["the head's gradients"] = {**state, "loss workspace": gathered.at_end}
    host = 0.0
    if setting.offload_activations and setting.gradient_checkpointing:
        host += shape.layers * input_bytes
    if setting.optimizer == "adamw-offload":
        host += OFFLOADED_STATE * trained_parameters(shape, setting) / setting.shards
    return _peak(moments, host)


def state_parts(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Weights, gradients and optimizer state: a rank's share of what stands from step to step."""
    trained = trained_parameters(shape, setting)
    kept_of_trained = WIDE if setting.lora else setting.stored  # adapters are fp32
    weights = setting.stored * shape.parameters + (WIDE * trained if setting.lora else 0)
    weights *= 1 + setting.reference
    gradients = kept_of_trained * trained / setting.shards
    return {
        "weights": weights / setting.shards,
        "gradients": gradients,
        "optimizer": OPTIMIZER_BYTES[setting.optimizer] * trained / setting.shards,
    }


@dataclass(frozen=True)
class _Cast:
    """Rounded copies of fp32 weights that autocast keeps: of the whole model in a forward, of a layer in its backward."""

    model: float
    layer: float


def _cast_weights(shape: ModelShape, setting: Setting) -> _Cast:
    if not setting.autocast or setting.sharded:  # which gathers them rounded
        return _Cast(0.0, 0.0)
    layer = 2.0 * shape.layer_matrices
    whole = shape.layers * layer
    return _Cast(whole, layer if setting.gradient_checkpointing else whole)


def _waiting_gradient(shape: ModelShape, setting: Setting) -> float:
    """A tied head's gradient waits through all layers for the embedding's, to be added to it; sharded, to be sent with it."""
    waits = (shape.tied or setting.sharded) and setting.lora is None
    return float(setting.stored * shape.head_parameters) if waits else 0.0


def _weight_peak(shape: ModelShape, setting: Setting) -> float:
    """The gradient of one matrix before it is added to what is there, or, sharded, reduced with its layer's."""
    if setting.lora is not None:
        return 0.0
    return float(setting.computed * shape.hidden * shape.inner)


def loss_bytes(shape: ModelShape, setting: Setting, share: Share) -> float:
    """Beside what the layers have saved: the last norm, hidden rows, a chunk of scores, fp32 sums of the head's gradient.

    Each rank sees its own rows, the vocabulary whole.
    """
    tokens, rows = share.tokens, share.loss_rows
    how = compute_of(setting, tokens)
    hidden, size = shape.hidden, how.residual
    tile = how.tile or 1.0
    norm = 0.0 if how.fused else (WIDE * (size < WIDE) + size * (setting.lora is None)) * hidden * tokens
    states = size * hidden * tokens * (2 if not how.fused else 1) * tile + 2 * size * hidden * rows
    if setting.sp > 1:
        return norm + states + _two_passes(shape, setting, rows)
    chunk = min(rows, max(128.0, KEPT_BYTES // (shape.vocab * size) // 128 * 128))
    scores = chunk * shape.vocab * (size + PART_BYTES) + chunk * hidden * (WIDE + size)
    head_trains = setting.lora is None or "lm_head" in setting.lora.targets
    sums = WIDE * shape.head_parameters if setting.lora is None and head_trains else 0
    after = sums + size * shape.head_parameters if sums else 0.0  # the rounded gradient beside its fp32 sum
    return norm + states + max(sums + scores, after)


def _two_passes(shape: ModelShape, setting: Setting, rows: float) -> float:
    """The backward of log-probs that other ranks needed first: a block of scores' gradients, fp32 sums of one side."""
    size, hidden = setting.residual, shape.hidden
    if setting.lora is not None and "lm_head" not in setting.lora.targets:
        return min(rows, max(128.0, BLOCK_BYTES // (shape.vocab * size))) * (size * shape.vocab + WIDE * hidden)
    vocab, stored = shape.vocab, setting.stored
    held = min(rows, BLOCK_BYTES // (4096 * size))
    columns = min(float(vocab), BLOCK_BYTES / (max(1.0, held) * size))
    scores, rounded = held * columns * size, (stored < WIDE) * stored
    if rows > vocab:
        return scores + size * hidden * rows + (WIDE + rounded) * shape.head_parameters
    left = WIDE * hidden * rows
    if columns == vocab:  # the sum is the result, or rounded to it
        return left + WIDE * shape.head_parameters + max(scores, rounded * shape.head_parameters)
    return left + scores + stored * shape.head_parameters + (WIDE + rounded) * hidden * columns


def forward_memory(shape: ModelShape, setting: Setting, row: Row) -> Memory:
    """Log-probs without gradients: of the old policy, of the reference."""
    made = [_without_gradients(shape, setting, share) for share in fullest(shape, setting, row)]
    return max(made, key=lambda memory: memory.total)


def _without_gradients(shape: ModelShape, setting: Setting, share: Share) -> Memory:
    tokens, rows = share.tokens, share.loss_rows
    how = compute_of(setting, tokens)
    layer: LayerBytes = layer_bytes(shape, how, share.prompt_share)
    gathered = gathered_bytes(shape, setting)
    state = {**state_parts(shape, setting), "gradients": 0.0, "gathered weights": gathered.in_forward}
    entering = how.residual * shape.hidden * tokens + 2 * shape.head_dim * how.residual * tokens
    parts = min(rows, 8192) * shape.vocab * PART_BYTES
    moments = {
        "a layer's forward": {**state, "peak in a layer": layer.forward * tokens + entering},
        "log-probs": {**state, "loss workspace": parts + how.residual * shape.hidden * (tokens + rows)},
    }
    return _peak(moments, 0.0)


def generation_memory(shape: ModelShape, setting: Setting, cached_tokens: float, prompt: int) -> Memory:
    """While completions are sampled: the generator's weights, keys and values of `cached_tokens`, prompts passing through.

    The local generator is the trained model, gathered whole where it is sharded; a serving engine has weights of its own,
    and spreads them and all else over its GPUs.
    """
    size, over = setting.computed, max(1, setting.serve)
    state = {**state_parts(shape, setting), "gradients": 0.0}
    own = size * shape.parameters / over if setting.serve else gathered_bytes(shape, setting).whole
    passing = max(prompt, PREFILL_TOKENS)
    prefill = layer_bytes(shape, compute_of(replace(setting, ring=1, ulysses=1), passing), 1.0).forward * passing
    parts = {
        **state, "generator weights": own,
        "generator keys and values": cache_bytes(shape, size) * cached_tokens / over,
        "peak in a layer": max(prefill, float(SAMPLING_BYTES)) / over,
    }  # fmt: skip
    return Memory(parts, "generation", {"generation": sum(parts.values())})


def cache_bytes(shape: ModelShape, size: int) -> int:
    """Keys and values of one token."""
    return 2 * shape.layers * shape.kv * size


def _peak(moments: Mapping[str, Mapping[str, float]], host: float) -> Memory:
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    name = max(totals, key=lambda moment: totals[moment])
    return Memory(moments[name], name, totals, host)
