from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreach.engine import Group
from longreach.engine.decoding import Decode, Prefill, PrefixCache
from longreach.engine.packing import one_row

H, K, E, G, SCALE = 4, 2, 8, 3, 0.4
LENGTHS = [3, 7, 5]


class Played:
    """A cache that was prefilled in two passes and decoded for some steps, with all that went in."""

    def __init__(self, dtype: torch.dtype, steps: int, lengths: list[int] = LENGTHS) -> None:
        self.draw, self.dtype = torch.Generator().manual_seed(0), dtype
        self.cache = PrefixCache(lengths, G, max_completion=8)
        self.keys: list[Tensor] = []  # of each prompt, then of each of its completions: [G, n, K, E]
        self.values: list[Tensor] = []
        first = 0
        for part in (lengths[:1], lengths[1:]):
            row = one_row([Group(torch.zeros(n, dtype=torch.long), ()) for n in part])
            q, k, v = self.random(H, row.tokens), self.random(K, row.tokens), self.random(K, row.tokens)
            Prefill(row, first, self.cache).attend(0, q, k, v, SCALE)
            self.keys += [x[None].expand(G, -1, -1, -1) for x in k.split(part)]
            self.values += [x[None].expand(G, -1, -1, -1) for x in v.split(part)]
            first += len(part)
        for _ in range(steps):
            self.step()

    def random(self, heads: int, tokens: int) -> Tensor:
        return torch.randn(tokens, heads, E, generator=self.draw, dtype=torch.float64).mul(2).to(self.dtype)

    def step(self) -> tuple[Tensor, Tensor]:
        """(our output, the output by definition in fp64), both [B * G, H, E]."""
        B = len(self.keys)
        q, k, v = self.random(H, B * G), self.random(K, B * G), self.random(K, B * G)
        ours = Decode(self.cache).attend(0, q, k, v, SCALE)
        self.cache.decoded += 1
        self.keys = [torch.cat([old, new[:, None]], 1) for old, new in zip(self.keys, k.split(G), strict=True)]
        self.values = [torch.cat([old, new[:, None]], 1) for old, new in zip(self.values, v.split(G), strict=True)]
        exact = [
            self.attention(q[b * G + g].double(), self.keys[b][g].double(), self.values[b][g].double())
            for b in range(B)
            for g in range(G)
        ]
        return ours, torch.stack(exact)

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
        return torch.einsum("hs,she->he", (torch.einsum("he,she->hs", q, k) * SCALE).softmax(-1), v)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_each_completion_attends_to_its_prompt_and_itself(dtype: torch.dtype, bound: float) -> None:
    played = Played(dtype, 0)
    for _ in range(4):
        ours, exact = played.step()
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=bound)


def test_in_bfloat16_the_error_is_that_of_rounding_weights_and_result() -> None:
    played = Played(torch.bfloat16, 0)
    steps = [played.step() for _ in range(8)]
    assert all(ours.dtype == torch.bfloat16 for ours, _ in steps)
    # two roundings of at most 2^-8, each 0.4 of that on average; scores of up to 20 that are rounded too would double it
    errors = [float((ours.double() - exact).norm() / exact.norm()) for ours, exact in steps]
    assert sum(errors) / len(errors) <= 0.75 * 2**-8


def test_prompts_that_are_dropped_leave_the_others_as_they_were() -> None:
    played, whole = Played(torch.float64, 3), Played(torch.float64, 3)
    keep = torch.tensor([0, 2])
    played.cache.keep(keep)
    played.keys, played.values = ([x[i] for i in keep] for x in (played.keys, played.values))
    for _ in range(2):
        ours, exact = played.step()
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
    k, _ = played.cache.prompts[0]
    assert k.shape == (2, K, 5, E)  # the longest one is gone, and its padding with it
    assert torch.equal(k, whole.cache.prompts[0][0][keep, :, :5])


def test_prompts_of_one_length_need_no_padding() -> None:
    cache = Played(torch.float32, 1, [4, 4, 4]).cache
    assert cache.padding(torch.device("cpu")) is None
    assert Played(torch.float32, 1).cache.padding(torch.device("cpu")) is not None


def test_padding_is_hidden_whatever_it_holds() -> None:
    played = Played(torch.float64, 0)
    for stored in played.cache.prompts[0]:
        stored[0, :, LENGTHS[0] :] = 1e3
    ours, exact = played.step()
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)
