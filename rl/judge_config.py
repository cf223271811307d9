"""The recipe's `[reward.judge]`: where the judge is, how hard it is asked, and when training stops waiting for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..engine.model import DTYPES

# Keys that only a server has a use for, and keys that only a model in this process has.
_SERVER = (
    "model", "api_key_env", "concurrency", "requests_per_minute", "tokens_per_minute", "timeout", "deadline", "retries",
    "backoff", "breaker_failures", "breaker_pause",
)  # fmt: skip
_LOCAL = ("device", "dtype", "batch_tokens")


@dataclass(frozen=True)
class JudgeConfig:
    """Either `base_url` (an OpenAI-compatible server that serves `model`) or `model_dir` (a transformers model run here).

    api_key_env names the environment variable that holds the key (None: no key). At most `concurrency` requests are under
    way at once, and no minute sees more than `requests_per_minute` or `tokens_per_minute` (0: no limit of ours).
    timeout: seconds for one request. retries: further tries after the first, for 429, 5xx, timeouts and broken
    connections; backoff: first wait in seconds, doubled each time, with jitter. deadline: seconds for one answer, tries
    and their waits together (our own rate limits don't count). breaker_failures in a row and nobody asks for
    breaker_pause seconds, then one request tries; an outage longer than `deadline` costs verdicts, a shorter one only time.

    max_wait: seconds that training waits for verdicts once generation has ended. max_failure_share: above it, among the
    last 100 answers asked for, the run stops. audit: share of the answers which the rule accepts that are judged all the
    same; their reward stays 1, but a gamed rule shows. tail: characters that the judge sees of a completion which
    announces no answer (0: such a completion is not judged). cache: a JSONL file of verdicts (None: in the run folder).

    device, dtype and batch_tokens are of the model in `model_dir`.
    """

    base_url: str = ""
    model: str = ""
    model_dir: str = ""
    api_key_env: str | None = None
    concurrency: int = 32
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    timeout: float = 60.0
    deadline: float = 300.0
    retries: int = 4
    backoff: float = 0.5
    breaker_failures: int = 20
    breaker_pause: float = 10.0
    max_tokens: int = 1024
    max_wait: float = 1800.0
    max_failure_share: float = 0.2
    audit: float = 0.05
    tail: int = 0
    cache: str | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    batch_tokens: int = 1 << 16

    def __post_init__(self) -> None:
        self._check_place()
        lowest = {
            "concurrency": 1, "requests_per_minute": 0, "tokens_per_minute": 0, "retries": 0, "backoff": 0, "max_tokens": 1,
            "breaker_failures": 1, "max_wait": 0, "audit": 0, "tail": 0, "batch_tokens": 1,
        }  # fmt: skip
        for name, least in lowest.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"judge {name} is {getattr(self, name)}, must be at least {least}")
        for name in ("timeout", "deadline", "breaker_pause"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"judge {name} is {getattr(self, name)}, must be above 0 seconds")
        if not 0 < self.max_failure_share <= 1 or self.audit > 1:
            raise ValueError(
                f"judge max_failure_share {self.max_failure_share} must lie in (0, 1] and audit {self.audit} in [0, 1]"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"judge dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")

    def _check_place(self) -> None:
        if bool(self.base_url) == bool(self.model_dir):
            raise ValueError(
                f"judge base_url {self.base_url!r} and model_dir {self.model_dir!r}: give one, a server's URL such as "
                "http://127.0.0.1:8000/v1 or the folder of a transformers model"
            )
        unused = _SERVER if self.model_dir else _LOCAL
        changed = [field.name for field in fields(self) if field.name in unused and self._differs(field.name)]
        if changed:
            other = "model_dir" if self.model_dir else "base_url"
            raise ValueError(f"judge {', '.join(changed)} would do nothing with {other}: leave it out")
        if self.model_dir:
            return
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"judge base_url {self.base_url!r} is no URL; give one such as http://127.0.0.1:8000/v1")
        if not self.model:
            raise ValueError("judge model is empty; name the model that the server at base_url serves")

    def _differs(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default
