"""What `longreach eval --model` can be told. The defaults are the published conditions (QwenLong-L1, arXiv 2505.17667, 3.3).

120,000 tokens of prompt with the middle cut out where it is longer, 10,000 of answer, temperature 0.7, top_p 0.95, one
sample. What differs from them is named beside the published table (`published_table.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...engine import Sampling
from ...engine.generate import GeneratorConfig
from ...engine.model import DTYPES
from ...engine.rope import RopeScaling
from ..judge_config import JudgeConfig
from ..rules import check_scoring
from ..statistics import bucket_of

STYLES = ("auto", "completions", "chat")
_OF_TRAINING = ("audit", "max_wait", "max_failure_share")
LIMIT_KEYS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class ServerConfig:
    """How an OpenAI-compatible server is asked. Seconds where it is about time.

    api_key_env: the environment variable that holds the key (None: no key). concurrency, requests_per_minute,
    tokens_per_minute (0: no limit), timeout (one request), deadline (one answer, its tries and waits together), retries,
    backoff, breaker_failures and breaker_pause are as the judge has them; a server that stays down for `outage` ends the
    evaluation, which the same command takes up again.

    style: `completions` sends token ids to /completions (vLLM takes them), `chat` sends text to /chat/completions, `auto`
    asks the server once. limit_key is what the server calls the longest answer; send_seed false is for a server
    that refuses a seed. vllm_fields: with `completions` top_k, min_p and repetition_penalty are sent too, since vLLM else takes
    them from the model's generation_config.json without a word (Qwen3's says top_k 20).
    """

    api_key_env: str | None = None
    concurrency: int = 32
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    timeout: float = 3600.0
    deadline: float = 7200.0
    outage: float = 600.0
    retries: int = 4
    backoff: float = 1.0
    breaker_failures: int = 20
    breaker_pause: float = 10.0
    style: str = "auto"
    limit_key: str = "max_tokens"
    send_seed: bool = True
    vllm_fields: bool = True

    def __post_init__(self) -> None:
        lowest = {
            "concurrency": 1, "requests_per_minute": 0, "tokens_per_minute": 0, "retries": 0, "backoff": 0,
            "breaker_failures": 1, "outage": 0,
        }  # fmt: skip
        for name, least in lowest.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"server.{name} is {getattr(self, name)}, must be at least {least}")
        for name in ("timeout", "deadline", "breaker_pause"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"server.{name} is {getattr(self, name)}, must be above 0 seconds")
        for name, known in (("style", STYLES), ("limit_key", LIMIT_KEYS)):
            if getattr(self, name) not in known:
                raise ValueError(f"server.{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}")


@dataclass(frozen=True)
class LocalConfig:
    """How a model directory is run in this process: `ModelConfig`'s keys, and how much is generated together.

    batch_tokens 0: as much as one question with its samples needs at the limits, and GeneratorConfig's own at least.
    """

    dtype: str = "bfloat16"
    device: str = "auto"
    yarn: float | None = None
    rope_scaling: RopeScaling | None = None
    trust_remote_code: bool = False
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"local.dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")
        if self.batch_tokens < 0:
            raise ValueError(
                f"local.batch_tokens is {self.batch_tokens}: it must be 0 (as needed) or a number of tokens"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """One evaluation. `model`: a directory (or shipped:NAME) that is run here, or the URL of a server.

    benchmarks: names, or `all`, or `seven`. data: a file for each benchmark that isn't to come from the hub. limit: the first
    so many questions of each. tokenizer: a directory or hub name; a URL needs one, a directory has its own. served_name:
    what the server calls the model (where it serves one alone, that one).

    scoring: the rule; `rules` are set beside it. Without a `judge` the score is the rule's alone. buckets: upper bounds in
    tokens. resamples: of the bootstrap.
    """

    model: str
    benchmarks: str = "all"
    data: dict[str, str] = field(default_factory=dict)
    limit: int | None = None
    skip_bad_rows: bool = False
    samples: int = 1
    max_input: int = 120_000
    max_output: int = 10_000
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    seed: int = 0
    tokenizer: str = ""
    served_name: str = ""
    scoring: str = "strict"
    rules: tuple[str, ...] = ("strict", "qwenlong-l1", "qwenlong-l1-eval", "longbench", "longbench-em")
    judge: JudgeConfig | None = None
    buckets: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    resamples: int = 10_000
    server: ServerConfig = field(default_factory=ServerConfig)
    local: LocalConfig = field(default_factory=LocalConfig)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise ValueError(
                "model is empty: give a model's directory, or a server's URL such as http://127.0.0.1:8000/v1"
            )
        for scoring in (self.scoring, *self.rules):
            check_scoring(scoring)
        for name in ("samples", "max_input", "max_output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}, must be at least 1 question of each benchmark")
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}: an interval of 95 % needs 100 at least")
        if self.temperature == 0.0 and self.samples > 1:
            raise ValueError(
                f"samples = {self.samples} greedy answers are all alike: set temperature above 0, or samples = 1"
            )
        bucket_of(1, self.buckets)  # refuses bounds that don't rise
        self.sampling()
        self._check_place()
        for name in _OF_TRAINING if self.judge else ():
            if getattr(self.judge, name) != getattr(JudgeConfig, name):
                raise ValueError(
                    f"judge.{name} would do nothing here: every answer is judged and every verdict waited for (judge.deadline bounds each)"
                )

    def _check_place(self) -> None:
        if not self.is_served:
            if self.server != ServerConfig() or self.served_name:
                raise ValueError(
                    f"model {self.model!r} is no URL, so that served_name and server.* would do nothing: leave them out, or "
                    "give a URL such as http://127.0.0.1:8000/v1"
                )
            return
        if self.local != LocalConfig():
            raise ValueError(f"model {self.model!r} is a URL, so that local.* would do nothing: leave it out")
        if not self.tokenizer:
            raise ValueError(
                f"model {self.model!r} is a URL: lengths and the cut in the middle are in the model's own tokens, so give its "
                "tokenizer (--tokenizer DIR, a model's directory or hub name)"
            )
        if self.top_k and self.server.style == "chat":
            raise ValueError("top_k is no field of chat completions: leave it out, or set server.style = completions")

    @property
    def is_served(self) -> bool:
        return self.model.startswith(("http://", "https://"))

    def sampling(self) -> Sampling:
        return Sampling(self.max_output, self.temperature, self.top_p, self.top_k)

    def generator(self) -> GeneratorConfig:
        """Room for one question at the limits, so that none is refused for its length."""
        need = self.max_input + self.samples * self.max_output
        return GeneratorConfig(self.local.batch_tokens or max(need, GeneratorConfig.batch_tokens))
