from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longreach.engine import load_model
from longreach.engine.support import verify_model

NOT_PLAIN = "differ from the model's own"

# family -> (config class, changes, what the error says); each would train on wrong numbers in silence
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral with a window": ("MistralConfig", {"sliding_window": 16}, "a sliding window of 16"),
    "qwen2 with windowed layers": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        r"aren't full attention \(sliding_attention\)",
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 8}, r"aren't full attention \(sliding_attention\)"),
    "gemma2 without windows": (
        "Gemma2Config", {"head_dim": 8, "layer_types": ["full_attention"] * 2}, r"caps its attention scores \(50",
    ),
    "attention dropout": ("LlamaConfig", {"attention_dropout": 0.1}, r"attention dropout 0\.1"),
    "other dropout": (
        "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, r"dropout \(transformer",
    ),
    "granite scales its logits": ("GraniteConfig", {"logits_scaling": 8.0}, NOT_PLAIN),
    "cohere scales its logits": ("CohereConfig", {"logit_scale": 0.0625}, NOT_PLAIN),
    "attention sinks": (
        "GptOssConfig",
        {"layer_types": ["full_attention"] * 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "attends with s_aux",
    ),
    "a state instead of attention": (
        "MambaConfig", {"state_size": 4}, r"aren't full attention \(linear_attention\)",
    ),
    "positions by the length of the call": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        "stretches its positions by the length of what it is given .rope_type 'dynamic'",
    ),
    "one of two sets of positions": (
        "Phi3Config",
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "rope_type 'longrope'",
    ),
    "a loss of its experts": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
            "output_router_logits": True,
        },
        "load-balancing loss of its experts",
    ),
    "attention of its own": (
        "BloomConfig", {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        "0 of its 2 layers attend through transformers' attention interface",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_be_wrong_are_refused(case: str, build: Callable[..., Path]) -> None:
    config_class, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load_model(build(case, config_class, **changes), dtype=torch.float32, device="cpu")


def test_an_encoder_decoder_is_refused(build: Callable[..., Path]) -> None:
    folder = build("llama")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        load_model(folder)


@pytest.mark.parametrize(
    "config_class, changes",
    [
        ("GraniteConfig", {"logits_scaling": 1.0}),
        ("OlmoConfig", {}),
        ("Phi3Config", {}),
        ("GPTNeoXConfig", {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
        ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
    ],
)
def test_other_families_with_plain_attention_pass(
    config_class: str, changes: dict[str, Any], build: Callable[..., Path]
) -> None:
    folder = build(config_class, config_class, **changes)
    for dtype in (torch.float32, torch.bfloat16):
        load_model(folder, dtype=dtype, device="cpu")


class Wrong(nn.Module):
    """A decoder layer's wrapper that passes tokens on in a wrong way."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(self.change(hidden), **kwargs)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "random in training": lambda x: x + 0.3 * torch.randn_like(x),
    "mixes neighbours outside attention": lambda x: x + 0.3 * x.roll(1, dims=1),
    "mixes the whole row": lambda x: x - x.mean(dim=1, keepdim=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_verification_notices(change: Callable[[Tensor], Tensor], dtype: torch.dtype, load: Callable[..., Any]) -> None:
    model = load("qwen3", dtype=dtype)
    layers = model.get_decoder().layers
    layers[0] = Wrong(layers[0], change)
    with pytest.raises(ValueError, match=NOT_PLAIN):
        verify_model(model)


def test_verification_notices_ignored_layouts(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model that bypasses the attention interface does: plain causal attention over the whole packed row."""
    model = load("qwen3")
    monkeypatch.setattr(
        "longreach.engine.attention.SharedPrefix.attend",
        lambda self, layer, q, k, v, scale: nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True
        ).transpose(0, 1),
    )
    with pytest.raises(ValueError, match=NOT_PLAIN):
        verify_model(model)


def test_verification_leaves_the_model_as_it_was(load: Callable[..., Any]) -> None:
    model = load("qwen3", verify=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    verify_model(model)
    assert model.training and model.config._attn_implementation == "longreach"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    verify_model(model)
    assert not model.training
