"""No dead options: each key of `[reward.judge]` is changed here and must change something."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.rl import judge_local
from longreach.rl.data import Example
from longreach.rl.judge import JudgeConfig, JudgeFailing, LocalJudge
from longreach.rl.rewards import RewardConfig, make_reward

PLAIN = Example("q", "b", ("Paris",), context="c", question="Where?")
# One that the rule accepts, one that announces nothing, and some to judge.
TEXTS = ["the answer is Paris.", "Lutetia it is", *(f"the answer is city {i}." for i in range(6))]
Options = dict[str, Any]

WELL, DOWN, SLOW, HALF = "well", "down", "slow", "half"
ONCE = {"retries": 0, "breaker_failures": 1000}
# key: (how the server is, what is set on both sides, what is set on one side only)
ROWS: dict[str, tuple[str, Options, Options]] = {
    "base_url": (WELL, {}, {"base_url": "/other"}),
    "model": (WELL, {}, {"model": "large"}),
    "api_key_env": (WELL, {}, {"api_key_env": "KEY"}),
    "concurrency": (SLOW, {}, {"concurrency": 1}),
    "requests_per_minute": (WELL, {}, {"requests_per_minute": 3}),
    "tokens_per_minute": (WELL, {}, {"tokens_per_minute": 3000}),
    "timeout": (SLOW, ONCE, {"timeout": 0.02}),
    "deadline": (DOWN, {"retries": 500, "backoff": 0.02, "deadline": 0.1}, {"deadline": 0.6}),
    "retries": (DOWN, ONCE, {"retries": 2}),
    "backoff": (DOWN, {**ONCE, "retries": 1}, {"backoff": 0.3}),
    "breaker_failures": (DOWN, ONCE, {"breaker_failures": 2}),
    "breaker_pause": (DOWN, {"breaker_failures": 1, "retries": 5, "deadline": 0.4, "breaker_pause": 0.01}, {"breaker_pause": 9.0}),
    "max_tokens": (WELL, {}, {"max_tokens": 7}),
    "max_wait": (SLOW, ONCE, {"max_wait": 0.05}),
    "max_failure_share": (HALF, {**ONCE, "max_failure_share": 0.9}, {"max_failure_share": 0.05}),
    "audit": (WELL, {"audit": 0.0}, {"audit": 1.0}),
    "tail": (WELL, {}, {"tail": 10}),
    "cache": (WELL, {}, {"cache": "named.jsonl"}),
}  # fmt: skip


@pytest.fixture
def course(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What the server saw and what the reward made of it."""
    monkeypatch.setattr("longreach.rl.judge_limits.MINUTE", 0.2)

    def respond(number: int, body: Options) -> Any:
        if state == DOWN or (state == HALF and number % 2):
            return server.http(500)
        return server.after(0.1 if state == SLOW else 0.0, server.chat("[[YES]]"))

    def run(behaves: str, options: Options) -> Any:
        nonlocal state
        state = behaves
        for seen in (server.bodies, server.paths, server.headers, server.times):
            seen.clear()
        server.most = 0
        usual = {"model": "small", "backoff": 0.001, "audit": 0.0, "max_failure_share": 1.0}
        url, cache = server.url + options.get("base_url", ""), options.get("cache")
        places = {"base_url": url, "cache": str(tmp_path / cache) if cache else None}
        config = JudgeConfig(**{**usual, **options, **places})
        reward = make_reward(RewardConfig(judge=config), {"KEY": "secret"})
        n = len(TEXTS)
        try:
            scored: Any = [
                one.parts for one in reward.score([PLAIN] * n, ["p"] * n, TEXTS, [[1]] * n, ["stop"] * n)
            ]  # fmt: skip
        except JudgeFailing as failing:
            scored = str(failing)
        counted = reward.metrics()
        return {
            "scored": scored,
            "asked": len(server.bodies),
            "settings": sorted({json.dumps({k: v for k, v in b.items() if k != "messages"}) for b in server.bodies}),
            "paths": sorted(set(server.paths)),
            "keys": sorted({headers.get("Authorization", "") for headers in server.headers}),
            "at once": state == SLOW and server.most > 1,  # a quick server may or may not see two at a time
            "limited": counted["judge/rate_limited_s"] > 0,
            "opened": counted["judge/breaker_opened"] > 0,
            "slow": state == DOWN and server.times[-1] - server.times[0] > 0.12,
            "files": sorted(path.name for path in tmp_path.iterdir()),
        }

    state, server.respond = WELL, respond
    return run


@pytest.mark.parametrize("key", ROWS)
def test_a_servers_key_changes_something(key: str, course: Callable[..., Any]) -> None:
    behaves, both, one = ROWS[key]
    assert course(behaves, both) != course(behaves, {**both, **one})


def test_the_same_settings_make_the_same_course(course: Callable[..., Any]) -> None:
    assert course(WELL, {}) == course(WELL, {})


@pytest.mark.parametrize(
    "options", [{"device": "meta"}, {"dtype": "float32"}, {"batch_tokens": 2000}, {"model_dir": "other"}], ids=repr
)
def test_a_local_models_key_reaches_it(options: Options, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    load = judge_local.load_model

    def spy(path: str, *, dtype: torch.dtype, device: torch.device) -> Any:
        asked.append((path, dtype, device.type))
        return load(str(tiny_dir), dtype=dtype, device=torch.device("cpu"))

    monkeypatch.setattr(judge_local, "load_model", spy)
    monkeypatch.setattr(judge_local, "load_tokenizer", lambda path, load=judge_local.load_tokenizer: load(tiny_dir))
    usual = {"model_dir": str(tiny_dir), "device": "cpu", "max_tokens": 8, "batch_tokens": 1000}
    for settings in (usual, {**usual, **options}):
        one = make_reward(RewardConfig(judge=JudgeConfig(**settings)), {}).judge
        assert isinstance(one, LocalJudge)
        asked.append(one._longest)
    assert asked[:2] != asked[2:]


def test_every_key_of_the_judge_has_a_row() -> None:
    local = {"model_dir", "device", "dtype", "batch_tokens"}
    assert set(ROWS) | local == {field.name for field in dataclasses.fields(JudgeConfig)}
