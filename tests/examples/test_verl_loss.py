"""examples/verl_loss.py: loss, gradients and log-probs are those of verl's own FSDP2 engine on the same micro-batch.

Both engines are verl's, on one process and the CPU, which verl knows by a platform of its own registering.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

pytest.importorskip("verl.workers.engine.fsdp.transformer_impl", reason="verl can't be imported", exc_type=ImportError)
if find_spec("trl") and not hasattr(importlib.import_module("trl"), "AutoModelForCausalLMWithValueHead"):
    pytest.skip(
        "verl 0.9 builds no engine beside a TRL without AutoModelForCausalLMWithValueHead", allow_module_level=True
    )

VOCAB = 40
LENGTHS = [(9, 4), (5, 6), (9, 2), (5, 1), (5, 3), (9, 6)]
"""Prompt and response of each sequence: two groups of three, shuffled."""
BOUND = 1e-5
"""Relative, in fp32: a prompt's gradient is a sum of other roundings than verl's. About 1e-6 is what it takes."""

Make = Callable[[Any], Any]


def verl(name: str) -> Any:
    """A module of verl's."""
    return importlib.import_module(f"verl.{name}")


@pytest.fixture(scope="module")
def example(root: Path) -> Any:
    found = importlib.util.spec_from_file_location("verl_loss", root / "examples" / "verl_loss.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """make(engine class) -> an engine of a tiny random model with plain SDPA, its module built and sharded."""
    platform, configs = verl("plugin.platform"), verl("workers.config")

    class PlatformCPU(verl("plugin.platform.platform_cuda").PlatformCUDA):
        device_name = vendor_name = "cpu"  # type: ignore[assignment]
        device_module = torch.cpu  # type: ignore[assignment]

        def current_device(self) -> Any:
            return "cpu"

    folder, usual = tmp_path_factory.mktemp("verl"), platform.get_platform()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.25, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    platform.set_platform(PlatformCPU())

    def build(cls: Any) -> Any:
        model = configs.HFModelConfig(
            path=str(folder / "model"), load_tokenizer=False, override_config={"attn_implementation": "sdpa"},
            use_remove_padding=False, enable_gradient_checkpointing=False,
        )  # fmt: skip
        exact = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        settings = configs.FSDPEngineConfig(strategy="fsdp2", mixed_precision=exact, use_torch_compile=False)
        optimizer = configs.FSDPOptimizerConfig(lr=1e-3, total_training_steps=1)
        engine = cls(model, settings, optimizer, verl("trainer.config").CheckpointConfig())
        engine.module = engine._build_fsdp_module(engine._build_module())
        return engine

    yield build
    platform.set_platform(usual)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def engines(make: Make, example: Any) -> SimpleNamespace:
    theirs = verl("workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
    return SimpleNamespace(ours=make(example.SharedPrefixEngine), theirs=make(theirs))


def batch(**changes: Any) -> Any:
    """A micro-batch as verl's trainer hands it to an engine: nested tensors, no padding; a tool's tokens masked."""
    draw = torch.Generator().manual_seed(1)
    prompts = {p: torch.randint(3, VOCAB, (p,), generator=draw) for p in {p for p, _ in LENGTHS}}
    responses = [torch.randint(3, VOCAB, (r,), generator=draw) for _, r in LENGTHS]

    def nested(parts: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    def noise(mean: float) -> Tensor:
        return nested([mean + 0.5 * torch.randn(r, generator=draw) for _, r in LENGTHS])

    advantages = [1.0, -0.5, 0.7, 0.0, 2.0, -1.5]
    tensors = {
        "input_ids": nested([torch.cat([prompts[p], x]) for (p, _), x in zip(LENGTHS, responses, strict=True)]),
        "position_ids": nested([torch.arange(p + r) for p, r in LENGTHS]),
        "prompts": nested([prompts[p] for p, _ in LENGTHS]), "responses": nested(responses),
        "response_mask": nested([torch.arange(r) % 4 != 2 for _, r in LENGTHS]),
        "advantages": nested([torch.full((r,), a) for (_, r), a in zip(LENGTHS, advantages, strict=True)]),
        "old_log_probs": noise(-3.5), "ref_log_prob": noise(-6.0),
    }  # fmt: skip
    told = {
        "temperature": 0.8,
        "dp_size": 1,
        "batch_num_tokens": 30,
        "global_batch_size": 12,
        "use_remove_padding": False,
    }
    everything = {**tensors, **told, "calculate_entropy": True, **changes}
    batched = {name: x for name, x in everything.items() if isinstance(x, Tensor)}
    return verl("utils.tensordict_utils").get_tensordict(
        batched, {name: x for name, x in everything.items() if name not in batched}
    )


def loss_of(**changes: Any) -> Any:
    """verl's ppo_loss as its workers bind it."""
    settings = {"rollout_n": 3, "ppo_micro_batch_size_per_gpu": 6, "strategy": "fsdp2", **changes}
    return partial(verl("workers.utils.losses").ppo_loss, config=verl("workers.config").FSDPActorConfig(**settings))


def result(engine: Any, data: Any, loss_function: Any) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
    engine.module.zero_grad()
    loss, output = engine.forward_step(data, loss_function, forward_only=False)
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in engine.module.named_parameters()}
    return loss.item(), gradients, output["metrics"]


