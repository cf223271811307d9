"""Groups that a call doesn't wait for, at servers that play vLLM; at the real one in `test_vllm.py`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import Completion, Sampling
from longreach.rl.generator import UNFINISHED, whole
from longreach.rl.serving import stopping
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.stopping import Part, joined, nothing, parts

Make = Callable[..., Any]
LATE = 30
"""Tokens of the prompt whose group takes long."""


def one(ids: list[int], reason: str = "length", logprob: float = -0.5) -> Completion:
    return Completion(tuple(ids), (logprob,) * len(ids), (0.0,) * len(ids), reason)


BEGUN = [one([5, 6, 9, 9]), one([5, 6], UNFINISHED), one([], UNFINISHED), one([8], UNFINISHED)]
"""Of a limit of four tokens: ended, halfway, not begun, just begun."""


@pytest.fixture
def most(make_prompts: Make) -> Make:
    """`most(generator, lengths, begun=, spare=)`: the groups, and what `on_done` was told."""

    def ask(generator: VllmGenerator, *lengths: int, begun: Any = (), spare: int = 1, size: int = 2) -> Any:
        told: list[tuple[int, int]] = []
        prompts = make_prompts(*lengths)
        made = generator.sample_most(prompts, begun, spare, size, Sampling(4), 3, lambda p, i, _: told.append((p, i)))
        return made, sorted(told)

    return ask


def late(fake: Any, answer: Callable[[dict[str, Any]], Any]) -> Callable[[int, dict[str, Any]], Any]:
    """`generate` that holds the late group's answer back until it is aborted."""

    def generate(_number: int, body: dict[str, Any]) -> Any:
        if len(body["token_ids"]) < LATE:
            return fake.well(body)
        assert fake.stopped(body)
        return answer(body)

    return generate


