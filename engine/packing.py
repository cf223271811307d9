"""A group is one sequence: its prompt is computed once and its G completions hang on it.

A packed row is `[p1 | p2 | ... | c11 ... c1G | c21 ... ]`: prompts first, then completions, so that the queries and
keys of each attention call are contiguous views. Positions of every completion restart at the length of its prompt.
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


@dataclass(frozen=True, eq=False)
class Group:
    """The completions of one prompt.

    Args:
        prompt_ids: LongTensor [P], P >= 1.
        completions: LongTensors [R_i], R_i >= 0.

    Raises:
        ValueError: anything else.
    """

    prompt_ids: Tensor
    completions: Sequence[Tensor]

    def __post_init__(self) -> None:
        check_ids("Group.prompt_ids", self.prompt_ids)
        for i, completion in enumerate(self.completions):
            check_ids(f"Group.completions[{i}]", completion)
        if not len(self.prompt_ids):
            raise ValueError("Group.prompt_ids is empty: the first completion token needs a token that predicts it")

    @property
    def tokens(self) -> int:
        """Tokens that this group takes in a packed row: P + sum(R)."""
        return len(self.prompt_ids) + sum(len(c) for c in self.completions)


@dataclass(frozen=True, eq=False)
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
    return [
        Group(group.prompt_ids, completions)
        for group in groups
        for completions in ([[c] for c in group.completions] or [[]])
    ]


def pack_groups(groups: Sequence[Group], budget: int, *, three_phases: bool = False) -> list[PackedRow]:
    """Packs groups, in order of decreasing size, into rows of at most `budget` tokens (first fit).

    A group over the budget is split over several rows that each repeat its prompt: exact, since gradients add.
    Linear in tokens; groups x rows comparisons of integers.

    Args:
        three_phases: where it costs less, leave such a group whole instead, in a row of its own that is over the
            budget: it is for `completion_hidden` and its kin with the same `budget`.

    Raises:
        ValueError: a prompt with its longest completion does not fit into `budget`.
    """
    pieces = [
        piece
        for index, group in enumerate(groups)
        for piece in (
            [(group, index, list(range(len(group.completions))))]
            if three_phases and three_phases_pay(group, budget)
            else _split(index, group, budget)
        )
    ]
    return [
        PackedRow(tuple(pieces[i][0] for i in row), tuple((pieces[i][1], c) for i in row for c in pieces[i][2]))
        for row in _first_fit([piece[0].tokens for piece in pieces], budget)
    ]


KEPT = 1.5
"""What three phases hold of a prompt beside its row, in tokens of a row for each of its tokens: keys and values of every
layer with the fp32 sums of their gradients are 2 K E (2 + 4) bytes, and a checkpointed layer holds 2 D of a token; this
is for K E = D / 4, as in Qwen3-8B and Llama-3-8B."""


def three_phases_pay(group: Group, budget: int) -> bool:
    """Whether a group over the budget costs less in three phases than in rows that each repeat its prompt.

    They must fit, (1 + KEPT) P and the longest completion: over the budget and fitting means that the completions
    outweigh the prompt by half and more. The cost, in forward passes F of the prompt and of all completions, with
    checkpointed layers (a backward is two forwards, and they are computed again): n rows are 4 (n F_P + F_C), three
    phases 4 F_P + 5 F_C, their completions being forwarded once more. F_C / F_P is sum(R) / P in the linear layers
    and (2 P sum(R) + sum(R^2)) / P^2 in attention; the larger stands for both, so that a yes holds for any model.
    """
    prompt, lengths = len(group.prompt_ids), [len(c) for c in group.completions]
    if group.tokens <= budget or phase_room(group, budget) < max(lengths, default=0):
        return False
    rows = len(_first_fit(lengths, budget - prompt))
    ratio = (2 * prompt * sum(lengths) + sum(n * n for n in lengths)) / prompt**2
    return ratio < 4 * (rows - 1)


def phase_room(group: Group, budget: int) -> int:
    """Completion tokens that three phases may compute at once under a budget of row tokens."""
    return int(budget - (1 + KEPT) * len(group.prompt_ids))


def phase_pieces(group: Group, budget: int) -> list[list[int]]:
    """Which completions three phases compute together.

    Raises:
        ValueError: the budget can't hold the prompt, what is kept of it and the longest completion.
    """
    room, longest = phase_room(group, budget), max((len(c) for c in group.completions), default=0)
    if longest > room:
        raise ValueError(
            f"a prompt of {len(group.prompt_ids)} tokens with a completion of {longest} does not fit into a budget of "
            f"{budget} tokens in three phases, which hold {1 + KEPT} times the prompt: split the group with "
            "pack_groups, or raise the budget"
        )
    return [sorted(piece) for piece in _first_fit([len(c) for c in group.completions], room)]


def _split(index: int, group: Group, budget: int) -> list[tuple[Group, int, list[int]]]:
    """The group as pieces that fit, each with the whole prompt: (piece, index, which completions)."""
    prompt, lengths = len(group.prompt_ids), [len(c) for c in group.completions]
    longest = max(lengths, default=0)
    if prompt + longest > budget:
        raise ValueError(
            f"group {index}: a prompt of {prompt} tokens with a completion of {longest} does not fit into the budget "
            f"of {budget} tokens a row; raise the budget (micro_batch_tokens in a recipe) or lower the length limits"
        )
    if group.tokens <= budget:
        return [(group, index, list(range(len(lengths))))]
    pieces = [sorted(piece) for piece in _first_fit(lengths, budget - prompt)]
    return [(Group(group.prompt_ids, [group.completions[c] for c in piece]), index, piece) for piece in pieces]


def _first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `sizes` in bins of `room`: largest first, each into the first bin that has space for it."""
    bins: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = next((b for b, space in enumerate(free) if space >= sizes[i]), len(bins))
        if at == len(bins):
            bins.append([])
            free.append(room)
        bins[at].append(i)
        free[at] -= sizes[i]
    return bins


def check_ids(name: str, ids: object) -> None:
    """Raises ValueError for what isn't a row of token ids."""
    if not isinstance(ids, Tensor):
        raise ValueError(f"{name} must be a LongTensor of one dimension, not {type(ids).__name__}")
    if ids.ndim != 1 or ids.dtype != torch.long:
        raise ValueError(f"{name} must be a LongTensor of one dimension, not {ids.dtype} {tuple(ids.shape)}")


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
