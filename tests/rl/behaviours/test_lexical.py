"""The counter without a judge: a hand-labelled table, what a sentence counts for, quotations, and hostile texts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longreach.rl.behaviours.lexical import Lexical, count, normal, sentences
from longreach.rl.behaviours.lexicon import BEHAVIOURS

from ..hostile import hostile_texts
from .labelled import LABELLED, NAMES

DOCUMENT = normal("Item 1. The board  approved the merger\non 4 June 2004. 该厂于三月份正式关闭。Sales fell.")


def counted(text: str, document: str | None = None) -> dict[str, int]:
    return {name: number for name, number in count(text, document).counts.items() if number}


@pytest.mark.parametrize(("text", "letters"), LABELLED)
def test_labelled(text: str, letters: str) -> None:
    assert counted(text) == {NAMES[letter]: 1 for letter in letters}


def test_the_table_is_whole() -> None:
    texts = [text for text, _ in LABELLED]
    assert len(set(texts)) == len(texts) >= 80
    assert sum(not letters for _, letters in LABELLED) >= 40
    for letter in NAMES:
        assert sum(letter in letters for _, letters in LABELLED) >= 20


def test_a_sentence_counts_a_behaviour_once_and_each_sentence_anew() -> None:
    assert counted("Wait, no, wait, that's wrong, I made a mistake.") == {"backtracking": 1}
    assert counted("Let me verify the sum. It is 12.\nLet me verify the year! Fine.") == {"verification": 2}
    assert counted("") == {}


def test_a_bare_cue_and_what_follows_are_one_instance() -> None:
    assert counted("Wait. No, that was the sister. It is 12.") == {"backtracking": 1}
    assert counted("Wait. It is 12. No, that was the sister.") == {"backtracking": 2}
    assert counted("Wait, that is the figure for 2018. No, that was the sister.") == {"backtracking": 2}
    assert counted("不对。我刚才算错了。") == {"backtracking": 1}


def test_only_the_reasoning_is_read() -> None:
    assert counted("<think>Let me verify the sum.</think>Let me verify the sum. Wait.") == {"verification": 1}
    assert counted("Let me verify the sum.</think>Wait, no.") == {"verification": 1}
    assert counted("Preamble. Wait.<think>Let me verify the sum, cut") == {"verification": 1}
    assert counted("<think></think>Let me verify the sum.") == {}
    assert counted("Let me verify the sum.") == {"verification": 1}


def test_what_a_quotation_says_is_not_the_writers() -> None:
    for opened, closed in ('""', "“”", "「」", "«»"):
        assert counted(f"The witness wrote {opened}wait, I made a mistake. Let me verify.{closed} in 1999.") == {}
    assert counted("> Wait, I made a mistake.\nIt is 12.") == {}
    assert counted('A 5" pipe. Wait, that is 6.\nA 3" pipe.') == {"backtracking": 1}, "marks pair within a line"


def test_a_quotation_that_stands_in_the_document_is_grounding() -> None:
    quote = "So: “the board approved  the Merger on 4 June” it was."
    assert count(quote) == Lexical(dict.fromkeys(BEHAVIOURS, 0), None)
    assert count(quote, DOCUMENT) == Lexical({**dict.fromkeys(BEHAVIOURS, 0), "grounding": 1}, 1)
    assert count("It says “the board approved the merger”.", DOCUMENT).verbatim == 1
    assert counted("It says “the board approved the merger”.", DOCUMENT) == {"grounding": 1}, (
        "once, though it shows twice"
    )
    assert count("他写道「该厂于三月份正式关闭」", DOCUMENT).verbatim == 1
    for other in (
        "“the board refused the merger”",
        "“the merger”",
        "‘the board approved the merger’",
        "“”",
        "「关闭」",
    ):
        assert count(f"So: {other} it was.", DOCUMENT) == Lexical(dict.fromkeys(BEHAVIOURS, 0), 0), other


def test_sentences_are_cut_where_they_end() -> None:
    found = [one.text for one in sentences("1. First, 3.5 dollars, Inc. grew! **So?** “A. B.” ends.\n- two\n\n三。四")]
    assert found == ["first, 3.5 dollars, inc.", "grew!", "so?**", "\x02 ends.", "two", "三。", "四"]
    assert [one.quotes for one in sentences("a “b” c. “d” “e”")] == [("b",), ("d", "e")]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([text for text, _ in LABELLED]), max_size=6), st.text(max_size=40))
def test_counts_add_up_over_paragraphs(texts: list[str], noise: str) -> None:
    """Deterministic, never more than one a sentence, and paragraphs of whole sentences don't touch each other."""
    together = count("\n".join(texts)).counts
    assert together == count("\n".join(texts)).counts
    alone = [count(text).counts for text in texts]
    # A bare "Wait." joins the line after it, and takes one away at most.
    bare = sum(text.isascii() and len(text.split()) <= 3 for text in texts)
    for name in BEHAVIOURS:
        total = sum(one[name] for one in alone)
        assert total - bare <= together[name] <= total
    count(noise)
    assert all(0 <= number <= len(list(sentences(noise))) for number in count(noise).counts.values())


BOUND = 6.0
"""Seconds of one core for a million characters: reading them takes 1 to 4."""


def test_hostile_texts_cost_little() -> None:
    for name, text in hostile_texts(5_000).items():
        start = time.process_time()
        count(text, DOCUMENT)
        assert time.process_time() - start < 0.25, name


@pytest.mark.slow
def test_a_million_characters_take_bounded_time() -> None:
    units = {
        "lead-ins": "oh, but, no ", "let me": "let me ", "plans": "to answer a ", "sources": "the first second ",
        "open quotes": "“", "quoted": '"a" ', "ends": ". ", "chinese": "我再",
    }  # fmt: skip
    for name, unit in units.items():
        text = (unit * 1_000_000)[:1_000_000]
        start = time.process_time()
        count(text, DOCUMENT)
        assert time.process_time() - start < BOUND, name
