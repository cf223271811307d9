"""A trainer's batch as groups, and the values of its tokens there and back.

Trainers (TRL, verl) hold full sequences in an order of their own: shuffled, padded or nested. A prompt is shared among
neighbours alone, so sequences of one prompt are put side by side again, and it is remembered where each token stood:

    groups              for `completion_logprobs` and `completion_policy_loss`, whose [N] is in their order
    gather(x)           the trainer's values -> [N]
    padded(values)      [N] -> [B, R], zeros where there is no token
    predicted(values)   [N] -> one value for each token of all sequences, at the token that predicts it
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sequences import group_sequences, prompt_hash


class Regrouped:
    """B sequences as groups.

    Args:
        sequences: LongTensors [P_i + R_i], without padding.
        prompt_lengths: P_i of each.
        slots: where each completion's tokens stand among its values in a padded batch, LongTensors [R_i]; its first R_i
            unless given.

    Raises:
        ValueError: as `group_sequences`.
    """

    def __init__(
        self, sequences: Sequence[Tensor], prompt_lengths: Sequence[int], slots: Sequence[Tensor] | None = None
    ) -> None:
        hashes = [prompt_hash(ids[:p]) for ids, p in zip(sequences, prompt_lengths, strict=True)]
        self.order = sorted(range(len(sequences)), key=hashes.__getitem__)
        self.prompt_lengths = [prompt_lengths[i] for i in range(len(sequences))]
        self.lengths = [len(ids) - p for ids, p in zip(sequences, prompt_lengths, strict=True)]
        self.slots = [torch.arange(n) for n in self.lengths] if slots is None else [s.cpu() for s in slots]
        self.groups = group_sequences([sequences[i].cpu() for i in self.order], [prompt_lengths[i] for i in self.order])

    @classmethod
    def from_padded(cls, input_ids: Tensor, mask: Tensor, completion_length: int) -> Regrouped:
        """Of a batch [B, P + R] whose last R are completions, each side padded as `mask` says."""
        kept, p = mask.bool(), input_ids.shape[1] - completion_length
        sequences = [ids[m] for ids, m in zip(input_ids, kept, strict=True)]
        return cls(sequences, kept[:, :p].sum(1).tolist(), [m.nonzero()[:, 0] for m in kept[:, p:]])

    def gather(self, x: Tensor) -> Tensor:
        """[N] of the values of a batch: [B, R] padded, [B, R_i] nested, or [B] and [B, 1] for one of each sequence."""
        rows, each = x.unbind(), not x.is_nested and x[0].numel() == 1
        if len(rows) != len(self.slots):
            raise ValueError(f"values of {len(rows)} sequences for a batch of {len(self.slots)}: give one row for each")
        parts = []
        for i in self.order:
            if each:
                parts.append(rows[i].reshape(1).expand(self.lengths[i]))
                continue
            slots = self.slots[i]
            if len(slots) and int(slots.max()) >= len(rows[i]):
                raise ValueError(
                    f"sequence {i} has {len(rows[i])} values, and a token of its completion stands at {int(slots.max())}: "
                    "give values for completions alone, as wide as they"
                )
            parts.append(rows[i][slots.to(x.device)])
        return torch.cat(parts)

    def padded(self, values: Tensor, width: int) -> Tensor:
        """[N] -> [B, width], differentiable."""
        return self._place(values, [i * width for i in range(len(self.slots))], len(self.slots) * width).view(-1, width)

    def predicted(self, values: Tensor) -> Tensor:
        """[N] -> [sum of P_i + R_i] in the trainer's order, differentiable."""
        starts, total = [], 0
        for p, n in zip(self.prompt_lengths, self.lengths, strict=True):
            starts.append(total + p - 1)
            total += p + n
        return self._place(values, starts, total, packed=True)

    def _place(self, values: Tensor, starts: list[int], size: int, packed: bool = False) -> Tensor:
        """Values of completion i behind starts[i], at its slots or one after the other."""
        places = [starts[i] + (torch.arange(self.lengths[i]) if packed else self.slots[i]) for i in self.order]
        return values.new_zeros(size).index_copy(0, torch.cat(places).to(values.device), values)
