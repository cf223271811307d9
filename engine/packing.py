"""A group is one sequence: its prompt is computed once and its G completions hang on it.

A packed row is `[p1 | p2 | ... | c11 ... c1G | c21 ... ]`: prompts first, then completions, so that the queries and keys
of each attention call are contiguous views. Positions of every completion restart at the length of its prompt.
A row holds sum(P) + sum(R) tokens, where one sequence per completion would hold G * P + sum(R).
Everything here is integers on the CPU; it knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The completions of one prompt. `prompt_ids`: LongTensor [P], P >= 1; `completions`: LongTensors [R_i], R_i >= 0."""

    prompt_ids: Tensor
    completions: Sequence[Tensor]

    def __post_init__(self) -> None:
        for name, ids in (
            ("prompt_ids", self.prompt_ids),
            *((f"completions[{i}]", c) for i, c in enumerate(self.completions)),
        ):
            if ids.ndim != 1 or ids.dtype != torch.long:
                raise ValueError(
                    f"Group.{name} must be a LongTensor of one dimension, not {ids.dtype} {tuple(ids.shape)}"
                )
        if not len(self.prompt_ids):
            raise ValueError("Group.prompt_ids is empty: the first completion token needs a token that predicts it")

    @property
    def tokens(self) -> int:
        """Tokens that this group takes in a packed row: P + sum(R)."""
        return len(self.prompt_ids) + sum(len(c) for c in self.completions)


@dataclass(frozen=True)
class PackedRow:
    """One row of tokens and where its parts stand.

    `members` names, for each completion of the row in order, the (group, completion) it was in the list handed to
    `pack_groups`: a group over the budget stands in several rows.
    """

    groups: tuple[Group, ...]
    members: tuple[tuple[int, int], ...]

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(g.prompt_ids) for g in self.groups]

    @property
    def completion_lengths(self) -> list[int]:
        return [len(c) for g in self.groups for c in g.completions]

    @property
    def tokens(self) -> int:
        return sum(g.tokens for g in self.groups)

    @cached_property
    def prompt_tokens(self) -> int:
        """Where the completions begin."""
        return sum(self.prompt_lengths)

    @cached_property
    def cu_prompts(self) -> Tensor:
        """[groups + 1] int32: bounds of the prompts within the row's first `prompt_tokens` tokens."""
        return _bounds(self.prompt_lengths)

    @cached_property
    def cu_queries(self) -> Tensor:
        """[groups + 1] int32: bounds of each group's completions, all together, within the rest of the row."""
        return _bounds([sum(len(c) for c in g.completions) for g in self.groups])

    @cached_property
    def cu_completions(self) -> Tensor:
        """[completions + 1] int32: bounds of the single completions within the rest of the row."""
        return _bounds(self.completion_lengths)

    def input_ids(self) -> Tensor:
        """[T] token ids in row order."""
        return torch.cat([*(g.prompt_ids for g in self.groups), *(c for g in self.groups for c in g.completions)])

    def position_ids(self) -> Tensor:
        """[T] positions: 0..P-1 in a prompt, P..P+R-1 in each of its completions."""
        prompts = [torch.arange(n) for n in self.prompt_lengths]
        completions = [
            torch.arange(len(g.prompt_ids), len(g.prompt_ids) + len(c)) for g in self.groups for c in g.completions
        ]
        return torch.cat(prompts + completions)

    def loss_rows(self) -> Tensor:
        """[N] row index of the token that predicts each completion token, in group, completion, token order.

        The last token of a prompt predicts the first token of all its completions.
        """
        rows: list[Tensor] = []
        last, start = -1, self.prompt_tokens
        for group in self.groups:
            last += len(group.prompt_ids)
            for completion in group.completions:
                if len(completion):
                    rows += [torch.tensor([last]), torch.arange(start, start + len(completion) - 1)]
                start += len(completion)
        return torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)

    def targets(self) -> Tensor:
        """[N] completion tokens, in the order of `loss_rows`."""
        return torch.cat([c for g in self.groups for c in g.completions] or [torch.empty(0, dtype=torch.long)])


def one_row(groups: Sequence[Group]) -> PackedRow:
    """All groups in one row, whatever its length."""
    return PackedRow(
        tuple(groups), tuple((g, c) for g, group in enumerate(groups) for c in range(len(group.completions)))
    )


def unshared(groups: Sequence[Group]) -> list[Group]:
    """Each completion with a prompt of its own: what training without a shared prefix computes, G times the prompt."""
    return [Group(group.prompt_ids, [completion]) for group in groups for completion in group.completions]


def pack_groups(groups: Sequence[Group], budget: int) -> list[PackedRow]:
    """Packs groups, in order of decreasing size, into rows of at most `budget` tokens (first fit).

    A group over the budget is split over several rows that each repeat its prompt: exact, since gradients add.
    Linear in tokens; groups x rows comparisons of integers.

    Raises:
        ValueError: a prompt with its longest completion does not fit into `budget`.
    """
    pieces = [piece for index, group in enumerate(groups) for piece in _split(index, group, budget)]
    rows: list[list[tuple[Group, tuple[tuple[int, int], ...]]]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda p: -p[0].tokens):
        size = piece[0].tokens
        at = next((i for i, free in enumerate(room) if free >= size), None)
        if at is None:
            rows.append([piece])
            room.append(budget - size)
        else:
            rows[at].append(piece)
            room[at] -= size
    return [PackedRow(tuple(g for g, _ in row), tuple(m for _, members in row for m in members)) for row in rows]


def _split(index: int, group: Group, budget: int) -> list[tuple[Group, tuple[tuple[int, int], ...]]]:
    """The group as pieces that fit, each with the prompt."""
    prompt = len(group.prompt_ids)
    if group.tokens <= budget:
        return [(group, tuple((index, c) for c in range(len(group.completions))))]
    pieces: list[list[int]] = []
    room = 0
    for c, completion in sorted(enumerate(group.completions), key=lambda item: -len(item[1])):
        if prompt + len(completion) > budget:
            raise ValueError(
                f"group {index}: a prompt of {prompt} tokens with a completion of {len(completion)} does not fit into the "
                f"budget of {budget} tokens a row; raise micro_batch_tokens or lower the phase's limits"
            )
        if not pieces or room < len(completion):
            pieces.append([])
            room = budget - prompt
        pieces[-1].append(c)
        room -= len(completion)
    return [
        (
            Group(group.prompt_ids, [group.completions[c] for c in sorted(piece)]),
            tuple((index, c) for c in sorted(piece)),
        )
        for piece in pieces
    ]


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
