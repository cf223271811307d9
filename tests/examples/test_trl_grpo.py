"""examples/trl_grpo.py: loss, gradients and metrics are those of TRL's own `_compute_loss` on the same batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

trl = pytest.importorskip("trl", reason="trl isn't installed")

VOCAB, PROMPT, COMPLETION = 40, 9, 6
Make = Callable[..., Any]
BOUND = 1e-5
"""Relative, in fp32: a prompt's gradient is a sum of other roundings than TRL's. About 1e-6 is what it takes."""


@pytest.fixture(scope="module")
def example(root: Path) -> Any:
    found = importlib.util.spec_from_file_location("trl_grpo", root / "examples" / "trl_grpo.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model on disk, for TRL loads the reference model from where the policy came from."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.25, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(made)
    return str(made)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w2"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w1", unk_token="w2")


def variety(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


@pytest.fixture
def make(tmp_path: Path, folder: str) -> Callable[..., Any]:
    """make(trainer class, **settings of GRPOConfig) -> a trainer of the tiny model."""

    def build(cls: Any, lora: bool = False, **settings: Any) -> Any:
        config = trl.GRPOConfig(
            **{
                "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [], "temperature": 0.8,
                "per_device_train_batch_size": 6, "num_generations": 3, "max_completion_length": COMPLETION,
                "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 3, **settings,
            }
        )  # fmt: skip
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompts = Dataset.from_list([{"prompt": "w5 w6 w7 w8"}, {"prompt": "w9 w3"}] * 4)
        torch.manual_seed(5)
        adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None
        return cls(
            policy, reward_funcs=variety, args=config, train_dataset=prompts, processing_class=tokenizer(),
            peft_config=adapters,
        )  # fmt: skip

    return build


def batch(**changes: Any) -> dict[str, Any]:
    """Two groups of three in shuffled order: prompts padded left, completions right, one masked whole, one of a token."""
    draw = torch.Generator().manual_seed(1)
    prompts = {length: torch.randint(3, VOCAB, (length,), generator=draw) for length in (PROMPT, 5)}
    lengths = [(PROMPT, 4), (5, 6), (PROMPT, 0), (5, 1), (5, 3), (PROMPT, COMPLETION)]
    prompt_ids, prompt_mask = torch.zeros(6, PROMPT, dtype=torch.long), torch.zeros(6, PROMPT, dtype=torch.long)
    mask = torch.zeros(6, COMPLETION, dtype=torch.long)
    for i, (p, r) in enumerate(lengths):
        prompt_ids[i, PROMPT - p :], prompt_mask[i, PROMPT - p :], mask[i, :r] = prompts[p], 1, 1

    def noise() -> Tensor:
        return -3.5 + 0.5 * torch.randn(6, COMPLETION, generator=draw)

    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_mask": mask,
        "completion_ids": torch.randint(3, VOCAB, (6, COMPLETION), generator=draw) * mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7, 0.0, 2.0, -1.5]), "old_per_token_logps": noise(),
        "ref_per_token_logps": noise(), "num_items_in_batch": mask.sum() * 3, **changes,
    }  # fmt: skip


def result(trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    trainer.current_gradient_accumulation_steps = 2  # what TRL's loop sets before each update
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


SETTINGS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.3, "steps_per_generation": 2, "per_device_train_batch_size": 3},
    "dr_grpo": {"loss_type": "dr_grpo", "delta": 1.5},
    "bnpo": {"loss_type": "bnpo"},
    "with a reference": {"loss_type": "grpo", "beta": 0.2},
    "with a corrected reference": {"loss_type": "dapo", "beta": 0.2, "use_bias_correction_kl": True},
    "checkpointed": {"loss_type": "grpo", "gradient_checkpointing": True},
    "adapters": {"loss_type": "grpo", "beta": 0.2, "lora": True},
    "TRL's formula, cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "TRL's formula, sequence ratios": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "TRL's formula, entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
}
INPUTS: dict[str, dict[str, Any]] = {
    "on-policy": {"old_per_token_logps": None},
    "tools": {"tool_mask": torch.tensor([[1, 0, 1, 1, 0, 1]]).expand(6, -1)},
    "an advantage for each token": {"advantages": torch.linspace(-1, 1, 6 * COMPLETION).view(6, -1)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_trls(name: str, make: Make, example: Any) -> None:
    compare(make, example, SETTINGS[name], batch())


@pytest.mark.parametrize("name", INPUTS)
def test_batches(name: str, make: Make, example: Any) -> None:
    compare(make, example, SETTINGS["grpo"], batch(**INPUTS[name]))


def test_weights_of_the_generator(make: Make, example: Any) -> None:
    """TRL's correction for vLLM: one weight for each sequence, zero where it is masked."""
    weights = torch.tensor([0.5, 1.5, 1.0, 2.0, 0.0, 1.2])[:, None]
    compare(make, example, SETTINGS["grpo"], batch(importance_sampling_ratio=weights), use_vllm=True)


