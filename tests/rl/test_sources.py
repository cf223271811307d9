"""What a run reads: every source in tokens, sorted into phases, and refused or reported where it doesn't fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import load_tokenizer
from longreach.rl.recipe import Recipe
from longreach.rl.sources import Prompts, check_window, fingerprint, read_eval, read_prompts

Make = Callable[..., Recipe]


class Listener:
    """Keeps what a console would show."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def read(tiny_dir: Path) -> Callable[..., tuple[Prompts, list[str]]]:
    """`read_prompts`, and its warnings."""

    def reading(recipe: Recipe, folder: Path | None = None) -> tuple[Prompts, list[str]]:
        listener: Any = Listener()
        return read_prompts(recipe, load_tokenizer(tiny_dir), folder, listener), listener.warnings

    return reading


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def row(name: str, words: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "word " * words, "answers": ["1"], **more}


def test_prompts_are_tokens_sorted_into_phases(make_recipe: Make, read: Any, tiny_dir: Path) -> None:
    recipe = make_recipe()
    prompts, warnings = read(recipe)
    tokenizer, bound = load_tokenizer(tiny_dir), recipe.phases[0].upper
    assert (len(prompts.sft), len(prompts.train), len(prompts.eval)) == (8, 12, 6)
    assert all(list(p.ids) == tokenizer(p.example.text)["input_ids"] for p in prompts.train)
    assert prompts.phases == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert len(prompts.train[5].ids) == bound
    assert (prompts.beyond, warnings) == ([], [])


def test_what_no_phase_takes_is_counted_aloud(make_recipe: Make, read: Any) -> None:
    recipe = make_recipe(phases__1__upper=make_recipe().phases[0].upper + 1)
    with pytest.raises(ValueError, match=r"no prompt of data.train has a length within phases\.1"):
        read(recipe)
    recipe = make_recipe(phases=[{**vars(recipe.phases[0])}], retrospective=None)
    prompts, warnings = read(recipe)
    assert prompts.beyond == [6, 7, 8, 9, 10, 11]
    assert warnings == [
        f"6 prompts are longer than the last phase's {recipe.phases[0].upper} tokens and are not trained on"
    ]


def test_only_what_the_recipe_needs_is_read(make_recipe: Make, read: Any) -> None:
    prompts, _ = read(make_recipe(phases=[], retrospective=None, data__train="nothing.jsonl"))
    assert (prompts.train, prompts.phases) == ([], [])
    assert read(make_recipe(sft=None))[0].sft == []
    assert read(make_recipe(data__eval=[]))[0].eval == []


def test_limit_is_of_the_training_rows_alone(make_recipe: Make, read: Any) -> None:
    prompts, _ = read(make_recipe(data__limit=7))
    assert (len(prompts.train), len(prompts.eval), len(prompts.sft)) == (7, 6, 8)


def test_long_prompts_are_cut_in_the_middle_on_request_and_counted(make_recipe: Make, read: Any) -> None:
    longest = max(len(p.ids) for p in read(make_recipe())[0].train)
    prompts, warnings = read(make_recipe(data__truncate="middle", data__max_length=longest - 1))
    assert max(len(p.ids) for p in prompts.train) == longest - 1
    assert prompts.train[-1].truncated_from == longest
    assert any(
        re.search(rf"train.jsonl: 1 of 12 prompts were cut in the middle to {longest - 1} tokens", w) for w in warnings
    )
    with pytest.raises(ValueError, match="1 prompts are longer than max_length"):
        read(make_recipe(data__truncate="error", data__max_length=longest - 1))


def test_a_bad_row_stops_with_file_row_and_field_or_is_set_aside_by_role(
    make_recipe: Make, read: Any, tmp_path: Path
) -> None:
    """sft and train may be one file with different needs: what one set aside must not be lost to the other."""
    rows = [row(f"r{i}", response="x") for i in range(4)] + [row("no-response"), "{torn", row("r0", response="x")]
    source = write(tmp_path / "both.jsonl", rows)
    values = {"data__train": source, "sft__data": source, "data__eval": [source], "phases__0__upper": 400}
    with pytest.raises(ValueError, match=r"both\.jsonl, row 5, response"):
        read(make_recipe(**values))
    recipe = make_recipe(
        **values, data__skip_bad_rows=True, phases=[{**vars(make_recipe().phases[0])}], retrospective=None
    )
    prompts, warnings = read(recipe, tmp_path / "data")
    assert (len(prompts.sft), len(prompts.train), len(prompts.eval)) == (4, 5, 5)
    for role, count in (("sft", 3), ("train", 2), ("eval-0", 2)):
        aside = tmp_path / "data" / f"bad-{role}.jsonl"
        assert len(aside.read_text().splitlines()) == count
        assert f"{source}: {count} bad rows were left out and written to {aside}" in warnings
    _, warnings = read(recipe)
    assert [w for w in warnings if "written" in w] == [], "without a folder nothing is written, and nothing is claimed"
    assert len([w for w in warnings if w.endswith("bad rows were left out")]) == 3


