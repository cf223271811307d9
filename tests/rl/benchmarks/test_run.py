"""Whole evaluations: of a server and of a directory, killed and taken up again, counted without anything left out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import load_tokenizer
from longreach.rl.benchmarks.endpoint import ServerDown
from longreach.rl.benchmarks.questions import read_questions
from longreach.rl.benchmarks.registry import SEVEN
from longreach.rl.benchmarks.results import read_results
from longreach.rl.benchmarks.run import run_evaluation
from longreach.rl.console import Console
from longreach.rl.judge_base import JudgeFailing

Settings = Callable[..., Any]
ALL = 7 * 4


def test_a_served_model_on_all_seven(served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any) -> None:
    """Right on the even questions: 50 % everywhere, and the whole folder is there."""
    served.answer = lambda name, index: "7" if index % 2 else str(100 * (SEVEN.index(name) + 1) + index)
    made = run_evaluation(settings(server.url), tmp_path / "out", quiet, {})
    assert [b["name"] for b in made["benchmarks"]] == list(SEVEN)
    assert all(b["score"]["mean"] == b["rule"]["mean"] == 0.5 and b["score"]["n"] == 4 for b in made["benchmarks"])
    assert made["average"]["score"]["mean"] == 0.5
    assert made["average"]["score"]["low"] < 0.5 < made["average"]["score"]["high"]
    assert made["benchmarks"][0]["judge"]["mean"] is None
    assert made["counts"]["responses"] == ALL and made["counts"]["tokens"] == 7 * ALL
    assert read_results(tmp_path / "out") == json.loads(json.dumps(made))
    for name in ("conditions.json", "responses.jsonl", "report.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    [body] = [body for body in server.bodies if served.question(body) == ("hotpotqa", 3)]
    assert "Report 3. Report 3." in served.tokenizer.decode(body.pop("prompt"))
    vllm = {"top_k", "min_p", "repetition_penalty"}
    assert set(body) == {"model", "max_tokens", "temperature", "top_p", "n", "seed", *vllm}
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"], body["n"]) == (
        "small",
        8,
        0.7,
        0.95,
        1,
    )


def test_a_finished_evaluation_asks_nothing_again(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    config = settings(server.url, "hotpotqa", server__style="auto")
    first = run_evaluation(config, tmp_path, quiet, {})
    asked = len(server.bodies)
    assert asked == 1 + 4, "one token to see whether it takes ids, and the questions"
    server.close()  # what was found out stands in the folder
    again = run_evaluation(config, tmp_path, quiet, {})
    assert len(server.bodies) == asked
    assert {**again, "made": None} == {**first, "made": None}


def test_samples_are_kept_one_by_one_and_counted_by_question(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    """Three answers a question, of which index % 4 are right: avg@3 and pass@k by hand."""

    def respond(_n: int, body: dict[str, Any]) -> Any:
        name, index = served.question(body)
        right = f"Therefore, the answer is {100 * (SEVEN.index(name) + 1) + index}."
        return served.completion([right if i < index else "Therefore, the answer is 7." for i in range(body["n"])])

    server.respond = respond
    made = run_evaluation(settings(server.url, "musique", samples=3), tmp_path, quiet, {})
    [benchmark] = made["benchmarks"]
    assert benchmark["score"]["mean"] == pytest.approx((0 + 1 + 2 + 3) / 12)
    assert {k: v["mean"] for k, v in benchmark["pass_at"].items()} == pytest.approx(
        {"1": 0.5, "2": (0 + 2 / 3 + 1 + 1) / 4, "3": 3 / 4}
    )
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 12
    assert made["average"] is None, "one of the seven is no average"


def test_a_failed_request_is_wrong_and_listed_and_asked_again(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    """Question 1 gets 500s, question 2 is too long for the server: both count as wrong; only the first may pass."""
    broken = [True]

    def respond(_n: int, body: dict[str, Any]) -> Any:
        _, index = served.question(body)
        if index == 1 and broken[0]:
            return server.http(500)
        if index == 2:
            return server.http(400, '{"message": "maximum context length is 100 tokens"}')
        return served.respond(_n, body)

    server.respond = respond
    config = settings(server.url, "qasper", server__retries=2)
    made = run_evaluation(config, tmp_path, quiet, {})
    assert made["benchmarks"][0]["score"]["mean"] == 0.5 and made["benchmarks"][0]["score"]["n"] == 4
    assert [(f["id"], f["why"][:3]) for f in made["failures"]] == [("qasper-1", "500"), ("qasper-2", "400")]
    assert "maximum context length" in made["failures"][1]["why"]
    assert made["counts"]["failed_requests"] == 2
    assert sum(served.question(body)[1] == 1 for body in server.bodies) == 3, "after two retries"
    assert sum(served.question(body)[1] == 2 for body in server.bodies) == 1, "a refusal is not tried again"
    page = (tmp_path / "report.html").read_text()
    assert "maximum context length" in page and "qasper-1" in page
    broken[0], before = False, len(server.bodies)
    made = run_evaluation(config, tmp_path, quiet, {})
    assert len(server.bodies) == before + 1
    assert made["benchmarks"][0]["score"]["mean"] == 0.75
    assert [f["id"] for f in made["failures"]] == ["qasper-2"]


def test_other_conditions_in_the_same_folder_are_refused_by_name(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    run_evaluation(settings(server.url, "qasper"), tmp_path, quiet, {})
    before = len(server.bodies)
    for keys, words in (
        ({"samples": 2}, "asked.samples: there 1, here 2"),
        ({"max_input": 300}, "asked.max_input: there 400, here 300"),
        ({"limit": 2}, "asked.benchmarks.qasper.questions: there 4, here 2"),
        ({"served_name": "large"}, 'model.name: there "small", here "large"'),
        ({"scoring": "cover"}, 'scored.rule: there "strict", here "cover".*add --rescore'),
    ):
        with pytest.raises(ValueError, match=words):
            run_evaluation(settings(server.url, "qasper", **keys), tmp_path, quiet, {})
    with pytest.raises(ValueError, match=r"asked.benchmarks.musique"):
        run_evaluation(settings(server.url, "musique"), tmp_path, quiet, {})
    with pytest.raises(ValueError, match=r"asked.samples"):
        run_evaluation(settings(server.url, "qasper", samples=2), tmp_path, quiet, {}, rescore=True)
    assert len(server.bodies) == before


def judged(server: Any, verdict: Callable[[str], Any]) -> Callable[[int, dict[str, Any]], Any]:
    """Chat requests go to the judge, which is handed the user's turn; the rest to the model."""
    model = server.respond

    def respond(n: int, body: dict[str, Any]) -> Any:
        return verdict(body["messages"][1]["content"]) if "messages" in body else model(n, body)

    return respond


