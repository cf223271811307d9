"""Shapes of models and rows: read from configurations, counted as the real model and packer count them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from longreach.engine import Group
from longreach.engine.lora import add_lora
from longreach.engine.model import LoraConfig
from longreach.engine.packing import one_row, unshared
from longreach.engine.planner_shape import KNOWN, ModelShape, Row, Unplannable, config_of, model_shape, shape_of


def test_parameters_are_counted_as_the_model_has_them(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        shape = model_shape(str(folder))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
        assert shape.parameters == sum(p.numel() for p in model.parameters()), name
        lora = LoraConfig(rank=3)
        add_lora(model, lora)
        assert shape.adapter_parameters(lora) == sum(p.numel() for p in model.parameters() if p.requires_grad), name


@pytest.mark.parametrize("groups, prompt, size, completion", [(1, 7, 3, 4), (3, 5, 2, 6), (2, 9, 1, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_a_row_counts_as_the_packer_packs(groups: int, prompt: int, size: int, completion: int, shared: bool) -> None:
    ids = torch.zeros(prompt, dtype=torch.long), torch.zeros(completion, dtype=torch.long)
    packed = [Group(ids[0], [ids[1]] * size) for _ in range(groups)]
    real, row = one_row(packed if shared else unshared(packed)), Row(groups, prompt, size, completion, shared)
    assert (row.tokens, row.prompt_tokens, row.loss_rows) == (real.tokens, real.prompt_tokens, len(real.targets()))
    seen = sum(p * (p + 1) // 2 for p in real.prompt_lengths)
    lengths = real.completion_lengths
    assert row.pairs == seen + sum(n * prompt + n * (n + 1) // 2 for n in lengths)


def test_known_names_ask_no_hub() -> None:
    assert model_shape("Qwen/Qwen3-8B") is KNOWN["Qwen/Qwen3-8B"]


def test_what_cannot_be_read_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"no model folder /nowhere.*\n.*--model-config DIR.*Qwen/Qwen3-8B"):
        model_shape("/nowhere")


def test_experts_have_no_plan() -> None:
    config = transformers.MixtralConfig(
        num_hidden_layers=1, hidden_size=8, num_attention_heads=2, num_key_value_heads=1
    )
    with pytest.raises(Unplannable, match="8 experts"):
        shape_of(config)


def test_features_are_seen(build: Callable[..., Path]) -> None:
    assert model_shape(str(build("qwen3"))).qk_norm
    assert model_shape(str(build("qwen2"))).qkv_bias
    assert model_shape(str(build("qwen3", tie_word_embeddings=False))).tied is False
    assert shape_of(config_of(ModelShape(1, 8, 16, 2, 1, 4, 10))).head_dim == 4
