from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longreach.engine import Group, Sampling, completion_logprobs, generate
from longreach.engine.completions import model_head
from longreach.engine.model import LoraConfig, save_model, trainable
from longreach.engine.optimizer import OptimizerConfig, apply_update, make_optimizer

pytest.importorskip("peft")
lora = pytest.importorskip("longreach.engine.lora")

CONFIG = LoraConfig(rank=3, alpha=12.0)
SHAPES = [(9, (4, 6)), (5, (3,))]


class Untouched:
    """A tokenizer that save_model has nothing to do with here."""

    def save_pretrained(self, folder: Path) -> None:
        assert folder.is_dir()


def train(model: PreTrainedModel, groups: list[Group], updates: int = 2) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(grad_clip=0.0))
    for _ in range(updates):
        (-completion_logprobs(model, groups).logp.mean()).backward()
        apply_update(optimizer, model, 0.05, 0.0)


def logprobs(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    with torch.no_grad():
        return completion_logprobs(model, groups).logp


def base_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".base_layer.", "."): t.clone() for name, t in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_train_and_they_are_fp32(
    dtype: torch.dtype,
    family: str,
    load: Callable[..., Any],
    random_groups: Callable[..., list[Group]],
) -> None:
    model, plain, groups = load(family, dtype=dtype, lora=CONFIG), load(family, dtype=dtype), random_groups(SHAPES)
    adapters = trainable(model)
    assert len(adapters) == 2 * 2 * len(CONFIG.targets)  # A and B, in two layers
    assert all(".lora_" in name and p.dtype == torch.float32 for name, p in adapters.items())
    torch.testing.assert_close(logprobs(model, groups), logprobs(plain, groups), rtol=0, atol=1e-6)
    before = {name: p.detach().clone() for name, p in adapters.items()}
    train(model, groups)
    assert all(not torch.equal(before[name], p) for name, p in adapters.items())
    base, original = base_of(model.state_dict()), plain.state_dict()
    assert base.keys() == original.keys()
    assert all(torch.equal(base[name], original[name]) for name in base)
    assert (logprobs(model, groups) - logprobs(plain, groups)).abs().max() > 0.1


def test_merged_weights_are_the_adapted_model(
    family: str, load: Callable[..., Any], random_groups: Callable[..., list[Group]], tmp_path: Path
) -> None:
    model, groups = load(family, lora=CONFIG), random_groups(SHAPES)
    train(model, groups)
    before, wanted = {name: t.clone() for name, t in model.state_dict().items()}, logprobs(model, groups)
    save_model(model, Untouched(), tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logprobs(model, groups), wanted)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # knows nothing of adapters
    assert not any("lora" in name for name in plain.state_dict())
    ids = torch.cat([groups[1].prompt_ids, groups[1].completions[0]])
    with torch.no_grad():
        theirs = plain(input_ids=ids[None]).logits[0, 4:-1].log_softmax(-1)
    torch.testing.assert_close(theirs.gather(1, ids[5:, None])[:, 0], wanted[-3:], rtol=0, atol=1e-3)


def test_merging_rounds_once(load: Callable[..., Any], random_groups: Callable[..., list[Group]]) -> None:
    model = load("qwen3", dtype=torch.bfloat16, lora=CONFIG)
    train(model, random_groups(SHAPES))
    name = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index,union-attr]
    exact = layer.base_layer.weight.double() + CONFIG.alpha / CONFIG.rank * (b.double() @ a.double())  # type: ignore[union-attr]
    merged = lora.merged_state(model, model.state_dict())[f"{name}.weight"]
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_adapters_and_checkpointing_go_together(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = load("qwen3", lora=CONFIG, gradient_checkpointing=checkpointing)
        completion_logprobs(model, random_groups(SHAPES)).logp.sum().backward()
        found.append({name: p.grad for name, p in trainable(model).items()})
    for name, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)
    assert any(gradient.any() for gradient in found[0].values())


def test_layers_that_are_not_there_are_named(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"no linear layer is called qkv_proj; there are .*q_proj"):
        load("qwen3", lora=LoraConfig(targets=("o_proj", "qkv_proj")))


HEAD = LoraConfig(rank=3, alpha=12.0, targets=("q_proj", "lm_head"))


def test_an_adapter_on_the_head_is_in_every_path(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]], tmp_path: Path
) -> None:
    """Log-probs read the head's weight, and must not pass over the adapter beside it; nor may generation."""
    model, groups = load("llama", lora=HEAD), random_groups(SHAPES)
    train(model, groups)
    head = model.get_output_embeddings()
    adapter = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    completion_logprobs(model, groups).logp.sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in adapter)
    assert head.base_layer.weight.grad is None
    wanted = logprobs(model, groups)
    ids = torch.cat([groups[1].prompt_ids, groups[1].completions[0]])
    with torch.no_grad():
        theirs = model(input_ids=ids[None]).logits[0, 4:-1].log_softmax(-1)
    torch.testing.assert_close(theirs.gather(1, ids[5:, None])[:, 0], wanted[-3:], rtol=0, atol=1e-4)
    made = generate(model, [groups[0].prompt_ids], 2, Sampling(max_completion=5), seed=3, stop_ids=())[0]
    again = logprobs(model, [Group(groups[0].prompt_ids, [torch.tensor(c.ids) for c in made])])
    reported = torch.tensor([x for c in made for x in c.logprobs])
    torch.testing.assert_close(reported, again, rtol=0, atol=1e-4)
    save_model(model, Untouched(), tmp_path)  # type: ignore[arg-type]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        merged = plain(input_ids=ids[None]).logits[0, 4:-1].log_softmax(-1)
    torch.testing.assert_close(merged, theirs, rtol=0, atol=1e-3)


def test_an_adapter_on_a_tied_head_is_refused(load: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="whose weight is the embeddings' too"):
        load("qwen3", lora=HEAD)


def test_an_adapter_that_would_be_passed_over_is_refused(load: Callable[..., Any]) -> None:
    model = load("llama", lora=HEAD)
    model.get_output_embeddings().lora_dropout["default"] = torch.nn.Dropout(0.1)
    with pytest.raises(ValueError, match="without dropout"):
        model_head(model)