def compare(engines: SimpleNamespace, data: Callable[[], Any], loss_function: Any) -> tuple[dict, dict]:
    loss, gradients, metrics = result(engines.ours, data(), loss_function)
    wanted, wanted_gradients, wanted_metrics = result(engines.theirs, data(), loss_function)
    assert loss == pytest.approx(wanted, rel=BOUND, abs=1e-7)
    assert len(gradients) == len(wanted_gradients) > 20
    for name, gradient in wanted_gradients.items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() <= BOUND * gradient.abs().max(), name
    return metrics, wanted_metrics


AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("counted", [True, False], ids=["counted globally", "counted here"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_aggregations(mode: str, counted: bool, engines: SimpleNamespace) -> None:
    changes: dict[str, Any] = {} if counted else {"batch_num_tokens": None, "global_batch_size": None}
    ours, theirs = compare(engines, lambda: batch(**changes), loss_of(loss_agg_mode=mode, clip_ratio_c=1.4))
    assert ours["actor/loss"].aggregate() == pytest.approx(theirs["actor/pg_loss"].aggregate(), rel=1e-4)
    assert ours["actor/pg_clipfrac"].aggregate() == pytest.approx(theirs["actor/pg_clipfrac"].aggregate())
    assert 0 < ours["actor/pg_clipfrac"].aggregate() < 1


SETTINGS: dict[str, dict[str, Any]] = {
    "bounds": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4},
    "entropy": {"entropy_coeff": 0.1},
    **{
        f"KL, {kl}": {"use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": kl}
        for kl in ("kl", "mse", "low_var_kl")
    },
    "verl's formula, another KL": {"use_kl_loss": True, "kl_loss_coef": 0.2, "kl_loss_type": "abs"},
    "verl's formula, gspo": {"policy_loss": "gspo", "loss_agg_mode": "seq-mean-token-mean"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, engines: SimpleNamespace, example: Any) -> None:
    settings = dict(SETTINGS[name])
    if "policy_loss" in settings:
        settings["policy_loss"] = verl("workers.config").PolicyLossConfig(loss_mode=settings["policy_loss"])
    loss = loss_of(**settings)
    assert example.is_vanilla(loss) == (not name.startswith("verl's"))
    compare(engines, batch, loss)


def test_weights_of_the_generator(engines: SimpleNamespace) -> None:
    parts = [torch.linspace(0.5, 1.5, r) for _, r in LENGTHS]
    weights = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    compare(engines, lambda: batch(rollout_is_weights=weights), loss_of())


def test_a_temperature_for_each_sequence(engines: SimpleNamespace) -> None:
    heats = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5, 2.0])
    compare(engines, lambda: batch(temperature=heats), loss_of())


@torch.no_grad()
def test_log_probs_and_entropies(engines: SimpleNamespace) -> None:
    padded, found = verl("workers.utils.padding").no_padding_2_padding, []
    for engine in (engines.ours, engines.theirs):
        output = engine.forward_step(batch(), None, forward_only=True)[1]["model_output"]
        mask = torch.tensor([[j < r for j in range(6)] for _, r in LENGTHS])
        found.append([padded(output[name], batch())[mask] for name in ("log_probs", "entropy")])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_prompts_are_computed_once(engines: SimpleNamespace) -> None:
    seen: list[int] = []
    embedding = engines.ours.module.model.embed_tokens
    hook = embedding.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    engines.ours.forward_step(batch(), loss_of(), forward_only=False)
    hook.remove()
    assert seen == [9 + 5 + sum(r for _, r in LENGTHS)]


def test_verl_prefers_the_engine_on_nvidia(example: Any) -> None:
    assert (
        verl("workers.engine.base").EngineRegistry._engines["language_model"]["fsdp2"]["cuda", "nvidia"]
        is example.SharedPrefixEngine
    )
