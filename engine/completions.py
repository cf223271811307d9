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

from ..kernels import LogProbs, LowRank, PolicyLoss, linear_logprob, linear_policy_loss, policy_loss
from .attention import Layout, SharedPrefix
from .mesh import Mesh
from .packing import Group, PackedRow, one_row, phase_pieces, unshared
from .sequence_parallel import Part, local_rows, token_costs
from .three_phase import three_phases

_TILE = 8192
"""Vocabulary entries whose half-precision weights are widened at once."""


def completion_hidden(
    model: PreTrainedModel,
    groups: Sequence[Group],
    *,
    shared_prefix: bool = True,
    backend: str = "auto",
    mesh: Mesh | None = None,
    budget: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Final hidden rows that predict each completion token, and those tokens.

    Args:
        groups: packed into one row of sum(P) + sum(R) tokens; split them with `pack_groups` to bound it.
        shared_prefix: False repeats the prompt for each completion: the same values, G times the prompt's work.
        backend: of `longreach.kernels.attention`.
        mesh: the ranks that compute the row together (`mesh.Mesh`): all ranks of a sequence group pass the same groups
            and get the whole result; added up over them, parameter gradients are those of one process
            (`sequence_parallel`).
        budget: tokens of a row. A single group over it is computed in three phases (`three_phase`): the same values,
            in the memory that a row of so many tokens takes with checkpointed layers. None: one row, however long.

    Returns:
        hidden [N, D] in the model's dtype, differentiable; targets [N]; N = sum of R_i in group, completion, token
        order.

    Raises:
        ValueError: no groups; several over the budget; one for which it is too small, or with a mesh one over it; ranks
            of a sequence group that pass different groups; heads or rows that the mesh or its schedule can't do.
    """
    row = _row(groups, shared_prefix, mesh, budget)
    if mesh is not None and mesh.sp > 1:
        part = _part(model, row, mesh, backend)
        return part.whole(part.hidden), row.targets().to(part.hidden.device)
    if budget is not None and row.tokens > budget:
        return _over_budget(model, row, backend, budget)
    hidden_TD = decode(model, row.input_ids(), row.position_ids(), SharedPrefix(row, backend))
    return hidden_TD.index_select(0, row.loss_rows().to(hidden_TD.device)), row.targets().to(hidden_TD.device)


def _row(groups: Sequence[Group], shared_prefix: bool, mesh: Mesh | None, budget: int | None) -> PackedRow:
    if not groups:
        raise ValueError("no groups: hand at least one prompt")
    row = one_row(groups if shared_prefix else unshared(groups))
    if mesh is not None and budget is not None and row.tokens > budget:
        raise ValueError(
            f"a row of {row.tokens} tokens is over the budget of {budget}, and three phases know no mesh, since ranks "
            "would differ in their number of forwards: raise the budget (a mesh shares the row out over "
            f"{mesh.sp} ranks), or make rows with pack_groups and without three_phases"
        )
    return row


def _part(model: PreTrainedModel, row: PackedRow, mesh: Mesh, backend: str) -> Part:
    return local_rows(partial(decode, model), row, mesh, backend, token_costs(model), model.device)


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
    mesh: Mesh | None = None,
    budget: int | None = None,
) -> LogProbs:
    """Log-probs, entropies and log-normalisers of every completion token at `temperature`, fp32 [N], differentiable.

    Arguments and errors as `completion_hidden`. The head is computed in fp32, under autocast too.
    """
    if mesh is not None and mesh.sp > 1:
        part = _part(model, _row(groups, shared_prefix, mesh, budget), mesh, backend)
        head = model_head(model)
        made = linear_logprob(part.hidden, head.weight_VD, part.targets, temperature=temperature, **head.options())
        return part.whole_logprobs(made)
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
    mesh: Mesh | None = None,
    budget: int | None = None,
    **options: Any,
) -> PolicyLoss:
    """The policy loss of the groups' completions, of each token one [N] entry in group, completion, token order.

    `longreach.kernels.linear_policy_loss` of `completion_hidden`: one pass over the vocabulary where the kind allows.
    `old_logp` (None: on-policy), `advantages` and the tensors among `options` are [N] on the model's device; a
    completion is a sequence. On a mesh, whose ranks each make the log-probs of their own rows, it is two passes. Errors as
    of both.
    """
    lengths = torch.tensor([len(c) for group in groups for c in group.completions], device=model.device)
    sequence_ids = torch.arange(len(lengths), device=model.device).repeat_interleave(lengths)
    if mesh is not None and mesh.sp > 1:
        made = completion_logprobs(
            model,
            groups,
            temperature=temperature,
            shared_prefix=shared_prefix,
            backend=backend,
            mesh=mesh,
            budget=budget,
        )
        return policy_loss(
            made.logp, old_logp, advantages, sequence_ids, kind=kind, normalizer=normalizer, entropy=made.entropy,
            **options,
        )  # fmt: skip
    hidden_ND, targets_N = completion_hidden(
        model, groups, shared_prefix=shared_prefix, backend=backend, mesh=mesh, budget=budget
    )
    head = model_head(model)
    return linear_policy_loss(
        hidden_ND, head.weight_VD, targets_N, old_logp, advantages, sequence_ids,
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
