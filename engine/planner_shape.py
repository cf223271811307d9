"""Shapes that a plan is made of: the model, and a packed row.

Pure numbers. A model's come from its transformers configuration, or, where no hub can be reached, from `KNOWN`: the
published configurations of the models that the shipped recipes name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from .model import LoraConfig, read_config
from .support import refuse_config


class Unplannable(ValueError):
    """A model that may well be trained, but whose memory and time no formula here knows."""


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: D hidden, F inner width of the MLP, H query heads, K key heads, E head dimension, V vocabulary."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False
    """Queries and keys are normalised head by head (Qwen3)."""
    qkv_bias: bool = False
    window: int = 0
    """Positions that the model knows, 0 if unknown."""

    @property
    def q(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of all key heads."""
        return self.key_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of one decoder layer."""
        return {
            "q_proj": (self.hidden, self.q), "k_proj": (self.hidden, self.kv), "v_proj": (self.hidden, self.kv),
            "o_proj": (self.q, self.hidden), "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner), "down_proj": (self.inner, self.hidden),
        }  # fmt: skip

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer that tokens are multiplied with."""
        return sum(a * b for a, b in self.linears.values())

    @property
    def layer_parameters(self) -> int:
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.layer_matrices + norms + (self.q + 2 * self.kv if self.qkv_bias else 0)

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    def adapter_parameters(self, lora: LoraConfig) -> int:
        """Of adapters on the named linear layers, the head among them."""
        sizes = {**self.linears, "lm_head": (self.hidden, self.vocab)}
        return sum(
            lora.rank * sum(sizes[name]) * (1 if name == "lm_head" else self.layers)
            for name in lora.targets
            if name in sizes
        )


def shape_of(config: Any) -> ModelShape:
    """The shape of a transformers configuration of a dense decoder.

    Raises:
        Unplannable: experts, or no widths that a decoder has.
    """
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if experts:
        raise Unplannable(f"{text.model_type} has {experts} experts a layer: only dense models can be planned")
    missing = [name for name in ("hidden_size", "intermediate_size", "num_hidden_layers") if not hasattr(text, name)]
    if missing:
        raise Unplannable(f"the configuration of {text.model_type} has no {missing[0]}: it can't be planned")
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        qk_norm=text.model_type == "qwen3",
        qkv_bias=text.model_type == "qwen2" or bool(getattr(text, "attention_bias", False)),
        window=getattr(text, "max_position_embeddings", 0) or 0,
    )


def config_of(shape: ModelShape) -> Any:
    """A transformers configuration of such a model: Qwen3 where heads are normalised, Qwen2 with biases, else Llama."""
    cls: Any = Qwen3Config if shape.qk_norm else Qwen2Config if shape.qkv_bias else LlamaConfig
    widths: dict[str, Any] = {} if cls is Qwen2Config else {"head_dim": shape.head_dim}
    return cls(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, tie_word_embeddings=shape.tied,
        max_position_embeddings=shape.window or 1 << 20, **widths,
    )  # fmt: skip


def _qwen(layers: int, hidden: int, inner: int, heads: int, vocab: int, window: int, **features: bool) -> ModelShape:
    return ModelShape(layers, hidden, inner, heads, 8, 128, vocab, window=window, **features)


KNOWN: dict[str, ModelShape] = {
    "Qwen/Qwen3-4B": _qwen(36, 2560, 9728, 32, 151936, 40960, tied=True, qk_norm=True),
    "Qwen/Qwen3-4B-Thinking-2507": _qwen(36, 2560, 9728, 32, 151936, 262144, tied=True, qk_norm=True),
    "Qwen/Qwen3-8B": _qwen(36, 4096, 12288, 32, 151936, 40960, qk_norm=True),
    "Qwen/Qwen3-14B": _qwen(40, 5120, 17408, 40, 151936, 40960, qk_norm=True),
    "Qwen/Qwen3-32B": _qwen(64, 5120, 25600, 64, 151936, 40960, qk_norm=True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _qwen(48, 5120, 13824, 40, 152064, 131072, qkv_bias=True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _qwen(64, 5120, 27648, 40, 152064, 131072, qkv_bias=True),
    "meta-llama/Llama-3.1-8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, window=131072),
}
"""By name on the hub; numbers from the published config.json (DeepSeek's distilled models have Qwen2.5's)."""


def model_shape(path: str, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of the model at `path`: a name in `KNOWN` (no hub is asked), else its configuration.

    Raises:
        ValueError: there is none, or the model can't be trained here.
    """
    if path in KNOWN:
        return KNOWN[path]
    try:
        config = read_config(path, trust_remote_code=trust_remote_code)
    except ValueError as error:
        known = ", ".join(KNOWN)
        raise ValueError(
            f"{error}\nto plan without it, give --model-config DIR with its config.json; known by name: {known}"
        ) from None
    refuse_config(config, path)
    return shape_of(config)


@dataclass(frozen=True)
class Row:
    """One packed row: `groups` prompts of P tokens, each with `size` completions of R; dense: each with its own prompt."""

    groups: int
    prompt: int
    size: int
    completion: int
    shared: bool = True

    @property
    def prompt_tokens(self) -> int:
        return self.groups * self.prompt * (1 if self.shared else self.size)

    @property
    def loss_rows(self) -> int:
        """Completion tokens: what meets the vocabulary."""
        return self.groups * self.size * self.completion

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.loss_rows

    @property
    def prompt_pairs(self) -> int:
        """Pairs of a query and a key that attention computes among prompts."""
        return self.groups * (1 if self.shared else self.size) * self.prompt * (self.prompt + 1) // 2

    @property
    def completion_pairs(self) -> int:
        """Pairs of completions' queries with their prompts and themselves: sharing saves none of these."""
        own = self.completion * (self.completion + 1) // 2
        return self.groups * self.size * (self.completion * self.prompt + own)

    @property
    def pairs(self) -> int:
        return self.prompt_pairs + self.completion_pairs
