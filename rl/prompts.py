"""From an example to the prompt's tokens.

The template is the published one of QwenLong-L1 (arXiv 2505.17667, table 1): one user turn, no system prompt; a plain
row with choices is asked for "The correct answer is" instead, the words that published rules for choices read. Lengths
are those of the rendered prompt in the policy's own tokens, since that is what memory and the curriculum see. A prompt
is never cut unless asked, and then says so in `truncated_from`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import BatchEncoding, PreTrainedTokenizerBase

from .rows import Example

_BEFORE_DOCUMENT = "Please read the following text and answer the question below.\n\n<text>\n"
_AFTER_DOCUMENT = "\n</text>\n\n"
_AFTER_QUESTION = '\n\nFormat your response as follows: "Therefore, the answer is (insert answer here)".'
# LongBench v2's and DocQA-RL-1.6K's form for options, which the published rules for choices look for.
_AFTER_CHOICES = '\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
TEMPLATE = f"{_BEFORE_DOCUMENT}$DOC${_AFTER_DOCUMENT}$Q${_AFTER_QUESTION}"

# Characters handed to the tokenizer at once: enough for its threads, little enough to hold the encodings of.
_BATCH_CHARACTERS = 1_000_000
_SHOWN = 20


@dataclass(frozen=True)
class Prompt:
    """ids: the rendered prompt in the policy's tokens. truncated_from: its token count before a cut, None if whole."""

    example: Example
    ids: tuple[int, ...]
    truncated_from: int | None = None


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as text, up to where the completion starts.

    Plain rows are put into the template as one user turn; messages go through the chat template. Without a chat
    template a single turn stands bare. A string prompt is used as it is.
    Raises ValueError for several messages and no chat template.
    """
    if example.text is not None:
        return example.text
    messages = render_turns(example)
    if tokenizer.chat_template is None:
        if len(messages) > 1:
            raise ValueError(
                f"{example.id}: {len(messages)} messages and a tokenizer without chat template; set its chat_template, "
                "or give the prompt as one string"
            )
        return messages[0]["content"]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def render_turns(example: Example) -> list[dict[str, str]]:
    """The messages of an example that isn't a ready string, a plain row as the one turn of the template."""
    if example.messages is None:
        return [{"role": "user", "content": _user_turn(example)}]
    return [dict(message) for message in example.messages]


def _user_turn(example: Example) -> str:
    context, question = _plain(example)
    after = _AFTER_QUESTION if example.choices is None else _AFTER_CHOICES
    return f"{_BEFORE_DOCUMENT}{context}{_AFTER_DOCUMENT}{question}{after}"


def _plain(example: Example) -> tuple[str, str]:
    assert example.context is not None and example.question is not None, example.id
    return example.context.strip(), example.question.strip()


