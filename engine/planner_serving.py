"""Serving engines that generate in the trainer's place: memory and time of one, and how new weights get there.

    weights      a copy over `tensor` GPUs, in the server's dtype; `replicas` copies side by side
    cache        keys and values of the groups that it has at once: P + G R tokens each, the prompt's once; on each GPU a share of the
                 key heads, of which there is at least one
    generation   its share of the prompts: each prefilled once, then batch after batch decoded, over `tensor` GPUs; paged attention
                 knows no groups, so each completion reads its prompt's keys and values for itself
    new weights  through files: written once, read by all servers side by side; through links: gathered and sent

A group that doesn't fit as a whole is sampled in parts. It gives up what servers do better (a batch is filled up while others still
decode) and worse (tensor parallelism's own communication). Held against nothing yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .planner_hardware import Gpu
from .planner_layer import WIDE, layer_bytes
from .planner_memory import Memory, Servers, Setting, cache_bytes, compute_of, state_parts
from .planner_shape import ModelShape
from .planner_time import Time, decode_time, link_rate, prefill_time

if TYPE_CHECKING:
    from .planner import Load

PASSING_TOKENS = 8192
"""Of prompts in one forward of a server."""
SAMPLED_SEQUENCES = 256
"""Whose scores a server has at once, at most: vLLM's --max-num-seqs."""
SCORES = 3
"""fp32 buffers of [sequences, V] while they are sampled from."""


@dataclass(frozen=True)
class Batching:
    """What one copy of the model decodes at once: `groups` whole ones, or of one group `size` completions (`groups` 1)."""

    groups: int
    size: int
    batches: int
    """Until its share of the prompts is done."""


def engine_of(servers: Servers) -> Setting:
    """One copy of the model, in the words of the other formulas."""
    return Setting(dtype=servers.dtype, serve=servers.tensor)


def token_bytes(shape: ModelShape, servers: Servers) -> float:
    """Keys and values of one token on one GPU: heads are shared out, and repeated where there are fewer than GPUs."""
    return cache_bytes(shape, servers.size) / min(servers.tensor, shape.key_heads)


def fixed_parts(shape: ModelShape, servers: Servers, load: Load) -> dict[str, float]:
    """On one GPU of a server, whatever it caches."""
    passing = layer_bytes(shape, compute_of(engine_of(servers), PASSING_TOKENS), 1.0).forward * PASSING_TOKENS
    sampled = min(SAMPLED_SEQUENCES, servers.concurrency * load.size)
    scores = float(SCORES * WIDE * sampled * shape.vocab)
    return {
        "generator weights": servers.size * shape.parameters / servers.tensor,
        "peak in a layer": max(passing / servers.tensor, scores),
    }


def cache_room(shape: ModelShape, servers: Servers, gpu: Gpu, load: Load) -> float:
    """Bytes of one GPU for keys and values."""
    return servers.cache or servers.utilization * gpu.memory - sum(fixed_parts(shape, servers, load).values())


