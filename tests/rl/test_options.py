"""No dead options: each key of a recipe is changed here and must change something.

Each table has one row a key: (what is set on both sides, what is set on one side only). A key without a row fails, so a new
option can't come without showing its effect.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Group, Sampling, load_tokenizer
from longreach.engine.generate import GeneratorConfig
from longreach.engine.model import LoraConfig, ModelConfig
from longreach.engine.optimizer import OptimizerConfig
from longreach.engine.rope import RopeScaling
from longreach.rl import policy as policy_module
from longreach.rl import train
from longreach.rl.console import Console
from longreach.rl.curriculum import Phase
from longreach.rl.data import DataConfig
from longreach.rl.entropy import AdaptiveEntropy, Aepo, EntropyControl, NegativeClip, spared
from longreach.rl.evaluate import EvalConfig, evaluate
from longreach.rl.generator import LocalGenerator
from longreach.rl.grpo_config import GrpoConfig
from longreach.rl.policy import Policy
from longreach.rl.prompts import tokenize
from longreach.rl.recipe import Recipe
from longreach.rl.retrospective import RetrospectiveConfig
from longreach.rl.rewards import make_reward
from longreach.rl.run import RunConfig
from longreach.rl.sampler import PromptSampler
from longreach.rl.sft import SftConfig
from longreach.rl.sources import read_prompts

Make = Callable[..., Any]
Row = tuple[dict[str, Any], dict[str, Any]]


def keys_of(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def digest(model: torch.nn.Module) -> str:
    whole = hashlib.sha256()
    for parameter in model.parameters():
        whole.update(parameter.detach().numpy().tobytes())
    return whole.hexdigest()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every call of `Policy.logprobs`, `Policy.loss` and `Policy.sample`."""
    made: list[str] = []

    def count(name: str) -> None:
        original = getattr(Policy, name)
        monkeypatch.setattr(Policy, name, lambda *a, **k: (made.append(name), original(*a, **k))[1])

    count("logprobs")
    count("loss")
    count("sample")
    return made


# One RL step with hand-made prompts and scripted rewards

SMALL: dict[str, Any] = {"batch_prompts": 4, "group_size": 3, "updates": 2}
KL = {"kl_weight": 0.5}
DYNAMIC = {"dynamic_sampling": True}
STEP: dict[str, Row] = {
    "kind": ({}, {"kind": "dapo"}),
    "group_size": ({}, {"group_size": 2}),
    "batch_prompts": ({}, {"batch_prompts": 8}),
    "updates": ({}, {"updates": 1}),
    "clip_low": ({}, {"clip_low": 0.0}),
    "clip_high": ({"updates": 4}, {"clip_high": 0.0}),
    "options": ({"kind": "sapo"}, {"options": {"temperature_neg": 9.0}}),
    "kl_weight": ({}, KL),
    "kl": (KL, {"kl": "k1"}),
    "kl_bias_correction": (KL, {"kl_bias_correction": True}),
    "entropy_weight": ({}, {"entropy_weight": 0.1}),
    "scale": ({}, {"scale": "batch"}),
    "importance": ({"foreign": True}, {"importance": "off"}),  # ratios of 1 to rounding
    "importance_cap": ({}, {"importance_cap": 0.5}),
    "importance_range": ({}, {"importance_range": (0.0, 0.999999)}),
    "importance_level": ({"importance_cap": 2.0}, {"importance_level": "sequence"}),  # likewise
    "importance_sequence_range": ({}, {"importance_sequence_range": (0.0, 1.0)}),
    "off_policy_threshold": ({}, {"off_policy_threshold": 1e-9}),
    "top_entropy_quantile": ({}, {"top_entropy_quantile": 0.5}),
    "negative_clip": ({}, {"negative_clip": NegativeClip("token", 6.5)}),
    "aepo": ({}, {"aepo": Aepo(1.0, 2.0)}),
    "adaptive_entropy": ({"entropy_weight": 0.1}, {"adaptive_entropy": AdaptiveEntropy(target=9.0)}),
    "dynamic_sampling": ({}, DYNAMIC),
    "max_batches": (DYNAMIC, {"max_batches": 1}),
    "overlong_buffer": ({}, {"overlong_buffer": 3}),
    "micro_batch_tokens": ({}, {"micro_batch_tokens": 24}),
    "shared_prefix": ({"micro_batch_tokens": 40}, {"shared_prefix": False}),
}


