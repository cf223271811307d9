"""Reading the columns of published rows: texts, lists of objects, passages, gold answers; what is wrong is a `RowError`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..rows import RowError, check_text

Row = Mapping[str, Any]


def golds(value: object, column: str) -> tuple[str, ...]:
    """Gold answers as printed, in their order, blanks and repetitions left out. Raises RowError where none is left."""
    values = value if isinstance(value, list | tuple) else [value]
    printed: list[str] = []
    for item in values:
        if item is None or (isinstance(item, str) and not item.strip()):
            continue
        if not isinstance(item, str | int | float) or (isinstance(item, float) and not math.isfinite(item)):
            raise RowError(column, f"holds {str(item)[:40]!r}, which is no answer")
        printed.append(check_text(item, column).strip() if isinstance(item, str) else str(item))
    if not printed:
        raise RowError(column, "holds no answer")
    return tuple(dict.fromkeys(printed))


def read_text(value: object, column: str) -> str:
    if value is None:
        raise RowError(column, "is missing or null")
    return check_text(value, column)


def read_texts(value: object, column: str) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        raise RowError(column, f"is of type {type(value).__name__}, must be a list of texts, and not empty")
    if not all(isinstance(item, str) for item in value):
        raise RowError(column, "holds what is no text")
    return list(value)


def read_objects(value: object, column: str) -> list[Row]:
    """A list of objects; `datasets` and parquet may hold it as one object of lists."""
    if isinstance(value, Mapping) and value and all(isinstance(items, list | tuple) for items in value.values()):
        lengths = {len(items) for items in value.values()}
        if len(lengths) != 1:
            raise RowError(column, f"holds lists of different lengths {sorted(lengths)}")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, Mapping) for item in value):
        raise RowError(column, "must be a list of objects, and not empty")
    return list(value)


def decoded(context: object) -> object:
    """Passages; some copies of 2Wiki hold them as JSON text."""
    if not isinstance(context, str):
        return context
    try:
        return json.loads(context)
    except ValueError as error:
        raise RowError("context", f"opens like a list of passages, and is no JSON ({error})") from error


def read_passages(context: object) -> list[tuple[str, str]]:
    if isinstance(context, Mapping):
        sentences = context.get("sentences", context.get("content"))
        titles = context.get("title")
        if (
            not isinstance(titles, list | tuple)
            or not isinstance(sentences, list | tuple)
            or len(titles) != len(sentences)
        ):
            raise RowError("context", "must hold title and sentences, two lists of one length")
        context = list(zip(titles, sentences, strict=True))
    if not isinstance(context, list | tuple) or not context:
        raise RowError("context", "must be a list of [title, [sentence, ..]], and not empty")
    passages = []
    for entry in context:
        if not isinstance(entry, list | tuple) or len(entry) != 2 or not isinstance(entry[0], str):
            raise RowError("context", "holds an entry that is no [title, [sentence, ..]]")
        passages.append((entry[0], _joined(read_texts(entry[1], "context"))))
    return passages


def _joined(sentences: list[str]) -> str:
    """HotpotQA's sentences bring their leading space, 2Wiki's don't."""
    text = ""
    for sentence in sentences:
        gap = " " if text and not text[-1].isspace() and sentence[:1].strip() else ""
        text += gap + sentence
    return text.strip()


def print_passages(passages: Iterable[tuple[str, str]]) -> str:
    return "\n\n".join(f"Passage {number}:\n{title}\n{text}" for number, (title, text) in enumerate(passages, 1))