def so_far(body: dict[str, Any], *lengths: int) -> list[dict[str, Any]]:
    """What vLLM answers to an order that was aborted after so many tokens of each."""
    limit = body["sampling_params"]["max_tokens"]
    return [
        {
            "index": i, "token_ids": [40 + i] * n, "finish_reason": "length" if n == limit else "abort",
            "logprobs": {"content": [{"token_id": 40 + i, "logprob": -2.0}] * n},
        }
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def test_all_but_the_spare_groups_are_waited_for_and_these_come_as_far_as_they_are(
    fake: Any, make_generator: Make, most: Make
) -> None:
    fake.generate = late(fake, lambda body: so_far(body, 4, 2))
    generator = make_generator(fake.url)
    made, told = most(generator, 9, LATE, 12)
    assert [whole(group) for group in made] == [True, False, True]
    assert [c.ids for c in made[1]] == [(40,) * 4, (41,) * 2]
    assert [c.finish_reason for c in made[1]] == ["length", UNFINISHED]
    assert [c.logprobs for c in made[1]] == [(-2.0,) * 4, (-2.0,) * 2]
    assert told == [(0, 0), (0, 1), (2, 0), (2, 1)], "rules and judge see whole groups alone"
    [order] = [body for body in fake.orders if len(body["token_ids"]) == LATE]
    assert {tuple(ids) for ids in fake.aborts} == {(f"generate-tokens-{order['request_id']}",)}
    assert generator.metrics()["rollout/failed_requests"] == 0


def test_none_is_stopped_where_all_are_waited_for(fake: Any, make_generator: Make, most: Make) -> None:
    made, told = most(make_generator(fake.url), 9, LATE, 12, spare=0)
    assert all(map(whole, made)) and len(told) == 6 and fake.aborts == []


def test_going_on_asks_for_what_is_left_and_joins_it(fake: Any, make_generator: Make, most: Make) -> None:
    """The empty ones in one request; each of the others by its own tokens, up to its own limit."""
    made, told = most(make_generator(fake.url), 9, begun=[BEGUN], spare=0, size=4)
    first, prompt = fake.orders, min((body["token_ids"] for body in fake.orders), key=len)
    asked = sorted((b["token_ids"][9:], b["sampling_params"]["n"], b["sampling_params"]["max_tokens"]) for b in first)
    assert asked == [([], 1, 4), ([5, 6], 1, 2), ([8], 1, 3)]
    assert all(body["token_ids"][:9] == prompt for body in first)
    assert made[0][0] == BEGUN[0], "what has ended stays as it is"
    assert [c.ids for c in made[0][1:]] == [(5, 6, 88, 20), (72, 20, 20, 20), (8, 80, 20, 20)]
    assert made[0][1].logprobs == (-0.5, -0.5, -1.5, -1.5), "each part's own"
    assert {c.finish_reason for group in made for c in group} == {"length"}
    assert told == [(0, i) for i in range(4)]


def test_a_group_can_be_late_again(fake: Any, make_generator: Make, most: Make) -> None:
    fake.generate = late(fake, lambda body: so_far(body, 1))
    [made, _], _ = most(make_generator(fake.url), LATE, 9, begun=[[one([5], UNFINISHED), one([6, 7, 8], UNFINISHED)]])
    assert [c.ids for c in made] == [(5, 40), (6, 7, 8, 40)]
    assert [c.finish_reason for c in made] == [UNFINISHED, "length"]


def test_one_that_ended_when_it_was_stopped_is_whole(fake: Any, make_generator: Make, most: Make) -> None:
    fake.generate = late(fake, fake.well)
    made, told = most(make_generator(fake.url), 9, LATE)
    assert all(map(whole, made)) and len(told) == 4


def test_an_abort_is_posted_until_it_is_heard(fake: Any, make_generator: Make, most: Make) -> None:
    """It may have come before the order, or to another front-end of the server."""
    fake.deaf, fake.generate = 2, late(fake, lambda body: so_far(body, 1, 1))
    made, _ = most(make_generator(fake.url), 9, LATE)
    assert [len(c.ids) for c in made[1]] == [1, 1] and len(fake.aborts) >= 3


def test_one_that_waits_for_a_place_is_not_asked_for(fake: Any, make_generator: Make, most: Make) -> None:
    held: list[float] = []

    def generate(number: int, body: dict[str, Any]) -> Any:
        if number:
            assert fake.stopped(body)
            held.append(time.monotonic())
        return so_far(body, 1, 1) if number else fake.well(body)

    fake.generate = generate
    made, told = most(make_generator(fake.url, concurrency=1), 9, 10, 11, spare=2)
    assert len(fake.orders) == 2 and len(told) == 2
    assert sorted(sum(len(c.ids) for c in group) for group in made) == [0, 2, 8]
    empty = next(group for group in made if not group[0].ids)
    assert empty == nothing(2)


def test_one_that_no_server_is_there_for_is_not_waited_for(fake: Any, make_generator: Make, most: Make) -> None:
    def generate(_number: int, body: dict[str, Any]) -> Any:
        if len(body["token_ids"]) == LATE:
            fake.healthy = False
            return fake.server.http(503)
        time.sleep(1.0)
        return fake.well(body)

    fake.generate = generate
    generator = make_generator(fake.url, start_timeout_s=20.0)
    start = time.monotonic()
    made, told = most(generator, 9, LATE)
    assert time.monotonic() - start < 10 and made[1] == nothing(2) and len(told) == 2


FAILS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "500": lambda s, _: s.http(500, "boom"),
    "reset": lambda s, _: s.Raw([b"HTTP/1.1 200 OK\r\n"], reset=True),
    "a completion short": lambda s, body: s.http(200, json.dumps({"choices": so_far(body, 1)[1:]})),
    "more than was asked for": lambda s, body: s.http(200, json.dumps({"choices": so_far(body, 9)})),
}


@pytest.mark.parametrize("fail", FAILS.values(), ids=FAILS)
def test_a_stop_that_fails_leaves_the_group_as_it_was(fail: Any, fake: Any, make_generator: Make, most: Make) -> None:
    fake.generate = late(fake, lambda body: fail(fake.server, body))
    begun = [one([5], UNFINISHED), one([5, 6, 7, 7])]
    generator = make_generator(fake.url)
    made, told = most(generator, LATE, 9, begun=[begun])
    assert made[0] == begun and told == [(1, 0), (1, 1)]
    assert generator.metrics()["rollout/failed_requests"] == 1


