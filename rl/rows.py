"""One row of a data set, in any of three forms, to one `Example`.

    TRL     prompt (string or messages) + free columns; answers, answer or solution
    verl    data_source, prompt, ability, reward_model{style, ground_truth}, extra_info (DocQA-RL-1.6K as published)
    plain   context, question, answers (or answer)
Optional in each: id, benchmark, answer_type, choices, response. The form is told from the row's own columns. Every
column that has no field of its own is kept for reward functions, as are the originals of a mapped one (`solution`,
`reward_model`). What is wrong with a row is raised as `RowError` with the column's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .answers import extract_answer
from .choices import choice_letter, yes_or_no
from .dates import parse_date
from .matching import ANSWER_TYPES, gold_type, list_items
from .numbers import parse_gold
from .spans import normal_form

Needs = Literal["answers", "response"]
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Substrings of data_source and ability in DocQA-RL-1.6K, as its released code tells them apart.
_VERL_TYPES = (
    ("long_toc_choices", "choice"),
    ("doc-mc", "choice"),
    ("docmath", "number"),
    ("doc-math", "number"),
    ("multihoprag", "span"),
    ("musique", "span"),
    ("doc-qa", "span"),
)
_FIELDS = ("id", "benchmark", "answers", "answer_type", "question", "choices", "response")


@dataclass(frozen=True)
class Example:
    """One question with its document or its ready prompt, and its gold answers.

    Exactly one of (context and question), messages, text is the prompt. answers may be empty only where a response is
    given (SFT). columns holds every other column of the row.
    """

    id: str
    benchmark: str
    answers: tuple[str, ...]
    answer_type: str = "auto"
    context: str | None = None
    question: str | None = None
    messages: tuple[dict[str, str], ...] | None = field(default=None, hash=False)
    text: str | None = None
    response: str | None = None
    choices: tuple[str, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_row(self) -> dict[str, Any]:
        """A row that JSON can hold and that reads back as an equal example."""
        row: dict[str, Any] = dict(self.columns)
        row |= {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        row["answers"] = list(self.answers)
        if self.choices is not None:
            row["choices"] = list(self.choices)
        if self.messages is not None:
            row["prompt"] = [dict(message) for message in self.messages]
        elif self.text is not None:
            row["prompt"] = self.text
        else:
            row["context"] = self.context
        return row


class RowError(ValueError):
    """What is wrong with a row: the column and the reason."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(f"{column}: {reason}")
        self.column, self.reason = column, reason


class LeftOut(RowError):
    """A row that its data set's own rules leave out: it is counted and listed, and nothing is wrong with it."""


class WrongForm(RowError):
    """A row in no form that was asked for: when a file opens with one, it is the wrong file."""


def parse_row(row: object, *, default_id: str, default_benchmark: str, needs: Needs) -> Example:
    """The example that a row describes. Raises RowError."""
    if not isinstance(row, Mapping):
        raise RowError("row", f"is {_kind(row)}, must be an object with named columns")
    # Parquet has no missing columns, only nulls: null counts as absent.
    row = {name: value for name, value in row.items() if value is not None}
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(name, f"is {value}")
    used: set[str] = set(_FIELDS)
    parts: dict[str, Any] = {}
    if "prompt" in row:
        used.add("prompt")
        parts |= _prompt(row["prompt"])
        if "question" in row:
            parts["question"] = _text(row, "question")
    elif "context" in row or "question" in row:
        used |= {"context", "answer"}
        parts |= {name: _text(row, name) for name in ("context", "question")}
    else:
        known = "prompt (TRL), data_source + prompt + reward_model (verl), or context + question (plain)"
        raise RowError("row", f"no form is recognised; it has {sorted(row)[:12]}, expected {known}")
    response = _response(row)
    if needs == "response" and response is None:
        raise RowError("response", "is missing, and warm-up needs one")
    choices = _strings(row, "choices") if "choices" in row else None
    answers, answer_type = _answers(row, choices, required=needs == "answers")
    return Example(
        id=_label(row, "id", default_id),
        benchmark=_label(row, "benchmark", _label(row, "data_source", default_benchmark)),
        answers=answers,
        answer_type=answer_type,
        response=response,
        choices=choices,
        columns={name: value for name, value in row.items() if name not in used},
        **parts,
    )


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


def check_text(text: object, column: str) -> str:
    """The text, if it is one that can be shown to a model. Raises RowError."""
    if not isinstance(text, str):
        raise RowError(column, f"is {_kind(text)}, must be a string")
    if not text.strip():
        raise RowError(column, "is empty")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise RowError(column, "holds half of a surrogate pair, which is no text")
    return text


