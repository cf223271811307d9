"""A language model as judge: are two answers to one question the same?

`make_judge` gives the one that a recipe asks for: behind an OpenAI-compatible server (`judge_http.py`) or a model run in
this process (`judge_local.py`); both read the same prompt (`judge_prompt.py`) and fill the same cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from .judge_base import Judge, JudgeFailing
from .judge_cache import VerdictCache
from .judge_config import JudgeConfig
from .judge_http import OpenAIClient, OpenAIJudge
from .judge_local import LocalClient, LocalJudge
from .judge_prompt import Case, parse_verdict
from .judge_task import C, Task, V

__all__ = [
    "Case", "Judge", "JudgeConfig", "JudgeFailing", "LocalJudge", "OpenAIJudge", "make_client", "make_judge", "parse_verdict",
]  # fmt: skip


def make_judge(
    config: JudgeConfig,
    environ: Mapping[str, str],
    home: Path | None = None,
    warn: Callable[[str], object] = warnings.warn,
) -> Judge:
    """The judge that a config describes; the one place where its API key is read.

    `home` is the run folder, where verdicts are kept if `config.cache` names no other file.
    Raises ValueError if api_key_env names a variable that is not set, or the cache or the model can't be read.
    """
    key = _api_key(config, environ)
    path = Path(config.cache) if config.cache else home and home / "verdicts.jsonl"
    cache = VerdictCache[float](path, warn)
    return LocalJudge(config, cache) if config.model_dir else OpenAIJudge(config, cache, key)


def make_client(
    config: JudgeConfig, environ: Mapping[str, str], task: Task[C, V], cache: VerdictCache[V]
) -> OpenAIClient[C, V] | LocalClient[C, V]:
    """The same judge with another task. Raises what `make_judge` raises."""
    key = _api_key(config, environ)
    return LocalClient(config, cache, task) if config.model_dir else OpenAIClient(config, cache, task, key)


def _api_key(config: JudgeConfig, environ: Mapping[str, str]) -> str | None:
    if config.api_key_env is None:
        return None
    key = environ.get(config.api_key_env)
    if not key:
        raise ValueError(f"environment variable {config.api_key_env} (judge api_key_env) is not set; export it")
    return key
