"""Finding the final answer in a completion: text in, an `Extraction` out; nothing is compared here.

What counts is the last statement after the reasoning ("the answer is ...", "Final answer: ...", `\\boxed{...}`, 答案是,
答えは; case-insensitive): its first line, without markdown, LaTeX dress, quotes and final punctuation, and without the
parentheses that the template "(insert answer here)" puts around it. No answer, each with its own reason, are: reasoning
that never closes, nothing announced, an empty slot, the template echoed back, and two statements side by side that
disagree. A statement that takes an earlier one back ("No, the answer is ...") or concludes from it is not a rival.

Bounds: marks are found in one pass over the text; of what follows a mark only `LONGEST` characters are read, and every
pattern is linear on them, so that no completion is expensive. It gives up on answers that nothing announces (the judge
sees their tail) and on reasoning that opens in the prompt and never closes, which looks like plain text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

# Characters of an answer that are read. A longer one says so in its text, and so matches nothing shorter.
LONGEST, CUT = 4000, " (cut)"

_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_LINE_ENDS = re.compile("\r\n?|[\u000b\u000c\u0085\u2028\u2029]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f]")
_THINKING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_MARKER = re.compile(
    r"""\banswers?(?:\s{1,3}to\s{1,3}(?:the|this|your)\s{1,3}question)?[*_`\s]{1,8}(?:is|are)\b[*_`\s]{0,8}[:：]?
    |\banswers?["*_`]{0,4}\s{0,3}[:：]
    |^[#*_\s]{0,8}final\s{1,3}answer[*_`:\s]{0,8}$
    |(?:答案|答え)[*_`\s]{0,4}(?:是|为|為|は|[:：])[*_`\s]{0,4}[:：]?
    |<answer>
    |\\f?boxed\s{0,8}(?=\{)""",
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_SPACE = re.compile(r"[\s*_`]*(?=\s)\s*|\s*")
_SPECIAL = re.compile(r"<[|｜][^<>\n]{0,60}[|｜]>|</?s>|<eos>|</answer>", re.IGNORECASE)
# A full stop after a digit may be a decimal point.
_CLOSED = re.compile(r"""(?:(?<![\d.!?)"”\s])[.!?]|[)"”。！？])\s*$""")
# Words between two statements that say how the second stands to the first: it corrects, concludes or restates.
_RESOLVED = re.compile(
    r"\b(?:no|not|wait|actually|correct(?:ion|ed|ing)?|rather|instead|reflection|sorry|mistaken?|revis\w{0,4}|but|however"
    r"|reconsider\w{0,3}|therefore|thus|so|hence|final(?:ly)?|conclusion|conclude|overall|equivalently|that is|which is"
    r"|because|since|in other words)\b|i\.e\.|=|所以|因此|但|不",
    re.IGNORECASE,
)
# Words that may stand between a mark and the next without being an answer; how many marks are looked back at.
_BETWEEN = frozenset("the final so and correct a".split())
_RIVALS = 8
_EMPHASIS = re.compile(r"(?<![^\W_])[*`_]+(?=\S)|(?<=\S)[*`_]+(?![^\W_])")
_LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox)\s?\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{(-?\d{1,20})\}\s?\{(\d{1,20})\}")
_LATEX_PLAIN = re.compile(r"\\[,!;:]|\\[()\[\]]|\\(?:left|right)(?![a-zA-Z])")
_LATEX_SIGNS = {"\\$": "$", "\\%": "%", "\\&": "&", "\\#": "#", "{,}": ",", "\\times": "×", "\\approx": "≈", "\\ ": " "}
_OPENING = " :：\"'“‘«»「『|*_`~" + "\u00a0"
_CLOSING = " .,;:!?\"'”’»」』。，、；：！？|*_`~" + "\u00a0"
_SLOT = {"(": ")", "[": "]", "{": "}", "（": "）", "【": "】"}
_PLACEHOLDER = re.compile(
    r"[(\[{<（【\s]*(?:(?:please )?(?:insert|write|put|enter|your|the|final|an?) )*answer(?: here)?[)\]}>）】\s]*"
    r"|.*\binsert (?:your |the )?answer here\b.*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Extraction:
    """answer: what is announced, None where there is none. reason: why it is no answer, None where it is one.

    printed: the answer with the parentheses it stood in. block: with the lines below it up to a blank one, for lists.
    complete: whether something closes it, so that no length limit can have cut it ("12|34").
    """

    answer: str | None
    reason: str | None
    printed: str = ""
    block: str = ""
    complete: bool = True


def visible(text: str) -> str:
    """Without zero-width characters, direction marks and fillers; control characters are spaces, line ends are \\n."""
    return _CONTROL.sub(" ", _LINE_ENDS.sub("\n", _INVISIBLE.sub("", text)))


def after_thinking(completion: str) -> str | None:
    """What follows the last closed reasoning; None if reasoning is still open at the end (the completion was cut)."""
    tags = _last(_THINKING, completion, 1)
    if not tags:
        return completion
    return completion[tags[-1].end() :] if tags[-1][1] else None


def thinking(completion: str) -> str:
    """The reasoning alone: what precedes the last closed reasoning's end, or follows an opening that never closes.

    The whole of a completion without such tags: it reasons in the open.
    """
    tags = _last(_THINKING, completion, 1)
    if not tags:
        return completion
    return completion[: tags[-1].start()] if tags[-1][1] else completion[tags[-1].end() :]


def extract(completion: str) -> Extraction:
    """The final answer of a completion, or the reason why there is none (see `rules.REASONS`)."""
    text = after_thinking(completion)
    if text is None:
        return Extraction(None, "truncated", complete=False)
    text = visible(text)
    markers = _last(_MARKER, text, _RIVALS)
    if not markers:
        return Extraction(None, "no_answer" if text.strip() else "empty", complete=False)
    found = _read(text, markers[-1])
    if not found.answer:
        reason = "empty"
    elif _PLACEHOLDER.fullmatch(found.answer) or _PLACEHOLDER.fullmatch(found.printed):
        reason = "placeholder"
    elif len(markers) > 1 and _rivals(text, markers, found.answer):
        reason = "rivals"
    else:
        reason = None
    return Extraction(found.answer, reason, found.printed, found.block, found.complete)


def extract_answer(text: str) -> str | None:
    """The answer announced last in a text without reasoning, as it is printed; None when nothing is announced.

    May be the empty string.
    """
    text = visible(text)
    markers = _last(_MARKER, text, _RIVALS)
    return _read(text, markers[-1]).printed if markers else None


def _last(pattern: re.Pattern[str], text: str, count: int) -> list[re.Match[str]]:
    """The last matches, in order; a text of a million marks holds no million match objects."""
    return list(deque(pattern.finditer(text), maxlen=count))


def _read(text: str, marker: re.Match[str]) -> Extraction:
    skipped = _SPACE.match(text, marker.end())
    start = skipped.end() if skipped else marker.end()
    rest = text[start : start + LONGEST + 1]
    if marker[0].startswith("\\"):
        content = _braced(rest)
        printed = clean(content.partition("\n")[0])
        # A box is itself the slot: parentheses inside it are the number's own.
        return Extraction(printed, None, printed, content, len(content) + 1 < len(rest))
    parts = _SPECIAL.split(rest, maxsplit=1)
    line, newline, _ = parts[0].partition("\n")
    block = parts[0].partition("\n\n")[0]
    closed = bool(newline) or len(parts) > 1 or _CLOSED.search(line[-80:]) is not None
    printed = clean(line)
    return Extraction(unwrap(printed), None, printed, block, closed)


def _braced(text: str) -> str:
    """The content of the leading {...}, nested braces respected; the rest if the brace never closes."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[1:index]
    return text[1:]


def _rivals(text: str, markers: list[re.Match[str]], last: str) -> bool:
    """Whether the statement before the last one, in the same paragraph, says something else and is not taken back."""
    end = markers[-1].start()
    for before, after in zip(markers[-2::-1], markers[:0:-1], strict=True):
        between = text[before.end() : end]
        if len(between) > LONGEST or "\n\n" in between:
            return False
        own = text[before.end() : after.start()]
        earlier = _words(clean(_braced(own.lstrip()) if before[0].startswith("\\") else first_sentence(own.lstrip())))
        # "the answer is \boxed{...}" is one statement, and so is "the answer is: the answer is".
        if earlier - _BETWEEN:
            same = earlier <= _words(last) or _words(last) <= earlier
            return not same and _RESOLVED.search(between) is None
    return False


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence: one before a space and a capital, or one of East Asia."""
    match = re.search(r"[.!?](?=\s+[^\Wa-z\d_])|[。！？]|[.!?]$", text.rstrip())
    return text[: match.start()] if match else text


def clean(line: str) -> str:
    """Strip emphasis, LaTeX dress, quotes and final punctuation from one line of an answer."""
    long = len(line) > LONGEST
    line = " ".join(visible(line[:LONGEST]).split())
    for _ in range(3):  # each pass takes the innermost dress off
        line = _LATEX_TEXT.sub(r"\1", line)
    line = _LATEX_FRACTION.sub(r"\1/\2", line)
    for sign, plain in _LATEX_SIGNS.items():
        line = line.replace(sign, plain)
    line = _EMPHASIS.sub("", _LATEX_PLAIN.sub("", line))
    bare = line.strip(" .,;:")
    if len(bare) > 2 and bare[0] == bare[-1] == "$" and line.count("$") == 2:
        line = line.replace("$", "")
    line = line.strip().rstrip(_CLOSING).lstrip(_OPENING).lstrip("•·").strip()
    while line.endswith((")", "]", "}")) and line.count(line[-1]) > line.count(
        {")": "(", "]": "[", "}": "{"}[line[-1]]
    ):
        line = line[:-1].rstrip(_CLOSING)  # closes what opened before the statement
    return line + CUT if long else line


def unwrap(answer: str) -> str:
    """The template prints its slot in parentheses, so "(Paris)" is "Paris" and "(32.4)" is 32.4; one pair only."""
    closing = _SLOT.get(answer[:1])
    if closing is None or not answer.endswith(closing):
        return answer
    depth = 0
    for index, letter in enumerate(answer):
        depth += (letter == answer[0]) - (letter == closing)
        if depth == 0:
            return clean(answer[1:-1]) if index == len(answer) - 1 else answer
    return answer
