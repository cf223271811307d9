"""Checkpoint inputs on the host: bit for bit the same results, buffers used again, the next one fetched ahead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longreach.engine import Group, completion_logprobs, load_model
from longreach.engine.model import LoraConfig, ModelConfig
from longreach.engine.offload import Offload, offload

Load = Callable[..., Any]
Groups = Callable[..., list[Group]]
SHAPES = [(40, (9, 13)), (11, (5,))]  # 78 tokens
BYTES = 78 * 32 * 4


def store_of(model: Any) -> Offload:
    return model.get_decoder().layers[0]._gradient_checkpointing_func.func.__self__


def loss_of(model: PreTrainedModel, groups: list[Group], **options: Any) -> Tensor:
    found = completion_logprobs(model, groups, **options)
    return (found.logp * torch.linspace(-1, 2, len(found.logp), device=found.logp.device)).sum()


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model: PreTrainedModel, groups: list[Group], **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, groups, **options)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits(family: str, dtype: torch.dtype, load: Load, random_groups: Groups) -> None:
    kept = load(family, dtype=dtype, gradient_checkpointing=True)
    moved = load(family, dtype=dtype, gradient_checkpointing=True, offload_activations=True)
    for seed in (0, 1):
        assert_equal(run(moved, random_groups(SHAPES, seed)), run(kept, random_groups(SHAPES, seed)))
    assert store_of(moved).bytes > 0


@pytest.mark.parametrize("options", [{"budget": 66}, {"tile_tokens": 7}, {"lora": True}], ids=lambda o: next(iter(o)))
def test_it_goes_with_the_rest(options: dict[str, Any], load: Load, random_groups: Groups) -> None:
    """Several forwards whose backwards come in another order; pieces; inputs without a gradient of their own."""
    options = dict(options)
    budget = {"budget": options.pop("budget")} if "budget" in options else {}
    if options.pop("lora", None):
        pytest.importorskip("peft")
        options["lora"] = LoraConfig(rank=3)
    results = []
    for moved in (False, True):
        torch.manual_seed(3)
        model = load("qwen3", gradient_checkpointing=True, offload_activations=moved, **options)
        results.append(run(model, random_groups([(20, (12, 9, 12, 12, 7))]), **budget))
    assert len(results[0]) > 5
    assert_equal(results[1], results[0])


def test_it_goes_with_autocast(load: Load, random_groups: Groups) -> None:
    results = []
    for moved in (False, True):
        model = load("qwen3", gradient_checkpointing=True, offload_activations=moved)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, random_groups(SHAPES))
        loss.backward()
        results.append(gradients(model))
    assert_equal(results[1], results[0])


def test_only_layer_inputs_move_and_buffers_are_used_again(load: Load, random_groups: Groups) -> None:
    model = load("llama", gradient_checkpointing=True, offload_activations=True)
    store = store_of(model)
    with torch.no_grad():
        completion_logprobs(model, random_groups(SHAPES))
    assert store.bytes == 0  # nothing to go back through
    loss = loss_of(model, random_groups(SHAPES))
    assert store.bytes == 2 * BYTES and store.free == []
    loss.backward()
    del loss
    assert len(store.free) == 2
    seen = {buffer.data_ptr() for buffer in store.free}
    run(model, random_groups([(30, (4,))]))  # fits into what is there
    assert {buffer.data_ptr() for buffer in store.free} == seen and store.bytes == 2 * BYTES
    run(model, random_groups([(100, (20,))]))  # does not: the old ones go
    assert store.bytes == sum(buffer.nbytes for buffer in store.free) == 2 * 120 * 32 * 4


def test_a_dropped_graph_gives_its_buffers_back(load: Load, random_groups: Groups) -> None:
    model = load("llama", gradient_checkpointing=True, offload_activations=True)
    store = store_of(model)
    losses = [loss_of(model, random_groups(SHAPES)) for _ in range(2)]
    assert store.bytes == 4 * BYTES and store.free == []
    losses.clear()
    assert len(store.free) == 4
    wanted = run(load("llama", gradient_checkpointing=True), random_groups(SHAPES))
    assert_equal(run(model, random_groups(SHAPES)), wanted)  # and what they hold is overwritten


def test_the_input_of_the_layer_below_is_fetched_before_it_is_asked_for(
    build: Callable[..., Any], random_groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build("llama", num_hidden_layers=4)
    model = load_model(
        folder, dtype=torch.float32, device="cpu", gradient_checkpointing=True, offload_activations=True, verify=False
    )
    told: list[str] = []
    layers: dict[int, int] = {}
    fetch, pack, unpack = Offload._fetch, Offload._pack, Offload._unpack

    def packed(self: Offload, x: Tensor) -> Any:
        kept = pack(self, x)
        layers[id(kept)] = len(layers)
        return kept

    def fetched(self: Offload, kept: Any) -> Any:
        told.append(f"fetch {layers[id(kept)]}")
        return fetch(self, kept)

    def unpacked(self: Offload, kept: Any) -> Tensor:
        told.append(f"need {layers[id(kept)]}")
        return unpack(self, kept)

    monkeypatch.setattr(Offload, "_pack", packed)
    monkeypatch.setattr(Offload, "_fetch", fetched)
    monkeypatch.setattr(Offload, "_unpack", unpacked)
    losses = [loss_of(model, random_groups(SHAPES, seed)) for seed in (0, 1)]  # two chains of four, not one of eight
    losses[1].backward()
    assert told == ["need 7", "fetch 7", "fetch 6", "need 6", "fetch 5", "need 5", "fetch 4", "need 4"]
    told.clear()
    losses[0].backward()
    assert told == ["need 3", "fetch 3", "fetch 2", "need 2", "fetch 1", "need 1", "fetch 0", "need 0"]


def test_a_graph_can_be_gone_through_twice(load: Load, random_groups: Groups) -> None:
    model = load("llama", gradient_checkpointing=True, offload_activations=True)
    loss = loss_of(model, random_groups(SHAPES))
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_equal(gradients(model), {name: 2 * gradient for name, gradient in once.items()})


def test_a_copied_model_has_a_store_of_its_own(load: Load, random_groups: Groups) -> None:
    model = load("llama", gradient_checkpointing=True, offload_activations=True)
    wanted = run(model, random_groups(SHAPES))
    other = copy.deepcopy(model)
    assert store_of(other) is not store_of(model) and store_of(other).bytes == 0
    assert store_of(other) is other.get_decoder().layers[1]._gradient_checkpointing_func.func.__self__
    assert_equal(run(other, random_groups(SHAPES)), wanted)


def test_without_checkpointing_it_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"set model\.gradient_checkpointing = true"):
        ModelConfig("x", offload_activations=True)
    with pytest.raises(ValueError, match="no checkpointed layers"):
        offload(load("llama"))


@pytest.mark.gpu
def test_on_a_gpu_the_bits_are_the_same_and_the_memory_is_less(
    build: Callable[..., Any], random_groups: Groups
) -> None:
    folder = build("llama", hidden_size=512, num_hidden_layers=12, max_position_embeddings=16384)
    results, peaks = [], []
    for moved in (False, True):
        model = load_model(
            folder, dtype=torch.bfloat16, device="cuda", gradient_checkpointing=True, offload_activations=moved
        )
        for seed in (0, 1, 2):  # buffers are new at first, then in use again
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = run(model, random_groups([(16000, (100, 200))], seed))
            peaks.append(torch.cuda.max_memory_allocated() - before)
            results.append({name: tensor.cpu() for name, tensor in found.items()})
    for kept, gone in zip(results[:3], results[3:], strict=True):
        assert_equal(gone, kept)
    assert peaks[5] < peaks[2] - 7 * 16300 * 512 * 2  # of twelve inputs, some are on their way
