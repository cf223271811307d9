"""Which models can be trained here: what we can't honour is refused before the first step, never ignored.

Two nets. `refuse_config` and `refuse_model` name features that would be wrong in silence. `verify_model` catches the
rest: it sees whether every layer attends through transformers' interface, and compares our path through the loaded
model with transformers' own attention on a few tokens, so a model that scales its logits or mixes tokens outside
attention can't train on wrong numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .completions import completion_logprobs, decode, model_head
from .packing import Group

EXACT_BOUND, HALF_BOUND = 1e-3, 0.25
"""Mean difference of log-probs allowed in fp32 and in half precision: a wrong mask, position or scale makes about 1."""


def refuse_config(config: PreTrainedConfig, path: str | Path) -> None:
    """Raises ValueError for what can be seen before any weight is loaded."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ValueError(f"{path} is an encoder-decoder: Longreach trains causal language models")
    partial = sorted({kind for kind in getattr(text, "layer_types", None) or [] if kind != "full_attention"})
    # models with layer_types state their window whether a layer uses it or not
    windowed = "layer_types" not in text.to_dict() and getattr(text, "sliding_window", None)
    if partial or windowed:
        what = ", ".join(partial) or f"a sliding window of {text.sliding_window}"
        raise ValueError(f"{path} has layers that aren't full attention ({what}): not supported")
    if getattr(text, "attention_dropout", 0.0):
        raise ValueError(
            f"{path} trains with attention dropout {text.attention_dropout}: set attention_dropout to 0 in its config"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"{path} caps its attention scores ({text.attn_logit_softcapping}): not supported")
    _refuse_by_length(text, path)
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            f"{path} asks for a load-balancing loss of its experts (output_router_logits), and none is added here: a "
            "shared prompt would count in it once instead of once for each completion; set output_router_logits to false"
        )


def _refuse_by_length(text: PreTrainedConfig, path: str | Path) -> None:
    """Positions that turn by the longest sequence of a call: in a packed row, by another completion's length."""
    rope = getattr(text, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some models have one a layer type
    kinds = sorted({part["rope_type"] for part in parts if part.get("rope_type") in ("dynamic", "longrope")})
    if kinds:
        raise ValueError(
            f"{path} stretches its positions by the length of what it is given (rope_type {kinds[0]!r}), so a completion "
            "in a packed row would get another's positions: not supported; yarn, llama3 and linear are"
        )


def refuse_model(model: PreTrainedModel, path: str | Path) -> None:
    """Raises ValueError for what only the loaded model shows."""
    model_head(model)
    dropping = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if dropping:
        raise ValueError(
            f"{path} trains with dropout ({dropping[0]} and {len(dropping) - 1} more), so that log-probs of the same "
            "weights differ from call to call: set the dropouts in its config.json to 0"
        )


class _Seen:
    """A layout that notes which layers ask it."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        self.layers.add(layer)
        return torch.zeros_like(q_THE)


@torch.no_grad()
def verify_model(model: PreTrainedModel) -> None:
    """Log-probs of a shared-prefix packed row, in the model's own mode, against its own logits by eager attention.

    Raises:
        ValueError: they differ by more than rounding, or a layer attends past our attention.
    """
    seen, layers = _Seen(), model.config.get_text_config().num_hidden_layers
    decode(model, torch.zeros(2, dtype=torch.long), torch.arange(2), seen)
    if len(seen.layers) != layers:
        raise ValueError(
            f"{type(model).__name__}: {len(seen.layers)} of its {layers} layers attend through transformers' attention "
            "interface; only models that do so throughout can be trained here"
        )
    groups = _some_groups(model)
    ours = completion_logprobs(model, groups).logp.cpu()
    own, training = model.config._attn_implementation, model.training
    assert own is not None
    model.eval()
    model.set_attn_implementation("eager")
    try:
        theirs = torch.cat([_own_logprobs(model, g.prompt_ids, c) for g in groups for c in g.completions])
    finally:
        model.set_attn_implementation(own)
        model.train(training)
    bound, difference = _bound(model), (ours - theirs).abs().mean().item()
    if not difference <= bound:
        raise ValueError(
            f"{type(model).__name__}: log-probs through Longreach differ from the model's own by {difference:.3g} on "
            f"average (at most {bound}): it scales its logits, or its attention isn't plain causal, or it is random in "
            "training; it can't be trained here"
        )


@torch.no_grad()
def verify_change(model: PreTrainedModel, change: Callable[[PreTrainedModel], object]) -> None:
    """Makes a change that must not change what the model computes. ValueError if log-probs differ by more than rounding."""
    groups = _some_groups(model)
    before = completion_logprobs(model, groups).logp
    change(model)
    difference = (completion_logprobs(model, groups).logp - before).abs().mean().item()
    if not difference <= _bound(model):
        name = getattr(change, "__name__", str(change))
        raise ValueError(
            f"{type(model).__name__}: log-probs after {name} differ by {difference:.3g} on average (at most {_bound(model)}): "
            "leave it out for this model"
        )


def _some_groups(model: PreTrainedModel) -> list[Group]:
    draw = torch.Generator().manual_seed(0)
    vocab = len(model_head(model).weight_VD)
    prompts = [torch.randint(vocab, (n,), generator=draw) for n in (7, 4)]
    return [Group(prompt, [torch.randint(vocab, (n,), generator=draw) for n in (6, 10)]) for prompt in prompts]


def _bound(model: PreTrainedModel) -> float:
    return HALF_BOUND if model.dtype in (torch.bfloat16, torch.float16) else EXACT_BOUND


def _own_logprobs(model: PreTrainedModel, prompt: Tensor, completion: Tensor) -> Tensor:
    ids = torch.cat([prompt, completion]).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].cpu()
