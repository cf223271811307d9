"""Synthetic annual reports with exact answers: the demo's documents, questions and tokenizer.

`lexicon` holds the words, `report` draws the facts and lays the document out, `questions` asks about it, `rows` makes
data sets of a given token length, `tokenizer` builds the vocabulary. Nothing here is taken from an outside text.
"""

from __future__ import annotations

from .questions import KINDS, Question, ask
from .report import Facts, Piece, draw_facts, lay_out
from .rows import Synthetic, make_rows, write_rows
from .tokenizer import build_tokenizer

__all__ = [
    "KINDS",
    "Facts",
    "Piece",
    "Question",
    "Synthetic",
    "ask",
    "build_tokenizer",
    "draw_facts",
    "lay_out",
    "make_rows",
    "write_rows",
]
