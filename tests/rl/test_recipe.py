"""Recipes: every shipped one parses and reads back, the paper's numbers stand in them, and what can't work is refused."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from longreach.rl.config import build, dump
from longreach.rl.policy import model_source
from longreach.rl.recipe import Recipe, load_recipe, shipped, to_toml

SHIPPED = (
    "demo", "smoke", "qwenlong-l1-14b", "qwenlong-l1-14b-dapo", "qwenlong-l1-32b", "qwenlong-l1-32b-dapo", "longreach-120k",
    "one-gpu-8b-lora", "qwenlong-l1.5-4b",
)  # fmt: skip
PHASE = {"upper": 100, "max_completion": 10, "steps": 1, "learning_rate": 1e-3}
BASE: dict[str, Any] = {"name": "x", "model": {"path": "m"}, "data": {"train": "t.jsonl"}, "phases": [PHASE]}


def recipe(**sections: Any) -> Recipe:
    return build(Recipe, {**BASE, **sections})


def test_the_promised_recipes_are_shipped() -> None:
    assert set(shipped()) >= set(SHIPPED)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_shipped_recipe_parses_and_its_dump_reads_back_equal(name: str, tmp_path: Path) -> None:
    made = load_recipe(name)
    assert made.name == name
    kept = tmp_path / "recipe.toml"
    kept.write_text(to_toml(dump(made)), encoding="utf-8")
    assert load_recipe(str(kept)) == made
    if made.model.path.startswith("shipped:"):
        assert Path(model_source(made.model), "model.safetensors").exists()


@pytest.mark.parametrize("name", ["qwenlong-l1-14b", "qwenlong-l1-32b", "qwenlong-l1-14b-dapo", "qwenlong-l1-32b-dapo"])
def test_the_numbers_of_the_paper(name: str) -> None:
    """arXiv 2505.17667, section 3.2, and the released script where the paper is silent (the clip of GRPO, DAPO's lengths)."""
    made = load_recipe(name)
    size, dapo = name.split("-")[2].upper(), name.endswith("dapo")
    assert made.model.path == f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}"
    assert made.sft is not None
    assert (made.sft.learning_rate, made.sft.epochs, made.sft.batch_size) == (5e-6, 3, 128)
    assert made.sft.upper == 20_003  # the longest of its 5,305 rows; "20K" in the text
    assert [
        (p.upper, p.max_completion, p.learning_rate, p.warmup_steps, p.schedule, p.temperature, p.top_p, p.top_k)
        for p in made.phases
    ] == [(upper, 10_000, 2e-6, 0, "constant", 0.7, 0.95, 0) for upper in (20_000, 60_000)]
    rl = made.rl
    assert (rl.group_size, rl.batch_prompts, rl.updates, rl.kl_weight, rl.scale) == (8, 128, 4, 0.0, "group")
    assert made.retrospective is not None
    kept = made.retrospective
    assert (kept.selection, kept.threshold, kept.samples) == ("threshold", 0.0, 8)
    grpo = ("grpo", 0.2, 0.2, False, 0)
    assert (rl.kind, rl.clip_low, rl.clip_high, rl.dynamic_sampling, rl.overlong_buffer) == (
        ("dapo", 0.2, 0.28, True, 1000) if dapo else grpo
    )
    assert (made.optimizer.weight_decay, made.optimizer.grad_clip) == (0.01, 1.0)


def test_longreach_120k_goes_to_120k() -> None:
    made = load_recipe("longreach-120k")
    assert [phase.upper for phase in made.phases] == [20_000, 60_000, 120_000]
    assert made.model.yarn == 4.0 and made.window() <= 4 * 40_960  # Qwen3's own positions
    assert load_recipe("one-gpu-8b-lora").model.lora is not None
    assert load_recipe("one-gpu-8b-lora").window() <= 4 * 40_960


def test_the_numbers_of_the_second_paper() -> None:
    """arXiv 2512.12967, sections 4.1 and 5.1; AEPO's bounds it doesn't print, but its Figures 8 and 10 show the entropy."""
    made = load_recipe("qwenlong-l1.5-4b")
    assert [(p.upper, p.max_completion, p.learning_rate, p.schedule, p.temperature, p.top_p) for p in made.phases] == [
        (upper, longest, 2e-6, "constant", 0.7, 0.95)
        for upper, longest in ((20_000, 12_000), (60_000, 20_000), (120_000, 50_000))
    ]
    rl = made.rl
    assert (rl.group_size, rl.batch_prompts, rl.updates, rl.kl_weight, rl.scale) == (8, 128, 1, 0.0, "task")
    assert (rl.loss.normalizer, rl.balanced_tasks, made.sft) == ("tokens", True, None)
    assert rl.aepo is not None
    assert 0.1 <= rl.aepo.low < rl.aepo.high <= 0.225


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    write(
        tmp_path / "base.toml",
        to_toml(dump(recipe(phases=[PHASE, {**PHASE, "upper": 200}], rl={"updates": 2, "batch_prompts": 4}))),
    )
    child = write(tmp_path / "child.toml", 'extends = "base.toml"\n[rl]\nbatch_prompts = 8\n')
    made = load_recipe(child)
    assert (made.name, made.rl.updates, made.rl.batch_prompts, len(made.phases)) == ("child", 2, 8, 2)
    text = 'extends = "child.toml"\n[[phases]]\n' + to_toml(PHASE)
    assert len(load_recipe(write(tmp_path / "grandchild.toml", text)).phases) == 1
    assert load_recipe(write(tmp_path / "own.toml", 'extends = "demo"\n[run]\nseed = 5\n')).run.seed == 5


