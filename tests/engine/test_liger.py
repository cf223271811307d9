"""Liger's kernels in one model's instances. They need a GPU, so what they compute is stood in for by plain torch here."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.engine import Group, completion_logprobs, load_model
from longreach.engine.liger import Kernels, bind, liger_kernels, use_liger
from longreach.engine.support import verify_change, verify_model
from longreach.engine.tiling import tile

Load = Callable[..., Any]
Groups = Callable[..., list[Group]]
SHAPES = [(40, (9, 13)), (11, (5,))]


class StandIn:
    """Torch's own formulas where Liger's kernels would be, counting their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def kernels(self, shift: float = 0.0, turn: float = 1.0) -> Kernels:
        def norm(module: Any, x: Tensor) -> Tensor:
            self.calls.append("norm")
            assert (module.casting_mode, module.offset) == ("llama", 0.0)
            wide = x.float()
            scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
            return (module.weight + shift) * scaled.to(x.dtype)

        def mlp(module: Any, x: Tensor) -> Tensor:
            self.calls.append("mlp")
            return module.down_proj(torch.nn.functional.silu(module.gate_proj(x)) * module.up_proj(x))

        def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            self.calls.append("rope")

            def turned(x: Tensor) -> Tensor:
                a, b = x.chunk(2, dim=-1)
                return x * cos[:, None] + turn * torch.cat([-b, a], dim=-1) * sin[:, None]

            return turned(q), turned(k)

        return Kernels(norm, mlp, rope)


def test_the_right_instances_change_and_nothing_else(family: str, load: Load, random_groups: Groups) -> None:
    plain, model, stand_in = load(family), load(family), StandIn()
    modeling = vars(sys.modules[type(model).__module__])
    before = dict(modeling)
    changed = bind(model, stand_in.kernels())
    per_layer = {"input_layernorm", "post_attention_layernorm", "mlp", "self_attn"}
    per_layer |= {"self_attn.q_norm", "self_attn.k_norm"} if family == "qwen3" else set()
    assert set(changed) == {"norm", *(f"layers.{i}.{name}" for i in range(2) for name in per_layer)}
    assert modeling == before  # another model of the process is not touched
    assert model.state_dict().keys() == plain.state_dict().keys()
    stand_in.calls.clear()
    groups = random_groups(SHAPES)
    found, wanted = (completion_logprobs(m, groups).logp for m in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert sorted(stand_in.calls) == ["mlp"] * 2 + ["norm"] * (9 if family == "qwen3" else 5) + ["rope"] * 2
    stand_in.calls.clear()
    completion_logprobs(plain, groups)
    assert stand_in.calls == []
    found.square().sum().backward()
    wanted.square().sum().backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-3)


def test_the_model_can_still_be_verified_tiled_and_copied(load: Load, random_groups: Groups) -> None:
    model, stand_in = load("qwen3"), StandIn()
    verify_change(model, lambda m: bind(m, stand_in.kernels()))
    verify_model(model)
    wanted = completion_logprobs(model, random_groups(SHAPES)).logp
    tile(model, 20)
    stand_in.calls.clear()
    found = completion_logprobs(model, random_groups(SHAPES)).logp
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert stand_in.calls.count("mlp") == 2 * 4  # in each piece of 78 tokens
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.get_decoder().norm.weight.zero_()
    torch.testing.assert_close(completion_logprobs(other, random_groups(SHAPES)).logp, found, rtol=0, atol=1e-4)


def test_adapters_stay_within_the_mlp(load: Load, random_groups: Groups) -> None:
    pytest.importorskip("peft")
    from longreach.engine.model import LoraConfig

    model = load("llama", lora=LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    wanted = completion_logprobs(model, random_groups(SHAPES)).logp
    bind(model, StandIn().kernels())
    torch.testing.assert_close(completion_logprobs(model, random_groups(SHAPES)).logp, wanted, rtol=0, atol=1e-4)


def test_another_formula_is_noticed(load: Load, build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"LlamaRMSNorm\) computes something else than Liger's kernel"):
        bind(load("llama"), StandIn().kernels(shift=1.0))  # a norm whose weight has one added, as Gemma's
    with pytest.raises(ValueError, match=r"MLP\) computes something else"):
        bind(load_model(build("llama", hidden_act="relu"), dtype=torch.float32, device="cpu"), StandIn().kernels())
    with pytest.raises(ValueError, match=r"log-probs after .* differ by"):
        verify_change(load("llama"), lambda m: bind(m, StandIn().kernels(turn=-1.0)))


def test_an_attention_that_turns_otherwise_is_refused(load: Load) -> None:
    model = load("llama")
    attention = model.get_decoder().layers[0].self_attn

    class Own(type(attention)):
        def forward(self, *args: Any, **named: Any) -> Any:
            return super().forward(*args, **named)

    attention.__class__ = Own
    with pytest.raises(ValueError, match=r"layers.0.self_attn \(Own\) doesn't rotate"):
        bind(model, StandIn().kernels())


def test_without_a_gpu_it_is_refused(load: Load) -> None:
    with pytest.raises(ValueError, match=r"model\.liger needs a GPU.*the model is on cpu"):
        use_liger(load("llama"))
    with pytest.raises(ValueError, match=r"model\.liger needs a GPU"):
        load("llama", liger=True)


def test_ligers_modules_read_what_ours_are_given(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's own methods on our instances, with torch in place of the kernels that they launch."""
    pytest.importorskip("liger_kernel")

    class Norm:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, epsilon: float, offset: float, casting: str, *_: Any) -> Tensor:
            assert (offset, casting) == (0.0, "llama")
            return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon))

    class Swiglu:
        @staticmethod
        def apply(a: Tensor, b: Tensor, *_: Any) -> Tensor:
            return torch.nn.functional.silu(a) * b

    monkeypatch.setattr("liger_kernel.transformers.rms_norm.LigerRMSNormFunction", Norm)
    monkeypatch.setattr("liger_kernel.transformers.swiglu.LigerSiLUMulFunction", Swiglu)
    own = liger_kernels()
    model = load("qwen3")
    verify_change(model, lambda m: bind(m, Kernels(own.norm, own.mlp, StandIn().kernels().rope)))


@pytest.mark.gpu
def test_on_a_gpu_log_probs_and_gradients_are_the_same_to_rounding(
    build: Callable[..., Any], random_groups: Groups
) -> None:
    pytest.importorskip("liger_kernel")
    folder, results = build("qwen3"), []
    for liger in (False, True):
        model = load_model(folder, dtype=torch.float32, device="cuda", liger=liger, tile_tokens=20)
        logp = completion_logprobs(model, random_groups(SHAPES)).logp
        logp.square().sum().backward()
        results.append((logp.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-3)
    for own, wanted in zip(results[1][1], results[0][1], strict=True):
        assert (own - wanted).norm() <= 1e-3 * wanted.norm()
