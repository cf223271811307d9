from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longreach.engine import Group, pack_groups
from longreach.engine.packing import one_row, unshared


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


# two groups, an empty completion first, in the middle and last, and a group without completions
GROUPS = [
    Group(ids(10, 11, 12), [ids(), ids(20, 21), ids(30)]),
    Group(ids(40, 41), []),
    Group(ids(50), [ids(60, 61, 62), ids()]),
]


def test_prompts_stand_first_then_completions() -> None:
    row = one_row(GROUPS)
    assert row.input_ids().tolist() == [10, 11, 12, 40, 41, 50, 20, 21, 30, 60, 61, 62]
    assert row.position_ids().tolist() == [0, 1, 2, 0, 1, 0, 3, 4, 3, 1, 2, 3]
    assert (row.tokens, row.prompt_tokens) == (12, 6)
    assert row.members == ((0, 0), (0, 1), (0, 2), (2, 0), (2, 1))


def test_bounds_of_the_three_attention_calls() -> None:
    row = one_row(GROUPS)
    assert row.cu_prompts.tolist() == [0, 3, 5, 6]
    assert row.cu_queries.tolist() == [0, 3, 3, 6]
    assert row.cu_completions.tolist() == [0, 0, 2, 3, 6, 6]
    assert row.cu_prompts.dtype == torch.int32


def test_loss_rows_hold_the_token_before_each_target() -> None:
    row = one_row(GROUPS)
    assert row.targets().tolist() == [20, 21, 30, 60, 61, 62]
    assert row.loss_rows().tolist() == [2, 6, 2, 5, 9, 10]


def test_without_completion_tokens_there_are_no_loss_rows() -> None:
    row = one_row([Group(ids(1, 2), [ids()]), Group(ids(3), ())])
    assert row.loss_rows().tolist() == row.targets().tolist() == []
    assert row.loss_rows().dtype == row.targets().dtype == torch.long
    assert row.input_ids().tolist() == [1, 2, 3]


def test_unshared_repeats_the_prompt_for_each_completion() -> None:
    made = [(g.prompt_ids.tolist(), [c.tolist() for c in g.completions]) for g in unshared(GROUPS)]
    first, last = [10, 11, 12], [50]
    assert made == [
        (first, [[]]),
        (first, [[20, 21]]),
        (first, [[30]]),
        ([40, 41], []),
        (last, [[60, 61, 62]]),
        (last, [[]]),
    ]


@pytest.mark.parametrize("budget", [16, 17, 23, 31, 60, 1000])
def test_packing_keeps_every_completion_once_and_the_budget(
    budget: int, random_groups: Callable[..., list[Group]]
) -> None:
    draw = torch.Generator().manual_seed(budget)

    def lengths(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=draw).tolist()

    groups = random_groups([(p, lengths(0, 9, 4)) for p in lengths(1, 9, 12)])
    rows = pack_groups(groups, budget)
    assert all(row.tokens <= budget for row in rows)
    members = [member for row in rows for member in row.members]
    assert sorted(members) == [(g, c) for g, group in enumerate(groups) for c in range(len(group.completions))]
    for row in rows:
        packed = [(g.prompt_ids.tolist(), c.tolist()) for g in row.groups for c in g.completions]
        assert packed == [(groups[g].prompt_ids.tolist(), groups[g].completions[c].tolist()) for g, c in row.members]


def test_a_group_that_fits_is_never_split_and_larger_ones_come_first(random_groups: Callable[..., list[Group]]) -> None:
    rows = pack_groups(random_groups([(2, [1, 1]), (10, [5, 5]), (4, [2, 2])]), 20)
    assert [[g.tokens for g in row.groups] for row in rows] == [[20], [8, 4]]


def test_a_split_repeats_the_prompt_as_seldom_as_first_fit_can(random_groups: Callable[..., list[Group]]) -> None:
    # room for 10 beside the prompt: 6 + 4 and 5 + 5, while filling one piece after the other would take three
    rows = pack_groups(random_groups([(20, [4, 6, 5, 5])]), 30)
    assert [row.members for row in rows] == [((0, 0), (0, 1)), ((0, 2), (0, 3))]


def test_a_group_without_completions_is_kept() -> None:
    (row,) = pack_groups([Group(ids(1, 2, 3), ())], 3)
    assert row.tokens == 3 and row.members == ()


@pytest.mark.parametrize("lengths", [[6], [1, 6, 1], [7]])
def test_what_cannot_fit_is_an_error_that_names_the_group(
    lengths: list[int], random_groups: Callable[..., list[Group]]
) -> None:
    groups = random_groups([(1, [1]), (5, lengths)])
    with pytest.raises(
        ValueError, match=f"group 1: a prompt of 5 tokens with a completion of {max(lengths)}.*budget of 10"
    ):
        pack_groups(groups, 10)


def test_a_prompt_alone_over_the_budget_is_an_error_and_not_dropped() -> None:
    with pytest.raises(ValueError, match="budget of 2 tokens"):
        pack_groups([Group(ids(1, 2, 3), ())], 2)


@pytest.mark.parametrize(
    "prompt, completions, message",
    [
        (ids(), [ids(1)], "prompt_ids is empty"),
        (torch.tensor([1, 2], dtype=torch.int32), [], r"prompt_ids must be a LongTensor.*int32"),
        (ids(1), [ids(1), torch.tensor([])], r"completions\[1\] must be a LongTensor.*float32"),
        (ids(1), [torch.tensor([[1]])], r"completions\[0\] must be a LongTensor of one dimension.*\(1, 1\)"),
        ([1, 2], [], "prompt_ids must be a LongTensor of one dimension, not list"),
    ],
)
def test_ids_of_another_kind_are_refused(prompt: Tensor, completions: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Group(prompt, completions)


def test_a_long_prompt_packs_in_linear_memory(largest_tensor) -> None:
    groups = [Group(torch.zeros(120_000, dtype=torch.long), [torch.ones(4_000, dtype=torch.long)] * 8)]
    with largest_tensor:
        (row,) = pack_groups(groups, 160_000)
        assert row.input_ids().shape == row.position_ids().shape == (152_000,)
        assert len(row.loss_rows()) == 32_000
        assert int(row.position_ids().max()) == 123_999
    assert largest_tensor.elements == 152_000
