"""Loading, checking and saving a transformers causal LM.

Weights come from safetensors alone (nothing is unpickled) and no code from a model directory runs unless asked for.
What we can't honour is refused here, before the first step, and `verify` compares our path through the model with
transformers' own on a few tokens, so that a model which scales its logits or ignores the attention interface can't
train on wrong numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import attention
from .completions import completion_logprobs
from .packing import Group

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the named linear layers (needs the `lora` extra)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, not {self.rank}")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held.

    `dtype` is of the weights that the optimizer changes; with `autocast` fp32 weights compute in bfloat16, which keeps
    small updates (2e-6) that bfloat16 weights would round away. `yarn` stretches the positions by that factor.
    """

    path: str
    dtype: str = "float32"
    autocast: bool = False
    device: str = "auto"
    yarn: float | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")
        if self.autocast and self.dtype != "float32":
            raise ValueError(
                f"model.autocast computes fp32 weights in bfloat16; with dtype = {self.dtype!r} it does nothing"
            )
        if self.yarn is not None and self.yarn <= 1.0:
            raise ValueError(f"model.yarn must be a factor above 1, not {self.yarn}")


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    with _naming(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no eos token: a completion could never end; set eos_token in it")
    return tokenizer


def read_config(path: str | Path, *, yarn: float | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration, with YaRN applied: enough to know its window before any weight is loaded."""
    with _naming(path):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if yarn is not None:
        text = config.get_text_config()
        original = text.max_position_embeddings
        rope = dict(text.rope_parameters or {})
        rope.update(rope_type="yarn", factor=yarn, original_max_position_embeddings=original)
        text.rope_parameters = rope
        text.max_position_embeddings = int(original * yarn)
    return config


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    yarn: float | None = None,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
    lora: LoraConfig | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """A transformers causal LM with its own parameter names and our attention, in training mode on `device`.

    Raises:
        ValueError: the model has a feature that our attention can't honour (sliding window, attention dropout,
            attention soft-cap), or its log-probs through our path differ from its own.
    """
    config = read_config(path, yarn=yarn, trust_remote_code=trust_remote_code)
    refuse_unsupported(config, path)
    with _naming(path):
        model = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    if lora is not None:
        from .lora import add_lora  # peft is an extra

        add_lora(model, lora)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(pick_device() if device is None else device)
    if verify:
        verify_model(model)
    return model.train()


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """transformers reports a model that can't be had as OSError with a page of text: the user's error is one line."""
    try:
        yield
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"no model can be loaded from {path!s}: {first}") from error


def refuse_unsupported(config: PreTrainedConfig, path: str | Path) -> None:
    """Raises ValueError for what our attention would silently get wrong."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None) or []
    unknown = sorted({kind for kind in layers if kind != "full_attention"})
    windowed = getattr(text, "use_sliding_window", False) or (
        "layer_types" not in text.to_dict() and getattr(text, "sliding_window", None)
    )
    if unknown or windowed:
        raise ValueError(
            f"{path} has layers that aren't full attention ({', '.join(unknown) or 'sliding window'}): not supported"
        )
    if getattr(text, "attention_dropout", 0.0):
        raise ValueError(
            f"{path} trains with attention dropout {text.attention_dropout}: set attention_dropout to 0 in its config"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"{path} caps its attention scores ({text.attn_logit_softcapping}): not supported")
    if config.is_encoder_decoder:
        raise ValueError(f"{path} is an encoder-decoder: Longreach trains causal language models")


@torch.no_grad()
def verify_model(model: PreTrainedModel) -> None:
    """Log-probs of a shared-prefix packed row against the model's own logits, sequence by sequence.

    The bound is loose enough for bfloat16 and far below what a wrong mask, position or logit scale makes (about 1).
    """
    training = model.training
    model.eval()
    draw = torch.Generator().manual_seed(0)
    vocab = model.get_input_embeddings().weight.shape[0]
    prompt = torch.randint(vocab, (7,), generator=draw)
    completions = [torch.randint(vocab, (n,), generator=draw) for n in (3, 5)]
    ours = completion_logprobs(model, [Group(prompt, completions)]).logp.float().cpu()
    theirs = torch.cat([_plain_logprobs(model, prompt, c) for c in completions])
    model.train(training)
    bound = 1e-3 if model.dtype == torch.float32 else 0.25
    worst = (ours - theirs).abs().max().item()
    if not worst <= bound:
        raise ValueError(
            f"{type(model).__name__}: log-probs through Longreach differ from the model's own by {worst:.3g} (bound {bound}): "
            "it scales its logits or has attention that isn't plain causal, and can't be trained here"
        )


def _plain_logprobs(model: PreTrainedModel, prompt: Tensor, completion: Tensor) -> Tensor:
    ids = torch.cat([prompt, completion]).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[len(prompt) :, None])[:, 0].cpu()


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's eos and those of the model's generation config."""
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({tokenizer.eos_token_id, *listed}))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The plain model in the transformers layout (adapters merged into a copy), readable by `from_pretrained` and vLLM."""
    weights = None
    if getattr(model, "peft_config", None):
        from .lora import merged_state

        weights = merged_state(model)
    implementation = model.config._attn_implementation
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    assert model.config._attn_implementation == implementation
    tokenizer.save_pretrained(folder)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the optimizer changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