def test_one_that_doesnt_stop_is_given_up(
    fake: Any, make_generator: Make, most: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "STOP_S", 0.7)
    fake.generate = late(fake, lambda body: time.sleep(8) or fake.well(body))
    start = time.monotonic()
    generator = make_generator(fake.url)
    made, _ = most(generator, 9, LATE)
    assert time.monotonic() - start < 7
    assert made[1] == nothing(2) and generator.metrics()["rollout/failed_requests"] == 1


@pytest.mark.parametrize("fail", FAILS.values(), ids=FAILS)
def test_going_on_that_fails_is_queued_again(fail: Any, fake: Any, make_generator: Make, most: Make) -> None:
    """All of the group's requests: from what was there before, so that nothing is joined twice."""
    fake.generate = lambda n, body: fail(fake.server, body) if n == 1 else fake.well(body)
    generator = make_generator(fake.url)
    [made], told = most(generator, 9, begun=[BEGUN], spare=0, size=4)
    assert [c.ids for c in made] == [(5, 6, 9, 9), (5, 6, 88, 20), (72, 20, 20, 20), (8, 80, 20, 20)]
    assert told == [(0, i) for i in range(4)]
    counted = generator.metrics()
    assert counted["rollout/failed_requests"] == counted["rollout/requeued"] == 1


def test_an_abort_that_nobody_asked_for_is_no_result(fake: Any, make_generator: Make, most: Make) -> None:
    """Such as of somebody who paused the server."""
    fake.generate = lambda n, body: so_far(body, 1, 1) if n == 0 else fake.well(body)
    generator = make_generator(fake.url)
    [made], _ = most(generator, 9, spare=0)
    assert whole(made) and generator.metrics()["rollout/requeued"] == 1


def test_going_on_that_fails_for_good_ends_the_run_by_name(fake: Any, make_generator: Make, most: Make) -> None:
    fake.generate = lambda _n, _body: fake.server.http(500, "boom")
    with pytest.raises(ServerError, match=r"no completions of prompt 'p0' \(9 tokens\) after 2 tries"):
        most(make_generator(fake.url, tries=2), 9, begun=[BEGUN], spare=0, size=4)


def test_seeds_of_a_groups_requests_differ() -> None:
    asked = parts([*BEGUN, one([], UNFINISHED)], 5)
    assert asked == [Part((2, 4)), Part((1,), (5, 6), 6), Part((3,), (8,), 8)]
    drawn = [part.seed + i for part in asked for i in range(len(part.places))]  # vLLM counts on from a request's seed
    assert len(set(drawn)) == 4
    assert parts((), 3) == [Part((0, 1, 2))], "a new group is one request"
    assert parts([one([5])], 1) == []


def test_what_top_p_kept_stays_unknown_where_a_part_doesnt_know_it() -> None:
    unknown = Completion((4,), (-1.0,), (), "stop")
    assert joined(one([5], UNFINISHED), unknown) == Completion((5, 4), (-0.5, -1.0), (), "stop")
    assert joined(one([5], UNFINISHED), one([4])).kept_logmass == (0.0, 0.0)


@pytest.mark.slow
def test_many_ranks_stop_and_go_on_together(fake: Any, start_ranks: Make, tiny_dir: Path, tmp_path: Path) -> None:
    fake.generate = late(fake, lambda body: so_far(body, 2, 1))
    ranks = start_ranks(2, Path(__file__).with_name("stopping_rank.py"), tiny_dir, fake.url, tmp_path)
    for rank in ranks:
        assert rank.wait(120.0) == 0, rank.err.read_text()[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["made"] == second["made"] and [len(ids) for ids in first["made"][1]] == [2, 1]
    assert first["told"] == [[0, 0], [0, 1], [2, 0], [2, 1]] and second["told"] == []
