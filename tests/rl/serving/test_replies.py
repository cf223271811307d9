"""What is ordered, and what counts as delivered."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

from longreach.engine import Completion, Sampling
from longreach.rl.serving.replies import BadReply, largest, order, read

STOPS, VOCABULARY, SAMPLING = (7, 0), 100, Sampling(3, temperature=0.7)


def entry(token: int, logprob: float = -1.0) -> dict[str, Any]:
    return {"token_id": token, "logprob": logprob, "rank": 1, "top_logprobs": []}


def reply() -> dict[str, Any]:
    """Two completions, in the wrong order: one stopped, one cut off."""
    return {
        "choices": [
            {"index": 1, "token_ids": [4, 7], "finish_reason": "stop", "logprobs": {"content": [entry(4, -0.5), entry(7)]}},
            {"index": 0, "token_ids": [9, 9, 8], "finish_reason": "length", "logprobs": {"content": [entry(9), entry(9), entry(8)]}},
        ]
    }  # fmt: skip


def test_a_group_is_one_request_of_ids_with_every_parameter_named() -> None:
    body = order([1, 2, 3], 5, Sampling(6, temperature=0.7, top_p=0.9, top_k=8), STOPS, 11)
    asked = body["sampling_params"]
    assert body["token_ids"] == [1, 2, 3]
    assert {k: asked[k] for k in ("n", "max_tokens", "seed", "temperature", "top_p", "top_k", "logprobs")} == {
        "n": 5, "max_tokens": 6, "seed": 11, "temperature": 0.7, "top_p": 0.9, "top_k": 8, "logprobs": 0,
    }  # fmt: skip
    assert asked["stop_token_ids"] == [0, 7]
    assert asked["ignore_eos"] and not asked["detokenize"] and not asked["skip_special_tokens"]
    neutral = {
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }
    assert neutral.items() <= asked.items(), "a server's generation_config.json has no say"
    assert "seed" not in order([1], 2, SAMPLING, STOPS, None)["sampling_params"]


def test_completions_come_in_their_order_with_their_own_numbers() -> None:
    first, second = read(reply(), 2, SAMPLING, STOPS, VOCABULARY)
    assert (first.ids, first.finish_reason, first.logprobs) == ((9, 9, 8), "length", (-1.0, -1.0, -1.0))
    assert (second.ids, second.finish_reason, second.logprobs) == ((4, 7), "stop", (-0.5, -1.0))
    assert first.kept_logmass == (0.0, 0.0, 0.0), "nothing was cut off"


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}])
def test_where_something_was_cut_off_the_kept_mass_is_not_known(cut: dict[str, Any]) -> None:
    for made in read(reply(), 2, Sampling(3, **cut), STOPS, VOCABULARY):
        assert made.kept_logmass == ()
        assert len(made.logprobs) == len(made.ids)


def test_greedy_completions_are_one_that_stands_for_all() -> None:
    sampling = Sampling(3, temperature=0.0, top_p=0.5, top_k=3)
    assert order([1], 4, sampling, STOPS, 1)["sampling_params"]["n"] == 1
    one = {"choices": reply()["choices"][1:]}
    made = read(one, 4, sampling, STOPS, VOCABULARY)
    assert len(made) == 4 and len(set(made)) == 1
    assert made[0].logprobs == (0.0, 0.0, 0.0), "one token was left to draw from"
    assert made[0].kept_logmass == (-1.0, -1.0, -1.0), "as the local generator has it"


def spoilt(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    made = copy.deepcopy(reply())
    change(made)
    return made


def cut_off(r: dict[str, Any]) -> None:
    """A server's own limit: shorter than ordered, and called "length"."""
    choice = r["choices"][1]
    choice["token_ids"].pop()
    choice["logprobs"]["content"].pop()


