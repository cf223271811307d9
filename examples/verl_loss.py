"""verl's FSDP2 engine with Longreach inside: a group's prompt is computed once, and no logits exist.

    actor_rollout_ref.actor.strategy=fsdp2 actor_rollout_ref.model.external_lib=verl_loss

Importing this file is all: it registers an engine that verl prefers on NVIDIA GPUs. Old and reference log-probs, and those
of every other loss of verl, come from `completion_logprobs`; verl's `ppo_loss` with loss_mode "vanilla" becomes
`completion_policy_loss`, one pass over the vocabulary, with verl's aggregation, dual clip, KL, entropy and rollout weights.
Only what stands in one micro-batch shares a prompt: let micro-batches hold whole groups, and leave balancing by length
(trainer.balance_batch) off. Tried with verl 0.9.1, whose package asks for an older transformers than Longreach does; data
parallel, without Ulysses.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import detach_tree
from verl.workers.utils.losses import ppo_loss

from longreach.engine import Adopted, Regrouped, completion_logprobs, completion_policy_loss

KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
"""verl's names. Its k3 is cut off at 10 for a token; ours isn't."""


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor="nvidia")
class SharedPrefixEngine(FSDPEngineWithLMHead):
    """FSDPEngineWithLMHead whose forward and loss are Longreach's."""

    def _build_fsdp_module(self, module: Any) -> Any:
        if self.use_ulysses_sp:
            raise ValueError("this example has no Ulysses: set ulysses_sequence_parallel_size to 1")
        Adopted(module, verify=next(module.parameters()).device.type != "meta")  # other ranks wait for rank 0's weights
        module = super()._build_fsdp_module(module)
        # FSDP2 gathers weights around `forward` alone unless told; a function passes through its casts of arguments
        module.within = MethodType(lambda model, call: call(model), module)
        register_fsdp_forward_method(module, "within")
        return module

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> tuple[Tensor, dict[str, Any]]:
        data, output = micro_batch.to(get_device_id()), {}
        batch, heat = regrouped(data), data["temperature"]
        heat = batch.gather(heat) if isinstance(heat, Tensor) else heat
        with torch.autocast(get_device_name(), self._autocast_dtype, enabled=self._autocast_dtype != torch.float32):
            if not forward_only and is_vanilla(loss_function):
                config = loss_function.keywords["config"]
                loss, metrics = self.module.within(lambda model: vanilla_loss(model, batch, data, heat, config))
            else:
                made = self.module.within(lambda model: completion_logprobs(model, batch.groups, temperature=heat))
                offsets = data["input_ids"].offsets()
                for name, values in (("log_probs", made.logp), ("entropy", made.entropy)):
                    output[name] = torch.nested.nested_tensor_from_jagged(batch.predicted(values), offsets)
                group = self.get_data_parallel_group()
                loss, metrics = torch.ones((), device=get_device_id()), {}
                if loss_function is not None:
                    loss, metrics = loss_function(model_output=output, data=data, dp_group=group)
        return loss, {"model_output": detach_tree(output), "loss": loss.detach().item(), "metrics": metrics}


def is_vanilla(loss_function: Any) -> bool:
    """Whether a loss is verl's own, with settings that `completion_policy_loss` has."""
    if not isinstance(loss_function, partial) or loss_function.func is not ppo_loss:
        return False
    config = loss_function.keywords["config"]
    known_kl = not config.use_kl_loss or config.kl_loss_type in KL
    return known_kl and config.policy_loss.get("loss_mode", "vanilla") == "vanilla"


def regrouped(data: Any) -> Regrouped:
    sequences, r = data["input_ids"].unbind(), data["responses"]
    own = r.offsets().diff() if r.is_nested else data["attention_mask"][:, -r.shape[1] :].sum(1)
    return Regrouped(sequences, [len(ids) - n for ids, n in zip(sequences, own.tolist(), strict=True)])


def vanilla_loss(model: Any, batch: Regrouped, data: Any, heat: Any, config: Any) -> tuple[Tensor, dict[str, Any]]:
    """`ppo_loss` of this batch, its share of the global one as verl counts it."""
    keep, advantages = batch.gather(data["response_mask"]), batch.gather(data["advantages"])
    if "rollout_is_weights" in data:
        advantages = advantages * batch.gather(data["rollout_is_weights"])
    kind, normalizer = aggregation(batch, data, keep, config)
    loss, means = completion_policy_loss(
        model, batch.groups, batch.gather(data["old_log_probs"]), advantages, kind=kind, normalizer=normalizer,
        temperature=heat, keep=keep, clip_low=config.clip_ratio_low, clip_high=config.clip_ratio_high,
        dual_clip=config.clip_ratio_c, entropy_weight=float(config.entropy_coeff),
        ref_logp=batch.gather(data["ref_log_prob"]) if config.use_kl_loss else None,
        kl_weight=config.kl_loss_coef if config.use_kl_loss else 0.0, kl=KL.get(config.kl_loss_type, "k3"),
    )  # fmt: skip
    told = {"actor/pg_clipfrac": "clip_ratio/region_mean", "actor/entropy": "entropy", "actor/kl": "kl"}
    metrics = {name: Metric(AggregationType.MEAN, means[own].value) for name, own in told.items() if own in means}
    return loss, {"actor/loss": Metric(AggregationType.SUM, loss.detach()), **metrics}


def aggregation(batch: Regrouped, data: Any, keep: Tensor, config: Any) -> tuple[str, float]:
    """The kind that sums as `loss_agg_mode` does, and what it divides by; FSDP averages over ranks later."""
    mode, ranks, mask = config.loss_agg_mode, data["dp_size"], data["response_mask"]
    if mode in ("token-mean", "token-sum"):
        return "dapo", (float(data["batch_num_tokens"] or keep.sum()) if mode == "token-mean" else 1.0) / ranks
    parts = keep.split([batch.lengths[i] for i in batch.order])
    sequences = float(data["global_batch_size"] or sum(bool(part.any()) for part in parts)) / ranks
    if mode == "seq-mean-token-mean":
        return "grpo", sequences
    width = max(batch.lengths) if mask.is_nested else mask.shape[1]
    return "dr_grpo", sequences * ((config.loss_scale_factor or width) if mode == "seq-mean-token-sum-norm" else 1)
