"""TRL's GRPOTrainer with Longreach inside: a group's prompt is computed once, and no logits exist.

    trainer = SharedPrefixGRPOTrainer(model, reward_funcs=..., args=GRPOConfig(...), train_dataset=...)

Everything else is TRL's: data, generation, rewards, advantages, optimizer, logs. Log-probs (old, reference, and those of
the losses TRL has alone) come from `completion_logprobs`; the loss of grpo, dapo, dr_grpo and bnpo comes from
`completion_policy_loss`, in one pass over the vocabulary. Of TRL's metrics, that pass leaves out clip_ratio/low_min and
clip_ratio/high_max, and its other clip_ratio/* don't count tokens that the correction for vLLM gives no weight. TRL
shuffles completions before it cuts them into micro-batches, and only what stands in one micro-batch shares a prompt: set
steps_per_generation = 1. Tried with TRL 1.16; one process, text alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer

from longreach.engine import Group, completion_logprobs, completion_policy_loss
from longreach.engine.attention import NAME
from longreach.engine.sequences import group_sequences, prompt_hash
from longreach.engine.support import verify_model

ONE_PASS = ("grpo", "dapo", "dr_grpo", "bnpo")
IMAGES = ("pixel_values", "token_type_ids", "mm_token_type_ids")


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose forward and loss are Longreach's; arguments as there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1 or self.aux_loss_enabled:
            raise ValueError("this example trains dense models in one process: DDP and router losses stay in TRL's own")
        self.own_attention = plain(self.model).config._attn_implementation
        for model in [m for m in (self.model, self.ref_model) if m is not None]:
            plain(model).set_attn_implementation(NAME)
            verify_model(plain(model))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # batches of several prompts are padded here, which needs the masks that our attention never makes
        plain(self.model).set_attn_implementation(self.own_attention)
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            plain(self.model).set_attn_implementation(NAME)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: Any = None,
        compute_entropy: bool = False, compute_aux_loss: bool = False, **images: Any,
    ) -> tuple[Tensor, Tensor | None, None]:  # fmt: skip
        groups, places = grouped(input_ids, attention_mask, logits_to_keep)
        with self.accelerator.autocast():  # one group at a time is what bounds memory here, not `batch_size`
            parts = [completion_logprobs(plain(model), [group], temperature=self.temperature) for group in groups]

        def batched(values: list[Tensor]) -> Tensor:
            flat = values[0].new_zeros(len(input_ids) * logits_to_keep)
            return flat.index_copy(0, places, torch.cat(values)).view(len(input_ids), logits_to_keep)

        return batched([p.logp for p in parts]), batched([p.entropy for p in parts]) if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if any(inputs.get(name) is not None for name in IMAGES):
            raise ValueError("this example trains on text alone: hand images to TRL's own GRPOTrainer")
        plain_mean = self.importance_sampling_level == "token" and self.off_policy_mask_threshold is None
        of_entropy = self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0
        if self.loss_type not in ONE_PASS or not plain_mean or of_entropy:
            return super()._compute_loss(model, inputs)  # TRL's formula, on our log-probs
        completion_mask = inputs["completion_mask"]
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        groups, places = grouped(ids, torch.cat([inputs["prompt_mask"], completion_mask], 1), completion_mask.shape[1])

        def of_tokens(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(len(x), -1).expand(completion_mask.shape).flatten()[places]

        advantages = inputs["advantages"].reshape(len(ids), -1)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            advantages = advantages * inputs["importance_sampling_ratio"]  # min(r A, clip(r) A) w, for w is positive
        keep = inputs.get("tool_mask", completion_mask)
        with self.accelerator.autocast():
            loss, metrics = completion_policy_loss(
                plain(model), groups, of_tokens(inputs.get("old_per_token_logps")), of_tokens(advantages),  # type: ignore[arg-type]
                kind=self.loss_type, normalizer=self._normalizer(inputs, keep * completion_mask),
                temperature=self.temperature, keep=of_tokens(keep), clip_low=self.epsilon_low,
                clip_high=self.epsilon_high, delta=self.args.delta, kl_weight=self.beta,
                ref_logp=of_tokens(inputs["ref_per_token_logps"]) if self.beta else None,
                kl_bias_correction=self.args.use_bias_correction_kl and self.beta != 0.0,
            )  # fmt: skip
        for name, mean in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(mean.value)
        return loss

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> Tensor | float:
        """What TRL divides its sum over tokens (of means over sequences for grpo) by."""
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1
        if self.loss_type == "dapo":  # counted over all completions generated at once, of which these are a part
            share = steps / self.args.steps_per_generation if training else 1.0
            return inputs["num_items_in_batch"].clamp(min=1.0) * share
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1.0) * steps
        return len(mask) * (self.max_completion_length if self.loss_type == "dr_grpo" else 1) * steps


def plain(model: Any) -> PreTrainedModel:
    """The transformers model; peft's adapters live inside it."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def grouped(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> tuple[list[Group], Tensor]:
    """Groups of a padded batch [B, P + R], and where each of their tokens stands in its flat completions [B R]."""
    mask, P = attention_mask.bool(), input_ids.shape[1] - completion_length
    prompts = [ids[:P][m[:P]] for ids, m in zip(input_ids, mask, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: prompt_hash(prompts[i]))  # shuffled groups stand together again
    groups = group_sequences([input_ids[i][mask[i]].cpu() for i in order], [len(prompts[i]) for i in order])
    flat = torch.arange(len(prompts) * completion_length, device=mask.device).view(len(prompts), -1)
    return groups, torch.cat([flat[i][mask[i, P:]] for i in order])