@pytest.fixture
def stepped(make_policy: Make, make_prompts: Make, scripted: Make, make_trainer: Make, calls: list[str]) -> Make:
    def run(foreign: bool = False, **options: Any) -> Any:
        prompts = make_prompts(*[5 + i % 4 for i in range(12)])
        reward = scripted(lambda example, place: 0.5 if int(example.id[1:]) % 3 == 0 else [1.0, 0.0, 0.25][place])
        policy, reference = make_policy(), make_policy() if options.get("kl_weight") else None
        policy.served = LocalGenerator(policy) if foreign else None
        sampler = PromptSampler(range(12), {}, seed=0)
        config = GrpoConfig(**{**SMALL, **options})
        trainer = make_trainer(
            policy, config, prompts, reward=reward, reference=reference, sampling=Sampling(5), sampler=sampler
        )
        calls.clear()
        _, groups = trainer.step(1, 0.3)
        return len(groups), sampler.state(), len(calls), digest(policy.model)

    return run


@pytest.mark.parametrize("key", STEP)
def test_grpo_config(key: str, stepped: Make) -> None:
    both, one = STEP[key]
    assert stepped(**both) != stepped(**both, **one)


def test_a_step_without_changes_is_the_same_step(stepped: Make) -> None:
    assert stepped() == stepped()


def test_every_key_of_the_rl_step_has_a_row() -> None:
    assert set(STEP) | {"balanced_tasks", "staleness", "stragglers"} == keys_of(
        GrpoConfig
    )  # `test_overlap.py`, `test_stragglers.py`


RULES: dict[type, dict[str, Row]] = {
    NegativeClip: {
        "level": ({"level": "token", "threshold": 1.0}, {"level": "sequence"}),
        "threshold": ({"level": "token", "threshold": 1.0}, {"threshold": 2.0}),
    },
    Aepo: {
        "low": ({"low": 1.0, "high": 2.0}, {"low": 1.6}),
        "high": ({"low": 1.0, "high": 2.0}, {"high": 3.0}),
    },
    AdaptiveEntropy: {
        "target": ({}, {"target": 2.0}),
        "delta": ({"target": 2.0}, {"delta": 0.02}),
        "min": ({"target": 1.0, "delta": 0.09}, {"min": 0.05}),
        "max": ({"target": 3.0}, {"max": 0.102}),
    },
}


@pytest.mark.parametrize("cls", RULES, ids=lambda cls: cls.__name__)
def test_the_sections_of_the_entropy_rules(cls: type) -> None:
    """Over a course of entropies: what is spared, when it masks, what the bonus weighs."""
    assert set(RULES[cls]) == keys_of(cls)

    def course(rule: Any) -> Any:
        if isinstance(rule, NegativeClip):
            return spared(torch.tensor([0.5, 1.5, 2.5]), -1.0, rule).tolist()
        control = EntropyControl(0.1, *((rule, None) if isinstance(rule, AdaptiveEntropy) else (None, rule)))
        made = []
        for entropy in (0.9, 2.5, 1.5, 0.8, 0.8, 2.5):
            made.append((control.begin(entropy), control.weight))
            control.observe(entropy)
        return made

    for key, (both, one) in RULES[cls].items():
        assert course(cls(**both)) != course(cls(**{**both, **one})), f"{cls.__name__}.{key} changes nothing"


# Whole runs

