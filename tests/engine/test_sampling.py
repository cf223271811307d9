from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longreach.engine import Sampling
from longreach.engine.sampling import sample

V, DRAWS = 23, 40_000


def warped(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that transformers samples from, [V]."""
    ids: Any = torch.zeros(1, 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, logits[None])
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0]


def some_logits() -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2


SETTINGS = [
    Sampling(1),
    Sampling(1, temperature=0.7),
    Sampling(1, temperature=2.5),
    Sampling(1, top_k=1),
    Sampling(1, temperature=0.7, top_k=5),
    Sampling(1, top_p=0.9),
    Sampling(1, temperature=0.7, top_p=0.95),
    Sampling(1, temperature=1.7, top_p=0.3),
    Sampling(1, temperature=1.5, top_k=6, top_p=0.8),
    Sampling(1, top_p=1e-9),
    Sampling(1, top_k=V + 10),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_tokens_come_as_often_as_transformers_would_draw_them(sampling: Sampling) -> None:
    logits = some_logits()
    wanted = warped(logits, sampling)
    even = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS  # evenly spread, so that counts are exact
    drawn = sample(logits.expand(DRAWS, -1), sampling, even)
    share = torch.bincount(drawn.tokens, minlength=V) / DRAWS
    assert (share - wanted).abs().max() <= 1 / DRAWS
    assert not share[wanted == 0].any()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_logprobs_and_kept_mass_describe_that_distribution(sampling: Sampling) -> None:
    logits = some_logits()
    drawn = sample(logits.expand(500, -1), sampling, torch.rand(500, dtype=torch.float64))
    wanted = warped(logits, sampling)
    torch.testing.assert_close(drawn.logprobs, wanted.log()[drawn.tokens], rtol=0, atol=1e-10)
    whole = (logits / sampling.temperature).log_softmax(-1)
    torch.testing.assert_close(drawn.logprobs + drawn.kept_logmass, whole[drawn.tokens], rtol=0, atol=1e-10)
    kept = whole[wanted > 0].logsumexp(-1)
    torch.testing.assert_close(drawn.kept_logmass, kept.expand(500), rtol=0, atol=1e-10)


def test_chi_square_of_random_draws() -> None:
    sampling, logits = Sampling(1, temperature=1.3, top_k=12, top_p=0.9), some_logits()
    uniform = torch.rand(DRAWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = sample(logits.expand(DRAWS, -1), sampling, uniform).tokens
    wanted = warped(logits, sampling) * DRAWS
    cells = wanted > 0
    statistic = ((torch.bincount(tokens, minlength=V) - wanted)[cells] ** 2 / wanted[cells]).sum()
    freedom = int(cells.sum()) - 1
    assert freedom >= 5
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_rows_are_independent_of_each_other() -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampling = Sampling(1, top_k=7, top_p=0.8)
    together = sample(logits, sampling, uniform)
    for row in range(6):
        alone = sample(logits[row : row + 1], sampling, uniform[row : row + 1])
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, top_p=0.999999)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_never_drawn(uniform: float, sampling: Sampling) -> None:
    logits = torch.full((200, V), -torch.inf)
    logits[:, 3:6] = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 3
    drawn = sample(logits, sampling, torch.full((200,), uniform, dtype=torch.float64))
    assert set(drawn.tokens.tolist()) <= {3, 4, 5}
    assert torch.isfinite(drawn.logprobs).all() and torch.isfinite(drawn.kept_logmass).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(1, temperature=0.0), Sampling(1), Sampling(1, top_p=0.9)])
def test_logits_that_are_not_finite_are_an_error_and_no_token(bad: float, sampling: Sampling) -> None:
    logits = torch.zeros(3, V)
    logits[1, 7] = bad
    with pytest.raises(FloatingPointError, match="logits aren't finite"):
        sample(logits, sampling, torch.full((3,), 0.5))


def test_greedy_takes_the_first_of_the_most_probable() -> None:
    logits = some_logits().float()
    logits[[4, 9]] = logits.max() + 1
    drawn = sample(logits[None], Sampling(1, temperature=0.0, top_k=3, top_p=0.5), torch.tensor([0.99]))
    assert drawn.tokens.tolist() == [4]
    assert drawn.logprobs.tolist() == [0.0]
    torch.testing.assert_close(drawn.kept_logmass, logits.double().log_softmax(-1)[4:5])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_completion": 0}, "max_completion must be at least 1 token, not 0"),
        ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or a positive number, not -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], not 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_completion": 4, **options})  # type: ignore[arg-type]
