"""Tiled MLPs and norms: the same numbers, never the whole intermediate, and nothing about the model changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from longreach.engine import Group, Sampling, completion_logprobs, generate, load_model
from longreach.engine.model import LoraConfig, ModelConfig, save_memory
from longreach.engine.tiling import Tiled, tile

Load = Callable[..., Any]
Groups = Callable[..., list[Group]]
SHAPES = [(40, (9, 13)), (11, (5,))]  # 78 tokens
MOE = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16, "decoder_sparse_step": 1},
    ),
}  # fmt: skip


def loss_of(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    found = completion_logprobs(model, groups)
    weights = torch.linspace(-1, 2, len(found.logp), dtype=found.logp.dtype)
    return (found.logp * weights + 0.1 * found.entropy).sum()


def results(model: PreTrainedModel, groups: list[Group], **options: Any) -> dict[str, Tensor]:
    """Log-probs and every gradient of a loss with uneven weights."""
    model.zero_grad(set_to_none=True)
    found = completion_logprobs(model, groups, **options)
    weights = torch.linspace(-1, 2, len(found.logp), dtype=found.logp.dtype)
    (found.logp * weights + 0.1 * found.entropy).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logp": found.logp.detach(), **gradients}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = (got[name] - tensor).abs().max().item()
        assert error <= bound * max(1.0, tensor.abs().max().item()), f"{name}: {error}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 39, 77])
def test_results_are_unchanged(
    family: str, tokens: int, checkpointing: bool, load: Load, random_groups: Groups
) -> None:
    """1 row, ragged pieces, two even ones, one token over; 78 would be a single piece."""
    wanted = results(load(family, dtype=torch.float64), random_groups(SHAPES))
    model = load(family, dtype=torch.float64, tile_tokens=tokens, gradient_checkpointing=checkpointing)
    assert_same(results(model, random_groups(SHAPES)), wanted, 1e-12)


@pytest.mark.parametrize("name", MOE)
def test_routed_experts_are_tiled_like_any_mlp(name: str, build: Callable[..., Path], random_groups: Groups) -> None:
    config, own = MOE[name]
    folder = build(name, config, **own)
    models: Any = [load_model(folder, dtype=torch.float32, device="cpu", tile_tokens=n) for n in (0, 7)]
    plain, tiled = models
    assert isinstance(tiled.get_decoder().layers[1].mlp.forward, Tiled)
    wanted = results(plain, random_groups(SHAPES))
    assert any("experts" in key for key in wanted)
    assert_same(results(tiled, random_groups(SHAPES)), wanted, 2e-5)
    for model in (plain, tiled):  # grouped products have no fp64
        model.set_experts_implementation("eager")
        model.double()
    assert_same(results(tiled, random_groups(SHAPES)), results(plain, random_groups(SHAPES)), 1e-12)


@pytest.mark.parametrize("tokens", [7, 77])
def test_in_fp32_only_rounding_differs(family: str, tokens: int, load: Load, random_groups: Groups) -> None:
    exact = results(load(family, dtype=torch.float64), random_groups(SHAPES))
    plain, tiled = (results(load(family, tile_tokens=n), random_groups(SHAPES)) for n in (0, tokens))
    for name, true in exact.items():
        own, ours = ((found[name] - true).abs().max().item() for found in (plain, tiled))
        assert ours <= 2 * own + 1e-6 * true.abs().max().item(), name


def test_adapters_are_tiled_too(load: Load, random_groups: Groups) -> None:
    pytest.importorskip("peft")

    def adapted(**options: Any) -> PreTrainedModel:
        torch.manual_seed(3)
        model = load("qwen3", lora=LoraConfig(rank=3), **options)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return model

    wanted = results(adapted(), random_groups(SHAPES))
    assert any("mlp" in name for name in wanted) and all("lora" in name for name in wanted if name != "logp")
    for checkpointing in (False, True):
        found = results(adapted(tile_tokens=7, gradient_checkpointing=checkpointing), random_groups(SHAPES))
        assert_same(found, wanted, 2e-5)


def test_under_autocast_the_error_is_no_larger(load: Load, random_groups: Groups) -> None:
    exact = results(load("qwen3", dtype=torch.float64), random_groups(SHAPES))
    found, computed = {}, set()
    for tokens in (0, 7):
        model = load("qwen3", tile_tokens=tokens, gradient_checkpointing=True)
        model.get_decoder().layers[0].mlp.down_proj.register_forward_hook(lambda *call: computed.add(call[-1].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, random_groups(SHAPES))
        loss.backward()  # outside, as a trainer has it
        found[tokens] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert computed == {torch.bfloat16}  # in the backward as well, which is not within the autocast
    for name, true in exact.items():
        if name == "logp":
            continue
        own, ours = ((found[tokens][name] - true).norm().item() for tokens in (0, 7))
        assert 0.0 < ours <= 1.5 * own, name


def test_weight_gradients_are_summed_in_fp32_and_rounded_once(load: Load) -> None:
    """512 pieces of one token: summed in bfloat16, the last ones would be lost to rounding."""
    model = load("llama", dtype=torch.bfloat16)
    mlp = model.get_decoder().layers[0].mlp
    x = torch.rand(1, 512, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    truth: Any = copy.deepcopy(mlp).double()
    truth(x.double()).sum().backward()
    tile(model, 1)
    mlp(x).sum().backward()
    assert mlp.down_proj.weight.grad.dtype == torch.bfloat16
    for own, true in zip(mlp.parameters(), truth.parameters(), strict=True):
        error = (own.grad.double() - true.grad).abs().max() / true.grad.abs().max()
        assert error <= 2**-7  # one rounding, and those of the products themselves, which average out


def test_the_wide_intermediate_never_exists(
    build: Callable[..., Path], random_groups: Groups, largest_tensor: Any
) -> None:
    folder = build("llama", intermediate_size=2048, num_hidden_layers=1)
    sizes = {}
    for tokens in (0, 10):
        model = load_model(folder, dtype=torch.float32, device="cpu", tile_tokens=tokens)
        largest_tensor.elements = 0
        with largest_tensor:
            results(model, random_groups([(80, (20,))]))
        sizes[tokens] = largest_tensor.elements
    assert sizes == {0: 100 * 2048, 10: 32 * 2048}  # the second is a weight


def test_only_inputs_are_saved(load: Load, random_groups: Groups) -> None:
    """One [T, D] for each MLP and norm; untiled, the norms alone save several in fp32."""
    saved = {}
    for tokens in (0, 7):
        decoder = load("llama", tile_tokens=tokens).get_decoder()
        seen: dict[int, int] = {}

        def note(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            x = torch.randn(1, 60, 32, requires_grad=True)
            kept = [decoder.norm(x), decoder.layers[0].mlp(x)]
        weights = {p.data_ptr() for p in decoder.parameters()}
        saved[tokens] = sum(size for at, size in seen.items() if at not in weights)
        del kept
    assert saved[7] == 60 * 32 * 4
    assert saved[0] > 5 * saved[7]


def test_in_a_checkpointed_layer_the_pieces_run_twice(load: Load, random_groups: Groups) -> None:
    """Forward and backward; the layer's recomputation stops before them, having all it needs."""
    model = load("qwen3", tile_tokens=20, gradient_checkpointing=True)
    runs: list[int] = []
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: runs.append(1))
    results(model, random_groups(SHAPES))
    assert len(runs) == 2 * 2 * 4  # layers, passes, pieces of 78 tokens


