"""The judge judged: what a kernel can get wrong must turn the three-way check red, and rounding must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 96, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double().t()
    terms = a.unsqueeze(1).float() * b
    other_order = terms.flip(-1).cumsum(-1)[..., -1].to(dtype)
    return other_order, a @ b.t(), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_another_order_of_summation_passes(three_way, dtype: torch.dtype) -> None:
    three_way(*case(dtype))


MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeroed": torch.zeros_like,
    "sign-flipped": lambda x: -x,
    "doubled": lambda x: 2 * x,
    "one row zeroed": lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    "rows swapped": lambda x: x[torch.tensor([1, 0, *range(2, len(x))])],
    "not a number": lambda x: torch.where(x == x.max(), float("nan"), x),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mutants_fail(three_way, mutant: str, dtype: torch.dtype) -> None:
    ours, plain, exact = case(dtype)
    with pytest.raises(AssertionError):
        three_way(MUTANTS[mutant](ours), plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dropped_term_fails(three_way, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(40, 96, generator=generator).to(dtype) for _ in range(2))
    with pytest.raises(AssertionError):
        three_way(a[:, :-1] @ b[:, :-1].t(), a @ b.t(), a.double() @ b.double().t())
