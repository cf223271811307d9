"""How training is laid out, in the words of a recipe's keys: what a plan is a plan of."""

from __future__ import annotations

from dataclasses import dataclass

from .model import LoraConfig
from .planner_layer import WIDE
from .planner_shape import ModelShape


@dataclass(frozen=True)
class Servers:
    """`count` serving engines that generate, each over `replicas` copies of the model of `tensor` GPUs.

    `apart` from the trainer's GPUs, else on them, where `sleep` gives up a server's memory while training runs. `cache`: bytes of
    keys and values on each GPU; 0: what `utilization` of the GPU leaves. A server has at most `concurrency` groups under way, of
    sequences of up to `window` tokens (0: as long as a load's). `sync` is the way of new weights: "safetensors", "lora", "nccl"
    or "ipc". `staleness` above 0: they generate the next step while this one trains.
    """

    count: int = 1
    tensor: int = 1
    replicas: int = 1
    apart: bool = True
    dtype: str = "bfloat16"
    utilization: float = 0.9
    cache: float = 0.0
    concurrency: int = 64
    window: int = 0
    sync: str = "safetensors"
    sleep: int = 0
    staleness: int = 0

    @property
    def gpus(self) -> int:
        """Of all servers."""
        return self.count * self.replicas * self.tensor

    @property
    def size(self) -> int:
        """Bytes of a weight, and of an entry of the cache."""
        return WIDE if self.dtype == "float32" else 2

    @property
    def overlaps(self) -> bool:
        """Whether generation takes nothing from training, which runs meanwhile."""
        return self.apart and self.staleness > 0


@dataclass(frozen=True)
class Setting:
    """How training is laid out, in the words of a recipe's keys; `gpus` are all of its ranks."""

    gpus: int = 1
    ring: int = 1
    ulysses: int = 1
    schedule: str = "auto"
    """How keys and values reach a ring's ranks; "auto" may turn out to be any."""
    shard: bool = True
    dtype: str = "float32"
    autocast: bool = False
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    tile_tokens: int = 0
    liger: bool = False
    optimizer: str = "adamw"
    serve: int = 0
    """GPUs that a serving engine spreads the generator over; 0: the trainer's own model generates, whole on each GPU."""
    reference: bool = False
    """A frozen model beside the trained one, for a KL term."""
    servers: Servers | None = None
    """Who generates in the trainer's place."""

    @property
    def all_gpus(self) -> int:
        """The trainer's, and those that its servers have for themselves."""
        return self.gpus + (self.servers.gpus if self.servers and self.servers.apart else 0)

    @property
    def sp(self) -> int:
        return self.ring * self.ulysses

    @property
    def data(self) -> int:
        return self.gpus // self.sp

    @property
    def sharded(self) -> bool:
        return self.shard and self.gpus > 1

    @property
    def shards(self) -> int:
        return self.gpus if self.sharded else 1

    @property
    def stored(self) -> int:
        """Bytes of a base weight as it is kept."""
        return WIDE if self.dtype == "float32" else 2

    @property
    def computed(self) -> int:
        """Bytes of an activation that meets a matrix."""
        return 2 if self.autocast or self.dtype != "float32" else WIDE

    @property
    def residual(self) -> int:
        """Bytes of an entry of the residual stream."""
        return WIDE if self.autocast else self.computed


def trained_parameters(shape: ModelShape, setting: Setting) -> int:
    return shape.parameters if setting.lora is None else shape.adapter_parameters(setting.lora)