def test_rule_judge_and_the_larger_of_both(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    """0: both right. 1: the judge alone. 2: the rule alone. 3: no verdict, so the rule's 0 stands and it is counted."""
    gold = 100 * (SEVEN.index("frames") + 1)
    served.answer = lambda _name, index: {0: str(gold), 1: "paraphrased", 2: str(gold + 2), 3: "unclear"}[index]

    def verdict(text: str) -> Any:
        said = next(word for word in (f'"{gold}"', "paraphrased", f'"{gold + 2}"', "unclear", "Paris") if word in text)
        return server.chat({f'"{gold + 2}"': "[[NO]]", "unclear": "hm"}.get(said, "[[YES]]"))

    server.respond = judged(server, verdict)
    judge = {"base_url": server.url, "model": "judge", "backoff": 0.001}
    config = settings(server.url, "frames")
    run_evaluation(config, tmp_path, quiet, {})
    assert not any("messages" in body for body in server.bodies)
    before = len(server.bodies)
    config = settings(server.url, "frames", judge=judge)
    with pytest.raises(ValueError, match=r"scored.judge: there null.*add --rescore"):
        run_evaluation(config, tmp_path, quiet, {})
    made = run_evaluation(config, tmp_path, quiet, {}, rescore=True)
    new = server.bodies[before:]
    assert len(new) == 5 and all("messages" in body for body in new), "a probe and four answers, none generated again"
    [frames] = made["benchmarks"]
    assert (frames["rule"]["mean"], frames["score"]["mean"]) == (0.5, 0.75)
    assert (frames["judge"]["mean"], frames["judge"]["n"], frames["judge"]["left_out"]) == (pytest.approx(2 / 3), 3, 1)
    assert made["judge_failures"] == [{"benchmark": "frames", "id": "frames-3", "sample": 0, "answer": "unclear"}]
    assert made["agreement"] == {"frames": {"both": 1, "rule_only": 1, "judge_only": 1, "neither": 0}}
    assert made["conditions"]["scored"]["judge"]["model"] == "judge"
    before = len(server.bodies)
    run_evaluation(config, tmp_path, quiet, {})
    assert len(server.bodies) == before + 1, "verdicts are kept, and what had none is asked again"


def test_choices_and_needles_are_scored_by_the_rule_alone(
    server: Any, settings: Settings, tmp_path: Path, quiet: Any, tiny_dir: Path
) -> None:
    """A benchmark that says so is not shown to the judge, and its judge column is empty."""
    server.respond = lambda _n, body: (
        server.chat("[[YES]]")
        if "messages" in body
        else server.http(200, json.dumps({"choices": [{"text": "the answer is"}]}))
    )
    config = settings(
        server.url, "longbench-v2", data={"longbench-v2": str(_choices(tmp_path))}, judge={"base_url": server.url, "model": "judge"}
    )  # fmt: skip
    made = run_evaluation(config, tmp_path / "out", quiet, {})
    assert not any("messages" in body for body in server.bodies)
    [benchmark] = made["benchmarks"]
    assert (benchmark["score"]["mean"], benchmark["judge"]["mean"], benchmark["judge"]["left_out"]) == (0.0, None, 2)
    assert "No judge" not in (tmp_path / "out" / "report.md").read_text()
    assert "Beside the published" not in (tmp_path / "out" / "report.md").read_text()


def test_needles_by_task_and_depth_with_rulers_own_score(
    server: Any, settings: Settings, tmp_path: Path, quiet: Any, tiny_dir: Path
) -> None:
    """A model that names all four codes every other time, and two of them else."""
    config = settings(server.url, "needles-multivalue-1k", limit=8, max_input=2000)
    wanted = values_of(config, tiny_dir)

    def respond(_n: int, body: dict[str, Any]) -> Any:
        values = wanted[tuple(body["prompt"])]
        said = ", ".join(values if len(server.bodies) % 2 else values[:2])
        return server.http(
            200, json.dumps({"choices": [{"text": f"Therefore, the answer is {said}.", "finish_reason": "stop"}]})
        )

    server.respond = respond
    made = run_evaluation(config, tmp_path, quiet, {})
    rows = made["needles"]
    [task] = [row for row in rows if row["by"] == "task"]
    assert (task["value"], task["score"]["mean"], task["named"]["mean"]) == ("multivalue", 0.5, 0.75)
    depths = [row for row in rows if row["by"] == "depth"]
    assert sum(row["score"]["n"] for row in depths) == 8 and all(row["value"].endswith(" %") for row in depths)
    assert "No judge was asked" not in (tmp_path / "report.md").read_text(), "none is needed"
    assert "Needle tests" in (tmp_path / "report.md").read_text()


def values_of(config: Any, tiny_dir: Path) -> dict[tuple[int, ...], list[str]]:
    questions, _ = read_questions(config, load_tokenizer(tiny_dir), Console(quiet=True))
    return {tuple(q.ids.tolist()): list(q.example.columns["values"]) for q in questions}


def _choices(folder: Path) -> Path:
    rows = [
        {
            "id": f"c{i}", "context": "Two cities.", "question": "Which?", "choices": ["Rome", "Oslo", "Bern", "Lima"],
            "answers": ["B"], "answer_type": "choice",
        }
        for i in range(2)
    ]  # fmt: skip
    path = folder / "longbench-v2.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_judge_in_this_process_that_never_decides(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any, tiny_dir: Path
) -> None:
    """The same interface: all scores fall back to the rule's, and all of its answers are listed."""
    judge = {"model_dir": str(tiny_dir), "device": "cpu", "dtype": "float32", "max_tokens": 4}
    made = run_evaluation(settings(server.url, "qasper", samples=2, judge=judge), tmp_path, quiet, {})
    assert made["counts"]["judge_failures"] == len(made["judge_failures"]) == 8
    [qasper] = made["benchmarks"]
    assert (qasper["score"]["mean"], qasper["judge"]["mean"]) == (1.0, None)


