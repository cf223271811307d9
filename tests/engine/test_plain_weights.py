"""Weights leave under their checkpoint's names, whole and merged, one at a time: what `save_pretrained` writes, and the tied head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from longreach.engine.lora import add_lora, merged_state
from longreach.engine.model import LoraConfig
from longreach.engine.plain_weights import PlainWeights
from longreach.engine.tensor_file import write_tensors

SCRIPT = Path(__file__).with_name("plain_weights_rank.py")
SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def make(tied: bool = True, lora: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, tie_word_embeddings=tied), dtype=dtype)
    if lora:
        add_lora(model, LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "down_proj")))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def taken(weights: PlainWeights) -> dict[str, Tensor]:
    """What iterating gives, held against what was announced."""
    pairs = dict(weights.pairs())
    assert [(e.name, e.shape, e.dtype) for e in weights.entries] == [
        (n, tuple(t.shape), t.dtype) for n, t in pairs.items()
    ]
    assert weights.bytes == sum(t.numel() * t.element_size() for t in pairs.values())
    return pairs


def saved(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [True, False])
def test_they_are_what_a_checkpoint_has_and_the_head_by_its_own_name(tmp_path: Path, tied: bool) -> None:
    model = make(tied)
    pairs, kept = taken(PlainWeights(model)), saved(model, tmp_path)
    assert pairs.keys() - kept.keys() == ({"lm_head.weight"} if tied else set()) and kept.keys() <= pairs.keys()
    assert all(torch.equal(pairs[name], kept[name]) for name in kept)
    assert torch.equal(pairs["lm_head.weight"], model.get_output_embeddings().weight)  # type: ignore[union-attr]


def test_numbers_are_rounded_once_to_the_dtype_asked_for() -> None:
    model = make()
    pairs = taken(PlainWeights(model, torch.bfloat16))
    assert all(
        torch.equal(t, p.detach().bfloat16())
        for (_, t), p in zip(pairs.items(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_and_the_model_is_left_alone(dtype: torch.dtype) -> None:
    model = make(lora=True, dtype=dtype)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pairs, merged = taken(PlainWeights(model)), merged_state(model, dict(model.state_dict()))
    assert pairs.keys() == merged.keys() == make().state_dict().keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(pairs[name], tensor, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=1e-7)
    assert not torch.equal(pairs["model.layers.0.self_attn.q_proj.weight"], make(dtype=dtype).state_dict()["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_mixture_is_split_as_its_checkpoint_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SIZES, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config)
    pairs, kept = taken(PlainWeights(model)), saved(model, tmp_path)
    assert "model.layers.1.mlp.experts.2.down_proj.weight" in kept, "else this tests nothing"
    assert pairs.keys() == kept.keys() and all(torch.equal(pairs[name], kept[name]) for name in kept)
    add_lora(model, LoraConfig(rank=2, alpha=2.0, targets=("q_proj",)))
    with pytest.raises(ValueError, match="merging adapters into a Qwen3MoeForCausalLM"):
        next(PlainWeights(model).pairs())


def test_they_go_into_a_file_under_their_names(tmp_path: Path) -> None:
    weights = PlainWeights(make())
    entries = weights.entries
    write_tensors(
        tmp_path / "made", [e.like for e in entries], (t for _, t in weights.pairs()), [e.name for e in entries]
    )
    read = load_file(tmp_path / "made")
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.pairs()) and len(read) == len(entries)


def test_sharded_weights_are_gathered(start_ranks: Callable[..., Any], tmp_path: Path) -> None:
    started = start_ranks(2, SCRIPT, tmp_path)
    assert [rank.wait(120.0) for rank in started] == [0, 0], "\n".join(r.err.read_text()[-3000:] for r in started)
    for case in ("plain", "lora"):
        made = load_file(tmp_path / f"{case}.safetensors")
        one = dict(PlainWeights(make(lora=case == "lora"), torch.bfloat16).pairs())
        assert made.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(made[name], tensor, rtol=2**-8, atol=1e-6)
