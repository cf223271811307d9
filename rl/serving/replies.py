"""A group as it is ordered from a server, and what may come back: exactly that, or an error.

`/inference/v1/generate` takes and gives token ids. `processed_logprobs` are of the distribution that was sampled from, after
temperature, top_k and top_p, so `kept_logmass` (their way to the full vocabulary's) is 0 where nothing was cut off, and not
known where something was. Greedy ones are the full vocabulary's at temperature 1, which is what a kept mass of one token is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from ...engine import Completion, Sampling

PATH = "/inference/v1/generate"

_NO_LOGPROB = -9999.0
"""What vLLM sends where it has none."""

_ROUNDING = 1e-3
"""A log-prob may be above zero by so much."""

_TOKEN_BYTES, _REPLY_BYTES = 512, 1 << 20


class BadReply(ValueError):
    """A reply that isn't what was ordered."""


def order(
    ids: Sequence[int], group_size: int, sampling: Sampling, stop_ids: Collection[int], seed: int | None,
    model: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The request's body. Every parameter is named, so that no server's default has a say.

    One request for the group, whose prompt is computed once. Greedy completions are all alike: one is asked for.
    """
    greedy = sampling.temperature == 0.0
    return {
        "token_ids": list(ids),
        "stream": False,
        **({} if model is None else {"model": model}),
        "sampling_params": {
            "n": 1 if greedy else group_size, "max_tokens": sampling.max_completion, **({} if seed is None else {"seed": seed}),
            "temperature": sampling.temperature, "top_p": 1.0 if greedy else sampling.top_p,
            "top_k": 0 if greedy else sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "min_tokens": 0, "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # the stop tokens above are all there are
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False, "skip_special_tokens": False,
        },
    }  # fmt: skip


def largest(group_size: int, sampling: Sampling) -> int:
    """Bytes that a reply may have."""
    return _REPLY_BYTES + _TOKEN_BYTES * group_size * sampling.max_completion


def read(
    reply: Any, group_size: int, sampling: Sampling, stop_ids: Collection[int], vocabulary: int
) -> list[Completion]:  # fmt: skip
    """The group's completions, in their order.

    Raises:
        BadReply: anything is missing, too much, or not a thing that such a request can give.
    """
    greedy = sampling.temperature == 0.0
    wanted = 1 if greedy else group_size
    choices = _field(reply, "choices", list)
    if len(choices) != wanted:
        raise BadReply(f"{len(choices)} completions instead of {wanted}")
    numbers = [_field(choice, "index", int) for choice in choices]
    if sorted(numbers) != list(range(wanted)):
        raise BadReply(f"completions number {numbers} instead of 0 to {wanted - 1}")
    ordered = [choice for _, choice in sorted(zip(numbers, choices, strict=True), key=lambda pair: pair[0])]
    made = [_completion(choice, sampling, frozenset(stop_ids), vocabulary) for choice in ordered]
    return made * group_size if greedy else made


def _completion(choice: Any, sampling: Sampling, stop_ids: frozenset[int], vocabulary: int) -> Completion:
    reason, ids = _field(choice, "finish_reason", str), _field(choice, "token_ids", list)
    content = _field(_field(choice, "logprobs", dict), "content", list)
    if reason not in ("stop", "length"):
        raise BadReply(f"a completion ended with {reason!r}")
    if not ids:
        raise BadReply("a completion has no tokens")
    if len(content) != len(ids):
        raise BadReply(f"{len(content)} log-probs for {len(ids)} tokens")
    for token, entry in zip(ids, content, strict=True):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise BadReply(f"token {token!r} is outside the vocabulary of {vocabulary}")
        if _field(entry, "token_id", int) != token:
            raise BadReply(f"the log-prob of token {entry['token_id']} stands with token {token}")
    logprobs = tuple(_logprob(entry) for entry in content)
    stops = [place for place, token in enumerate(ids) if token in stop_ids]
    if stops != ([len(ids) - 1] if reason == "stop" else []):
        raise BadReply(f"a completion of {len(ids)} tokens ended with {reason!r} and has stop tokens at {stops[:5]}")
    if len(ids) > sampling.max_completion or (reason == "length" and len(ids) < sampling.max_completion):
        raise BadReply(f"a completion ended with {reason!r} after {len(ids)} of {sampling.max_completion} tokens")
    if sampling.temperature == 0.0:
        return Completion(tuple(ids), (0.0,) * len(ids), logprobs, reason)
    whole = sampling.top_p == 1.0 and sampling.top_k == 0
    return Completion(tuple(ids), logprobs, (0.0,) * len(ids) if whole else (), reason)


def _logprob(entry: Any) -> float:
    value = entry.get("logprob")
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadReply(f"a log-prob is {value!r}")
    if not _NO_LOGPROB < value < _ROUNDING:
        raise BadReply(f"a log-prob is {value!r}: the server has none, or it is none")
    return float(value)


def _field(holder: Any, name: str, kind: type) -> Any:
    value = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadReply(f"no {name} where one is due, but {str(value)[:80]!r}")
    return value