def test_the_graph_is_freed_and_kept_as_usual(load: Load) -> None:
    mlp = load("llama", tile_tokens=7).get_decoder().layers[0].mlp
    x = torch.randn(1, 20, 32, requires_grad=True)
    loss = mlp(x).square().sum()
    loss.backward(retain_graph=True)
    once, _ = x.grad, loss.backward()
    assert once is not None and x.grad is not None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_it_goes_with_three_phases_and_generation(load: Load, random_groups: Groups) -> None:
    """Pieces within a backward within a backward; and a generator that sees the same model."""
    plain, tiled = (load("qwen3", dtype=torch.float64, tile_tokens=n) for n in (0, 7))
    groups = random_groups([(20, (12, 9, 12, 12, 7, 12))])  # 84 tokens
    wanted = results(plain, groups, budget=70)
    assert_same(results(tiled, groups, budget=70), wanted, 1e-12)
    assert_same(wanted, results(plain, groups), 1e-12)
    made = [
        generate(m, [groups[0].prompt_ids], 3, Sampling(6), stop_ids=(), seed=0, batch_tokens=200)
        for m in (plain, tiled)
    ]
    assert [c.ids for c in made[0][0]] == [c.ids for c in made[1][0]]


def test_the_model_stays_what_it_is(load: Load, tmp_path: Path, random_groups: Groups) -> None:
    plain, tiled = load("qwen3"), load("qwen3", tile_tokens=7)
    assert tiled.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in tiled.modules()] == [type(m) for m in plain.modules()]
    other = copy.deepcopy(tiled)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    wanted = results(plain, random_groups(SHAPES))
    assert_same(results(tiled, random_groups(SHAPES)), wanted, 2e-5)
    assert (results(other, random_groups(SHAPES))["logp"] - wanted["logp"]).abs().max() > 0.1
    tiled.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), plain.parameters(), strict=True))


