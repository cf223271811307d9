"""How weights go from the trainer to its servers, and what a server must be started with for that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("auto", "safetensors", "lora", "nccl", "ipc")
PAUSES = ("wait", "keep", "abort")


@dataclass(frozen=True)
class SyncConfig:
    """`kind`: through files that both sides see ("safetensors"), as adapters ("lora"), between GPUs ("nccl"), within one ("ipc");
    "auto" takes what model and server are set up for.

    `folder` is where hand-overs go ("": in the run folder); the newest `keep` stay. `pause`: what becomes of requests that a
    push finds running: "wait" lets them end with the old weights, "keep" goes on with the new ones (their completions then
    have tokens of both versions, and the server's version spans say which), "abort" ends them. `sleep` is for a server that
    shares its GPU with the trainer: 1 keeps its weights in the host's memory meanwhile, 2 drops them, 0 is no sharing.
    `deadline` bounds every wait, in seconds.

    `probe` compares log-probs after each push: `probe_limit` nats may equal weights differ by on average, and later pushes by
    `probe_multiple` times what the first one did. Weights of up to `checksum_gb` are summed by the server before and after.
    `take_over` pushes to a server that another run has marked. `buffer_mb`: of the weights on their way at once ("nccl", "ipc").
    """

    kind: str = "auto"
    folder: str = ""
    keep: int = 2
    pause: str = "wait"
    sleep: int = 0
    deadline: float = 600.0
    probe: bool = True
    probe_limit: float = 0.25
    probe_multiple: float = 3.0
    checksum_gb: float = 2.0
    take_over: bool = False
    buffer_mb: int = 256

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("pause", PAUSES), ("sleep", (0, 1, 2))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"generator.sync.{name} is {getattr(self, name)!r}: it must be one of {', '.join(map(str, known))}"
                )
        if self.keep < 1:
            raise ValueError(f"generator.sync.keep is {self.keep}: the hand-over that a server reads must stay")
        for name, least in (("deadline", 0.0), ("probe_limit", 0.0), ("probe_multiple", 1.0)):
            if not least < getattr(self, name) < math.inf:
                raise ValueError(f"generator.sync.{name} must be above {least:g}, not {getattr(self, name)}")
        if self.buffer_mb < 1:
            raise ValueError(f"generator.sync.buffer_mb must be at least 1, not {self.buffer_mb}")
        if self.checksum_gb < 0:
            raise ValueError(f"generator.sync.checksum_gb must be 0 (never) or a size, not {self.checksum_gb}")
        if self.sleep and self.pause == "keep":
            raise ValueError(
                'generator.sync.sleep gives up the cache that requests kept running (pause = "keep") need: choose "wait"'
            )
        if self.sleep == 2 and self.kind == "lora":
            raise ValueError(
                "generator.sync.sleep = 2 drops the server's weights, and an adapter doesn't bring them back: use sleep = 1"
            )


@dataclass(frozen=True)
class Needs:
    """Arguments and environment that a server is started with for its weights to be pushed."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def server_needs(config: SyncConfig, lora_rank: int = 0) -> Needs:
    """Of a kind; "auto" is files, or adapters where the model has some (`lora_rank` above 0)."""
    arguments: list[str] = []
    environment = {"VLLM_SERVER_DEV_MODE": "1"}  # the routes for weights are open only then
    kind = config.kind
    if kind == "lora" or (kind == "auto" and lora_rank):
        arguments += ["--enable-lora", "--max-lora-rank", str(_served_rank(lora_rank))]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if kind in ("nccl", "ipc"):
        arguments += ["--weight-transfer-config", json.dumps({"backend": kind})]
    if kind == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles come pickled: only from this host, on loopback
    if config.sleep:
        arguments.append("--enable-sleep-mode")
    return Needs(tuple(arguments), environment)


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""


def _served_rank(rank: int) -> int:
    fitting = [served for served in _RANKS if served >= rank]
    if not fitting:
        raise ValueError(
            f"lora.rank is {rank}, and vLLM serves adapters up to {_RANKS[-1]}: lower it, or sync merged weights"
        )
    return fitting[0]
