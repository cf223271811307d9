"""Hidden states and log-probs of completion tokens: the one forward that everything goes through.

SFT, policy updates, old and reference log-probs and the difficulty pass all call `completion_hidden`. Prompts are
computed once for all their completions, hidden rows are taken for completion tokens alone, and the vocabulary is met
only in `linear_logprob`, so no [T, V] tensor exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..kernels import LogProbs, linear_logprob
from .attention import SharedPrefix
from .packing import Group, one_row, unshared


def completion_hidden(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    shared_prefix: bool = True,
    backend: str = "auto",
    mesh: None = None,
) -> tuple[Tensor, Tensor]:
    """Final hidden rows that predict each completion token, and those tokens.

    Args:
        groups: packed into one row of sum(P) + sum(R) tokens; split them with `pack_groups` to bound it.
        shared_prefix: False repeats the prompt for each completion: the same values, G times the prompt's work.
        backend: of `longreach.kernels.attention`.
        mesh: sequence parallelism; None is one device, the only form so far.

    Returns:
        hidden [N, D] in the model's dtype, differentiable; targets [N]; N = sum of R_i in group, completion, token order.
    """
    if mesh is not None:
        raise ValueError("sequence parallelism is not available yet: pass mesh=None")
    row = one_row(groups if shared_prefix else unshared(groups))
    device = model.device
    output = model.get_decoder()(
        input_ids=row.input_ids().to(device)[None],
        position_ids=row.position_ids().to(device)[None],
        use_cache=False,
        layout=SharedPrefix(row, backend),
    )
    hidden_TD = output.last_hidden_state[0]
    return hidden_TD.index_select(0, row.loss_rows().to(device)), row.targets().to(device)


def completion_logprobs(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    shared_prefix: bool = True,
    backend: str = "auto",
    mesh: None = None,
) -> LogProbs:
    """Log-probs, entropies and log-normalisers of every completion token at `temperature`, fp32 [N], differentiable."""
    hidden_ND, targets_N = completion_hidden(model, groups, shared_prefix=shared_prefix, backend=backend, mesh=mesh)
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the head keeps full precision under mixed precision
        head = model_head(model)
        return linear_logprob(
            hidden_ND, head.weight_VD, targets_N, bias=head.bias, softcap=head.softcap, temperature=temperature
        )


class Head(NamedTuple):
    """The language-model head: weight [V, D], bias [V] or None, final soft-cap or None."""

    weight_VD: Tensor
    bias: Tensor | None
    softcap: float | None


def model_head(model: PreTrainedModel) -> Head:
    head = model.get_output_embeddings()
    assert head is not None, "load_model refuses models without a linear head"
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(head.weight, getattr(head, "bias", None), softcap)
