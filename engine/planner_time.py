"""Time of one GPU, part by part, and what bounds it. Operations are exact, rates are assumptions (`planner_hardware`).

    forward     2 T W + 4 A H E pairs, backward twice and two and a half times as much, a checkpointed layer forward again
    vocabulary  6 N D V in one pass over it, 8 in two, 2 for log-probs (4 and 6 with a frozen head)
    buffers     norms, rotations, gates and residuals cross memory: what a layer holds, some three times
    decoding    every token of a batch reads all weights, and each completion its prompt's keys and values
    sharing     FSDP gathers weights for forward and backward and reduces gradients; Ulysses exchanges heads, a ring keys and values

Communication runs beside computation: what is longer counts, on the busiest of the ranks that share a row. Operations are
held against a trace within 2 %, bytes sent within 1 %; seconds are held against nothing yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .planner_cut import Share, passed, shares
from .planner_hardware import Gpu
from .planner_layer import WIDE, layer_bytes
from .planner_memory import Setting, cache_bytes, compute_of, trained_parameters
from .planner_shape import ModelShape, Row
from .planner_sharding import gathered_bytes

CROSSINGS = 3
"""How often what a layer holds crosses memory in a forward: written, and read by one or two others."""
LAUNCH_S = 4e-6
"""Of one operator, where there is too little to do for the GPU to be busy longer."""
OPERATORS = 45
"""Operators of one layer while decoding."""


@dataclass(frozen=True)
class Work:
    """Operations of one rank."""

    products: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0
    vocabulary: float = 0.0

    @property
    def flops(self) -> float:
        return self.products + self.attention_forward + self.attention_backward + self.vocabulary


@dataclass(frozen=True)
class Time:
    """Seconds of one rank, the part that bounds it, and its communication (which runs beside)."""

    seconds: float
    bound: str
    communication: float = 0.0

    @property
    def shown(self) -> float:
        """What communication adds."""
        return max(0.0, self.communication - self.seconds)

    @property
    def total(self) -> float:
        return max(self.seconds, self.communication)


def update_work(shape: ModelShape, setting: Setting, row: Row, passes: int = 6) -> Work:
    """Forward and backward of one packed row, all ranks of it together; `passes` over the vocabulary (6 or 8, N D V each)."""
    t, layers, again = row.tokens, shape.layers, setting.gradient_checkpointing
    sizes, adapters = shape.linears, frozenset(setting.lora.targets if setting.lora else ())
    frozen = setting.lora is not None
    # nothing below the first layer asks for a gradient, unless transformers makes its input do so for checkpointing
    first = ("q_proj", "k_proj", "v_proj") if frozen and not again else ()
    products = 0.0
    for name, (wide_in, wide_out) in sizes.items():
        one = 2.0 * t * wide_in * wide_out
        backward = one * layers * (1 if frozen else 2)
        if name in first:
            backward -= one
        # what stands last in a layer is computed again only for an adapter's sake
        tiled = setting.tile_tokens > 0 and name in ("gate_proj", "up_proj", "down_proj")
        recomputed = tiled or (again and not (name == "down_proj" and name not in adapters))
        products += layers * one * (2 if recomputed else 1) + backward
        if setting.lora is not None and name in adapters:
            small = 2.0 * t * setting.lora.rank
            low, high = small * wide_in, small * wide_out
            once_more = low + high * (name != "down_proj" or tiled)
            products += layers * ((low + high) * 3 + (again or tiled) * once_more)
            if name in first:
                products -= low
    pair = 4.0 * shape.q * row.pairs * layers
    # ranks that share a row compute the loss from gathered log-probs, and attention by kernels that add nothing atomically
    passes, factor = (max(passes, 8), 3.5) if setting.sp > 1 else (passes, 2.5)
    vocabulary = 2.0 * row.loss_rows * shape.head_parameters * (passes // 2 - (1 if frozen else 0))
    return Work(products, pair * (2 if again else 1), factor * pair, vocabulary)


def forward_work(shape: ModelShape, row: Row) -> Work:
    """Log-probs of one packed row without gradients."""
    return Work(
        2.0 * row.tokens * shape.layer_matrices * shape.layers,
        4.0 * shape.q * row.pairs * shape.layers,
        0.0,
        2.0 * row.loss_rows * shape.head_parameters,
    )


def rank_work(row: Row, work: Work, share: Share) -> Work:
    """Of one rank, what its share of the row is."""
    tokens, rows = share.tokens / row.tokens, share.loss_rows / max(1, row.loss_rows)
    return Work(
        work.products * tokens,
        work.attention_forward * share.pairs,
        work.attention_backward * share.pairs,
        work.vocabulary * rows,
    )


def compute_time(shape: ModelShape, setting: Setting, gpu: Gpu, row: Row, work: Work, crossings: float) -> Time:
    """Seconds of the busiest of the ranks that share `work`, with the buffers that cross memory beside it."""
    ranks = shares(shape, setting, row)
    return max(
        (_rank_time(shape, setting, gpu, share, rank_work(row, work, share), crossings) for share in ranks),
        key=lambda time: time.seconds,
    )


def _rank_time(shape: ModelShape, setting: Setting, gpu: Gpu, share: Share, work: Work, crossings: float) -> Time:
    how = replace(compute_of(setting, share.tokens), tile=0.0)  # in pieces as much crosses memory
    held = layer_bytes(shape, how, share.prompt_share).saved * share.tokens * shape.layers
    parts = {
        "matrix products": (work.products + work.vocabulary) / (gpu.flops * gpu.products),
        "attention": work.attention_forward / (gpu.flops * gpu.attention_forward)
        + work.attention_backward / (gpu.flops * gpu.attention_backward),
        "memory bandwidth": crossings * held / (gpu.bandwidth * gpu.memory_share),
    }
    seconds = sum(parts.values())
    if setting.offload_activations and setting.gradient_checkpointing:
        moved = 2 * how.residual * shape.hidden * share.tokens * shape.layers
        parts["host link"] = moved / (gpu.host_link * gpu.link_share)
        seconds = max(seconds, parts["host link"])
    return Time(seconds, max(parts, key=lambda part: parts[part]))


def update_time(shape: ModelShape, setting: Setting, gpu: Gpu, row: Row, passes: int = 6) -> Time:
    work = update_work(shape, setting, row, passes)
    crossings = CROSSINGS * (4 if setting.gradient_checkpointing else 3)
    time = compute_time(shape, setting, gpu, row, work, crossings)
    return Time(time.seconds, time.bound, _sharing(shape, setting, gpu, row, backward=True))


def forward_time(shape: ModelShape, setting: Setting, gpu: Gpu, row: Row) -> Time:
    time = compute_time(shape, setting, gpu, row, forward_work(shape, row), CROSSINGS)
    return Time(time.seconds, time.bound, _sharing(shape, setting, gpu, row, backward=False))


def _sharing(shape: ModelShape, setting: Setting, gpu: Gpu, row: Row, *, backward: bool) -> float:
    """Seconds that a rank sends for one row: weights and gradients, heads, keys and values."""
    return sum(
        sent / rate for sent, rate in (
            (sharded_bytes(shape, setting, backward), link_rate(gpu, setting.gpus)),
            (ulysses_bytes(shape, setting, row, backward), link_rate(gpu, setting.ulysses)),
            (ring_bytes(shape, setting, row, backward), link_rate(gpu, setting.sp if setting.ring > 1 else 1)),
        )
    )  # fmt: skip


def link_rate(gpu: Gpu, ranks: int) -> float:
    """Bytes/s of a rank among `ranks` neighbours: the node's links while they are within one, else its network."""
    return gpu.link_share * (gpu.link if ranks <= gpu.per_node else gpu.network)


