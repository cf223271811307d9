"""GPUs that a plan can be made for: memory, speeds and links, and what share of them work reaches.

Peaks are the vendors' (NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, GeForce RTX 4090; bf16 without
sparsity, links in one direction). Shares are assumptions with a source, none of them measured by this project:

* products: 770 to 798 TFLOP/s were measured for large bf16 products on one H200 (0.78 of the peak); 0.7 is for shapes of
  a real layer. The same share is assumed for the others.
* attention: FlashAttention-2's, since that is what `auto` takes on an unmeasured GPU: 366 forward and 330 backward on an
  H100 at 32K tokens, causal, E = 128 (published chart of the MagiAttention benchmark); on an A100 its paper's 0.6 and 0.5.
* memory: 0.8 of the peak bandwidth, links: 0.8 of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

GB = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """One GPU and its place in a node. Bytes, bytes/s in one direction, FLOP/s."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    """To another GPU of the node."""
    network: float
    """A GPU's share of the node's network."""
    host_link: float
    """To the host's memory."""
    host_memory: float
    """A GPU's share of it."""
    capability: tuple[int, int] = (9, 0)
    per_node: int = 8
    products: float = 0.7
    attention_forward: float = 0.37
    attention_backward: float = 0.33
    memory_share: float = 0.8
    link_share: float = 0.8
    files: float = 2 * GB
    """Bytes/s to and from a folder that all nodes see: an assumption, for disks differ a hundredfold."""
    reserve: float = 0.06
    """Share of the memory that CUDA's context, NCCL and fragmentation take."""

    @property
    def usable(self) -> float:
        return self.memory * (1 - self.reserve)


# 80 GB and 141 GB are what the cards report as total memory, within a percent
GPUS: dict[str, Gpu] = {
    "h100-80": Gpu("h100-80", 80 * GB, 989 * TERA, 3350 * GB, 450 * GB, 50 * GB, 55 * GB, 250 * GB),
    "h200": Gpu("h200", 141 * GB, 989 * TERA, 4800 * GB, 450 * GB, 50 * GB, 55 * GB, 250 * GB),
    "a100-80": Gpu(
        "a100-80", 80 * GB, 312 * TERA, 2039 * GB, 300 * GB, 25 * GB, 25 * GB, 128 * GB, (8, 0),
        attention_forward=0.6, attention_backward=0.5,
    ),
    "rtx-4090": Gpu(
        "rtx-4090", 24 * GB, 165 * TERA, 1008 * GB, 25 * GB, 3 * GB, 25 * GB, 64 * GB, (8, 9),
        attention_forward=0.6, attention_backward=0.5,
    ),
}  # fmt: skip


def gpu_named(
    name: str,
    *,
    memory_gb: float | None = None,
    tflops: float | None = None,
    bandwidth_gbs: float | None = None,
    link_gbs: float | None = None,
) -> Gpu:
    """A GPU of the table, or "custom": an H100 with the given numbers in place of its own, of which memory is needed.

    Raises:
        ValueError: an unknown name, numbers for a known GPU, or "custom" without its memory.
    """
    given = {"memory": memory_gb, "flops": tflops, "bandwidth": bandwidth_gbs, "link": link_gbs}
    if name != "custom":
        if name not in GPUS:
            near = get_close_matches(name, [*GPUS, "custom"], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(GPUS)}, custom"
            raise ValueError(f"--gpu {name!r} is not known: {hint}")
        if any(value is not None for value in given.values()):
            raise ValueError(f"--gpu {name} has its own numbers: give --gpu custom to set them")
        return GPUS[name]
    if memory_gb is None:
        raise ValueError("--gpu custom needs --gpu-memory-gb")
    wrong = [value for value in given.values() if value is not None and not value > 0]
    if wrong:
        raise ValueError(f"a custom GPU's numbers must be positive, not {wrong[0]}")
    units = {"memory": GB, "flops": TERA, "bandwidth": GB, "link": GB}
    numbers = {key: value * units[key] for key, value in given.items() if value is not None}
    return replace(GPUS["h100-80"], name="custom", **numbers)