def share_of(servers: Servers, load: Load) -> int:
    """Prompts of one copy of the model in a step."""
    return -(-load.prompts // (servers.count * servers.replicas))


def batching(shape: ModelShape, servers: Servers, gpu: Gpu, load: Load) -> Batching:
    """What fits at once; at least one completion, whether or not it does (`server_problems` says)."""
    room, token, share = cache_room(shape, servers, gpu, load), token_bytes(shape, servers), share_of(servers, load)
    fitting = int(room // (token * (load.prompt + load.size * load.completion)))
    if fitting >= 1:
        groups = min(fitting, share, max(1, servers.concurrency // servers.replicas))
        return Batching(groups, load.size, -(-share // groups))
    size = max(1, int((room / token - load.prompt) // load.completion))
    return Batching(1, size, share * -(-load.size // size))


def server_memory(shape: ModelShape, setting: Setting, servers: Servers, gpu: Gpu, load: Load) -> Memory:
    """One GPU with a server, and with what the trainer keeps on it meanwhile."""
    at_once = batching(shape, servers, gpu, load)
    tokens = at_once.groups * (load.prompt + at_once.size * load.completion)
    kept = {} if servers.apart else {**state_parts(shape, setting), "gradients": 0.0}
    parts = {
        **kept,
        **fixed_parts(shape, servers, load),
        "generator keys and values": token_bytes(shape, servers) * tokens if servers.apart else held_cache(shape, servers, gpu, load),
    }  # fmt: skip
    return Memory(parts, "generation", {"generation": sum(parts.values())})


def held_cache(shape: ModelShape, servers: Servers, gpu: Gpu, load: Load) -> float:
    """What a server has claimed, whether or not it needs it."""
    return max(0.0, cache_room(shape, servers, gpu, load))


def beside_training(shape: ModelShape, servers: Servers, gpu: Gpu, memory: Memory, load: Load) -> Memory:
    """The trainer's peak on a GPU whose server stays awake."""
    if servers.apart or servers.sleep:
        return memory
    held = {
        "generator weights": fixed_parts(shape, servers, load)["generator weights"],
        "generator keys and values": held_cache(shape, servers, gpu, load),
    }
    more = sum(held.values())
    moments = {name: size + more for name, size in memory.moments.items()}
    return Memory({**memory.parts, **held}, memory.moment, moments, memory.host)


def server_problems(shape: ModelShape, setting: Setting, servers: Servers, gpu: Gpu, load: Load) -> list[str]:
    """Why these servers can't be, or can't hold a step's sequences."""
    found = []
    if shape.heads % servers.tensor:
        found.append(f"a server over {servers.tensor} GPUs can't share out {shape.heads} query heads")
    if not servers.apart and servers.gpus > setting.gpus:
        found.append(f"servers on the trainer's GPUs take {servers.gpus} of {setting.gpus}")
    longest = servers.window or load.prompt + load.completion
    if longest < load.prompt + load.completion:
        found.append(
            f"a server takes sequences of {longest:,} tokens, and a prompt with its completion has {load.prompt + load.completion:,}"
        )
    need, room = token_bytes(shape, servers) * longest, cache_room(shape, servers, gpu, load)
    if need > room:
        weights = fixed_parts(shape, servers, load)["generator weights"]
        found.append(
            f"a server's GPU has {max(room, 0.0) / 1e9:.1f} GB for keys and values beside {weights / 1e9:.1f} GB of weights, and one "
            f"sequence of {longest:,} tokens takes {need / 1e9:.1f}: spread it over more GPUs (--tensor-parallel-size)"
        )
    return found


def serving_time(shape: ModelShape, servers: Servers, gpu: Gpu, load: Load) -> Time:
    """Of one copy of the model, all of which work side by side."""
    engine, at_once = engine_of(servers), batching(shape, servers, gpu, load)
    prefill = prefill_time(shape, engine, gpu, load.prompt).seconds * share_of(servers, load) / servers.tensor
    rows = at_once.groups * at_once.size
    decoding = decode_time(shape, engine, gpu, load.prompt, rows, 1, load.completion)
    decode = decoding.seconds * at_once.batches
    return Time(prefill + decode, f"prefill: {prefill / (prefill + decode):.0%}, else {decoding.bound}")


def weights_time(shape: ModelShape, setting: Setting, servers: Servers, gpu: Gpu) -> Time:
    """From the trainer's GPUs to all servers."""
    whole = float(servers.size * shape.parameters)
    gathered = whole / link_rate(gpu, setting.gpus) if setting.sharded else 0.0
    woken = 2 * whole / servers.tensor / (gpu.host_link * gpu.link_share) if servers.sleep == 1 else 0.0
    if servers.sync == "lora" and setting.lora is not None:
        return Time(2 * WIDE * shape.adapter_parameters(setting.lora) / gpu.files + woken, "files, of adapters")
    if servers.sync == "nccl":
        return Time(gathered + whole / link_rate(gpu, setting.all_gpus) + woken, "links")
    if servers.sync == "ipc":
        return Time(gathered + 2 * whole / (gpu.bandwidth * gpu.memory_share) + woken, "memory bandwidth")
    return Time(gathered + 2 * whole / gpu.files + woken, "files")
