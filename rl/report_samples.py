"""A bounded, fair sample of a run's completions for the report's browser.

A page cannot hold every rollout of a run, and a sample chosen by eye would mislead. Taken: the last step of each stage
first, then whole groups from evenly spaced steps in an order that a hash of the prompt's id decides; and evaluation
questions by the same hash, so that each stage shows the same questions and they can be compared. What is shown, and of
how many, is told on the page. Long texts keep their beginning and their end, where the answer stands.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .report_data import Notes, Row, embed, evenly, number, read_lines, stage_rank

TRAINING_BYTES = 1_800_000
EVALUATION_BYTES = 1_200_000
MAX_STEPS_READ = 24
TEXT_HEAD, TEXT_TAIL = 1_200, 2_400


def read_samples(run_dir: Path, notes: Notes) -> Row:
    """{"rows": [completion, ..], "training": [shown, all], "evaluation": [shown, all]}."""
    training, training_total = _training(run_dir, notes)
    evaluation, evaluation_total = _evaluation(run_dir, notes)
    return {
        "rows": training + evaluation,
        "training": [len(training), training_total],
        "evaluation": [len(evaluation), evaluation_total],
    }


def shorten(text: str) -> tuple[str, int]:
    """`text` without its middle when it is long, and how many characters were left out."""
    cut = len(text) - TEXT_HEAD - TEXT_TAIL
    return (text, 0) if cut <= 0 else (f"{text[:TEXT_HEAD]}\n[... {cut:,} characters ...]\n{text[-TEXT_TAIL:]}", cut)


def _training(run_dir: Path, notes: Notes) -> tuple[list[Row], int]:
    folders = [path for path in (run_dir / "rollouts").glob("*") if path.is_dir()]
    folders.sort(key=lambda path: stage_rank(path.name))
    first: list[list[Row]] = []
    others: list[list[Row]] = []
    total = 0
    for folder in folders:
        files = sorted(folder.glob("*.jsonl"))
        total += sum(_count_lines(file) for file in files)
        for file in evenly(files, MAX_STEPS_READ):
            groups = _groups(_training_row(raw, folder.name) for raw in read_lines(file, notes))
            (first if file == files[-1] else others).extend(groups)
    # The newest stage's last step is what a reader looks for first; it must not be what the limit cuts.
    first.reverse()
    others.sort(key=lambda group: _order(*(group[0][key] for key in ("stage", "step", "benchmark", "prompt_id"))))
    shown = _within([*first, *others], TRAINING_BYTES)
    shown.sort(key=lambda row: (-(row["step"] or 0), row["benchmark"], row["prompt_id"]))
    return shown, total


def _training_row(raw: Row, stage: str) -> Row:
    text, cut = shorten(str(raw.get("completion")))
    tokens = raw.get("completion_ids")
    return {
        "kind": "training",
        "stage": stage,
        "step": number(raw.get("step")),
        "prompt_id": str(raw.get("prompt_id")),
        "benchmark": str(raw.get("benchmark")),
        "prompt_length": number(raw.get("prompt_length")),
        "text": text,
        "cut": cut,
        "reward": number(raw.get("reward")),
        "rewards": _parts(raw.get("rewards")),
        "advantage": number(raw.get("advantage")),
        "finish": str(raw.get("finish_reason")),
        "reason": _text_or_none(raw.get("reason")),
        "rule_reason": _text_or_none(raw.get("rule_reason")),
        "extracted": _text_or_none(raw.get("extracted")),
        "tokens": len(tokens) if isinstance(tokens, list) else None,
    }


def _evaluation(run_dir: Path, notes: Notes) -> tuple[list[Row], int]:
    questions: list[list[Row]] = []
    total = 0
    paths = (run_dir / "evals").glob("*.completions.jsonl")
    for path in sorted(paths, key=lambda path: stage_rank(path.name.removesuffix(".completions.jsonl"))):
        stage = path.name.removesuffix(".completions.jsonl")
        for raw in read_lines(path, notes):
            rows = _question_rows(raw, stage)
            total += len(rows)
            if rows:
                questions.append(rows)
    # A stable sort, by question alone: all stages of one question come before the next question.
    questions.sort(key=lambda rows: _order(rows[0]["benchmark"], rows[0]["prompt_id"]))
    shown = _within(questions, EVALUATION_BYTES)
    shown.sort(key=lambda row: (row["benchmark"], row["prompt_id"]))
    return shown, total


def _question_rows(raw: Row, stage: str) -> list[Row]:
    question, _ = shorten(str(raw.get("question")))
    shared = {
        "kind": "evaluation",
        "stage": stage,
        "step": None,
        "prompt_id": str(raw.get("prompt_id")),
        "benchmark": str(raw.get("benchmark")),
        "prompt_length": number(raw.get("prompt_length")),
        "question": question,
        "answers": [str(answer) for answer in _list(raw.get("answers"))],
    }
    rows: list[Row] = []
    scores, reasons, rewards = (_list(raw.get(name)) for name in ("scores", "reasons", "rewards"))
    for index, completion in enumerate(_list(raw.get("completions"))):
        text, cut = shorten(str(completion))
        score = number(scores[index]) if index < len(scores) else None
        reason = _text_or_none(reasons[index]) if index < len(reasons) else None
        parts = _parts(rewards[index]) if index < len(rewards) else {}
        rows.append(shared | {"text": text, "cut": cut, "reward": score, "rewards": parts, "reason": reason})
    return rows


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    by_prompt: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_prompt.setdefault((row["benchmark"], row["prompt_id"]), []).append(row)
    return list(by_prompt.values())


def _within(groups: list[list[Row]], limit: int) -> list[Row]:
    """Groups in order, whole, until the next one would pass `limit` bytes of JSON."""
    shown: list[Row] = []
    for group in groups:
        limit -= len(embed(group).encode())
        if limit < 0:
            break
        shown.extend(group)
    return shown


def _order(*key: Any) -> bytes:
    """A place in a random-looking order that is the same in every report (Python's own hash changes per process)."""
    return hashlib.sha256(repr(key).encode(errors="backslashreplace")).digest()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _parts(value: Any) -> Row:
    return {str(k): number(v) for k, v in value.items()} if isinstance(value, dict) else {}


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
