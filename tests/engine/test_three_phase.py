"""When three phases are chosen, and how they look from outside; that their numbers are right is in test_shared_prefix."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.engine import Group, completion_hidden, completion_logprobs, pack_groups
from longreach.engine.packing import KEPT, one_row, phase_pieces, three_phases_pay
from longreach.engine.three_phase import _OnPrompt
from longreach.kernels import attention

Make = Callable[..., Any]
MakeGroups = Callable[..., list[Group]]
SHAPES = [(4, (6, 0, 9, 5, 5))]
BUDGET = 26


def zeros(prompt: int, lengths: list[int]) -> Group:
    return Group(torch.zeros(prompt, dtype=torch.long), [torch.zeros(n, dtype=torch.long) for n in lengths])


@pytest.mark.parametrize(
    "lengths, budget, rows, pays",
    [
        ([40] * 4, 260, 1, False),  # it fits
        ([40] * 4, 259, 2, False),  # over the budget, but so are the prompt and what is kept of it with a completion
        ([40] * 4, 289, 1, False),
        ([20] * 9, 270, 2, True),  # 2 rows: 4 (2 P + C) against 4 P + 5 C, with C = 3.6 + 0.4 P at most
        ([20] * 11, 270, 2, False),  # C = 4.84 P of attention: the prompt's repetition is cheaper
        ([20] * 18, 270, 3, True),
        ([20] * 20, 270, 3, False),
        ([20] * 60, 270, 8, True),
        ([60] * 6, 310, 2, False),
        ([60] * 12, 310, 4, False),  # completions so long that what they do among themselves counts
        ([0, 0], 99, 0, False),
    ],
)
def test_three_phases_are_chosen_where_they_fit_and_cost_less(
    lengths: list[int], budget: int, rows: int, pays: bool
) -> None:
    group = zeros(100, lengths)
    assert three_phases_pay(group, budget) is pays
    if budget >= 100:
        split, chosen = pack_groups([group], budget), pack_groups([group], budget, three_phases=True)
        assert len(split) == rows and len(chosen) == (1 if pays else rows)


@pytest.mark.parametrize("lengths", [[], [0], [4]])
def test_a_prompt_over_the_budget_stays_an_error(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"group 0: a prompt of 100 tokens .* the budget of 99 tokens"):
        pack_groups([zeros(100, lengths)], 99, three_phases=True)


def test_the_choice_is_right_by_counting_forwards() -> None:
    """The stated costs, counted over a grid in linear layers and in attention; a yes must be right in both."""
    yes = 0
    for count in range(2, 40):
        for length in (5, 20, 60):
            for budget in range(260, 420, 10):
                group = zeros(100, [length] * count)
                if not three_phases_pay(group, budget):
                    continue
                yes += 1
                assert 2.5 * 100 + length <= budget < group.tokens
                assert count * length > 1.5 * 100  # the completions outweigh the prompt by half
                n = len(pack_groups([group], budget))
                for F_P, F_C in ((100, count * length), (100**2 / 2, count * (length * 100 + length**2 / 2))):
                    assert 4 * (n * F_P + F_C) > 4 * F_P + 5 * F_C
    assert yes > 20


def test_a_group_for_three_phases_has_a_row_of_its_own(random_groups: MakeGroups) -> None:
    groups = [zeros(10, [3, 3]), zeros(100, [20] * 9), zeros(30, [8, 8])]
    rows = pack_groups(groups, 270, three_phases=True)
    assert [[g.tokens for g in row.groups] for row in rows] == [[280], [46, 16]]
    assert rows[0].members == tuple((1, c) for c in range(9))
    assert all(row.tokens <= 270 for row in pack_groups(groups, 270))


def test_pieces_leave_room_for_the_prompt_and_what_is_kept_of_it() -> None:
    group = zeros(100, [5, 30, 0, 20, 10, 30])
    pieces = phase_pieces(group, 281)
    assert sorted(c for piece in pieces for c in piece) == list(range(6))
    assert all(100 * (1 + KEPT) + sum(len(group.completions[c]) for c in piece) <= 281 for piece in pieces)
    assert len(pieces) == 4
    with pytest.raises(ValueError, match=r"prompt of 100 tokens with a completion of 30 .* budget of 279 .*2.5 times"):
        phase_pieces(group, 279)


def test_what_is_over_the_budget_and_no_single_shared_group_is_an_error(load: Make, random_groups: MakeGroups) -> None:
    model, groups = load("qwen3"), random_groups([*SHAPES, (3, (2,))])
    with pytest.raises(ValueError, match=r"2 groups of 34 tokens together are over the budget of 26.*pack_groups"):
        completion_logprobs(model, groups, budget=BUDGET)
    with pytest.raises(ValueError, match="5 groups of 45 tokens"):
        completion_logprobs(model, groups[:1], budget=BUDGET, shared_prefix=False)
    with pytest.raises(ValueError, match="does not fit into a budget of 18 tokens in three phases"):
        completion_logprobs(model, groups[:1], budget=18)
    whole, within = (completion_logprobs(model, groups, budget=b).logp for b in (None, 34))
    assert torch.equal(whole, within)  # a row that fits is a packed row


def test_the_trainers_rows_go_through_either_way(load: Make, random_groups: MakeGroups) -> None:
    """Rows of one batch, some over the budget, with one budget for all."""
    model, groups = load("qwen3", dtype=torch.float64), random_groups([(9, (4, 2)), (20, [4] * 9), (5, (2,))])
    rows, found = pack_groups(groups, 54, three_phases=True), {}
    assert [row.tokens for row in rows] == [56, 22]
    for row in rows:
        logp = completion_logprobs(model, row.groups, budget=54).logp
        parts = logp.split([len(groups[g].completions[c]) for g, c in row.members])
        found.update(zip(row.members, parts, strict=True))
    made = torch.cat([found[member] for member in one_row(groups).members])
    torch.testing.assert_close(made, completion_logprobs(model, groups).logp, rtol=0, atol=1e-6)


def test_without_gradients_there_is_one_forward_and_no_graph(load: Make, random_groups: MakeGroups) -> None:
    model, groups = load("qwen3"), random_groups(SHAPES)
    passes: list[int] = []
    model.get_decoder().register_forward_hook(lambda _, args, out: passes.append(out.last_hidden_state.requires_grad))
    with torch.no_grad():
        made = completion_hidden(model, groups, budget=BUDGET)[0]
    assert passes == [False] * 3 and not made.requires_grad
    model.requires_grad_(False)
    assert not completion_hidden(model, groups, budget=BUDGET)[0].requires_grad
    torch.testing.assert_close(made, completion_hidden(model, groups)[0], rtol=0, atol=1e-5)


def test_gradients_of_some_parameters_can_be_asked_for(load: Make, random_groups: MakeGroups) -> None:
    """As from any function: nothing is left in .grad behind autograd's back."""
    model, groups = load("qwen3"), random_groups(SHAPES)
    asked = [model.get_submodule(f"model.layers.{i}.self_attn.k_proj").weight for i in (0, 1)]
    made = torch.autograd.grad(completion_logprobs(model, groups, budget=BUDGET).logp.sum(), asked)
    wanted = torch.autograd.grad(completion_logprobs(model, groups).logp.sum(), asked)
    for one, other in zip(made, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_it_goes_back_once(load: Make, random_groups: MakeGroups) -> None:
    loss = completion_logprobs(load("qwen3"), random_groups(SHAPES), budget=BUDGET).logp.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_nothing_stays_behind(back: bool, checkpointing: bool, load: Make, random_groups: MakeGroups) -> None:
    """The prompt's graph is held from within autograd's own, where Python's collector can't see a cycle."""
    model, groups = load("qwen3", gradient_checkpointing=checkpointing), random_groups(SHAPES)
    counts = []

    def alive() -> int:
        gc.collect()
        return sum(type(x) is Tensor for x in gc.get_objects())

    for _ in range(3):
        loss = completion_logprobs(model, groups, budget=BUDGET).logp.sum()
        if back:
            loss.backward()
            model.zero_grad()
        del loss
        counts.append(alive())
    assert counts[0] == counts[1] == counts[2]


def test_pieces_add_to_the_prompts_gradient_in_fp32() -> None:
    """200 pieces in bfloat16: what they add up to is one sum's rounding away from exact, not 200."""
    draw = torch.Generator().manual_seed(0)
    past = torch.randn(4, 2, 8, generator=draw).bfloat16(), torch.randn(4, 2, 8, generator=draw).bfloat16()
    sums = torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    exact = torch.zeros(4, 2, 8, dtype=torch.float64)
    careless = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    for _ in range(200):
        q, k, v = (torch.randn(2, h, 8, generator=draw).bfloat16().requires_grad_() for h in (4, 2, 2))
        dout = torch.rand(2, 4, 8, generator=draw).bfloat16()
        layout = _OnPrompt([past], [sums], torch.tensor([0, 2]), "auto")
        layout.attend(0, q, k, v, 0.3).backward(dout)
        keys, values = (torch.cat([p, x.detach()]).double() for p, x in zip(past, (k, v), strict=True))
        queries = torch.cat([torch.zeros(4, 4, 8), q.detach()]).double()
        douts = torch.cat([torch.zeros(4, 4, 8), dout]).double()
        out, lse = attention.forward(queries, keys, values, causal=True, scale=0.3)
        dv = attention.backward(douts, queries, keys, values, out, lse, causal=True, scale=0.3)[2][:4]
        exact += dv
        careless += dv.bfloat16()

    def error(made: Tensor) -> float:
        return float(((made.double() - exact).abs() / exact.abs()).max())

    assert sums[1].dtype == torch.float32
    assert error(sums[1]) < 2**-8 < 4 * 2**-8 < error(careless)