BRIEF: dict[str, Any] = {
    "sft": None, "data__eval": [], "phases__0__steps": 2, "phases__1__steps": 1, "run__save_every": 1,
    "run__keep_checkpoints": 9, "retrospective": None,
}  # fmt: skip
WARM = {"sft__batch_size": 3, "data__eval": [], "phases": [], "retrospective": None}
POOL = {"retrospective": {"samples": 2, "threshold": 0.4}}
DRAW = {"retrospective": {"samples": 2, "selection": "weighted", "size": 3}}
EVALUATED = {"data__eval": None, "eval__batch": 6}
RUNS: dict[type, dict[str, Row]] = {
    GrpoConfig: {"balanced_tasks": (BRIEF, {"rl__balanced_tasks": True})},
    Phase: {
        "upper": (BRIEF, {"phases__0__upper": "median - 1"}),
        "max_completion": (BRIEF, {"phases__0__max_completion": 3}),
        "steps": (BRIEF, {"phases__0__steps": 1}),
        "learning_rate": (BRIEF, {"phases__0__learning_rate": 2e-2}),
        "warmup_steps": (BRIEF, {"phases__0__warmup_steps": 2}),
        "schedule": (BRIEF, {"phases__0__schedule": "linear"}),
        "temperature": (BRIEF, {"phases__0__temperature": 0.5}),
        "top_p": (BRIEF, {"phases__0__top_p": 0.3}),
        "top_k": (BRIEF, {"phases__0__top_k": 2}),
    },
    RetrospectiveConfig: {
        "source": ({**BRIEF, **POOL}, {"retrospective__source": "records"}),
        "selection": ({**BRIEF, **POOL}, DRAW),
        "threshold": ({**BRIEF, **POOL}, {"retrospective__threshold": 0.9}),
        "size": ({**BRIEF, **DRAW}, {"retrospective__size": 1}),
        "samples": ({**BRIEF, **POOL}, {"retrospective__samples": 3}),
    },
    RunConfig: {
        "seed": (BRIEF, {"run__seed": 1}),
        "save_every": (BRIEF, {"run__save_every": 9}),
        "keep_checkpoints": (BRIEF, {"run__keep_checkpoints": 1}),
        "threads": (BRIEF, {"run__threads": 2}),
    },
    SftConfig: {
        "data": (WARM, {"sft__data": "first rows"}),
        "upper": (WARM, {"sft__upper": 40}),
        "learning_rate": (WARM, {"sft__learning_rate": 2e-2}),
        "epochs": (WARM, {"sft__epochs": 2}),
        "batch_size": (WARM, {"sft__batch_size": 4}),
        "warmup_steps": (WARM, {"sft__warmup_steps": 2}),
        "schedule": (WARM, {"sft__schedule": "cosine"}),
        "micro_batch_tokens": ({**WARM, "sft__upper": 100}, {"sft__micro_batch_tokens": 100}),
    },
    OptimizerConfig: {
        "kind": (WARM, {"optimizer__kind": "adamw-8bit"}),
        "weight_decay": (WARM, {"optimizer__weight_decay": 1.0}),
        "beta1": (WARM, {"optimizer__beta1": 0.5}),
        "beta2": (WARM, {"optimizer__beta2": 0.5}),
        "epsilon": (WARM, {"optimizer__epsilon": 1.0}),
        "grad_clip": ({**WARM, "optimizer__epsilon": 1.0}, {"optimizer__grad_clip": 0.01}),
    },
    EvalConfig: {
        "every": ({**BRIEF, **EVALUATED}, {"eval__every": 1}),
        "base": ({**BRIEF, **EVALUATED}, {"eval__base": False}),
    },
}  # fmt: skip