def question_of(example: Example) -> str:
    """The question alone, as a judge should see it: of a ready prompt, what stands between document and format line."""
    if example.question is not None:
        return example.question.strip()
    users = [message["content"] for message in example.messages or () if message["role"] == "user"]
    text = users[-1] if users else example.text or ""
    # The last "</text>": the document may hold the mark itself, the question hardly.
    rest = text.rpartition("</text>")[2]
    formats = (_AFTER_QUESTION.strip(), _AFTER_CHOICES.strip())
    return next((before for form in formats if (before := rest.rpartition(form)[0].strip())), rest.strip())


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    truncate: str = "error",
) -> list[Prompt]:
    """The prompts of examples, in order. max_length counts tokens of the rendered prompt; None sets no limit.

    truncate says what happens above it: "error" raises one ValueError that lists them, "keep" leaves them whole,
    "middle" cuts to exactly max_length tokens and marks the prompt. Of a plain row the middle of the *document* goes,
    so that instruction, question and format line survive; the published evaluation cuts the middle of the whole
    rendered prompt, which comes to nearly the same for a long document. Where there is only a ready prompt (TRL, verl)
    the whole prompt is cut, as published: its first and last halves stay.
    Raises ValueError when what surrounds the document is longer than max_length by itself.
    """
    if truncate not in ("error", "middle", "keep"):
        raise ValueError(f"truncate {truncate!r} is unknown; choose error, middle or keep")
    limit = sys.maxsize if max_length is None else max_length
    prompts: list[Prompt] = []
    too_long: list[str] = []
    for batch, encoding in _encoded(examples, tokenizer):
        for index, (example, text) in enumerate(batch):
            ids: list[int] = encoding["input_ids"][index]
            if len(ids) <= limit or truncate == "keep":
                prompts.append(Prompt(example, tuple(ids)))
            elif truncate == "error":
                too_long.append(f"{example.id} ({len(ids)})")
            else:
                start, stop = _cut(example, text, encoding, index, len(ids) - limit)
                prompts.append(Prompt(example, tuple(ids[:start] + ids[stop:]), len(ids)))
    if too_long:
        shown = ", ".join(too_long[:_SHOWN]) + (f" and {len(too_long) - _SHOWN} more" if too_long[_SHOWN:] else "")
        raise ValueError(
            f"{len(too_long)} prompts are longer than max_length {max_length} tokens: {shown}. "
            'Raise it, drop them, or set truncate to "middle" or "keep"'
        )
    return prompts


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[tuple[Example, str]], BatchEncoding]]:
    """Batches of (example, rendered text) with their encoding, in order."""
    batch: list[tuple[Example, str]] = []
    size = 0
    for example in examples:
        text = render(example, tokenizer)
        special = _special_tokens(example, tokenizer)
        if batch and (size + len(text) > _BATCH_CHARACTERS or special != _special_tokens(batch[-1][0], tokenizer)):
            yield batch, _encode(batch, tokenizer)
            batch, size = [], 0
        batch.append((example, text))
        size += len(text)
    if batch:
        yield batch, _encode(batch, tokenizer)


def _special_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds its own: not where a chat template has written them (a second BOS would follow)."""
    return example.text is not None or tokenizer.chat_template is None


def _encode(batch: list[tuple[Example, str]], tokenizer: PreTrainedTokenizerBase) -> BatchEncoding:
    # verbose=False: the warning about model_max_length is meant for models that would be fed the whole.
    return tokenizer(
        [text for _, text in batch],
        add_special_tokens=_special_tokens(batch[0][0], tokenizer),
        return_attention_mask=False,
        verbose=False,
    )


def _cut(example: Example, text: str, encoding: BatchEncoding, index: int, excess: int) -> tuple[int, int]:
    """The token range to leave out, `excess` long, from the middle of the document or of a ready prompt."""
    first, stop = 0, len(encoding["input_ids"][index])
    if example.text is None and example.messages is None:
        first, stop = _document_tokens(example, text, encoding, index)
    kept = stop - first - excess
    if kept < 2:
        raise ValueError(
            f"{example.id}: max_length leaves {kept} of the {stop - first} tokens that may be cut; raise it to "
            f"at least {len(encoding['input_ids'][index]) - (stop - first) + 2}"
        )
    start = first + (kept + 1) // 2
    return start, start + excess


def _document_tokens(example: Example, text: str, encoding: BatchEncoding, index: int) -> tuple[int, int]:
    """The token range of a plain row's document. Tokens that reach over its ends are its outermost and stay."""
    if not encoding.is_fast:
        raise ValueError(
            "middle truncation needs a fast tokenizer (it maps characters to tokens); convert the tokenizer"
        )
    context = _plain(example)[0]
    turn = text.find(_user_turn(example))
    if turn < 0:
        raise ValueError(f"{example.id}: the chat template rewrites the user's text, so its document cannot be found")
    begin = turn + len(_BEFORE_DOCUMENT)
    end = begin + len(context)
    first = encoding.char_to_token(index, begin)
    # The token after the document's last. Asked for the characters that follow it, because a character of several
    # tokens maps to its first one; and of several characters, because some tokenizers have no token for a line end.
    after = (encoding.char_to_token(index, end + offset) for offset in range(len(_AFTER_DOCUMENT)))
    stop = next((token for token in after if token is not None), None)
    assert first is not None and stop is not None, f"{example.id}: the document's ends have no token"
    return first, stop
