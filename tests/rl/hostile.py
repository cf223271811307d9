"""Texts of a million characters that make naive patterns backtrack, each a way to ask for more than linear time."""

from __future__ import annotations

SIZE = 1_000_000


def _fill(unit: str, size: int) -> str:
    return (unit * (size // len(unit) + 1))[:size]


def hostile_texts(size: int = SIZE) -> dict[str, str]:
    """Name -> completion of `size` characters, more or less."""
    answer = "Therefore, the answer is "
    units = {
        "nines": "9", "groups": "1,", "dots": ".", "digits and dots": "1.", "spaces": " ", "tabs": "\t", "commas": ",",
        "minus": "-", "stars": "*", "underscores": "_", "backticks": "`", "word and underscore": "a_", "braces": "{",
        "closing braces": "}", "parentheses": "(", "closing parentheses": ")", "pairs": "()", "brackets": "[",
        "dollars": "$", "quotes": '"', "slashes": "a/", "or": "a or ", "not": "not ", "lines": "\n", "bullets": "- a\n",
        "zero width": "\u200b", "marks": "\u202e", "combining": "\u0301", "ligatures": "\ufdfa", "han": "北", "thai": "ก",
        "superscripts": "²", "halves": "½", "full width": "１", "boxes": "\\boxed{", "text": "\\text{", "frac": "\\frac{1}",
        "tags": "<|", "thinks": "<think>", "closed thinks": "</think>", "answers": "the answer is ", "labels": "answer:",
        "finals": "final answer\n", "the": "the ", "months": "October 5 ", "percent": "5% ", "sentences": "A. ",
        "surrogates": "\ud800", "nul": "\x00", "mixed space": " \u3000", "semicolons": "a;", "question": "?!",
    }  # fmt: skip
    texts = {f"answer, {name}": answer + _fill(unit, size) for name, unit in units.items()}
    texts |= {f"answer, {name}, x": answer + _fill(unit, size) + "x" for name, unit in units.items()}
    texts |= {f"answer, a, {name}, b": answer + "a" + _fill(unit, size) + "b" for name, unit in units.items()}
    texts |= {f"bare {name}": _fill(unit, size) for name, unit in units.items()}
    texts |= {f"{name}, answer": _fill(unit, size) + answer + "5" for name, unit in units.items()}
    texts |= {f"boxed {name}": "\\boxed{" + _fill(unit, size) + "}" for name, unit in units.items()}
    texts["nearly a mark"] = _fill("answer" + " " * 9, size)
    texts["nearly a question"] = _fill("answer to the ", size)
    texts["nearly a token"] = answer + _fill("<|" + "a" * 59, size)
    texts["european"] = answer + _fill("1.000", size) + ",5x"
    texts["thought"] = "<think>" + _fill("a", size) + "</think>" + answer + "5"
    return texts
