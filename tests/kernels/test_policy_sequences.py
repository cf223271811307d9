"""Sums over sequences against Python's exact ones, and where nothing is kept."""

from __future__ import annotations

import math

import pytest
import torch

from longreach.kernels.policy_sequences import Sequences


def test_sums_and_means_of_kept_weight() -> None:
    ids = torch.tensor([0, 0, 0, 2, 7, 7])
    weight = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 0.0])
    sequences = Sequences(ids, weight)
    x = torch.tensor([1.0, 10.0, 4.0, 5.0, 6.0, 7.0])
    assert sequences.sum(x).tolist() == [3.0, 3.0, 3.0, 10.0, 0.0, 0.0]
    assert sequences.mean(x).tolist() == [2.0, 2.0, 2.0, 5.0, 0.0, 0.0]
    assert sequences.counts.tolist() == [1.5, 1.5, 1.5, 2.0, 1.0, 1.0]


def test_no_tokens() -> None:
    sequences = Sequences(torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert sequences.sum(torch.zeros(0)).shape == sequences.mean(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("length", [1, 1023, 50_000])
def test_a_long_sequence_keeps_its_digits(length: int) -> None:
    x = torch.randn(length + 1, generator=torch.Generator().manual_seed(length)) * 0.1
    ids = torch.zeros(length + 1, dtype=torch.long)
    ids[-1] = 1
    mean = Sequences(ids, torch.ones(length + 1)).mean(x)
    exact = math.fsum(x[:-1].tolist()) / length
    # one rounding of the sum and one of the quotient
    assert mean[0].item() == pytest.approx(exact, rel=2 * torch.finfo(torch.float32).eps, abs=0)
    assert (mean[:-1] == mean[0]).all()
    assert mean[-1] == x[-1]