def test_a_batch_longer_than_the_piece_is_cut_along_its_longest_side(load: Load) -> None:
    model = load("qwen3", dtype=torch.float64)
    layer = model.get_decoder().layers[0]
    inputs = [(layer.mlp, torch.randn(3, 20, 32).double()), (layer.self_attn.q_norm, torch.randn(1, 20, 4, 16).double()),
              (layer.self_attn.k_norm, torch.randn(2, 4, 20, 16).double()), (layer.mlp, torch.randn(20, 1, 32).double())]  # fmt: skip
    wanted = [module(x) for module, x in inputs]
    tile(model, 7)
    for (module, x), y in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(module(x), y, rtol=0, atol=1e-12)


class Mixing(nn.Module):
    """A short convolution over the sequence, as some models have in place of an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


@pytest.mark.parametrize("module, reason", [(Mixing(), "mixes tokens"), (Pair(32, 32), "one row a token")])
def test_what_cannot_be_cut_is_refused_and_left_alone(module: nn.Module, reason: str, load: Load) -> None:
    model = load("llama")
    model.get_decoder().layers[1].mlp = module
    with pytest.raises(ValueError, match=rf"layers.1.mlp.*{reason}.*leave model.tile_tokens out"):
        tile(model, 7)
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="tile_tokens must be 0"):
        ModelConfig("x", tile_tokens=-1)


def test_without_numbers_nothing_is_looked_at(load: Load) -> None:
    model = load("llama").to("meta")
    assert "layers.0.mlp" in tile(model, 7, verify=False)
    assert model.get_decoder().layers[0].mlp(torch.empty(1, 20, 32, device="meta")).shape == (1, 20, 32)


def test_it_goes_with_fsdp(load: Load, random_groups: Groups, tmp_path: Path) -> None:
    """Wrapped layers, weights gathered for a layer and freed after it, gathered again for its backward."""
    from torch.distributed.fsdp import fully_shard

    wanted = results(load("qwen3"), random_groups(SHAPES))
    model = load("qwen3")
    save_memory(model, gradient_checkpointing=True, offload_activations=True, tile_tokens=7)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        found = completion_logprobs(model, random_groups(SHAPES))
        weights = torch.linspace(-1, 2, len(found.logp))
        (found.logp * weights + 0.1 * found.entropy).sum().backward()
        got = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
    finally:
        dist.destroy_process_group()
    assert_same({"logp": found.logp.detach(), **got}, wanted, 2e-5)  # type: ignore[arg-type]