def test_ids_must_be_unique_over_the_evaluation_files(make_recipe: Make, read: Any, tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", [row("same")]) for name in ("one", "two"))
    with pytest.raises(ValueError, match=r"data\.eval: two rows have the id 'same'"):
        read(make_recipe(data__eval=[one, two]))


def test_generated_rows_stay_in_the_folder_or_nowhere(make_recipe: Make, read: Any, tmp_path: Path) -> None:
    synthetic = {"eval": {"rows": 3, "split": "eval", "shortest": 140, "longest": 150}}
    recipe = make_recipe(synthetic=synthetic, data__eval=["synthetic:eval"])
    prompts, _ = read(recipe, tmp_path / "data")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["eval.jsonl"]
    assert len(prompts.eval) == 3
    assert [p.ids for p in read(recipe)[0].eval] == [p.ids for p in prompts.eval]


def test_a_headline_must_name_a_benchmark_that_is_there(make_recipe: Make, read: Any) -> None:
    assert len(read(make_recipe(eval__headline=["odd", "even"]))[0].eval) == 6
    with pytest.raises(ValueError, match=r"eval\.headline: .* benchmark 'evn'; did you mean 'even'"):
        read(make_recipe(eval__headline=["evn"]))


def test_questions_must_fit_the_generator_and_the_positions(make_recipe: Make, tiny_dir: Path) -> None:
    listener: Any = Listener()
    tokenizer = load_tokenizer(tiny_dir)
    longest = max(len(p.ids) for p in read_eval(make_recipe(), tokenizer, None, listener))
    small = make_recipe(generator__batch_tokens=600, eval__k=100)
    with pytest.raises(ValueError, match=rf"one group of eval \({longest} \+ 100 x 6 = {longest + 600} tokens\)"):
        read_eval(small, tokenizer, None, listener)
    long = make_recipe(eval__max_completion=1025 - longest)
    with pytest.raises(
        ValueError, match=r"takes 1025 tokens.* positions for 1024: set model.yarn = 2.0, or cut long questions"
    ):
        read_eval(long, tokenizer, None, listener)
    read_eval(make_recipe(eval__max_completion=1024 - longest), tokenizer, None, listener)


def test_the_window_of_training_is_checked_from_the_recipe_alone(make_recipe: Make) -> None:
    wide = {"rl__micro_batch_tokens": 5000}
    check_window(make_recipe(phases__1__upper=1018, **wide))
    with pytest.raises(ValueError, match=r"takes 1025 tokens.* model.yarn = 2.0, or lower the phases' limits"):
        check_window(make_recipe(phases__1__upper=1019, **wide))
    check_window(make_recipe(phases__1__upper=2042, model__yarn=2.0, **wide))
    with pytest.raises(ValueError, match=r"positions for 2048: set model.yarn = 3.0"):
        check_window(make_recipe(phases__1__upper=2043, model__yarn=2.0, **wide))


@pytest.mark.parametrize("kind", ["yarn", "linear", "llama3"])
def test_the_window_is_that_of_the_scaling(kind: str, make_recipe: Make) -> None:
    wide = {"rl__micro_batch_tokens": 9000, "generator__batch_tokens": 1 << 20}
    scaling = {"kind": kind, "factor": 3.0}
    check_window(make_recipe(phases__1__upper=3 * 1024 - 6, model__rope_scaling=scaling, **wide))
    with pytest.raises(ValueError, match=r"takes 3073 .* positions for 3072: set model.rope_scaling.factor = 4.0, or"):
        check_window(make_recipe(phases__1__upper=3 * 1024 - 5, model__rope_scaling=scaling, **wide))
    with pytest.raises(ValueError, match=r"takes 3073 .* positions for 1536: set model.rope_scaling.factor = 7.0, or"):
        check_window(
            make_recipe(phases__1__upper=3 * 1024 - 5, model__rope_scaling={**scaling, "original": 512}, **wide)
        )


def test_a_model_that_is_stretched_already_has_one_way_out(make_recipe: Make, tiny_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stretched"
    shutil.copytree(tiny_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    with pytest.raises(ValueError, match=r"its config.json stretches them already \(linear\).*, or lower the phases"):
        check_window(make_recipe(model__path=str(folder), phases__1__upper=1019, rl__micro_batch_tokens=5000))


@pytest.mark.parametrize(
    "change",
    [{"answers": ["2"]}, {"prompt": "other "}, {"benchmark": "b"}, {"answer_type": "number"}, {"id": "x"}, {"more": 1}],
)
def test_the_fingerprint_sees_everything_that_training_reads(
    change: dict[str, Any], make_recipe: Make, read: Any, tmp_path: Path
) -> None:
    sources = []
    for name, extra in (("before", {}), ("after", change), ("again", {})):
        (tmp_path / name).mkdir()
        sources.append(write(tmp_path / name / "rows.jsonl", [{**row("a"), **extra}]))
    made = [
        fingerprint(read(make_recipe(data__train=s, phases=[{**vars(make_recipe().phases[1])}], retrospective=None))[0])
        for s in sources
    ]
    assert made[0] == made[2] != made[1]
