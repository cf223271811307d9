"""A shared prompt together with what else a run may ask for: checkpointing, adapters, autocast, compiled layers.

Each with the packed row and with three phases, whose own way through autograd is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longreach.engine import Group, completion_logprobs
from longreach.engine.model import LoraConfig

Make = Callable[..., Any]
MakeGroups = Callable[..., list[Group]]
SCHEDULES = [None, 26]
"""Budgets: one row, and three phases in three pieces."""
SHAPES = [(4, (6, 0, 9, 5, 5))]


def logp_and_gradients(
    model: PreTrainedModel, groups: list[Group], budget: int | None, autocast: bool = False
) -> dict[str, Tensor]:
    """The backward runs outside autocast, as PyTorch asks for."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logp = completion_logprobs(model, groups, budget=budget).logp
    (logp * torch.linspace(-1, 2, len(logp), dtype=logp.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logp": logp.detach(), **found}


def assert_close(made: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert made.keys() == wanted.keys() and len(wanted) > 10
    for name, exact in wanted.items():
        assert exact.abs().max() > 0, name
        assert (made[name] - exact).abs().max() <= bound * exact.abs().max(), name


def forwards(model: PreTrainedModel) -> list[int]:
    seen: list[int] = []
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    return seen


@pytest.mark.parametrize("budget", SCHEDULES)
def test_checkpointed_layers(budget: int | None, load: Make, random_groups: MakeGroups) -> None:
    groups, plain, model = random_groups(SHAPES), load("qwen3"), load("qwen3", gradient_checkpointing=True)
    wanted, seen = logp_and_gradients(plain, groups, None), forwards(model)
    assert_close(logp_and_gradients(model, groups, budget), wanted, 1e-5)
    once = [29, 29] if budget is None else [4, 15, 10, 15, 15, 10, 10, 4]  # pieces are forwarded, then computed again
    assert seen == once


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("k_proj",), ("v_proj", "o_proj")])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", SCHEDULES)
def test_adapters(
    budget: int | None, checkpointing: bool, targets: tuple[str, ...], build: Callable[..., Any], random_groups: MakeGroups,
    load: Make,
) -> None:  # fmt: skip
    """Only the adapters train, so in the first layer keys, values or both have no gradient to pass on."""
    pytest.importorskip("peft")
    groups, found = random_groups(SHAPES), []
    for shared in (False, True):
        torch.manual_seed(0)
        model = load("qwen3", lora=LoraConfig(rank=3, targets=targets), gradient_checkpointing=checkpointing and shared)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zeros would hide the other factor
                    parameter.normal_(std=0.3)
        single = [Group(groups[0].prompt_ids, [c]) for c in groups[0].completions]
        found.append(logp_and_gradients_of_adapters(model, groups if shared else single, budget if shared else None))
    assert_close_to(found[1], found[0])


def logp_and_gradients_of_adapters(
    model: PreTrainedModel, groups: list[Group], budget: int | None
) -> dict[str, Tensor]:
    found = logp_and_gradients(model, groups, budget)
    assert all(name == "logp" or ".lora_" in name for name in found)
    return found


def assert_close_to(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert made.keys() == wanted.keys() and len(wanted) >= 5
    for name, exact in wanted.items():
        assert exact.abs().max() > 0, name
        torch.testing.assert_close(made[name], exact, rtol=0, atol=2e-3 * float(exact.abs().max()), msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("budget", SCHEDULES)
def test_autocast(budget: int | None, checkpointing: bool, load: Make, random_groups: MakeGroups) -> None:
    groups, model = random_groups(SHAPES), load("llama", gradient_checkpointing=checkpointing)
    exact = logp_and_gradients(load("llama"), groups, None)
    made = logp_and_gradients(model, groups, budget, autocast=True)
    assert made.keys() == exact.keys()
    for name, wanted in exact.items():
        assert made[name].dtype == torch.float32
        assert torch.cosine_similarity(made[name].flatten(), wanted.flatten(), dim=0) > 0.97, name
    assert not torch.allclose(made["logp"], exact["logp"], rtol=0, atol=1e-4)  # the layers did compute in bfloat16


def test_three_phases_compute_in_the_callers_precision_throughout(load: Make, random_groups: MakeGroups) -> None:
    """What is computed again in the backward, outside autocast, is what was computed in the forward."""
    groups, model = random_groups(SHAPES), load("llama")
    dtypes: list[torch.dtype] = []
    model.get_submodule("model.layers.0.mlp.up_proj").register_forward_hook(
        lambda _, args, out: dtypes.append(out.dtype)
    )
    logp_and_gradients(model, groups, 26, autocast=True)
    assert dtypes == [torch.bfloat16] * 5
    logp_and_gradients(model, groups, 26)
    assert dtypes[5:] == [torch.float32] * 5


def test_old_log_probs_and_an_update_in_one_autocast_region(load: Make, random_groups: MakeGroups) -> None:
    """Autocast keeps rounded weights while its region lasts: those of a pass without gradients would cut an update off."""
    groups, model = random_groups(SHAPES), load("llama")
    wanted = logp_and_gradients(model, groups, 26, autocast=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            completion_logprobs(model, groups, budget=26)
        made = logp_and_gradients(model, groups, 26, autocast=True)
    assert_close(made, wanted, 0)


@pytest.fixture
def dynamo() -> Iterator[Any]:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    yield dynamo
    dynamo.reset()


def compile_layers(model: PreTrainedModel, part: str = "") -> None:
    """Traced and run as traced ("eager"): what a real compiler adds is its own, and takes minutes."""
    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule(part).compile(backend="eager")


def test_compiled_layers(load: Make, random_groups: MakeGroups, dynamo: Any) -> None:
    plain, model, graphs = load("qwen3"), load("qwen3", verify=False), []
    compile_layers(model)
    for seed, shapes in enumerate([SHAPES, [(5, (6, 1, 9, 6, 5))], [(6, (9, 5)), (3, (7,))]]):
        groups = random_groups(shapes, seed=seed)
        wanted = logp_and_gradients(plain, groups, None)
        assert_close(logp_and_gradients(model, groups, None), wanted, 1e-5)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= graphs[1] == graphs[2], "rows of other lengths were compiled anew"


def test_three_phases_of_compiled_attention(load: Make, random_groups: MakeGroups, dynamo: Any) -> None:
    """Of the layer, the part that has to do with it: prompt, pieces and gradients on and off are traced each."""
    plain, model, groups = load("qwen3"), load("qwen3", verify=False), random_groups([(4, (9, 9))])
    model.get_submodule("model.layers.1.self_attn").compile(backend="eager")
    assert_close(logp_and_gradients(model, groups, 20), logp_and_gradients(plain, groups, None), 1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_compiled_layers_that_are_checkpointed_are_right(load: Make, random_groups: MakeGroups, dynamo: Any) -> None:
    """The break at attention falls within the checkpoint, so such a layer runs as it is; compile its parts instead."""
    plain, model, groups = load("qwen3"), load("qwen3", gradient_checkpointing=True), random_groups(SHAPES)
    wanted = logp_and_gradients(plain, groups, None)
    compile_layers(model, "mlp")
    assert_close(logp_and_gradients(model, groups, None), wanted, 1e-5)
    assert dynamo.utils.counters["stats"]["unique_graphs"] > 0
    compile_layers(model)
    assert_close(logp_and_gradients(model, groups, None), wanted, 1e-5)
