"""Loading and saving a transformers causal LM.

Weights come from safetensors alone (nothing is unpickled), all of them must be there, and no code from a model
directory runs unless asked for. What can't be honoured is refused before the first step: see `support`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import attention
from .liger import use_liger
from .offload import offload
from .rope import RopeScaling
from .support import refuse_config, refuse_model, verify_change, verify_model
from .tiling import tile
from .whole import whole_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the named linear layers (needs the `lora` extra)."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, not {self.rank}")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be a positive number, not {self.alpha}")
        if not self.targets:
            raise ValueError("lora.targets is empty: name the linear layers that get adapters")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is held.

    `dtype` is of the weights that the optimizer changes; with `autocast` fp32 weights compute in bfloat16, which keeps
    small updates (2e-6) that bfloat16 weights would round away. `yarn` stretches the positions by that factor, as
    `rope_scaling` does with more to say.

    Memory, each with the same results: `gradient_checkpointing` keeps one tensor a layer and computes the rest again,
    `offload_activations` keeps that one on the host, `tile_tokens` computes MLPs and norms in pieces of so many tokens (0 is
    off), `liger` puts Liger's fused norms, MLPs and rotary embeddings in (a GPU and the `liger` extra).
    """

    path: str
    dtype: str = "float32"
    autocast: bool = False
    device: str = "auto"
    yarn: float | None = None
    rope_scaling: RopeScaling | None = None
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    tile_tokens: int = 0
    liger: bool = False
    trust_remote_code: bool = False
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype is {self.dtype!r}: it must be one of {', '.join(DTYPES)}")
        if self.autocast and self.dtype != "float32":
            raise ValueError(
                f"model.autocast computes fp32 weights in bfloat16; with dtype = {self.dtype!r} it does nothing"
            )
        if self.yarn is not None and not 1.0 < self.yarn < math.inf:
            raise ValueError(f"model.yarn must be a factor above 1, not {self.yarn}")
        if self.yarn is not None and self.rope_scaling is not None:
            raise ValueError("model.yarn and [model.rope_scaling] both stretch the positions: keep one of them")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "model.offload_activations moves what checkpointed layers keep: set model.gradient_checkpointing = true"
            )
        if self.tile_tokens < 0:
            raise ValueError(f"model.tile_tokens must be 0 (off) or a number of tokens, not {self.tile_tokens}")


def pick_device(name: str = "auto") -> torch.device:
    """ "auto" is the GPU if there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    with _naming(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {path} has no eos token: a completion could never end; set eos_token in it")
    return tokenizer


def read_config(
    path: str | Path,
    *,
    yarn: float | None = None,
    rope_scaling: RopeScaling | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The model's configuration, its positions stretched: enough to know its window before any weight is loaded.

    Raises:
        ValueError: there is none, or its positions are stretched already.
    """
    assert yarn is None or rope_scaling is None
    with _naming(path):
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    scaling = rope_scaling if yarn is None else RopeScaling("yarn", yarn)
    if scaling is not None:
        scaling.apply(config, path)
    return config


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    yarn: float | None = None,
    rope_scaling: RopeScaling | None = None,
    gradient_checkpointing: bool = False,
    offload_activations: bool = False,
    tile_tokens: int = 0,
    liger: bool = False,
    trust_remote_code: bool = False,
    lora: LoraConfig | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """A transformers causal LM with its own parameter names and our attention, in training mode on `device`.

    Args:
        device: None is the GPU if there is one.
        yarn: factor by which positions are stretched; `rope_scaling`: the same, by one of transformers' ways.
        gradient_checkpointing, offload_activations, tile_tokens, liger: as `ModelConfig` has them.
        verify: compare log-probs with the model's own on a few tokens (`support.verify_model`).

    Raises:
        ValueError: no safetensors weights at `path`, or not all of them, or of another size than its config says; code
            of its own without `trust_remote_code`; a feature that our attention can't honour (sliding window, dropout,
            soft-capped scores); log-probs through our path differ from the model's own; an option about memory that this
            model or machine can't have.
    """
    config = read_config(path, yarn=yarn, rope_scaling=rope_scaling, trust_remote_code=trust_remote_code)
    refuse_config(config, path)
    with _naming(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # typed as if output_loading_info were never set
            str(path),
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    # transformers fills these with random numbers and a warning
    wrong = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} weights are missing or don't fit its config ({', '.join(wrong[:3])})")
    if lora is not None:
        from .lora import add_lora  # peft is an extra

        add_lora(model, lora)
    refuse_model(model, path)
    nn.Module.to(model, pick_device() if device is None else device)
    model.train()
    if verify:
        verify_model(model)
    if liger:
        verify_change(model, use_liger)
    save_memory(model, gradient_checkpointing, offload_activations, tile_tokens, verify=verify)
    return model


def save_memory(
    model: PreTrainedModel,
    gradient_checkpointing: bool = False,
    offload_activations: bool = False,
    tile_tokens: int = 0,
    *,
    verify: bool = True,
) -> None:
    """Turns on what saves memory at the price of time; what the model computes stays.

    Args:
        verify: compute a few numbers to see that MLPs and norms can be tiled; without it no number is looked at.

    Raises:
        ValueError: the model can't.
    """
    if gradient_checkpointing:
        # the newer of two names for one thing; both compute layers again without the reentrant form
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if offload_activations:
        offload(model)
    if tile_tokens:
        tile(model, tile_tokens, verify=verify)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """transformers reports a model that can't be had in several ways, with a page of text; a user's error is a line."""
    local = str(path).startswith(("/", ".", "~")) or str(path).count("/") > 1  # a name on the hub is OWNER/NAME
    if local and not Path(path).is_dir():
        raise ValueError(f"there is no model folder {path!s}: give the folder of a model, or its name on the hub")
    try:
        yield
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"nothing can be loaded from {path!s}: {first}") from error


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's eos and those of the model's generation config."""
    config = model.generation_config
    stops: set[int] = set()
    for named in (tokenizer.eos_token_id, config.eos_token_id if config is not None else None):
        stops.update(named if isinstance(named, list) else [] if named is None else [named])  # type: ignore[arg-type]
    return tuple(sorted(stops))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> None:
    """The plain model in the transformers layout, readable by `from_pretrained` and vLLM.

    Adapters are merged into copies of their weights; the model itself is left alone. Of a sharded model all ranks call
    this, one with a folder and the others with None: weights are gathered one by one, and only that rank keeps them,
    on its CPU.
    """
    weights = None
    if getattr(model, "peft_config", None) or any(isinstance(p, DTensor) for p in model.parameters()):
        weights = whole_state(model, keep=folder is not None)
    if folder is None:
        return
    if getattr(model, "peft_config", None):
        from .lora import merged_state

        weights = merged_state(model, weights or {})
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that the optimizer changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