def test_extends_that_comes_back_to_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, parent in (("a", "b"), ("b", "a"), ("self", "self")):
        write(tmp_path / f"{name}.toml", f'extends = "{parent}.toml"\n')
    for name in ("a.toml", "self.toml", "../" + tmp_path.name + "/b.toml", str(tmp_path / "a.toml")):
        with pytest.raises(ValueError, match="can't be its own ancestor"):
            load_recipe(name)


@pytest.mark.parametrize(
    "text, words",
    [
        ("name = ", "is not valid TOML"),
        ('extends = "nothing"', "no recipe 'nothing'"),
        ('extends = "nothing.toml"', "nothing.toml'"),
        ("extends = 3", "extends must be the name or the path of one recipe, not 3"),
    ],
)
def test_an_unreadable_recipe_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_recipe(write(tmp_path / "r.toml", text))


@pytest.mark.parametrize("name", ["demmo", "missing.toml", ".", "rl"])
def test_a_recipe_that_is_not_there(name: str) -> None:
    with pytest.raises(ValueError, match=f"no recipe '{re.escape(name)}'.*give the path of a .toml file"):
        load_recipe(name)


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        load_recipe("demmo")


def test_overrides_reach_every_level() -> None:
    made = load_recipe(
        "smoke", [("phases.0.steps", "7"), ("rl.group-size", "2"), ("retrospective", "none"), ("name", "mine")]
    )
    assert (made.phases[0].steps, made.rl.group_size, made.retrospective, made.name) == (7, 2, None, "mine")


def test_free_names_of_sections_survive_the_dump(tmp_path: Path) -> None:
    data = {"train": "synthetic:my data.1"}
    made = recipe(data=data, synthetic={"my data.1": {"rows": 3}, 'quo"ted': {}, "bare-1_": {}})
    assert load_recipe(write(tmp_path / "r.toml", to_toml(dump(made)))) == made


def test_text_with_anything_in_it_survives_the_dump(tmp_path: Path) -> None:
    made = recipe(data={"train": 'a "b" \\ \n\t é \u2028 #'})
    assert load_recipe(write(tmp_path / "r.toml", to_toml(dump(made)))) == made


