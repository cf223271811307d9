"""Which backends a mesh prefers, and that it says so; what the layout computes is in test_sequence_parallel.py."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longreach.engine import parallel_attention
from longreach.engine.parallel_attention import kernel
from longreach.kernels import attention_choice


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Queries as of a GPU where `auto` is torch's flash operator; on_a_gpu(triton=...) says whether ours can run."""
    parallel_attention._say.cache_clear()
    monkeypatch.setattr(attention_choice, "choose", lambda *_: "flash")

    def make(triton: str | None) -> Any:
        monkeypatch.setattr(attention_choice, "unsuited", lambda name, q: triton)
        return SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, shape=(8, 4, 64))

    return make


def test_unrounded_partial_results_are_preferred(on_a_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longreach.parallel"):
        made = kernel(on_a_gpu(triton=None), 0.5, "auto")
    assert (made.scale, made.forward, made.backward) == (0.5, "triton", "triton")
    assert not caplog.records


def test_a_backend_that_rounds_them_is_named_once(on_a_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longreach.parallel"):
        made = [kernel(on_a_gpu(triton="Triton isn't installed"), 0.5, "auto") for _ in range(2)]
    assert all((m.forward, m.backward) == ("flash", "flash") for m in made)
    assert [r.getMessage().split(" on a mesh")[0] for r in caplog.records] == [
        "attention forward",
        "attention backward",
    ]
    assert all("flash" in r.getMessage() and "rounds partial results" in r.getMessage() for r in caplog.records)


def test_a_backend_that_was_asked_for_is_taken_and_named(on_a_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "longreach.parallel"):
        assert kernel(on_a_gpu(triton=None), 0.5, "cudnn").forward == "cudnn"
        assert kernel(on_a_gpu(triton=None), 0.5, "triton").forward == "triton"
    assert len(caplog.records) == 2 and all("cudnn (as asked)" in r.getMessage() for r in caplog.records)
