"""The published conditions as defaults, and keys that reach what they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longreach.engine import Sampling
from longreach.engine.generate import GeneratorConfig
from longreach.rl.benchmarks.local import LocalModel
from longreach.rl.benchmarks.published_table import published_table
from longreach.rl.benchmarks.questions import Question
from longreach.rl.benchmarks.settings import EvaluationConfig, LocalConfig
from longreach.rl.rows import Example

Settings = Callable[..., Any]


def test_the_defaults_are_the_published_conditions() -> None:
    config, published = EvaluationConfig("dir"), published_table().conditions
    for name in ("samples", "max_input", "max_output", "temperature", "top_p"):
        assert getattr(config, name) == published[name]
    assert config.sampling() == Sampling(10_000, 0.7, 0.95, 0)
    assert config.scoring == "strict" and published["rule"] in config.rules


def test_the_generator_has_room_for_one_question_at_the_limits() -> None:
    assert EvaluationConfig("dir", max_output=10, max_input=50).generator() == GeneratorConfig()
    assert EvaluationConfig("dir", samples=16).generator().batch_tokens == 120_000 + 16 * 10_000
    assert EvaluationConfig("dir", local=LocalConfig(batch_tokens=77)).generator().batch_tokens == 77


def question(length: int) -> Question:
    return Question("qasper", Example("q", "qasper", ("x",), text="t"), np.zeros(length, np.int32), length)


def test_yarn_stretches_the_window_that_questions_are_checked_against(tiny_dir: Path, settings: Settings) -> None:
    plain = LocalModel(settings(str(tiny_dir), max_output=24))
    plain.check([question(1000)])
    with pytest.raises(ValueError, match=r"takes 1025 tokens, but .* has positions for 1024: .*--local.yarn 2\.0"):
        plain.check([question(10), question(1001)])
    stretched = LocalModel(settings(str(tiny_dir), max_output=24, local={"yarn": 2.0}))
    stretched.check([question(2024)])
    with pytest.raises(ValueError, match="positions for 2048"):
        stretched.check([question(2025)])
    assert plain.identity() != stretched.identity()
    assert LocalModel(settings(str(tiny_dir), local={"dtype": "float32"})).identity() != plain.identity()


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"server": {"deadline": 0.0}}, "server.deadline is 0.0, must be above 0 seconds"),
        ({"server": {"retries": -1}}, "server.retries is -1"),
        ({"server": {"limit_key": "most"}}, "one of max_tokens, max_completion_tokens"),
        ({"server": {"style": "chat"}, "top_k": 5}, "top_k is no field of chat completions"),
        ({"limit": 0}, "limit is 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
    ],
)
def test_what_is_out_of_range_is_refused(settings: Settings, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings("http://127.0.0.1:9/v1", "qasper", **keys)


def test_dtype_and_batch_of_a_directory_are_checked() -> None:
    with pytest.raises(ValueError, match=r"local.dtype is 'int8'"):
        LocalConfig(dtype="int8")
    with pytest.raises(ValueError, match=r"local.batch_tokens is -1"):
        LocalConfig(batch_tokens=-1)


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model is empty: give a model's directory"):
        EvaluationConfig(model=" ")
