"""Groups out of full sequences, each a prompt with one completion, with the prompts of a group checked to be the same.

A prompt that is shared must be the same tokens for all its completions. Templates and truncation that ran once for each
sequence can make it another one, and nothing later would notice.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from hashlib import blake2b

from torch import Tensor

from .packing import Group, check_ids


def group_sequences(
    sequences: Sequence[Tensor], prompt_lengths: Sequence[int], group_ids: Sequence[Hashable] | None = None
) -> list[Group]:
    """Groups of full sequences, each prompt and completion in one tensor, as trainers hold them (TRL, verl).

    The order stays: the tokens of `completion_hidden` are those of the completions one after the other.

    Args:
        sequences: LongTensors [P + R_i], without padding.
        prompt_lengths: P of each.
        group_ids: which group each belongs to (TRL: `i // num_generations`; verl: `uid`); a group stands together, and
            its prompts must be the same tokens. None: neighbours whose prompts are the same tokens are a group.

    Raises:
        ValueError: prompts of one group differ, a group doesn't stand together, or lengths don't fit.
    """
    prompts = _prompts(sequences, prompt_lengths)
    keys: Sequence[Hashable] = [prompt_hash(p) for p in prompts] if group_ids is None else group_ids
    if len(keys) != len(sequences):
        raise ValueError(f"{len(keys)} group_ids for {len(sequences)} sequences: give one for each")
    groups: list[Group] = []
    first: dict[Hashable, int] = {}
    for i, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        completion = sequences[i][len(prompt) :]
        if not i or key != keys[i - 1]:
            if group_ids is not None and key in first:
                raise ValueError(
                    f"sequence {i} is of group {key!r}, which began at sequence {first[key]} and ended before: sort the "
                    "sequences by group, and what belongs to their tokens with them"
                )
            first[key] = i
            groups.append(Group(prompt, [completion]))
            continue
        _check_same(prompts[first[key]], prompt, first[key], i)
        groups[-1] = Group(groups[-1].prompt_ids, [*groups[-1].completions, completion])
    return groups


def prompt_hash(prompt_ids: Tensor) -> str:
    """A prompt's identity: equal for the same tokens in the same order, and in practice for no others."""
    return blake2b(prompt_ids.cpu().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _prompts(sequences: Sequence[Tensor], prompt_lengths: Sequence[int]) -> list[Tensor]:
    if len(sequences) != len(prompt_lengths):
        raise ValueError(f"{len(prompt_lengths)} prompt_lengths for {len(sequences)} sequences: give one for each")
    for i, (ids, length) in enumerate(zip(sequences, prompt_lengths, strict=True)):
        check_ids(f"sequences[{i}]", ids)
        if not 1 <= length <= len(ids):
            raise ValueError(
                f"prompt_lengths[{i}] is {length}: it must be at least 1 and at most the {len(ids)} tokens of sequence {i}"
            )
    return [ids[:length] for ids, length in zip(sequences, prompt_lengths, strict=True)]


def _check_same(one: Tensor, other: Tensor, i: int, j: int) -> None:
    if prompt_hash(one) == prompt_hash(other):
        return
    both = min(len(one), len(other))
    differing = (one[:both] != other[:both]).nonzero()
    where = f"from token {int(differing[0])} on" if len(differing) else f"in length, {len(one)} and {len(other)} tokens"
    raise ValueError(
        f"sequences {i} and {j} are one group, but their prompts differ {where}: a shared prompt is the same tokens after "
        "template and truncation; tokenize it once for the group, or give each prompt a group of its own"
    )
