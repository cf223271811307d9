from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longreach.engine.sequences import group_sequences, prompt_hash

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([1, 2]), torch.tensor([4])]


def sequences(*pairs: tuple[int, list[int]]) -> tuple[list[Tensor], list[int]]:
    """(which prompt, completion) of each -> full sequences and prompt lengths."""
    prompts = [PROMPTS[p] for p, _ in pairs]
    return [torch.cat([x, torch.tensor(c, dtype=torch.long)]) for x, (_, c) in zip(prompts, pairs, strict=True)], [
        len(x) for x in prompts
    ]


MIXED = sequences((0, [7, 8]), (0, []), (1, [3, 9]), (2, [5]), (2, [5]), (0, [6]))


@pytest.mark.parametrize("ids", [None, [0, 0, 1, 2, 2, 3], ["a", "a", "b", "c", "c", "d"]])
def test_neighbours_with_the_same_prompt_are_a_group_and_the_order_stays(ids: list | None) -> None:
    groups = group_sequences(*MIXED, ids)
    made = [(g.prompt_ids.tolist(), [c.tolist() for c in g.completions]) for g in groups]
    assert made == [([1, 2, 3], [[7, 8], []]), ([1, 2], [[3, 9]]), ([4], [[5], [5]]), ([1, 2, 3], [[6]])]


def test_ids_divide_what_has_the_same_prompt() -> None:
    groups = group_sequences(*MIXED, [0, 1, 2, 3, 4, 5])
    assert [len(g.completions) for g in groups] == [1] * 6


def test_no_sequences_are_no_groups() -> None:
    assert group_sequences([], []) == group_sequences([], [], []) == []


def test_prompts_that_differ_within_a_group_are_an_error_that_says_where() -> None:
    with pytest.raises(
        ValueError, match=r"sequences 2 and 3 are one group, but .* differ from token 0 on.*tokenize it once"
    ):
        group_sequences(*MIXED, [0, 0, 1, 1, 2, 3])
    short = [torch.tensor([1, 2, 3, 9]), torch.tensor([1, 2, 3, 9])]
    with pytest.raises(ValueError, match=r"sequences 0 and 1 .* differ in length, 3 and 2 tokens"):
        group_sequences(short, [3, 2], [0, 0])
    third = [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), torch.tensor([1, 5, 4])]
    with pytest.raises(ValueError, match=r"sequences 0 and 2 .* differ from token 1 on"):
        group_sequences(third, [2, 2, 2], [0, 0, 0])


def test_a_group_that_does_not_stand_together_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"sequence 5 is of group 0, which began at sequence 0 .*sort the sequences"):
        group_sequences(*MIXED, [0, 0, 1, 2, 2, 0])


@pytest.mark.parametrize(
    "lengths, ids, message",
    [
        ([1], None, "1 prompt_lengths for 2 sequences"),
        ([1, 1], [0], "1 group_ids for 2 sequences"),
        ([1, 0], None, r"prompt_lengths\[1\] is 0: it must be at least 1 and at most the 2 tokens"),
        ([3, 1], None, r"prompt_lengths\[0\] is 3"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(lengths: list[int], ids: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_sequences([torch.tensor([1, 2]), torch.tensor([1, 2])], lengths, ids)


def test_what_is_no_row_of_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"sequences\[1\] must be a LongTensor of one dimension, not torch.float32 \(2,\)"
    ):
        group_sequences([torch.tensor([1, 2]), torch.tensor([1.0, 2.0])], [1, 1])


def test_a_hash_tells_tokens_order_and_length_apart() -> None:
    prompts = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [1], [1 + (1 << 32), 2]]
    assert len({prompt_hash(torch.tensor(p)) for p in prompts}) == len(prompts)
    strided = torch.tensor([[1, 9], [2, 9]])[:, 0]
    assert prompt_hash(strided) == prompt_hash(torch.tensor([1, 2]))


def test_a_long_prompt_is_kept_once(largest_tensor) -> None:
    """Groups hold views: the sequences' own memory and no more."""
    prompt = torch.randint(60, (100_000,))
    full = [torch.cat([prompt, torch.ones(5, dtype=torch.long)]) for _ in range(8)]
    with largest_tensor:
        (group,) = group_sequences(full, [100_000] * 8)
    assert group.prompt_ids.data_ptr() == full[0].data_ptr()
    assert [c.data_ptr() for c in group.completions] == [x[100_000:].data_ptr() for x in full]