def test_a_judge_with_a_wrong_key_stops_before_anything_is_generated(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    server.respond = judged(server, lambda _text: server.http(401))
    with pytest.raises(JudgeFailing, match=r"401"):
        run_evaluation(settings(server.url, judge={"base_url": server.url, "model": "judge"}), tmp_path, quiet, {})
    assert len(server.bodies) == 1


def test_a_server_that_goes_away_stops_and_the_same_command_goes_on(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    well = served.respond
    server.respond = lambda n, body: well(n, body) if n < 5 else server.http(503)
    keys = {"server__concurrency": 1, "server__breaker_failures": 3, "server__outage": 0.2, "server__retries": 100}
    with pytest.raises(ServerDown, match=r"failing for more than 0 s .503.*the same command goes on"):
        run_evaluation(settings(server.url, **keys), tmp_path, quiet, {})
    assert len((tmp_path / "responses.jsonl").read_text().splitlines()) == 5
    server.respond, before = well, len(served.asked)
    made = run_evaluation(settings(server.url, **keys), tmp_path, quiet, {})
    assert len(served.asked) - before == ALL - 5
    assert made["average"]["score"]["mean"] == 1.0


COMMAND = "import sys; from longreach.rl.cli import main; sys.exit(main(sys.argv[1:]))"


def begin(server: Any, seven: dict[str, str], tiny_dir: Path, out: Path) -> subprocess.Popen[str]:
    data = [word for name, path in seven.items() for word in ("--data", f"{name}={path}")]
    options = {
        "model": server.url, "benchmarks": "seven", "tokenizer": str(tiny_dir), "served-name": "small", "max-input": "400",
        "max-output": "8", "out": str(out), "server.style": "completions", "concurrency": "2", "resamples": "500",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    environ = {**os.environ, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "eval", *words, *data], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environ,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_and_interrupted_it_goes_on_where_it_was(
    served: Any, server: Any, seven: dict[str, str], tiny_dir: Path, tmp_path: Path
) -> None:
    """A real process: killed while answers come in, a line torn by hand on top; then Ctrl-C; then let through.

    What was answered is not asked again.
    """
    well, out = served.respond, tmp_path / "out"

    def stop_after(answers: int, how: signal.Signals) -> tuple[int, str, str]:
        first = len(server.bodies)
        server.respond = lambda n, body: well(n, body) if n < first + answers else server.after(300, server.http(500))
        process = begin(server, seven, tiny_dir, out)
        deadline = time.monotonic() + 180
        while len(server.bodies) < first + answers + 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(how)
        said, error = process.communicate(timeout=120)
        assert len(server.bodies) == first + answers + 2, error
        return process.returncode, said, error

    stop_after(10, signal.SIGKILL)
    kept = [json.loads(line)["id"] for line in (out / "responses.jsonl").read_text().splitlines()]
    assert len(kept) == 10
    with (out / "responses.jsonl").open("a") as file:
        file.write('{"benchmark": "qasper", "id": "qasper-0", "text": "half a li')
    status, said, error = stop_after(8, signal.SIGINT)
    assert status == 130, error
    assert "10 responses are there already, 18 are asked for" in said
    assert f"every response so far is kept in {out}" in said
    assert "Traceback" not in error
    server.respond, before = well, len(server.bodies)
    process = begin(server, seven, tiny_dir, out)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "18 responses are there already, 10 are asked for" in said
    answered = [
        json.loads(line)["id"] for line in (out / "responses.jsonl").read_text().splitlines() if line.endswith("}")
    ]
    assert len(answered) == len(set(answered)) == ALL
    again = {f"{name}-{index}" for name, index in map(served.question, server.bodies[before:])}
    assert len(again) == 10 and not again & set(answered[:18])
    assert read_results(out)["average"]["score"]["mean"] == 1.0
    assert "100.0" in said and str(out / "report.html") in said


def test_a_directory_runs_here_and_goes_on_with_the_same_answers(
    tiny_dir: Path, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    """What a kill left out is generated as it would have been: whole questions, and one sample of two."""
    config = settings(str(tiny_dir), "hotpotqa", "qasper", samples=2, local={"device": "cpu", "dtype": "float32"})
    whole = run_evaluation(config, tmp_path / "whole", quiet, {})
    lines = (tmp_path / "whole" / "responses.jsonl").read_text().splitlines()
    assert len(lines) == 16
    assert len({json.loads(line)["text"] for line in lines}) > 8, "samples differ"
    run_evaluation(config, tmp_path / "torn", quiet, {})
    (tmp_path / "torn" / "responses.jsonl").write_text("\n".join(lines[:7]) + "\n" + lines[7][:20])
    resumed = run_evaluation(config, tmp_path / "torn", quiet, {})
    assert {**resumed, "made": None} == {**whole, "made": None}
    made = {json.loads(line)["tokens"] for line in lines}
    assert max(made) <= 8
    assert whole["counts"]["answers_cut"] == sum(json.loads(line)["finish_reason"] == "length" for line in lines) > 0
    assert whole["counts"]["prompts_cut"] == sum(q["length"] > 400 for q in whole["questions"])
    identity = whole["conditions"]["model"]
    assert identity["kind"] == "directory" and len(identity["weights"]) == 1 and identity["config_sha256"]


def test_other_weights_of_the_same_size_are_another_model(
    tiny_dir: Path, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_dir, folder)
    config = settings(str(folder), "qasper", limit=1, local={"device": "cpu", "dtype": "float32"})
    run_evaluation(config, tmp_path / "out", quiet, {})
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and tensors[name].dim() == 2)
    save_file(
        {**tensors, name: torch.randn_like(tensors[name])}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"model.weights.model.safetensors"):
        run_evaluation(config, tmp_path / "out", quiet, {})


def test_long_prompts_lose_their_middle_and_are_counted(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    made = run_evaluation(settings(server.url, "qasper", max_input=120), tmp_path, quiet, {})
    lengths = [q["length"] for q in made["questions"]]
    assert made["counts"]["prompts_cut"] == sum(length > 120 for length in lengths) == 3
    assert sorted(len(body["prompt"]) for body in server.bodies)[1:] == [120] * 3
    by_bucket = {b["upper"]: b["n"] for b in made["buckets"]}
    assert sum(by_bucket.values()) == 4 and by_bucket[64] + by_bucket[128] < 4, "buckets go by the whole length"


def test_a_directory_too_short_for_the_questions_is_refused_before_it_is_loaded(
    tiny_dir: Path, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    config = settings(str(tiny_dir), "qasper", max_output=5000, local={"device": "cpu"})
    with pytest.raises(ValueError, match=r"positions for 1024.*--local.yarn [0-9]+\.0"):
        run_evaluation(config, tmp_path / "out", quiet, {})
    assert not (tmp_path / "out").exists()


def test_no_number_of_a_results_file_is_nan(
    served: Any, server: Any, settings: Settings, tmp_path: Path, quiet: Any
) -> None:
    run_evaluation(settings(server.url, "qasper", limit=1), tmp_path, quiet, {})
    text = (tmp_path / "results.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert not math.isnan(json.loads(text)["made"]["seconds"])
