"""`longreach eval` in both forms: what it takes, what it says when it can't, and what it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def longreach(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in this process, in a folder of its own: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = cli.main(arguments)
        except SystemExit as stop:  # argparse's own way out
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


URL = ("--model", "http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "the following arguments are required: RECIPE | --model DIR_OR_URL"),
        (("--benchmarks", "qasper"), "required: RECIPE | --model DIR_OR_URL"),
        (("smoke", "--samples", "4"), "samples would do nothing with a recipe"),
        (("smoke", "--out", "x"), "out would do nothing with a recipe"),
        (("--model",), "expected one argument"),
        ((*URL,), "give its tokenizer (--tokenizer DIR"),
        ((*URL, "--tokenizer", "x", "--samples", "0"), "samples is 0, must be at least 1"),
        ((*URL, "--tokenizer", "x", "--samples", "many"), "'samples' must be a whole number, not 'many'"),
        ((*URL, "--tokenizer", "x", "--sampels", "2"), "unknown key 'sampels': did you mean 'samples'?"),
        ((*URL, "--tokenizer", "x", "--server.timout", "2"), "unknown key 'server.timout': did you mean 'timeout'?"),
        ((*URL, "--tokenizer", "x", "--timeout", "2"), "did you mean 'judge.timeout' or 'server.timeout'?"),
        ((*URL, "--tokenizer", "x", "--server.style", "soap"), "server.style is 'soap'"),
        ((*URL, "--tokenizer", "x", "--concurrency", "0"), "server.concurrency is 0"),
        ((*URL, "--tokenizer", "x", "--local.dtype", "float32"), "local.* would do nothing"),
        ((*URL, "--tokenizer", "x", "--judge-url", "http://127.0.0.1:9"), "judge model is empty"),
        ((*URL, "--tokenizer", "x", "--judge-url", "http://127.0.0.1:9", "--judge-model", "j", "--judge.audit", "0.5"), "judge.audit would do nothing here"),
        ((*URL, "--tokenizer", "x", "--data", "qasper"), "give NAME=FILE"),
        ((*URL, "--tokenizer", "x", "--temperature", "0", "--samples", "2"), "greedy answers are all alike"),
        ((*URL, "--tokenizer", "x", "--top-p", "0"), "top_p must lie in (0, 1]"),
        ((*URL, "--tokenizer", "x", "--resamples", "9"), "resamples is 9"),
        ((*URL, "--tokenizer", "x", "--buckets", "5,4"), "strictly rising"),
        ((*URL, "--tokenizer", "x", "--rules", "strict,mine"), "'mine' is unknown"),
        ((*URL, "--tokenizer", "x", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY (--api-key-env) is not set"),
        ((*URL, "--tokenizer", "x", "extra"), "unexpected argument 'extra'"),
        (("--model", "no/such/model", "--local.device", "cpu"), "no/such/model"),
        (("--model", "x", "--concurrency", "3"), "served_name and server.* would do nothing"),
        (("--model", "shipped:demo-base", "--benchmarks", "qaspr"), "did you mean 'qasper'?"),
        (("--model", "shipped:demo-base", "--benchmarks", "qasper", "--data", "hotpotqa=x.jsonl"), "'hotpotqa' is none of the benchmarks asked for: qasper"),
        (("--model", "shipped:demo-base", "--benchmarks", "qasper", "--data", "qasper=x.jsonl"), "x.jsonl: no such file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_message_and_status_2(
    arguments: tuple[str, ...], words: str, longreach: Run, tiny_dir: Path
) -> None:
    real = [
        str(tiny_dir) if word == "x" and arguments[i - 1] == "--tokenizer" else word for i, word in enumerate(arguments)
    ]
    status, out, err = longreach("eval", *real)
    assert status == 2
    assert words in err
    assert "Traceback" not in err + out


def test_help_names_both_forms(longreach: Run) -> None:
    status, out, _ = longreach("eval", "--help")
    assert status == 0
    assert "RECIPE | --model DIR_OR_URL" in out and "--judge-url URL" in out and "NAME=FILE" in out


def test_a_directory_from_the_command_line(
    longreach: Run, tiny_dir: Path, seven: dict[str, str], tmp_path: Path
) -> None:
    """All the way through main, keys of every section reaching what they name."""
    shutil.copytree(tiny_dir, tmp_path / "small-model")
    arguments = (
        "eval", "--model", "small-model/", "--benchmarks", "qasper,musique", "--data", f"qasper={seven['qasper']}", "--data",
        f"musique={seven['musique']}", "--samples", "2", "--limit", "2", "--max-input", "300", "--max-output", "4", "--temperature", "1.5",
        "--top-p", "0.9", "--local.device", "cpu", "--local.dtype=float32", "--resamples", "200", "--seed", "3", "--buckets", "100,200",
    )  # fmt: skip
    status, out, err = longreach(*arguments)
    assert status == 0, err
    results = json.loads((tmp_path / "evals" / "small-model" / "results.json").read_text())
    asked = results["conditions"]["asked"]
    assert (asked["samples"], asked["max_input"], asked["max_output"], asked["seed"]) == (2, 300, 4, 3)
    assert (asked["temperature"], asked["top_p"]) == (1.5, 0.9)
    assert results["conditions"]["scored"]["buckets"] == [100, 200]
    assert results["conditions"]["model"]["dtype"] == "float32"
    assert results["counts"]["questions"] == 4 and results["counts"]["responses"] == 8
    assert "Scores (avg@2, %)" in out and "evals/small-model/report.html" in out
    assert "no judge is given" in out
    status, out, err = longreach(*arguments)
    assert status == 0 and "8 responses are there already, 0 are asked for" in out, err
    status, _, err = longreach(*arguments, "--top-k", "5")
    assert status == 2 and "asked.top_k: there 0, here 5" in err


def test_a_server_from_the_command_line(
    served: Any, server: Any, longreach: Run, tiny_dir: Path, seven: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With its key, its judge and the judge's keys; then the same under another judge."""
    model = served.respond
    server.respond = lambda n, body: (
        server.chat("[[NO]]" if "Paris" not in body["messages"][1]["content"] else "[[YES]]")
        if "messages" in body
        else model(n, body)
    )
    monkeypatch.setenv("THE_KEY", "secret")
    arguments = (
        "eval", "--model", server.url, "--benchmarks", "qasper", "--data", f"qasper={seven['qasper']}", "--tokenizer", str(tiny_dir),
        "--served-name", "org/small", "--max-input", "400", "--max-output", "8", "--concurrency", "2", "--api-key-env", "THE_KEY",
        "--judge-url", server.url, "--judge-model", "judge", "--judge.backoff", "0.01", "--server.style", "completions",
    )  # fmt: skip
    status, out, err = longreach(*arguments)
    assert status == 0, err
    assert str(Path("evals") / "org-small" / "report.html") in out
    asked = [h.get("Authorization") for h, b in zip(server.headers, server.bodies, strict=True) if "prompt" in b]
    assert asked == ["Bearer secret"] * 4
    results = json.loads((tmp_path / "evals" / "org-small" / "results.json").read_text())
    [qasper] = results["benchmarks"]
    assert (qasper["score"]["mean"], qasper["rule"]["mean"], qasper["judge"]["mean"]) == (1.0, 1.0, 0.0)
    assert "secret" not in (tmp_path / "evals" / "org-small" / "results.json").read_text()
    status, out, err = longreach(*arguments, "--judge-model", "other")
    assert status == 2 and "scored.judge.model" in err
    status, out, err = longreach(*arguments, "--judge-model", "other", "--rescore")
    assert status == 0 and "4 responses are there already, 0 are asked for" in out, err


def test_bad_rows_stop_it_or_are_left_out_as_told(
    served: Any, server: Any, longreach: Run, tiny_dir: Path, seven: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "qasper.jsonl"
    path.write_text(Path(seven["qasper"]).read_text() + '{"context": "no question"}\n')
    arguments = (
        "eval", "--model", server.url, "--benchmarks", "qasper", "--data", f"qasper={path}", "--tokenizer", str(tiny_dir),
        "--served-name", "s", "--max-output", "8", "--server.style", "completions", "--out", "out",
    )  # fmt: skip
    status, _, err = longreach(*arguments)
    assert status == 2 and "row 5" in err and not server.bodies
    status, out, err = longreach(*arguments, "--skip-bad-rows")
    assert status == 0, err
    assert "1 bad rows were left out" in out and "qasper: 1 rows could not be read" in out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["made"]["bad_rows"] == {"qasper": 1}


def test_a_server_that_is_not_there_is_status_1(longreach: Run, tiny_dir: Path) -> None:
    status, _, err = longreach(
        "eval", *URL, "--tokenizer", str(tiny_dir), "--served-name", "s", "--server.retries", "0"
    )
    assert status == 1
    assert "does not answer (connection)" in err
