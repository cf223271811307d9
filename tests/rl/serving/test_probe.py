"""The probe's measure: what it reads, what it allows, and what it says when it is not allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from longreach.rl.policy import Policy
from longreach.rl.serving.control import Control, Facts, SyncError
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.probe import PREFIXES, SHORTEST, TOP, Answers, Difference, Gauge, Probe


def facts(block: int = 16, longest: int = 1024) -> Facts:
    return Facts(torch.float32, block, longest, 1, True, None, 0, False)


def difference(fresh: float, cached: float) -> Difference:
    return Difference({"fresh": fresh, "cached": cached}, {"fresh": 3 * fresh, "cached": 3 * cached})


class Exact(Control):
    """A server that answers what a plain forward of the model gives; `spoil` changes an answer before it is read."""

    def __init__(self, policy: Policy, spoil: Any = lambda kind, answer: answer) -> None:
        super().__init__(["http://a"], 1.0)
        self.policy, self.spoil = policy, spoil

    @torch.no_grad()
    def post(self, path: str, json: Any = None, **query: str | int) -> list[Any]:
        choices = []
        for i, ids in enumerate(json["prompt"]):
            values, tokens = self.policy.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(json["logprobs"])
            top = {f"token_id:{t}": v for t, v in zip(tokens.tolist(), values.tolist(), strict=True)}
            choices.append({"index": i, "logprobs": {"top_logprobs": [top]}})
        return [
            self.spoil("fresh" if "cache_salt" in json else "cached", {"choices": choices[::-1]})
        ]  # in no particular order


def test_equal_weights_agree_on_every_value(policy: Policy) -> None:
    probe = Probe.build(policy, [facts()])
    (answers,) = probe.ask(Exact(policy), "policy")
    assert probe.start == SHORTEST and [len(top) for top in answers.fresh + answers.cached] == [TOP] * 2 * PREFIXES
    (found,) = probe.compare(policy, [answers])
    assert max(found.largest.values()) < 1e-4


def test_it_measures_what_was_changed(policy: Policy) -> None:
    probe = Probe.build(policy, [facts()])
    (answers,) = probe.ask(Exact(policy), "policy")
    shifted = Answers(
        [{t: v + 0.25 for t, v in top.items()} for top in answers.fresh],
        [{t: v - 0.5 for t, v in top.items()} for top in answers.cached],
    )
    one, two = probe.compare(policy, [answers, shifted])
    assert one.mean["fresh"] < 1e-4
    assert two.mean == pytest.approx({"fresh": 0.25, "cached": 0.5}, abs=1e-4)


def test_servers_may_name_other_likeliest_tokens(policy: Policy) -> None:
    probe = Probe.build(policy, [facts()])
    (answers,) = probe.ask(Exact(policy), "policy")
    fewer = Answers(answers.fresh, [dict(list(top.items())[3:]) for top in answers.cached])
    one, two = probe.compare(policy, [answers, fewer])
    assert max(one.largest["cached"], two.largest["cached"]) < 1e-4


def test_its_prompt_is_the_given_ids_filled_up_without_special_tokens(policy: Policy) -> None:
    probe = Probe.build(policy, [facts(block=128)], ids=[7, 8, 9])
    assert probe.start == 256 and len(probe.ids) == 256 + PREFIXES - 1 and probe.ids[:3] == (7, 8, 9)
    assert not set(probe.ids[3:]) & set(policy.tokenizer.all_special_ids)
    assert Probe.build(policy, [facts(), facts(block=128)], ids=[7, 8, 9]) == probe, (
        "two blocks of each server's, every time"
    )
    short = Probe.build(policy, [facts(128, 150)])
    assert short.start + PREFIXES == 150, (
        "one block is all that such a server can have; the last prefix leaves a token's room"
    )
    with pytest.raises(ValueError, match="needs 17 tokens, and the server takes 16"):
        Probe.build(policy, [facts(128, 16)])


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("fresh", lambda c: c.clear()),
        ("fresh", lambda c: c[0].update(logprobs=None)),
        ("fresh", lambda c: c[0]["logprobs"]["top_logprobs"][0].clear()),
        ("cached", lambda c: c.pop()),
        ("cached", lambda c: c[0].pop("logprobs")),
        ("cached", lambda c: c[0]["logprobs"].update(top_logprobs=[{"the": -1.0}])),
    ],
)
def test_an_answer_that_lacks_something_is_an_error_with_the_servers_name(
    policy: Policy, kind: str, spoil: Any
) -> None:
    def apply(which: str, answer: Any) -> Any:
        if which == kind:
            spoil(answer["choices"])
        return answer

    with pytest.raises(ServerError, match="http://a: the probe's answer lacks"):
        Probe.build(policy, [facts()]).ask(Exact(policy, apply), "policy")


def test_the_first_push_sets_the_noise_and_later_ones_are_held_to_it() -> None:
    gauge = Gauge(3.0, 0.25)
    assert "nothing" in gauge.resolution()
    gauge.judge(["a", "b"], [difference(0.01, 0.02), difference(0.012, 0.018)], 0)
    assert gauge.noise == {"fresh": 0.012, "cached": 0.02}
    gauge.judge(["a"], [difference(0.035, 0.059)], 1)
    assert gauge.noise["fresh"] == 0.012, "a head that drifts away slowly must not be got used to"
    assert "0.0360 nats (fresh), 0.0600 nats (cached)" in gauge.resolution()
    with pytest.raises(
        SyncError, match=r"a: version 2 did not take: .*fresh route are 0\.0370 .*0\.0360 are allowed \(3 times"
    ):
        gauge.judge(["a"], [difference(0.037, 0.02)], 2)
    with pytest.raises(SyncError, match=r"cached route .*older weights from its prefix cache"):
        gauge.judge(["a"], [difference(0.01, 0.07)], 2)
    with pytest.raises(SyncError, match="it has other weights"):
        gauge.judge(["a"], [difference(0.5, 0.6)], 2)


def test_a_first_push_that_is_grossly_off_is_no_noise() -> None:
    gauge = Gauge(3.0, 0.25)
    with pytest.raises(SyncError, match=r"0\.2500 are allowed \(generator\.sync\.probe_limit\)"):
        gauge.judge(["a"], [difference(0.3, 0.3)], 0)
    assert not gauge.noise


def test_the_limit_is_never_more_than_was_asked_for_nor_less_than_sense() -> None:
    gauge = Gauge(100.0, 0.25, {"fresh": 0.02, "cached": 1e-7})
    assert gauge.allowed("fresh") == 0.25 and gauge.allowed("cached") == 0.002


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_taken(policy: Policy, value: float) -> None:
    probe = Probe.build(policy, [facts()])
    (answers,) = probe.ask(Exact(policy), "policy")
    answers.fresh[3][next(iter(answers.fresh[3]))] = value
    with pytest.raises(SyncError):
        Gauge(3.0, 0.25).judge(["a"], probe.compare(policy, [answers]), 0)