@pytest.fixture
def ran(make_recipe: Make, data_dir: Path, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> Make:
    """Everything that a run leaves behind but measured times, and the threads it asked for (two would fight for this core)."""
    seen: dict[str, Any] = {}
    begun = itertools.count()  # a run that is refused leaves its folder behind
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def run(**keys: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):  # torchao's update would be compiled for a minute
            return run_eagerly(**keys)

    def run_eagerly(**keys: Any) -> Any:
        if (key := repr(keys)) in seen:
            return seen[key]
        keys = {name: value for name, value in keys.items() if (name, value) != ("data__eval", None)}
        if keys.get("phases__0__upper") == "median - 1":
            keys["phases__0__upper"] = int((data_dir / "median").read_text()) - 1
        if keys.get("sft__data") == "first rows":
            first = (data_dir / "sft.jsonl").read_text().splitlines()[:3]
            (tmp_path / "first.jsonl").write_text("\n".join(first))
            keys["sft__data"] = str(tmp_path / "first.jsonl")
        run_dir = tmp_path / str(next(begun))
        calls.clear()
        threads.clear()
        train(make_recipe(**keys), run_dir, console=Console(quiet=True))
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        shown = [{k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/"))} for line in lines]
        files = {
            str(path.relative_to(run_dir)): path.read_bytes()
            for name in ("evals", "pool", "model")
            for path in (run_dir / name).rglob("*.*")
        }
        checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        seen[key] = (json.dumps(shown), files, checkpoints, len(calls), list(threads))
        return seen[key]

    return run


@pytest.mark.parametrize("cls", RUNS, ids=lambda cls: cls.__name__)
def test_what_a_run_reads(cls: type, ran: Make) -> None:
    for key, (both, one) in RUNS[cls].items():
        if key == "kind" and find_spec("torchao") is None:
            with pytest.raises(ValueError, match="needs torchao"):
                ran(**{**both, **one})
            continue
        assert ran(**both) != ran(**{**both, **one}), f"{cls.__name__}.{key} changes nothing"


def test_every_key_of_a_run_has_a_row() -> None:
    for cls in (Phase, RetrospectiveConfig, RunConfig, SftConfig, OptimizerConfig):
        assert set(RUNS[cls]) == keys_of(cls), cls.__name__
    assert set(RUNS[EvalConfig]) | set(EVALUATION) == keys_of(EvalConfig)


# Evaluation

EVALUATION: dict[str, dict[str, Any]] = {
    "k": {"k": 2},
    "max_completion": {"max_completion": 3},
    "temperature": {"temperature": 0.1},
    "top_p": {"top_p": 0.3},
    "top_k": {"top_k": 1},
    "headline": {"headline": ["odd"]},
    "buckets": {"buckets": [10, 20, 500]},
    "batch": {"batch": 2},
    "rules": {"rules": ["cover"]},
}


@pytest.mark.parametrize("key", EVALUATION)
def test_eval_config(key: str, make_recipe: Make, policy: Policy, calls: list[str], tiny_dir: Path) -> None:
    made = []
    for options in ({}, EVALUATION[key]):
        recipe: Recipe = make_recipe(**{f"eval__{name}": value for name, value in options.items()})
        prompts = read_prompts(recipe, load_tokenizer(tiny_dir), None, Console(quiet=True)).eval
        calls.clear()
        summary, rows = evaluate(
            policy, make_reward(recipe.reward), prompts, recipe.eval, bounds=recipe.buckets(), seed=0, name="now"
        )  # fmt: skip
        made.append((json.dumps(summary), [row["completions"] for row in rows], len(calls)))
    assert made[0] != made[1]


# Data

LINES = [{"id": f"r{i}", "prompt": "word " * (i + 3), "answers": ["1"]} for i in range(6)]
DATA: dict[str, Row] = {
    "train": ({}, {"train": "other.jsonl"}),
    "eval": ({}, {"eval": ["other.jsonl"]}),
    "split": ({"train": "splits"}, {"split": "test"}),
    "eval_split": ({"eval": ["splits"]}, {"eval_split": "train"}),
    "limit": ({}, {"limit": 2}),
    "skip_bad_rows": ({"train": "bad.jsonl"}, {"skip_bad_rows": True}),
    "truncate": ({"truncate": "keep", "max_length": 8}, {"truncate": "middle"}),
    "max_length": ({"truncate": "middle", "max_length": 8}, {"max_length": 7}),
}


@pytest.mark.parametrize("key", DATA)
def test_data_config(key: str, make_recipe: Make, tmp_path: Path, tiny_dir: Path) -> None:
    (tmp_path / "splits").mkdir()
    files = {
        "rows": LINES,
        "other": LINES[:3],
        "bad": [*LINES, {}],
        "splits/train-0": LINES[:2],
        "splits/test-0": LINES[2:],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read(**options: Any) -> Any:
        options = {"train": "rows.jsonl", "eval": ["rows.jsonl"], **options}
        options |= {
            "train": str(tmp_path / options["train"]),
            "eval": [str(tmp_path / name) for name in options["eval"]],
        }
        phases = [{"upper": 500, "max_completion": 2, "steps": 1, "learning_rate": 1.0}]
        recipe = make_recipe(data=options, phases=phases, sft=None, retrospective=None)
        try:
            prompts = read_prompts(recipe, load_tokenizer(tiny_dir), None, Console(quiet=True))
        except ValueError as error:
            return str(error)
        return [p.ids for p in prompts.train], [p.ids for p in prompts.eval]

    both, one = DATA[key]
    assert read(**both) != read(**{**both, **one})


def test_every_key_of_the_data_has_a_row() -> None:
    assert set(DATA) == keys_of(DataConfig)


# Model and generator

LOADED: dict[str, Any] = {
    "path": "other", "dtype": "bfloat16", "autocast": True, "device": "meta", "yarn": 2.0, "gradient_checkpointing": True,
    "trust_remote_code": True, "lora": {"rank": 2}, "rope_scaling": {"kind": "linear", "factor": 2.0}, "tile_tokens": 64,
    "offload_activations": True, "liger": True,
}  # fmt: skip
ALONGSIDE: dict[str, dict[str, Any]] = {"offload_activations": {"model__gradient_checkpointing": True}}


@pytest.mark.parametrize("key", LOADED)
def test_model_config(key: str, make_recipe: Make, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything reaches `load_model` (its own tests show what it does with it), or the precision of the policy."""
    asked: list[Any] = []

    def load(source: str, **arguments: Any) -> Any:
        asked.append((source, arguments))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(policy_module, "load_model", load)
    monkeypatch.setattr(policy_module, "load_tokenizer", lambda path, **arguments: asked.append((path, arguments)))
    monkeypatch.setattr(policy_module, "stop_tokens", lambda *_: ())
    made = []
    for options in ({}, {f"model__{key}": LOADED[key]}):
        recipe: Recipe = make_recipe(**ALONGSIDE.get(key, {}), **options)
        asked.clear()
        made_policy = Policy(recipe.model, recipe.generator)
        monkeypatch.setattr(made_policy, "model", type("M", (), {"device": torch.device("cpu")}), raising=False)
        made.append((repr(asked), type(made_policy.precision())))
    assert made[0] != made[1]


def test_every_key_of_the_model_has_a_row() -> None:
    assert set(LOADED) == keys_of(ModelConfig)


ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kind": ({"kind": "yarn"}, {"kind": "linear"}),
    "factor": ({"kind": "yarn"}, {"factor": 3.0}),
    "original": ({"kind": "yarn"}, {"original": 512}),
    "attention_factor": ({"kind": "yarn"}, {"attention_factor": 1.5}),
    "beta_fast": ({"kind": "yarn"}, {"beta_fast": 4.0}),
    "beta_slow": ({"kind": "yarn"}, {"beta_slow": 20.0}),
    "low_freq_factor": ({"kind": "llama3"}, {"low_freq_factor": 3.0}),
    "high_freq_factor": ({"kind": "llama3"}, {"high_freq_factor": 2.0}),
}


@pytest.mark.parametrize("key", ROPE)
def test_rope_scaling(key: str, make_policy: Make) -> None:
    assert set(ROPE) == keys_of(RopeScaling)
    both, one = ROPE[key]
    angles = []
    for options in (both, {**both, **one}):
        policy = make_policy(rope_scaling=RopeScaling(**{"factor": 2.0, **options}))
        cos, _ = policy.model.get_decoder().rotary_emb(torch.zeros(1, 1, 1), torch.arange(0, 1500, 100)[None])
        angles.append((cos, policy.model.config.max_position_embeddings))
    assert not torch.equal(angles[0][0], angles[1][0])


@pytest.mark.parametrize(
    "options",
    [{"offload_activations": True, "gradient_checkpointing": True}, {"tile_tokens": 16}],
    ids=lambda o: next(iter(o)),
)
def test_memory_options_reach_the_model_and_keep_its_numbers(
    options: dict[str, Any], make_policy: Make, make_prompts: Make
) -> None:
    groups = [Group(torch.arange(10, 70), [torch.arange(100, 120)])]
    plain, saving = make_policy(), make_policy(**options)
    wanted, found = (policy.logprobs(groups, 1.0).logp for policy in (plain, saving))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    layer = saving.model.get_decoder().layers[0]
    if "tile_tokens" in options:
        assert layer.mlp.forward.tokens == 16
    else:
        assert layer._gradient_checkpointing_func.func.__self__.bytes > 0


@pytest.mark.parametrize("options", [{"rank": 3}, {"alpha": 7.0}, {"targets": ("q_proj",)}])
def test_lora_config(options: dict[str, Any], make_policy: Make) -> None:
    tuners = pytest.importorskip("peft.tuners.lora", reason="adapters need the lora extra")

    def adapters(config: LoraConfig) -> dict[str, Any]:
        layers = dict(make_policy(lora=config).model.named_modules())
        return {name: (m.r, m.scaling) for name, m in layers.items() if isinstance(m, tuners.LoraLayer)}

    usual = {"rank": 2, "alpha": 4.0, "targets": ("q_proj", "v_proj")}
    assert set(usual) == keys_of(LoraConfig)
    assert adapters(LoraConfig(**usual)) != adapters(LoraConfig(**{**usual, **options}))


def test_generator_config(make_policy: Make, make_prompts: Make) -> None:
    """A smaller budget means more batches, each with a prefill and its own decode steps."""
    assert keys_of(GeneratorConfig) == {"batch_tokens"}
    passes = []
    for budget in (1000, 20):
        policy = make_policy(batch_tokens=budget)
        seen: list[int] = []
        policy.model.get_decoder().register_forward_hook(lambda *_, seen=seen: seen.append(1))
        policy.sample(make_prompts(9, 9, 9), 2, Sampling(4), 0)
        passes.append(len(seen))
    assert passes[0] < passes[1]


def test_tokenize_is_what_reading_uses(make_recipe: Make, tiny_dir: Path) -> None:
    """The rows above speak of prompts in tokens: nothing between file and phase changes them."""
    tokenizer = load_tokenizer(tiny_dir)
    prompts = read_prompts(make_recipe(), tokenizer, None, Console(quiet=True)).train
    assert [p.ids for p in tokenize([p.example for p in prompts], tokenizer)] == [p.ids for p in prompts]