BAD: dict[str, tuple[Any, str]] = {
    "no choices": ({}, "no choices"),
    "not an object": ([1], "no choices"),
    "too few": (spoilt(lambda r: r["choices"].pop()), "1 completions instead of 2"),
    "too many": (spoilt(lambda r: r["choices"].append(r["choices"][0])), "3 completions instead of 2"),
    "twice the same": (spoilt(lambda r: r["choices"][0].update(index=0)), r"number \[0, 0\]"),
    "short of log-probs": (spoilt(lambda r: r["choices"][0]["logprobs"]["content"].pop()), "1 log-probs for 2 tokens"),
    "short of tokens": (spoilt(lambda r: r["choices"][0]["token_ids"].pop()), "2 log-probs for 1 tokens"),
    "no log-probs": (spoilt(lambda r: r["choices"][0].update(logprobs=None)), "no logprobs"),
    "no tokens": (spoilt(lambda r: r["choices"][0].update(token_ids=[], logprobs={"content": []})), "no tokens"),
    "aborted": (spoilt(lambda r: r["choices"][0].update(finish_reason="abort")), "ended with 'abort'"),
    "no reason": (spoilt(lambda r: r["choices"][0].update(finish_reason=None)), "no finish_reason"),
    "other tokens' log-probs": (spoilt(lambda r: r["choices"][0]["token_ids"].reverse()), "the log-prob of token 4 stands with token 7"),
    "beyond the vocabulary": (spoilt(lambda r: r["choices"][1]["token_ids"].__setitem__(0, 100)), "token 100 is outside"),
    "no whole number": (spoilt(lambda r: r["choices"][1]["token_ids"].__setitem__(0, "9")), "token '9' is outside"),
    "log-prob is nan": (spoilt(lambda r: r["choices"][0]["logprobs"]["content"][0].update(logprob=math.nan)), "is nan"),
    "log-prob is none": (spoilt(lambda r: r["choices"][0]["logprobs"]["content"][0].update(logprob=None)), "is None"),
    "log-prob is vLLM's none": (spoilt(lambda r: r["choices"][0]["logprobs"]["content"][0].update(logprob=-9999.0)), "-9999"),
    "log-prob above zero": (spoilt(lambda r: r["choices"][0]["logprobs"]["content"][0].update(logprob=0.5)), "is 0.5"),
    "stopped without a stop": (spoilt(lambda r: r["choices"][1].update(finish_reason="stop")), r"'stop' and has stop tokens at \[\]"),
    "went on after a stop": (spoilt(lambda r: r["choices"][0].update(finish_reason="length")), r"'length' and has stop tokens at \[1\]"),
    "cut off by the server": (spoilt(cut_off), "'length' after 2 of 3 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("bad, told", BAD.values(), ids=BAD)
def test_anything_else_is_an_error_that_says_what(bad: Any, told: str) -> None:
    with pytest.raises(BadReply, match=told):
        read(bad, 2, SAMPLING, STOPS, VOCABULARY)


def test_longer_than_ordered_is_an_error_too() -> None:
    with pytest.raises(BadReply, match="after 3 of 2 tokens"):
        read(reply(), 2, Sampling(2), STOPS, VOCABULARY)


def test_a_reply_may_be_as_long_as_the_order_makes_it() -> None:
    assert largest(8, Sampling(10_000)) > 8 * 10_000 * 130, "what vLLM 0.32 takes for a token and its log-prob"


def aborted(*ids: int) -> dict[str, Any]:
    content = {"content": [entry(i) for i in ids]}
    return {"choices": [{"index": 0, "token_ids": list(ids), "finish_reason": "abort", "logprobs": content}]}


@pytest.mark.parametrize("ids", [(), (4,), (4, 5)])
def test_what_was_stopped_has_what_was_sampled_so_far(ids: tuple[int, ...]) -> None:
    [made] = read(aborted(*ids), 1, SAMPLING, STOPS, VOCABULARY, stopped=True)
    assert made == Completion(ids, (-1.0,) * len(ids), (0.0,) * len(ids), "abort")


@pytest.mark.parametrize(
    "bad, told",
    [(aborted(4, 5, 6), "'abort' after 3 of 3 tokens"), (aborted(4, 7), r"has stop tokens at \[1\]")],
)
def test_what_has_ended_can_t_have_been_stopped(bad: Any, told: str) -> None:
    with pytest.raises(BadReply, match=told):
        read(bad, 1, SAMPLING, STOPS, VOCABULARY, stopped=True)