TWO = [PHASE, {**PHASE, "upper": 200, "max_completion": 50}]


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"phases": []}, "neither [sft] nor [[phases]]"),
        ({"data": {}}, "[[phases]] need prompts: set data.train"),
        ({"phases": [PHASE, PHASE]}, "phases.1.upper = 100 does not lie above phases.0.upper = 100"),
        ({"phases": [{**PHASE, "upper": 0}]}, "phases.0: steps and upper must be at least 1"),
        ({"phases": [{**PHASE, "steps": 0}]}, "phases.0: steps and upper must be at least 1"),
        ({"phases": [PHASE, {**TWO[1], "temperature": 0.0}]}, "phases.1: temperature = 0: greedy"),
        ({"phases": [PHASE, {**TWO[1], "temperature": -1.0}]}, "phases.1: temperature must be"),
        ({"phases": [PHASE, {**TWO[1], "schedule": "cosin"}]}, "phases.1: schedule 'cosin' is not one of"),
        ({"phases": [PHASE, {**TWO[1], "learning_rate": 0.0}]}, "phases.1: learning_rate must be a positive number"),
        ({"phases": [PHASE, {**TWO[1], "warmup_steps": 2}]}, "phases.1: warmup_steps must lie in 0..steps = 1, not 2"),
        ({"phases": [{**PHASE, "top_p": 0.0}]}, "phases.0: top_p must lie in (0, 1], not 0.0"),
        ({"phases": [{**PHASE, "top_k": -1}]}, "phases.0: top_k must be 0 (off) or positive"),
        ({"phases": [{**PHASE, "max_completion": 0}]}, "phases.0: max_completion must be at least 1"),
        ({"retrospective": {}}, "only one of [[phases]]"),
        ({"rl": {"micro_batch_tokens": 109}}, "rl.micro_batch_tokens = 109 can't hold one prompt of phases.0"),
        ({"rl": {"overlong_buffer": 10}}, "rl.overlong_buffer = 10 covers all 10 tokens of phases.0"),
        ({"generator": {"batch_tokens": 179}}, "(100 + 8 x 10 = 180 tokens): raise it to 180"),
        (
            {"phases": TWO, "generator": {"batch_tokens": 700}, "retrospective": {"samples": 16}},
            "one group of the difficulty pass after phases.0 (100 + 16 x 50 = 900 tokens)",
        ),
        ({"data": {"train": "synthetic:a"}, "synthetic": {"ab": {}}}, "no section [synthetic.a]: did you mean 'ab'?"),
        ({"data": {"train": "t", "eval": ["synthetic:a"]}}, "data.eval = 'synthetic:a'"),
        ({"sft": {"data": "synthetic:a", "upper": 9, "learning_rate": 1.0}}, "sft.data = 'synthetic:a'"),
        ({"rl": {"kind": "dappo"}}, "rl: unknown policy loss 'dappo': did you mean 'dapo'?"),
        ({"rl": {"scale": "std"}}, "rl.scale 'std' is not known"),
        ({"rl": {"kl": "k4"}}, "rl: unknown KL estimator 'k4'"),
        ({"rl": {"kl_weight": -0.1}}, "rl: kl_weight must not be negative, got -0.1"),
        ({"rl": {"entropy_weight": -0.1}}, "rl: entropy_weight must not be negative, got -0.1"),
        ({"rl": {"clip_low": 1.5}}, "rl: clip_low must be at most 1 (ratios are positive), got 1.5"),
        ({"rl": {"clip_low": -0.1}}, "rl: clip_low must not be negative"),
        ({"rl": {"clip_high": -0.1}}, "rl: clip_high must not be negative"),
        ({"rl": {"importance_cap": 0.0}}, "rl: importance_cap must be positive, got 0.0"),
        ({"rl": {"overlong_buffer": -1}}, "rl.overlong_buffer must be 0 or more"),
        ({"rl": {"group_size": 1}}, "rl.group_size = 1"),
        ({"rl": {"batch_prompts": 6, "updates": 4}}, "rl.batch_prompts = 6 can't be shared by rl.updates = 4"),
        ({"rl": {"max_batches": 0}}, "rl.max_batches must be at least 1"),
        ({"sft": {"data": "t", "upper": 100, "learning_rate": 1.0, "micro_batch_tokens": 99}}, "can't hold an example"),
        ({"sft": {"data": "t", "upper": 100, "learning_rate": 1.0, "schedule": "x"}}, "sft: schedule 'x'"),
        ({"sft": {"data": "t", "upper": 100, "learning_rate": 1.0, "warmup_steps": -1}}, "sft.warmup_steps"),
        ({"sft": {"data": "t", "upper": 100, "learning_rate": 1.0, "epochs": 0}}, "sft.epochs"),
        ({"eval": {"k": 2, "temperature": 0.0}}, "greedy completions are all alike"),
        ({"eval": {"k": 0}}, "eval.k and eval.batch must be at least 1"),
        ({"eval": {"every": -1}}, "eval.every"),
        ({"eval": {"buckets": [2, 1]}}, "bucket bounds [2, 1]"),
        ({"eval": {"top_p": 2.0}}, "eval: top_p must lie in"),
        ({"run": {"save_every": 0}}, "run.save_every and run.keep_checkpoints"),
        ({"run": {"threads": -1}}, "run.threads"),
        ({"phases": TWO, "retrospective": {"selection": "weighted"}}, "retrospective.size = 0"),
        ({"phases": TWO, "retrospective": {"size": 3}}, "retrospective.size = 3"),
        ({"phases": TWO, "retrospective": {"source": "old"}}, "retrospective.source must be one of"),
        ({"phases": TWO, "retrospective": {"samples": 0}}, "retrospective.samples"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_loaded(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        recipe(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"rl": {"micro_batch_tokens": 110}},
        {"rl": {"overlong_buffer": 9}},
        {"generator": {"batch_tokens": 180}},
        {"phases": TWO, "retrospective": {"samples": 16}, "generator": {"batch_tokens": 900}},
        {"rl": {"clip_low": 1.0, "clip_high": 0.0}},
        {"phases": [{**PHASE, "warmup_steps": 1}]},
    ],
)
def test_the_limits_themselves_are_allowed(sections: dict[str, Any]) -> None:
    recipe(**sections)


def test_the_window_covers_phases_and_warm_up() -> None:
    sft = {"data": "t", "upper": 300, "learning_rate": 1.0}
    assert recipe(phases=TWO).window() == 250
    assert recipe(phases=TWO, sft=sft).window() == 300
    assert recipe(phases=[], sft=sft).window() == 300


def test_buckets_are_those_of_the_phases_unless_given() -> None:
    sft = {"data": "t", "upper": 300, "learning_rate": 1.0}
    assert recipe(phases=TWO).buckets() == [100, 200]
    assert recipe(phases=TWO, eval={"buckets": [7]}).buckets() == [7]
    assert recipe(phases=[], sft=sft).buckets() == [300]


def sections(cls: type) -> set[type]:
    """All dataclasses below a dataclass."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner) and inner not in found:
                found |= sections(typing.cast(type, inner))
    return found


def test_every_key_that_may_be_none_is_none_when_left_out() -> None:
    """A dump leaves None out, so None must be what its absence means."""
    for cls in sections(Recipe):
        for field in dataclasses.fields(cls):
            hint = typing.get_type_hints(cls)[field.name]
            if type(None) in typing.get_args(hint):
                assert field.default is None, f"{cls.__name__}.{field.name}"