def compare(make: Make, example: Any, settings: dict[str, Any], inputs: dict[str, Any], use_vllm: bool = False) -> None:
    ours, theirs = (make(cls, **settings) for cls in (example.SharedPrefixGRPOTrainer, trl.GRPOTrainer))
    ours.use_vllm = theirs.use_vllm = use_vllm  # no engine is needed once completions are there
    loss, gradients, metrics = result(ours, inputs)
    wanted, wanted_gradients, wanted_metrics = result(theirs, inputs)
    assert loss == pytest.approx(wanted, rel=BOUND, abs=1e-7)
    assert len(wanted_gradients) == len(gradients) > 20
    for name, gradient in wanted_gradients.items():
        assert gradient.abs().max() > 0, name
        assert (gradients[name] - gradient).abs().max() <= BOUND * gradient.abs().max(), name
    assert wanted_metrics.keys() - metrics.keys() <= {"clip_ratio/low_min", "clip_ratio/high_max"}
    for name in wanted_metrics.keys() & metrics.keys():
        if not (use_vllm and name.startswith("clip_ratio")):  # ours leave out what the weight has taken away
            assert metrics[name] == pytest.approx(wanted_metrics[name], rel=1e-4, abs=1e-6), name


def test_prompts_are_computed_once(make: Make, example: Any) -> None:
    """Two prompts and their completions in one row, however they were shuffled and padded."""
    trainer = make(example.SharedPrefixGRPOTrainer)
    seen: list[int] = []
    trainer.model.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    inputs = batch()
    result(trainer, inputs)
    assert seen == [PROMPT + 5 + int(inputs["completion_mask"].sum())]


RUNS: dict[str, dict[str, Any]] = {
    "on-policy": {}, "old and reference": {"beta": 0.1, "num_iterations": 2}, "adapters": {"beta": 0.1, "lora": True},
}  # fmt: skip


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_training_goes_as_trls(settings: dict[str, Any], make: Make, example: Any) -> None:
    """Whole steps, generation among them: the same seeds, so the same completions, losses and weights."""
    logs, weights = [], []
    for cls in (example.SharedPrefixGRPOTrainer, trl.GRPOTrainer):
        trainer = make(cls, max_steps=4, learning_rate=0.01, **settings)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert len(logs[0]) == len(logs[1]) == 4
    for ours, theirs in zip(*logs, strict=True):
        for name in theirs.keys() - {"step_time", "clip_ratio/low_min", "clip_ratio/high_max"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name
    assert max(row["grad_norm"] for row in logs[1]) > 0.01
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_images_are_refused(make: Make, example: Any) -> None:
    for settings in (SETTINGS["grpo"], SETTINGS["TRL's formula, cispo"]):
        with pytest.raises(ValueError, match="text alone"):
            result(make(example.SharedPrefixGRPOTrainer, **settings), {**batch(), "pixel_values": torch.zeros(1)})
