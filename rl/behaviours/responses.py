"""Which of a run's responses are counted: a fixed sample of each step's rollouts and of each evaluation, and their documents.

The sample is decided by a hash of what is asked and of the response's place, one of each question before a second one of
any: the same in every call, the same questions at every evaluation, and a larger sample holds the smaller one. Steps are
spaced evenly where there are more than one wants to pay for; the last is always among them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import Example, read_examples
from ..recipe import SYNTHETIC, Recipe, load_recipe
from ..report_data import Notes, evenly, number, read_json, read_lines, stage_rank
from .lexical import normal

TRAINING, EVALUATION = "training", "evaluation"


@dataclass(frozen=True)
class Response:
    """`question` tells a question of one source from all others; `score` None: no verdict."""

    question: str
    text: str
    score: float | None


@dataclass(frozen=True)
class Point:
    """What is counted together: the sample of one training step, or of one evaluation after `step` steps; `of` how many."""

    kind: str
    stage: str
    step: int
    responses: tuple[Response, ...]
    of: int


def points(run_dir: Path, samples: int, steps: int, notes: Notes) -> Iterator[Point]:
    """Of all training steps, at most `steps` of them, then of all evaluations; at most `samples` responses each."""
    files = [path for path in (run_dir / "rollouts").glob("*/*.jsonl") if path.stem.isdecimal()]
    for path in evenly(sorted(files, key=lambda path: int(path.stem)), steps):
        yield _point(TRAINING, path.parent.name, int(path.stem), _rollouts(path, notes), samples)
    evals = sorted((run_dir / "evals").glob("*.completions.jsonl"), key=lambda path: stage_rank(_stage(path)))
    for path in evals:
        made = read_json(path.with_name(f"{_stage(path)}.json"), notes) or {}
        step = number(made.get("step"))
        if step is None:  # being written, or its summary is lost
            notes.append(f"evals/{path.name} has no summary that says at which step it was made, and is left out.")
            continue
        yield _point(EVALUATION, _stage(path), int(step), _evaluated(path, notes), samples)


def _stage(path: Path) -> str:
    return path.name.removesuffix(".completions.jsonl")


def _point(kind: str, stage: str, step: int, responses: Iterable[Response], samples: int) -> Point:
    everything = list(responses)
    return Point(kind, stage, step, tuple(sample(everything, samples)), len(everything))


def sample(responses: list[Response], size: int) -> list[Response]:
    """`size` of them: the questions in an order of their hashes, a response of each before the next one of any."""
    turn: Counter[str] = Counter()
    ranked: list[tuple[int, bytes, Response]] = []
    for response in responses:
        ranked.append((turn[response.question], _order(response.question), response))
        turn[response.question] += 1
    ranked.sort(key=lambda one: one[:2])
    return [response for _, _, response in ranked[:size]]


def _order(question: str) -> bytes:
    return hashlib.sha256(question.encode(errors="backslashreplace")).digest()


def _rollouts(path: Path, notes: Notes) -> Iterator[Response]:
    for line in read_lines(path, notes):
        yield Response(_question(line), str(line.get("completion")), number(line.get("reward")))


def _evaluated(path: Path, notes: Notes) -> Iterator[Response]:
    for line in read_lines(path, notes):
        texts, scores = _list(line.get("completions")), _list(line.get("scores"))
        for index, text in enumerate(texts):
            yield Response(_question(line), str(text), number(scores[index]) if index < len(scores) else None)


def _question(line: dict[str, Any]) -> str:
    return json.dumps([str(line.get("benchmark")), str(line.get("prompt_id"))])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def read_documents(run_dir: Path, questions: set[str], warn: Callable[[str], object]) -> dict[str, str]:
    """The documents of `questions`, as `lexical.normal` text, from the data that the run's recipe names.

    What can't be read any more is warned of: without a document, a quotation is grounding only where it is announced.
    """
    found: dict[str, str] = {}
    try:
        recipe = load_recipe(str(run_dir / "recipe.toml"))
        for role, source, split in _sources(recipe):
            for example in _examples(recipe, run_dir, role, source, split):
                key = json.dumps([example.benchmark, example.id])
                if key in questions and key not in found:
                    found[key] = normal(document_of(example))
    except ValueError as error:
        warn(f"the run's documents can't be read, and quotations are not looked up in them: {error}")
    return found


def _sources(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    if recipe.phases:
        yield "train", recipe.data.train, recipe.data.split
    for source in recipe.data.eval:
        yield "eval", source, recipe.data.eval_split


def _examples(recipe: Recipe, run_dir: Path, role: str, source: str, split: str) -> list[Example]:
    if source.startswith(SYNTHETIC):  # a run keeps the rows that it has generated
        source = str(run_dir / "data" / f"{source.removeprefix(SYNTHETIC)}.jsonl")
    limit = recipe.data.limit if role == "train" else None
    return read_examples(source, split=split, limit=limit, skip_bad_rows=True).examples


def document_of(example: Example) -> str:
    """What the writer was given: the document, or the whole of a ready prompt."""
    if example.context is not None:
        return example.context
    return example.text or "\n".join(message["content"] for message in example.messages or ())
