"""The recipe's section [generator]: the policy's own model ("local"), or vLLM's servers ("vllm").

Servers are started here, on this host's loopback interface (`servers` of them), or run already (`urls`), wherever they are.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ...engine.generate import GeneratorConfig
from ..config import nearest
from .sync_config import SyncConfig

KINDS = ("local", "vllm")
VENV = ".venv-vllm"
"""What `make vllm` sets up, beside the environment that trains."""

_DTYPES = ("", "float32", "bfloat16", "float16")
_URL = re.compile(r"https?://[^/\s?#]+/?")
_PORTS = 1 << 16


@dataclass(frozen=True)
class ServingConfig(GeneratorConfig):
    """`batch_tokens` is the local generator's, all that follows the servers'.

    `urls`: servers that run already; none are started then. Else `servers` are, with the interpreter `python` (empty: that of
    `make vllm`), each on a free port (or `port`, `port` + 1, ...), on the GPUs that `devices` has for it (one entry a server,
    such as "0,1"; empty: all), with `args` behind our own arguments and with the variables of [generator.environment].
    `dtype` empty is what the trainer computes in. `max_model_len` 0 is what the recipe's longest prompt with its completion
    takes. `eager` runs without compiled graphs (left out: where there is no GPU). `cache_gib` of keys and values (0: without
    a GPU two prompts of that length or one GiB, else vLLM's own share of the GPU's memory). `seeded` gives each prompt its
    random stream, so that the same call has the same completions where the same numbers come out of the model (left out:
    where there is a GPU; without one, vLLM 0.32 dies of a seed as soon as a prompt is computed in chunks, so then they
    are not).

    At most `concurrency` groups are under way at a server. A group that isn't there `deadline_s` seconds after it was
    asked for, or not as it was ordered, is queued again, in all for `tries` tries. A server must answer within
    `start_timeout_s` of its start, and one of our own that dies is started again, `restarts` times in a run.

    [generator.sync] is how new weights get there (`SyncConfig`).
    """

    kind: str = "local"
    urls: tuple[str, ...] = ()
    servers: int = 1
    python: str = ""
    port: int = 0
    devices: tuple[str, ...] = ()
    dtype: str = ""
    max_model_len: int = 0
    eager: bool | None = None
    cache_gib: float = 0.0
    seeded: bool | None = None
    args: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    concurrency: int = 64
    deadline_s: float = 3600.0
    tries: int = 3
    start_timeout_s: float = 900.0
    restarts: int = 3
    sync: SyncConfig = field(default_factory=SyncConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"generator.kind {self.kind!r} is not known: {nearest(self.kind, KINDS)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"generator.dtype {self.dtype!r} is not known: {nearest(self.dtype, _DTYPES[1:])}")
        for url in self.urls:
            if not _URL.fullmatch(url):
                raise ValueError(f"generator.urls: {url!r} is no server's address: write http://HOST:PORT")
        self._check_numbers()
        self._check_servers()

    def _check_numbers(self) -> None:
        for name in ("servers", "concurrency", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"generator.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_model_len", "cache_gib", "restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"generator.{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("deadline_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"generator.{name} must be a positive number of seconds, not {getattr(self, name)}")
        if not 0 <= self.port <= _PORTS - self.servers:
            raise ValueError(
                f"generator.port must be 0 (free ones) or a port with {self.servers - 1} above it, not {self.port}"
            )

    def _check_servers(self) -> None:
        started = ("python", "port", "devices", "args", "environment", "eager", "cache_gib", "max_model_len", "dtype")
        given = [name for name in started if getattr(self, name) not in ("", 0, (), {}, None)]
        if self.urls and given:
            raise ValueError(
                f"generator.{given[0]} is for servers that are started, but generator.urls names running ones: leave one out"
            )
        if len(set(self.urls)) < len(self.urls):
            raise ValueError(f"generator.urls names a server twice: {', '.join(self.urls)}")
        if self.devices and len(self.devices) != self.servers:
            raise ValueError(
                f"generator.devices has {len(self.devices)} entries for {self.servers} servers: give each its own"
            )
        for name in self.environment:
            if not name.isidentifier():
                raise ValueError(f"generator.environment: {name!r} is no name of a variable")

    def interpreter(self) -> Path:
        """Of vLLM's own environment.

        Raises:
            ValueError: it isn't there.
        """
        found = Path(self.python) if self.python else Path(sys.prefix).parent / VENV / "bin" / "python"
        if not found.is_file():
            way = "name vLLM's interpreter there" if self.python else "run make vllm, or set generator.python"
            raise ValueError(f"generator.python: there is no {found}, which would run vLLM: {way}")
        return found
