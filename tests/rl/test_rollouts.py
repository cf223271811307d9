"""Rollouts: sampled once, scored once, dumped and read back to the bit, with log-probs that the trainer agrees with."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from longreach.engine import Group, Sampling
from longreach.engine.generate import GeneratorConfig
from longreach.rl.judge import JudgeConfig
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.rewards import Reward, RewardConfig, make_reward
from longreach.rl.rollouts import Rollout, RolloutGroup, Unjudged, regroup, roll_out
from longreach.rl.rules import REASONS, score_example
from longreach.rl.run import Stopwatch

SAMPLING = Sampling(6, temperature=0.7, top_p=0.9)
SPEC = {
    "step", "stage", "prompt_id", "benchmark", "prompt_length", "completion_ids", "completion", "logprobs", "kept_logmass",
    "finish_reason", "rewards", "reward", "advantage", "reason",
}  # fmt: skip


def through_json(rollout: Rollout) -> Rollout:
    return Rollout.load(json.loads(json.dumps(rollout.dump(), ensure_ascii=False)))


def make_rollout(**values: Any) -> Rollout:
    usual: dict[str, Any] = {
        "stage": "phase1", "step": 3, "group": 1, "prompt_id": "p1", "benchmark": "b", "prompt_length": 4,
        "completion_ids": (1, 2), "completion": "x", "logprobs": (-0.1, -0.2), "kept_logmass": (0.0, -0.3),
        "finish_reason": "stop", "rewards": {"rule": 1.0, "judge": None}, "reward": 1.0, "reason": "correct",
    }  # fmt: skip
    return Rollout(**{**usual, **values})


def test_floats_survive_json_to_the_bit() -> None:
    draw = random.Random(0)
    drawn = [-draw.expovariate(1.0) * 10 ** draw.randint(-300, 2) for _ in range(200)]
    values = (*drawn, -0.0, -5e-324, 0.1 + 0.2)
    made = make_rollout(
        logprobs=values, kept_logmass=values, advantage=1 / 3, reward=0.1 + 0.2, completion_ids=tuple(range(203))
    )
    again = through_json(made)
    assert again == made
    assert [math.copysign(1, x) for x in again.logprobs] == [math.copysign(1, x) for x in values]


@pytest.mark.parametrize("text", ["", 'quotes " \\ and\nlines\r\n', "é \u2028 \u2029 \x85 \x00 \ufffd", "</script>"])
def test_any_text_survives_as_one_line(text: str) -> None:
    line = json.dumps(make_rollout(completion=text).dump(), ensure_ascii=False)
    assert "\n" not in line and "\r" not in line
    assert Rollout.load(json.loads(line)).completion == text


def test_none_and_zero_are_different_verdicts() -> None:
    for reward, advantage in ((None, None), (0.0, 0.0), (1.0, None)):
        again = through_json(make_rollout(reward=reward, advantage=advantage))
        assert (again.reward, again.advantage, again.rewards) == (reward, advantage, {"rule": 1.0, "judge": None})


def test_a_dumped_line_has_every_field() -> None:
    assert set(make_rollout().dump()) == {field.name for field in fields(Rollout)} > SPEC


def test_regroup_restores_groups_in_their_order(
    make_prompts: Callable[..., list[Prompt]], make_groups: Callable[..., list[RolloutGroup]]
) -> None:
    prompts = make_prompts(3, 4)
    groups = make_groups([prompts[1], prompts[0], prompts[1]], [[0.5, None], [0.0, 1.0], [-0.5, 0.25]])
    lines = [json.loads(json.dumps(r.dump())) for group in groups for r in group.rollouts]
    assert regroup(lines, {p.example.id: p for p in prompts}) == groups, "one prompt in two groups stays two groups"


def test_regroup_refuses_rollouts_of_other_data(make_prompts: Callable[..., list[Prompt]]) -> None:
    with pytest.raises(ValueError, match="name the prompt 'p1', which the data doesn't have"):
        regroup([make_rollout().dump()], {"p0": make_prompts(3)[0]})


def test_difficulty_is_judged_without_the_length_penalty(make_prompts: Callable[..., list[Prompt]]) -> None:
    group = RolloutGroup(
        make_prompts(3)[0],
        (
            make_rollout(reward=0.25, rewards={"rule": 1.0, "overlong": -0.75}),
            make_rollout(reward=-0.3, rewards={"rule": 0.0, "overlong": -0.3}),
            make_rollout(reward=None, rewards={"rule": 0.0, "judge": None, "overlong": -0.3}),
            make_rollout(reward=1.0, rewards={"rule": 1.0}),
        ),
    )
    bare = group.bare()
    assert bare.rewards == [1.0, 0.0, None, 1.0]
    assert all((r.completion_ids, r.logprobs, r.completion) == ((), (), "") for r in bare.rollouts), "tokens weigh"


def test_advantages_mark_a_group_as_used(make_prompts: Callable[..., list[Prompt]]) -> None:
    made = RolloutGroup(make_prompts(3)[0], (make_rollout(), make_rollout(reward=None))).with_advantages([0.5, None])
    assert [(r.advantage, r.used) for r in made.rollouts] == [(0.5, True), (None, True)]
    with pytest.raises(ValueError, match="zip"):
        made.with_advantages([0.5])


@pytest.fixture
def rolled(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], scripted: Callable[..., Any]
) -> list[RolloutGroup]:
    reward = scripted(lambda example, place: None if example.id == "p1" and place == 2 else place / 2)
    return roll_out(
        policy, reward, make_prompts(5, 40, 9), 3, SAMPLING, seed=7, stage="phase1", step=12, first_group=4
    )  # fmt: skip


def test_roll_out_puts_every_score_with_its_completion(policy: Policy, rolled: list[RolloutGroup]) -> None:
    assert [group.rewards for group in rolled] == [[0.0, 0.5, 1.0], [0.0, 0.5, None], [0.0, 0.5, 1.0]]
    for index, group in enumerate(rolled):
        assert group.prompt.example.id == f"p{index}"
        for r in group.rollouts:
            assert (r.group, r.step, r.stage, r.prompt_id) == (4 + index, 12, "phase1", f"p{index}")
            assert (r.prompt_length, r.benchmark) == (len(group.prompt.ids), group.prompt.example.benchmark)
            assert len(r.logprobs) == len(r.kept_logmass) == len(r.completion_ids) <= 6
            assert (r.advantage, r.used, r.reason) == (None, False, "scripted")
            assert r.finish_reason == ("stop" if r.completion_ids[-1] in policy.stop_ids else "length")
            assert r.finish_reason == "stop" or len(r.completion_ids) == 6


def test_the_trainer_agrees_with_the_reported_log_probs(policy: Policy, rolled: list[RolloutGroup]) -> None:
    """`logprobs + kept_logmass` is the full-vocabulary log-prob at the sampling temperature: the ratio starts at 1."""
    groups = [Group(torch.tensor(g.prompt.ids), [torch.tensor(r.completion_ids) for r in g.rollouts]) for g in rolled]
    with torch.no_grad():
        trained = policy.logprobs(groups, SAMPLING.temperature).logp
    reported = [a + b for g in rolled for r in g.rollouts for a, b in zip(r.logprobs, r.kept_logmass, strict=True)]
    torch.testing.assert_close(trained, torch.tensor(reported), atol=2e-5, rtol=0)  # fp32 log-probs of size 10
    assert min(m for g in rolled for r in g.rollouts for m in r.kept_logmass) < -0.05, "top_p cut something off"


def test_the_seed_decides_what_is_sampled(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], scripted: Callable[..., Any], rolled: list[RolloutGroup]
) -> None:
    def again(seed: int) -> list[RolloutGroup]:
        reward = scripted(lambda example, place: 0.0)
        return roll_out(policy, reward, make_prompts(5, 40, 9), 3, SAMPLING, seed=seed, stage="phase1", step=12)

    def tokens(groups: list[RolloutGroup]) -> list[tuple[int, ...]]:
        return [r.completion_ids for g in groups for r in g.rollouts]

    assert tokens(again(7)) == tokens(rolled)
    assert tokens(again(8)) != tokens(rolled)


def test_a_truncated_prompt_is_sampled_as_it_was_cut(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], scripted: Callable[..., Any]
) -> None:
    prompt = replace(make_prompts(40)[0], truncated_from=400)
    group = roll_out(policy, scripted(lambda e, p: 1.0), [prompt], 2, SAMPLING, seed=0, stage="s", step=0)[0]
    assert group.prompt is prompt
    assert group.rollouts[0].prompt_length == 40


def judged(server: Any, **options: Any) -> Reward:
    """Every completion is judged: the rule has no part, and the tail of what announces nothing is shown."""
    config = JudgeConfig(base_url=server.url, model="m", tail=200, **options)
    return make_reward(RewardConfig(rule=False, judge=config), {})


def test_the_judge_works_while_other_groups_are_generated(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], server: Any
) -> None:
    """One prompt a batch, eight batches: all but the last one's judging happens within generation."""
    policy = copy.copy(policy)
    policy.generator = GeneratorConfig(60)  # 9 + 3 x 16 tokens: one prompt at a time
    policy.model.get_decoder().register_forward_hook(lambda *_: time.sleep(0.004))  # a larger model's step
    server.respond = lambda _n, _body: server.after(0.2, server.chat("[[YES]]"))
    ended: list[float] = []
    watch = Stopwatch()
    groups = roll_out(
        policy, judged(server), make_prompts(*[9] * 8), 3, Sampling(16, 1.0), seed=3, stage="s", step=1, watch=watch,
        on_done=lambda count: ended.append(time.monotonic()),
    )  # fmt: skip
    assert len(ended) == 24
    asked = [r for g in groups for r in g.rollouts if r.rewards["judge"] == 1.0]
    assert len(asked) == len(server.times) > 8
    assert server.times[0] < ended[len(ended) // 2], "asked long before generation had ended"
    seconds = watch.seconds
    assert seconds["reward/judge_time"] > 0.4, "the union of its working times"
    assert seconds["reward/judge_wait"] < seconds["reward/judge_time"] / 2, "hidden behind generation"
    assert seconds["reward/judge_wait"] <= seconds["timing_s/reward"] < seconds["timing_s/gen"]


def test_what_is_scored_does_not_hang_on_when_it_was(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], server: Any
) -> None:
    """Answers that take different times, batches of any size, all at once at the end: the same rollouts."""

    def respond(number: int, body: dict[str, Any]) -> Any:
        yes = hashlib.sha256(body["messages"][1]["content"].encode()).digest()[0] % 2
        return server.after(0.01 * (number * 7 % 5), server.chat("[[YES]]" if yes else "[[NO]]"))

    server.respond = respond
    prompts, made = make_prompts(9, 5, 30, 9), []
    for budget, streaming in ((1 << 20, True), (80, True), (1 << 20, False)):
        one = copy.copy(policy)
        one.generator = GeneratorConfig(budget)
        if not streaming:  # a generator that can't tell when a completion ends
            one.sample = lambda *a, one=one: Policy.sample(one, *a[:4])  # type: ignore[method-assign]
        made.append(roll_out(one, judged(server), prompts, 3, SAMPLING, seed=7, stage="s", step=1))
    facts = [[(r.completion_ids, r.rewards, r.reward, r.reason) for g in groups for r in g.rollouts] for groups in made]
    assert facts[0] == facts[1] == facts[2]
    assert {reward for _, _, reward, _ in facts[0]} == {0.0, 1.0}


