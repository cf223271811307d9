"""Hidden states and log-probs of completion tokens: the one forward that everything goes through.

SFT, policy updates, old and reference log-probs and the difficulty pass all call `completion_hidden`. Prompts are
computed once for all their completions, hidden rows are taken for completion tokens alone, and the vocabulary is met
only in `linear_logprob`, so no [T, V] tensor exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..kernels import LogProbs, LowRank, PolicyLoss, linear_logprob, linear_policy_loss
from .attention import Layout, SharedPrefix
from .packing import Group, PackedRow, one_row, phase_pieces, unshared
from .three_phase import three_phases

_TILE = 8192
"""Vocabulary entries whose half-precision weights are widened at once."""


def completion_hidden(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    shared_prefix: bool = True,
    backend: str = "auto",
    mesh: None = None,
    budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Final hidden rows that predict each completion token, and those tokens.

    Args:
        groups: packed into one row of sum(P) + sum(R) tokens; split them with `pack_groups` to bound it.
        shared_prefix: False repeats the prompt for each completion: the same values, G times the prompt's work.
        backend: of `longreach.kernels.attention`.
        mesh: sequence parallelism; None is one device, the only form so far.
        budget: tokens of a row. A single group over it is computed in three phases (`three_phase`): the same values,
            in the memory that a row of so many tokens takes with checkpointed layers. None: one row, however long.

    Returns:
        hidden [N, D] in the model's dtype, differentiable; targets [N]; N = sum of R_i in group, completion, token
        order.

    Raises:
        ValueError: no groups; several over the budget; one for which it is too small.
    """
    if mesh is not None:
        raise ValueError("sequence parallelism is not available yet: pass mesh=None")
    if not groups:
        raise ValueError("no groups: hand at least one prompt")
    row = one_row(groups if shared_prefix else unshared(groups))
    if budget is not None and row.tokens > budget:
        return _over_budget(model, row, backend, budget)
    hidden_TD = decode(model, row.input_ids(), row.position_ids(), SharedPrefix(row, backend))
    return hidden_TD.index_select(0, row.loss_rows().to(hidden_TD.device)), row.targets().to(hidden_TD.device)


def _over_budget(model: PreTrainedModel, row: PackedRow, backend: str, budget: int) -> tuple[Tensor, Tensor]:
    if len(row.groups) > 1:
        raise ValueError(
            f"{len(row.groups)} groups of {row.tokens} tokens together are over the budget of {budget}: only a single "
            "group with a shared prefix can be computed in three phases; make rows with pack_groups"
        )
    [group] = list(row.groups)
    parameters = [p for p in model.get_decoder().parameters() if p.requires_grad]
    hidden = three_phases(partial(decode, model), parameters, group, phase_pieces(group, budget), backend)
    before = row.prompt_tokens - 1  # rows that no completion token hangs on, and that don't come back
    return hidden.index_select(0, (row.loss_rows() - before).to(hidden.device)), row.targets().to(hidden.device)


def completion_logprobs(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    temperature: float = 1.0,
    shared_prefix: bool = True,
    backend: str = "auto",
    mesh: None = None,
    budget: int | None = None,
) -> LogProbs:
    """Log-probs, entropies and log-normalisers of every completion token at `temperature`, fp32 [N], differentiable.

    Arguments and errors as `completion_hidden`. The head is computed in fp32, under autocast too.
    """
    hidden_ND, targets_N = completion_hidden(
        model, groups, shared_prefix=shared_prefix, backend=backend, mesh=mesh, budget=budget
    )
    head = model_head(model)
    return linear_logprob(hidden_ND, head.weight_VD, targets_N, temperature=temperature, **head.options())


