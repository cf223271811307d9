"""TRL's GRPOTrainer with Longreach inside: a group's prompt is computed once, and no logits exist.

    trainer = SharedPrefixGRPOTrainer(model, reward_funcs=..., args=GRPOConfig(...), train_dataset=...)

Everything else is TRL's. Log-probs (old, reference, and those of the losses TRL has alone) come from `completion_logprobs`;
grpo, dapo, dr_grpo and bnpo become `completion_policy_loss`, in one pass over the vocabulary. Of TRL's metrics, that pass
leaves out clip_ratio/low_min and clip_ratio/high_max, and its other clip_ratio/* don't count tokens that the correction for
vLLM gives no weight. TRL shuffles completions before it cuts micro-batches, and a prompt is shared within one alone: set
steps_per_generation = 1. Tried with TRL 1.16; one process, text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from longreach.engine import Adopted, Regrouped, base_model, completion_logprobs, completion_policy_loss


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose forward and loss are Longreach's; arguments as there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1 or self.aux_loss_enabled:
            raise ValueError("this example trains dense models in one process: DDP and router losses stay in TRL's own")
        self.adopted = [Adopted(model) for model in (self.model, self.ref_model) if model is not None]

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.adopted[0].released():  # prompts of several lengths are padded here
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Tensor, mask: Tensor, width: int, *_: Any, compute_entropy: bool = False, **others: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        batch = Regrouped.from_padded(ids, mask, width)
        with self.accelerator.autocast():  # one group at a time is what bounds memory here, not `batch_size`
            parts = [completion_logprobs(base_model(model), [g], temperature=self.temperature) for g in batch.groups]
        entropy = batch.padded(torch.cat([p.entropy for p in parts]), width) if compute_entropy else None
        return batch.padded(torch.cat([p.logp for p in parts]), width), entropy, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if any(inputs.get(name) is not None for name in ("pixel_values", "token_type_ids", "mm_token_type_ids")):
            raise ValueError("this example trains on text alone: hand images to TRL's own GRPOTrainer")
        plain_mean = self.importance_sampling_level == "token" and self.off_policy_mask_threshold is None
        of_entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        if self.loss_type not in ("grpo", "dapo", "dr_grpo", "bnpo") or not plain_mean or of_entropy:
            return super()._compute_loss(model, inputs)  # TRL's formula, on our log-probs
        mask = inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        batch = Regrouped.from_padded(ids, torch.cat([inputs["prompt_mask"], mask], 1), mask.shape[1])
        keep, old, advantages = inputs.get("tool_mask", mask), inputs.get("old_per_token_logps"), inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction:  # min(r A, clip(r) A) w, for w is positive
            advantages = advantages.reshape(len(ids), -1) * inputs["importance_sampling_ratio"]
        with self.accelerator.autocast():
            loss, metrics = completion_policy_loss(
                base_model(model), batch.groups, None if old is None else batch.gather(old), batch.gather(advantages),
                kind=self.loss_type, normalizer=self._normalizer(inputs, keep * mask), temperature=self.temperature,
                keep=batch.gather(keep), clip_low=self.epsilon_low, clip_high=self.epsilon_high, delta=self.args.delta,
                kl_weight=self.beta, ref_logp=batch.gather(inputs["ref_per_token_logps"]) if self.beta else None,
                kl_bias_correction=self.args.use_bias_correction_kl and self.beta != 0.0,
            )  # fmt: skip
        for name, mean in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(mean.value)
        return loss

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """What TRL divides its sum over tokens (of means over sequences for grpo) by."""
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type == "dapo":  # counted over all completions generated at once, of which these are a part
            share = steps / self.args.steps_per_generation if self.model.training else 1.0
            return inputs["num_items_in_batch"].clamp(min=1.0) * share
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0) * steps
        return len(mask) * (self.max_completion_length if self.loss_type == "dr_grpo" else 1) * steps
