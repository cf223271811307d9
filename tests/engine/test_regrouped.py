"""A trainer's batch as groups: what goes out and comes back stands where the trainer had it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longreach.engine import Group, Regrouped, completion_logprobs

PROMPTS = [[1, 2, 3], [4, 5]]
SEQUENCES = [(0, [7, 8]), (1, [9]), (0, []), (1, [7, 7, 7]), (0, [6])]
"""(prompt, completion): two groups, shuffled; one completion is empty."""
LENGTHS = [len(c) for _, c in SEQUENCES]


def batch() -> Regrouped:
    sequences = [torch.tensor([*PROMPTS[p], *c]) for p, c in SEQUENCES]
    return Regrouped(sequences, [len(PROMPTS[p]) for p, _ in SEQUENCES])


def padded_batch() -> tuple[Tensor, Tensor]:
    """Prompts padded left, completions right, with garbage where nothing stands."""
    ids, mask = torch.full((5, 6), 99), torch.zeros(5, 6, dtype=torch.long)
    for i, (p, c) in enumerate(SEQUENCES):
        n = len(PROMPTS[p])
        ids[i, 3 - n : 3], mask[i, 3 - n : 3] = torch.tensor(PROMPTS[p]), 1
        ids[i, 3 : 3 + len(c)], mask[i, 3 : 3 + len(c)] = torch.tensor(c, dtype=torch.long), 1
    return ids, mask


def told(made: Regrouped) -> list[tuple[list[int], list[list[int]]]]:
    return [(g.prompt_ids.tolist(), [c.tolist() for c in g.completions]) for g in made.groups]


def test_sequences_of_one_prompt_are_one_group() -> None:
    wanted = [([1, 2, 3], [[7, 8], [], [6]]), ([4, 5], [[9], [7, 7, 7]])]
    assert sorted(told(batch())) == wanted
    assert told(Regrouped.from_padded(*padded_batch(), 3)) == told(batch())
    assert batch().lengths == LENGTHS


def tokens(made: Regrouped) -> Tensor:
    return torch.cat([c for group in made.groups for c in group.completions])


@pytest.mark.parametrize("make", [batch, lambda: Regrouped.from_padded(*padded_batch(), 3)])
def test_there_and_back(make: Callable[[], Regrouped]) -> None:
    """Completion tokens as the values: [N] is in the order of the groups' tokens."""
    made, (ids, mask) = make(), padded_batch()
    nested = torch.nested.as_nested_tensor([torch.tensor(c, dtype=torch.long) for _, c in SEQUENCES], layout=torch.jagged)  # fmt: skip
    for x in (ids[:, 3:], torch.cat([ids[:, 3:], torch.full((5, 2), 98)], 1), nested):
        assert torch.equal(made.gather(x), tokens(made))
    assert torch.equal(made.padded(tokens(made), 3), ids[:, 3:] * mask[:, 3:])
    assert made.padded(tokens(made), 4).shape == (5, 4)
    each = torch.arange(5.0)
    wanted = torch.cat([each[i].expand(LENGTHS[i]) for i in made.order])
    assert torch.equal(made.gather(each), wanted) and torch.equal(made.gather(each[:, None]), wanted)
    assert made.gather(ids[:, 3:] == 7).dtype == torch.bool


def test_completions_of_one_token() -> None:
    """A value for each token and one for each sequence have one shape then, and mean the same."""
    uneven = Regrouped([torch.tensor([1, 5]), torch.tensor([1, 6, 7])], [1, 1])
    assert uneven.gather(torch.nested.as_nested_tensor([torch.ones(1), torch.zeros(2)], layout=torch.jagged)).sum() == 1
    made = Regrouped([torch.tensor([1, 5]), torch.tensor([1]), torch.tensor([2, 6])], [1, 1, 1])
    values = torch.tensor([[0.5], [7.0], [1.5]])
    assert torch.equal(made.gather(values), torch.tensor([0.5, 1.5])[[i // 2 for i in made.order if i != 1]])


def test_a_mask_with_holes() -> None:
    ids, mask = torch.tensor([[1, 2, 7, 50, 8]]), torch.tensor([[1, 1, 1, 0, 1]])
    made = Regrouped.from_padded(ids, mask, 3)
    assert told(made) == [([1, 2], [[7, 8]])]
    assert made.gather(torch.tensor([[10, 11, 12]])).tolist() == [10, 12]
    assert made.padded(torch.tensor([10, 12]), 3).tolist() == [[10, 0, 12]]
    assert made.predicted(torch.tensor([10, 12])).tolist() == [0, 10, 12, 0]


def test_predicted_stands_where_a_model_says_it(load: Callable[..., torch.nn.Module]) -> None:
    """Against each sequence's log-probs by itself, one after the other; differentiable."""
    model, made = load("qwen3"), batch()
    flat = made.predicted(completion_logprobs(model, made.groups).logp)  # type: ignore[arg-type]
    wanted = []
    for p, c in SEQUENCES:
        alone = Group(torch.tensor(PROMPTS[p]), [torch.tensor(c, dtype=torch.long)])
        logp = completion_logprobs(model, [alone]).logp  # type: ignore[arg-type]
        zeros = logp.new_zeros(len(PROMPTS[p]) - 1)
        wanted += [zeros, logp, logp.new_zeros(1)]
    torch.testing.assert_close(flat, torch.cat(wanted), rtol=1e-4, atol=1e-5)
    values = torch.arange(7.0, requires_grad=True)
    (made.predicted(values) + 0).sum().backward()
    made.padded(values, 3).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.full((7,), 2.0))


def test_values_that_do_not_fit_are_errors() -> None:
    with pytest.raises(ValueError, match="values of 4 sequences for a batch of 5"):
        batch().gather(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="sequence 3 has 2 values, and a token of its completion stands at 2"):
        batch().gather(torch.zeros(5, 2))