def test_an_exception_within_generation_leaves_no_thread(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], server: Any
) -> None:
    def stop(count: int) -> None:
        assert any(thread.name == "scoring" for thread in threading.enumerate())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll_out(policy, judged(server), make_prompts(5), 2, SAMPLING, seed=0, stage="s", step=0, on_done=stop)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith(("scoring", "rules", "asyncio")) for name in names), names


def test_saved_completions_are_scored_and_not_sampled_again(
    policy: Policy, make_prompts: Callable[..., list[Prompt]], server: Any, scripted: Callable[..., Any]
) -> None:
    prompts = make_prompts(5, 9)
    server.respond = lambda _n, _body: server.http(403)
    with pytest.raises(Unjudged, match="403") as stopped:
        roll_out(policy, judged(server), prompts, 3, SAMPLING, seed=7, stage="s", step=1, first_group=2)
    saved = stopped.value.groups
    assert [r.reward for g in saved for r in g.rollouts] == [None] * 6
    server.respond = lambda _n, _body: server.chat("[[YES]]")
    again = roll_out(
        policy, judged(server), prompts, 3, SAMPLING, seed=99, stage="s", step=1, first_group=2, saved=saved
    )
    fresh = roll_out(policy, judged(server), prompts, 3, SAMPLING, seed=7, stage="s", step=1, first_group=2)
    assert again == fresh
    with pytest.raises(ValueError, match="other prompts"):
        roll_out(policy, judged(server), prompts[::-1], 3, SAMPLING, seed=7, stage="s", step=1, saved=saved)


def test_the_rules_reason_lands_in_the_record(policy: Policy, make_prompts: Callable[..., list[Prompt]]) -> None:
    """Whatever the untrained model writes, its line says what the rule made of it and which answer it read."""
    prompts = [
        replace(prompt, example=replace(prompt.example, answers=answers))
        for prompt, answers in zip(make_prompts(5, 9), (("1",), ()), strict=True)
    ]
    groups = roll_out(policy, make_reward(RewardConfig(), {}), prompts, 2, SAMPLING, seed=7, stage="phase1", step=1)
    for group in groups:
        for rollout in group.rollouts:
            line = json.loads(json.dumps(rollout.dump()))
            if not group.prompt.example.answers:
                assert (line["reason"], line["rule_reason"]) == ("no_gold", None)
                continue
            expected = score_example(group.prompt.example, rollout.completion, rollout.finish_reason, "strict")
            assert (line["rule_reason"], line["extracted"]) == (expected.reason, expected.extracted)
            assert line["reason"] == expected.reason in REASONS