def _text(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise RowError(column, "is missing or null")
    return check_text(row[column], column)


def _label(row: Mapping[str, Any], column: str, default: str) -> str:
    value = row.get(column, default)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else check_text(value, column)


def _strings(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """A string, a number, or a list of them, as strings."""
    value = row[column]
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values:
        raise RowError(column, "is empty")
    for item in values:
        if isinstance(item, float) and not math.isfinite(item):
            raise RowError(column, f"holds {item}")
    # A gold answer stored as a number loses nothing by being printed.
    printed = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in values]
    return tuple(check_text(item, column) for item in printed)


def _prompt(prompt: object) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": check_text(prompt, "prompt")}
    if not isinstance(prompt, list | tuple) or not prompt:
        raise RowError("prompt", f"is {_kind(prompt)}, must be a string or a list of messages, and not empty")
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
            raise RowError("prompt", f"holds a message without a role out of {', '.join(_ROLES)}")
        messages.append({"role": message["role"], "content": check_text(message.get("content"), "prompt")})
    if messages[-1]["role"] == "assistant":
        raise RowError("prompt", "ends with an assistant message; that one belongs in the column response")
    return {"messages": tuple(messages)}


def _response(row: Mapping[str, Any]) -> str | None:
    return _text(row, "response") if "response" in row else None


def _answers(row: Mapping[str, Any], choices: tuple[str, ...] | None, *, required: bool) -> tuple[tuple[str, ...], str]:
    """(gold answers, answer type), checked against each other."""
    answer_type = row.get("answer_type", "auto")
    if answer_type not in ANSWER_TYPES:
        raise RowError("answer_type", f"{answer_type!r} is unknown; one of {', '.join(ANSWER_TYPES)}")
    column = next((name for name in ("answers", "answer", "solution") if name in row), None)
    if "reward_model" in row and "prompt" in row and column != "answers":
        column, answers = "reward_model", _ground_truth(row["reward_model"])
        if answer_type == "auto":
            answer_type = _verl_type(row)
    elif column is not None:
        if row[column] in ([], ()) and not required:
            return (), answer_type
        answers = _strings(row, column)
    elif required:
        raise RowError("answers", "is missing or null (answer, solution and reward_model.ground_truth are read too)")
    else:
        return (), answer_type
    for answer in answers:
        _check_answer(answer, answer_type, choices, column)
    return answers, answer_type


def _check_answer(answer: str, answer_type: str, choices: tuple[str, ...] | None, column: str) -> None:
    kind = gold_type(answer, choices)
    if answer_type.startswith("number") and kind != "yes_no" and parse_gold(answer) is None:
        raise RowError(column, f"{answer[:80]!r} does not parse as a number, yet answer_type is {answer_type}")
    for name, read in (("yes_no", yes_or_no), ("date", parse_date)):
        if answer_type == name and read(answer) is None:
            raise RowError(
                column, f"{answer[:80]!r} is no {name}, yet answer_type is {name} (an ambiguous date is none)"
            )
    if answer_type == "choice" or (answer_type == "auto" and kind == "choice"):
        if choice_letter(answer, choices) is None:
            among = f"none of the {len(choices)} choices" if choices else "no letter of a choice"
            raise RowError(column, f"{answer[:80]!r} is {among}")
    elif answer_type == "list":
        if not all(map(normal_form, list_items(answer))) or not list_items(answer):
            raise RowError(column, f"{answer[:80]!r} has an item of nothing but punctuation, so nothing can match it")
    elif not answer_type.startswith("number") and kind != "number" and not normal_form(answer):
        raise RowError(column, f"{answer[:80]!r} is nothing but punctuation or an article, so nothing can match it")


def _ground_truth(reward_model: object) -> tuple[str, ...]:
    """The bare answers in verl's reward_model: a sentence that announces the answer, or the answer itself."""
    if not isinstance(reward_model, Mapping):
        raise RowError("reward_model", f"is {_kind(reward_model)}, must be an object with ground_truth")
    if reward_model.get("ground_truth") is None:
        raise RowError("reward_model", "has no ground_truth")
    sentences = _strings({"reward_model": reward_model["ground_truth"]}, "reward_model")
    found = [extract_answer(sentence) for sentence in sentences]
    bare = [sentence if answer is None else answer for sentence, answer in zip(sentences, found, strict=True)]
    return tuple(check_text(answer, "reward_model") for answer in bare)


def _verl_type(row: Mapping[str, Any]) -> str:
    names = f"{row.get('data_source', '')} {row.get('ability', '')}".lower()
    return next((kind for part, kind in _VERL_TYPES if part in names), "auto")