def sharded_bytes(shape: ModelShape, setting: Setting, backward: bool) -> float:
    """Weights to where they are needed, and gradients of shares to where those are."""
    if not setting.sharded:
        return 0.0
    others, gathered = (setting.gpus - 1) / setting.gpus, gathered_bytes(shape, setting)
    reduced = setting.stored if setting.lora is None else WIDE
    sent = gathered.root + (2 if backward else 1) * shape.layers * gathered.layer  # embeddings and head stay gathered
    return others * (sent + (reduced * trained_parameters(shape, setting) if backward else 0))


def ulysses_bytes(shape: ModelShape, setting: Setting, row: Row, backward: bool) -> float:
    """q, k, v to heads and out back to tokens; keys are repeated where there are fewer heads than ranks."""
    if setting.ulysses == 1:
        return 0.0
    repeated = max(1.0, setting.ulysses / shape.key_heads)
    one = setting.computed * row.tokens / setting.sp * (2 * shape.q + 2 * shape.kv * repeated)
    times = (2 + setting.gradient_checkpointing) if backward else 1
    # copies of a key head have gradients that are added: in fp32
    wider = (WIDE - setting.computed) * row.tokens / setting.sp * 2 * shape.kv * repeated * (backward and repeated > 1)
    return shape.layers * (times * one + wider) * (setting.ulysses - 1) / setting.ulysses


def ring_bytes(shape: ModelShape, setting: Setting, row: Row, backward: bool) -> float:
    """Prompts' keys and values go round; backward they do again, with their fp32 gradients."""
    if setting.ring == 1:
        return 0.0
    keys, sums = passed(shape, setting.ring, row)
    rounds = (2 + setting.gradient_checkpointing) if backward else 1
    sent = setting.computed * rounds * keys + (WIDE * sums if backward else 0)
    return shape.layers * 2 * shape.kv / min(setting.ulysses, shape.key_heads) * sent


def prefill_time(shape: ModelShape, setting: Setting, gpu: Gpu, prompt: int) -> Time:
    """One prompt through the generator of one GPU."""
    alone = Setting(dtype=setting.dtype, autocast=setting.autocast)
    row = Row(1, prompt, 1, 1)
    return compute_time(shape, alone, gpu, row, forward_work(shape, row), CROSSINGS)


def decode_time(
    shape: ModelShape, setting: Setting, gpu: Gpu, prompt: int, prompts: int, size: int, tokens: int
) -> Time:
    """`tokens` steps of a batch of `prompts` groups of `size`: what a step reads, or its operators' launches.

    Keys and values of a prompt are read once for its group; a serving engine's GPUs read their shares side by side.
    """
    rate = gpu.bandwidth * gpu.memory_share * max(1, setting.serve)
    weights = setting.computed * (shape.parameters - shape.head_parameters * (not shape.tied))
    cached = cache_bytes(shape, setting.computed) * prompts * (prompt + size * tokens / 2)
    parts = {"weights read": weights / rate, "keys and values read": cached / rate}
    reading, launching = sum(parts.values()), LAUNCH_S * OPERATORS * shape.layers
    bound = max(parts, key=lambda part: parts[part]) if reading > launching else "launches"
    return Time(tokens * max(reading, launching), bound)


def sync_time(shape: ModelShape, setting: Setting, gpu: Gpu) -> Time:
    """Handing the generator new weights: nothing where it is the trainer's model itself, else one gather of all."""
    if not (setting.sharded or setting.serve):
        return Time(0.0, "shared weights")
    sent = setting.computed * shape.parameters
    return Time(sent / link_rate(gpu, setting.gpus), "links")