def completion_policy_loss(
    model: PreTrainedModel,
    groups: Sequence[Group],
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    kind: str,
    normalizer: float | Tensor,
    temperature: float = 1.0,
    shared_prefix: bool = True,
    backend: str = "auto",
    mesh: None = None,
    budget: int | None = None,
    **options: Any,
) -> PolicyLoss:
    """The policy loss of the groups' completions, of each token one [N] entry in group, completion, token order.

    `longreach.kernels.linear_policy_loss` of `completion_hidden`: one pass over the vocabulary where the kind allows.
    `old_logp` (None: on-policy), `advantages` and the tensors among `options` are [N] on the model's device; a
    completion is a sequence. Errors as of both.
    """
    hidden_ND, targets_N = completion_hidden(
        model, groups, shared_prefix=shared_prefix, backend=backend, mesh=mesh, budget=budget
    )
    head = model_head(model)
    lengths = torch.tensor([len(c) for group in groups for c in group.completions], device=targets_N.device)
    return linear_policy_loss(
        hidden_ND, head.weight_VD, targets_N, old_logp, advantages,
        torch.arange(len(lengths), device=targets_N.device).repeat_interleave(lengths),
        kind=kind, normalizer=normalizer, temperature=temperature, **head.options(), **options,
    )  # fmt: skip


def decode(model: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, layout: Layout) -> Tensor:
    """Hidden states [T, D] of the model's decoder, its tokens seeing each other as `layout` says."""
    ids, positions = ids_T.to(model.device), positions_T.to(model.device)
    output = model.get_decoder()(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0]


class Head(NamedTuple):
    """The language-model head: weight [V, D], bias [V] or None, final soft-cap or None, LoRA adapter or None."""

    weight_VD: Tensor
    bias: Tensor | None
    softcap: float | None
    lora: LowRank | None = None

    def options(self) -> dict[str, Any]:
        """What `linear_logprob` takes beside the weight."""
        return {"bias": self.bias, "softcap": self.softcap, "lora": self.lora}

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] in fp32 (fp64 for fp64), as `linear_logprob` sees them: neither autocast nor bfloat16 rounds them."""
        wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, self.weight_VD.dtype), torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            logits = self._product(hidden_ND, wide)
            if self.lora is not None:
                low = hidden_ND.to(wide) @ self.lora.down.to(wide).t()
                logits = logits.addmm_(low, self.lora.up.to(wide).t(), alpha=self.lora.scale)
            if self.bias is not None:
                logits += self.bias.to(wide)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def _product(self, hidden_ND: Tensor, wide: torch.dtype) -> Tensor:
        weight = self.weight_VD
        if weight.is_cuda and hidden_ND.dtype == weight.dtype != wide:
            return torch.mm(hidden_ND, weight.t(), out_dtype=wide)
        hidden = hidden_ND.to(wide)
        if weight.dtype == wide:
            return hidden @ weight.t()
        return torch.cat([hidden @ tile.to(wide).t() for tile in weight.split(_TILE)], dim=1)


def model_head(model: PreTrainedModel) -> Head:
    """The head of a model that `load_model` has let through.

    Raises:
        ValueError: the head isn't one plain linear layer, or one with a single LoRA adapter beside it (what else may
            stand there would be passed over).
    """
    head, lora = model.get_output_embeddings(), None
    if isinstance(head, nn.Module) and isinstance(getattr(head, "base_layer", None), nn.Linear):
        head, lora = head.base_layer, _adapter(head)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the head of {type(model).__name__} is a {type(head).__name__}, not a plain linear layer")
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Head(head.weight, head.bias, softcap, lora)


def _adapter(head: Any) -> LowRank | None:
    """peft's adapter on the head; told by its parts, since peft need not be installed."""
    names = [] if head.disable_adapters or head.merged else list(head.active_adapters)
    if not names:
        return None
    plain = len(names) == 1 and names[0] in head.lora_A and names[0] not in getattr(head, "lora_variant", {})
    if not plain or not isinstance(head.lora_dropout[names[0]], nn.Identity):
        raise ValueError(f"the head has adapters {names}: one plain LoRA adapter without dropout is supported")
    name = names[0]
    return LowRank(head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name])
