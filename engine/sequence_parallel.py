"""One packed row's forward over the ranks of a sequence group, seen from one of them.

Every rank is handed the same groups and runs the decoder on its own tokens. A completion token's row of hidden states
is on one rank: that of the token before it, so the row of a prompt's last token, which predicts the first token of all
its completions, serves completions on other ranks too. Log-probs are computed where the rows are and gathered as numbers,
12 bytes a token, and so neither rows nor the head's work are repeated; only `completion_hidden` gathers rows.

Each rank gets the whole result, bit for bit the same, and computes the same loss from it, so the gather's backward hands
each its own slice unsummed. The gradients of all parameters, the head's among them, are then partial sums: added up over
the sequence group they are those of one process.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels import LogProbs
from .exchange import exchange, gather_rows
from .mesh import Mesh
from .packing import PackedRow
from .parallel_attention import ParallelSharedPrefix
from .ring_flash import RingFlash, cut_plain
from .shards import Held, TokenCosts, cut_row
from .three_phase import Decode


@dataclass(frozen=True, eq=False)
class Part:
    """What one rank has of a row's N loss rows: hidden [n, D] and targets [n]."""

    hidden: Tensor
    targets: Tensor
    cut: Held
    mesh: Mesh

    def whole(self, mine: Tensor) -> Tensor:
        """[N, ...] from every rank's [n, ...]."""
        return gather_rows(mine, [entries for entries, _ in self.cut.losses], self.mesh.sequence_group)

    def whole_logprobs(self, mine: LogProbs) -> LogProbs:
        return LogProbs(*self.whole(torch.stack(mine, 1)).unbind(1))


def local_rows(
    decode: Decode, row: PackedRow, mesh: Mesh, backend: str, costs: TokenCosts, device: torch.device
) -> Part:
    """This rank's part of the row's loss rows; a collective call of its sequence group.

    Args:
        decode: the model's decoder, called once.
        device: where its hidden states are.
    """
    check_same(row, mesh, device, (backend, mesh.config, torch.is_grad_enabled()))
    if mesh.config.schedule == "ring-flash-attn":
        cut = cut_plain(row, mesh)
        layout = RingFlash(cut, mesh)
    else:
        cut = cut_row(row, mesh.ring, mesh.ulysses, costs)
        layout = ParallelSharedPrefix(cut, mesh, backend)
    held = cut.tokens[mesh.sequence_rank]
    held = held if len(held) else torch.zeros(1, dtype=torch.long)  # a token that nothing reads
    entries, rows = cut.losses[mesh.sequence_rank]
    hidden_TD = decode(row.input_ids()[held], row.position_ids()[held], layout)
    return Part(hidden_TD.index_select(0, rows.to(device)), row.targets()[entries].to(device), cut, mesh)


def check_same(row: PackedRow, mesh: Mesh, device: torch.device, settings: tuple[Any, ...]) -> None:
    """Raises ValueError on all ranks of the sequence group where they were handed different groups or settings."""
    digest = hashlib.sha256(repr((row.prompt_lengths, row.completion_lengths, *settings)).encode())
    digest.update(row.input_ids().numpy().tobytes())
    mine = torch.from_numpy(np.frombuffer(digest.digest()[:8], dtype=np.int64).copy()).to(device)
    found = exchange([mine] * mesh.sp, [1] * mesh.sp, mesh.sequence_group)
    if len(set(found.tolist())) > 1:
        raise ValueError(
            f"the {mesh.sp} ranks of a sequence group were handed different groups or settings: the ranks that share a "
            "row (Mesh.sequence_group) must all pass the same; only data ranks pass different ones"
        )


def token_costs(model: PreTrainedModel) -> TokenCosts:
    """In pairs of a query and a key, 4 H E operations a layer each; 2 operations for each weight that a token meets."""
    config: Any = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pair = 4 * config.num_attention_heads * width * config.num_hidden_layers
    decoder: nn.Module = model.get_decoder()
    weights = sum(p.numel() for p in decoder.parameters() if p.ndim == 2)
    vocabulary = sum(p.numel() for p in model.get_input_embeddings().parameters())
    return TokenCosts(2 * max(0, weights - vocabulary) / pair, 2 * vocabulary / pair)
