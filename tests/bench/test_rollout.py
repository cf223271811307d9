"""Every generator samples what it is told to, each gap says why, and rows are what was counted over what was timed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import generators, results, rollout, servers, timing
from bench.case import Case, Missing

SMALL = Case("rollout", {**rollout.SMALL[0], **rollout.SMALL_SHAPE}, "float32", "cpu")
HERE = (rollout.SHARED, rollout.EACH, rollout.GENERATE, rollout.BATCHED, rollout.APART)


def test_every_generator_samples_exactly_what_is_asked(tmp_path: Path) -> None:
    generators.save(SMALL, tmp_path)
    made, (g, r) = rollout.contenders(""), (SMALL.dims["G"], SMALL.dims["R"])
    with ExitStack() as stack, generators.quiet():
        counts = {name: made[name](tmp_path, SMALL, stack)(rollout.prompt(SMALL), g, r) for name in HERE}
    assert counts == dict.fromkeys(HERE, g * r)


def test_rounds_have_prompts_of_their_own() -> None:
    first, second = rollout.prompt(SMALL), rollout.prompt(SMALL)
    assert len(first) == len(second) == SMALL.dims["P"] and not torch.equal(first, second)


def test_a_row_is_what_was_sampled_over_what_it_took_and_a_gap_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "save", lambda case, folder: None)
    seconds = iter([1.0, 4.0, 2.0])
    monkeypatch.setattr(timing, "make_clock", lambda device: lambda task: task.run(task.prepare()) * next(seconds) / 8)

    def makes(count: int) -> generators.Make:
        return lambda folder, case, stack: lambda prompt, g, r: count

    def breaks(*_: object) -> generators.Sample:
        raise OSError("no such server\nlast lines of its log")

    def missing(*_: object) -> generators.Sample:
        raise Missing("run make vllm")

    def later(*_: object) -> generators.Sample:
        seen: list[Tensor] = []

        def sample(prompt: Tensor, g: int, r: int) -> int:
            seen.append(prompt)
            if len(seen) > 1:
                raise RuntimeError("out of memory")
            return 8

        return sample

    given: dict[str, generators.Make] = {
        rollout.SHARED: makes(8), "short": makes(7), "broken": breaks, "absent": missing, "later": later
    }  # fmt: skip
    made = {row["contender"]: row for row in rollout.rows([SMALL], given, rounds=3)}
    own = made.pop(rollout.SHARED)
    assert own["samples_s"] == [1.0, 4.0, 2.0] and own["tokens_per_s"] == 8 / 2.0 and own["ours"]
    assert {name: row["reason"] for name, row in made.items()} == {
        "short": "sampled 7 tokens and not 8",
        "broken": "failed: OSError: no such server",
        "absent": "run make vllm",
        "later": "failed: RuntimeError: out of memory",
    }


def test_without_vllm_there_are_gaps_that_say_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, names = tmp_path / "rows.json", [rollout.VLLM, rollout.UNCACHED, *servers.WAYS]
    options = ["--small", "--rounds", "1", "--vllm", str(tmp_path / "python"), "--out", str(path), "--note", "a test"]
    assert rollout.main([*options, "--only", *names]) == 0
    rows = results.load(path)
    assert [row["contender"] for row in rows] == names
    assert all(row["status"] == "gap" and "name vLLM's interpreter there" in row["reason"] for row in rows)
    assert {row["note"] for row in rows} == {"a test"}
    assert capsys.readouterr().out.count("gap: ") == len(names)


def test_an_unknown_contender_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert rollout.main(["--only", "vllm", "--out", str(tmp_path / "rows.json")]) == 2
    assert rollout.VLLM in capsys.readouterr().err


def test_the_table_sets_speeds_beside_ours_and_seconds_beside_gigabytes(capsys: pytest.CaptureFixture[str]) -> None:
    place: dict[str, Any] = {
        "dims": {"P": 8, "G": 2}, "dtype": "float32", "device": "a CPU", "status": "measured", "least_s": 0.4
    }  # fmt: skip
    rollout.show([
        {**place, "op": "rollout", "contender": rollout.SHARED, "tokens_per_s": 80.0},
        {**place, "op": "rollout", "contender": rollout.VLLM, "tokens_per_s": 20.0},
        {**place, "op": "sync", "contender": "longreach, safetensors", "median_s": 0.5, "bytes": 250_000_000, "s_per_gb": 2.0},
    ])  # fmt: skip
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert any("20.0" in line and "0.25" in line for line in shown)
    assert any("0.25" in line and "0.5" in line and line[-2] == "2" for line in shown)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_real_server_is_measured_and_brought_new_weights(vllm_python: Path, tmp_path: Path) -> None:
    path, names = tmp_path / "rows.json", [rollout.UNCACHED, *servers.WAYS]
    options = ["--small", "--rounds", "2", "--vllm", str(vllm_python), "--out", str(path)]
    assert rollout.main([*options, "--only", *names]) == 0
    rows = {row["contender"]: row for row in results.load(path)}
    assert [rows[name]["reason"] for name in names] == [None] * 3
    assert rows[rollout.UNCACHED]["tokens_per_s"] > 0
    weights = 4 * 1.0e5  # bytes, at least: the layer's and the embedding's
    for way in servers.WAYS:
        row = rows[way]
        assert row["bytes"] > weights and row["s_per_gb"] == pytest.approx(row["median_s"] / row["bytes"] * 1e9)
        assert row["dims"] == rollout.SMALL_SHAPE and len(row["samples_s"]) == 2
