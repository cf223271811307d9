"""The client against servers that play vLLM: groups, order, faults. The real one is in `test_vllm.py`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longreach.engine import Sampling
from longreach.rl.generator import Generator
from longreach.rl.policy import Policy
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.handing import Handing
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.sync_config import SyncConfig

Make = Callable[..., Any]


@pytest.fixture
def second(fake: Any) -> Iterator[Any]:
    """Another server of the same kind."""
    server = type(fake.server)()
    yield type(fake)(server)
    server.close()


def test_groups_come_in_the_order_of_the_prompts_and_each_completion_is_told(
    fake: Any, make_generator: Make, draw: Make
) -> None:
    generator = make_generator(fake.url)
    made, told = draw(generator, 9, 30, 12, size=3)
    assert [[c.ids[0] // 8 for c in group] for group in made] == [[9] * 3, [30] * 3, [12] * 3], (
        "tokens tell whose they are"
    )
    assert [c.ids[1] for c in made[0]] == [20, 21, 22]
    assert sorted(told) == [(p, i) for p in range(3) for i in range(3)]
    assert len(fake.orders) == 3, "one request a group: its prompt is computed once"
    assert [order["sampling_params"]["n"] for order in fake.orders] == [3, 3, 3]
    assert generator.metrics() == {"rollout/failed_requests": 0, "rollout/requeued": 0, "rollout/restarts": 0}


def test_a_group_is_told_while_others_are_still_generated(fake: Any, make_generator: Make, make_prompts: Make) -> None:
    """Rules and judge begin with the first one."""
    release = threading.Event()

    def generate(_number: int, body: Any) -> Any:
        if len(body["token_ids"]) == 30:
            assert release.wait(20)
        return fake.well(body)

    fake.generate = generate
    made = make_generator(fake.url).sample(
        make_prompts(9, 30), 2, Sampling(4), 0, lambda p, *_: p == 0 and release.set()
    )
    assert [group[0].ids[0] // 8 for group in made] == [9, 30]


def test_seeds_are_the_prompts_own_and_the_calls(fake: Any, make_generator: Make, draw: Make) -> None:
    generator = make_generator(fake.url, seeded=True)

    def seeds(**more: Any) -> list[int]:
        fake.orders.clear()
        draw(generator, 9, 9, 9, **more)
        return sorted(order["sampling_params"]["seed"] for order in fake.orders)

    first = seeds(seed=3)
    assert len(set(first)) == 3 and seeds(seed=3) == first and not set(seeds(seed=4)) & set(first)
    assert all(0 <= seed < 2**62 for seed in first), "vLLM counts on from it for the group's others"


def test_without_a_gpu_no_seeds_are_sent(fake: Any, make_generator: Make, draw: Make) -> None:
    draw(make_generator(fake.url), 9)
    assert "seed" not in fake.orders[0]["sampling_params"]


SPOILT: dict[str, Callable[[Any, list[Any]], Any]] = {
    "500": lambda s, _: s.http(500, "boom"),
    "429": lambda s, _: s.http(429),
    "half": lambda s, _: s.Raw([b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", b" "]),
    "reset": lambda s, _: s.Raw([b"HTTP/1.1 200 OK\r\n"], reset=True),
    "no JSON": lambda s, _: s.http(200, "<html>"),
    "a completion short": lambda s, made: s.http(200, json.dumps({"choices": made[1:]})),
    "aborted": lambda s, made: s.http(
        200, json.dumps({"choices": [{**one, "finish_reason": "abort"} for one in made]})
    ),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_bad_reply_is_counted_and_the_group_is_made_again(
    spoil: Any, fake: Any, make_generator: Make, draw: Make
) -> None:
    fake.generate = lambda n, body: spoil(fake.server, fake.well(body)) if n == 1 else fake.well(body)
    generator = make_generator(fake.url, concurrency=1)
    made, told = draw(generator, 9, 30, 12)
    assert [group[0].ids[0] // 8 for group in made] == [9, 30, 12]
    assert len(told) == len(set(told)) == 6, "nothing is scored twice"
    assert generator.metrics() == {"rollout/failed_requests": 1, "rollout/requeued": 1, "rollout/restarts": 0}
    assert generator.metrics()["rollout/requeued"] == 0, "since it was last asked"


def test_a_reply_that_doesnt_come_is_given_up_at_the_deadline(fake: Any, make_generator: Make, draw: Make) -> None:
    release = threading.Event()
    fake.generate = lambda n, body: release.wait(20) and fake.well(body) if n == 0 else fake.well(body)
    start = time.monotonic()
    made, _ = draw(make_generator(fake.url, deadline_s=0.5), 9)
    release.set()
    assert made[0][0].ids[0] // 8 == 9
    assert time.monotonic() - start < 10.0


def test_another_server_is_tried_first(fake: Any, second: Any, make_generator: Make, draw: Make) -> None:
    fake.generate = lambda _n, _body: fake.server.http(500)
    generator = make_generator(fake.url, second.url)
    made, _ = draw(generator, *range(9, 19))
    assert [group[0].ids[0] // 8 for group in made] == list(range(9, 19))
    assert len(second.orders) == 10
    assert generator.metrics()["rollout/requeued"] == len(fake.orders) > 0


def test_after_the_tries_the_run_stops_and_says_which_server_prompt_and_why(
    fake: Any, make_generator: Make, draw: Make
) -> None:
    fake.generate = lambda n, body: fake.server.http(500, "boom") if len(body["token_ids"]) == 30 else fake.well(body)
    with pytest.raises(ServerError) as raised:
        draw(make_generator(fake.url, tries=2), 9, 30)
    told = str(raised.value)
    assert told.startswith(f"{fake.url}: no completions of prompt 'p1' (30 tokens) after 2 tries: "), told
    assert "was answered 500: boom (before that: " in told


def test_a_request_that_is_refused_as_wrong_is_not_tried_again(fake: Any, make_generator: Make, draw: Make) -> None:
    fake.generate = lambda _n, _body: fake.server.http(400, "out of vocabulary")
    with pytest.raises(ServerError, match=r"after one try: .* was answered 400: out of vocabulary"):
        draw(make_generator(fake.url), 9)
    assert len(fake.orders) == 1


def test_a_server_that_is_not_well_is_asked_no_more_until_it_is(
    fake: Any, second: Any, make_generator: Make, draw: Make
) -> None:
    def sick(_number: int, _body: Any) -> Any:
        fake.healthy = False
        return fake.server.http(503)

    fake.generate = sick
    generator = make_generator(fake.url, second.url, concurrency=2)
    made, _ = draw(generator, *range(9, 29))
    assert len(made) == 20 and len(fake.orders) <= 2
    assert generator.health() == {fake.url: "not healthy"}
    fake.healthy, fake.generate = True, lambda _n, body: fake.well(body)
    until = time.monotonic() + 20
    while generator.health() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1.0)  # it is looked at twice a second
    before = len(fake.orders)
    draw(generator, *range(9, 29))
    assert len(fake.orders) > before


def test_a_server_that_stays_away_ends_the_run_by_name(fake: Any, make_generator: Make, draw: Make) -> None:
    generator = make_generator(fake.url, start_timeout_s=1.0)

    def sick(_number: int, _body: Any) -> Any:
        fake.healthy = False
        return fake.server.http(503)

    fake.generate = sick
    with pytest.raises(ServerError, match=rf"{fake.url}: no healthy answer to GET /health for 1 s"):
        draw(generator, 9)


def test_no_more_groups_are_under_way_than_asked_for(fake: Any, make_generator: Make, draw: Make) -> None:
    fake.generate = lambda _n, body: fake.server.after(
        0.05, fake.server.http(200, json.dumps({"choices": fake.well(body)}))
    )
    draw(make_generator(fake.url, concurrency=3), *range(9, 29))
    assert fake.server.most == 3


def test_a_window_that_is_too_small_is_refused_at_the_start(fake: Any, make_generator: Make) -> None:
    fake.window = 99
    with pytest.raises(ValueError, match=r"at most 99 tokens, .* has 100: start it with --max-model-len 100"):
        make_generator(fake.url)


def test_log_probs_of_another_distribution_are_refused_at_the_start(fake: Any, make_generator: Make) -> None:
    fake.probe = -0.7
    with pytest.raises(ValueError, match="start it with --logprobs-mode processed_logprobs"):
        make_generator(fake.url)


def test_a_server_without_token_ids_is_refused_at_the_start(fake: Any, make_generator: Make) -> None:
    respond = fake.respond
    fake.server.respond = lambda n, b: (
        fake.server.http(403, "off") if "inference" in fake.server.paths[n] else respond(n, b)
    )
    with pytest.raises(ValueError, match=r"start vLLM 0\.32 with --enable-scale-out"):
        make_generator(fake.url)


def test_weights_are_handed_over_before_anything_is_asked(fake: Any, make_generator: Make, draw: Make) -> None:
    handed: list[tuple[int, list[str], int]] = []
    generator = make_generator(
        fake.url, hand_over=lambda p, urls: handed.append((p.version, list(urls), len(fake.orders)))
    )
    draw(generator, 9)
    assert handed == [], "they begin with the same weights"
    generator.policy.version = 2
    draw(generator, 9)
    draw(generator, 9)
    assert handed == [(2, [fake.url], 1)]
    assert generator.versions == {fake.url: 2}


def test_a_server_that_somebody_gave_other_weights_is_brought_in_step(
    fake: Any, make_generator: Make, draw: Make
) -> None:
    fake.version, handed = "step-7", []
    draw(make_generator(fake.url, hand_over=lambda _p, urls: handed.extend(urls)), 9)
    assert handed == [fake.url]


def test_old_weights_are_never_sampled_from(fake: Any, make_generator: Make, draw: Make) -> None:
    generator = make_generator(fake.url)
    generator.policy.version = 1
    with pytest.raises(ValueError, match="other weights than the policy, and nothing hands them over"):
        draw(generator, 9)
    assert fake.orders == []


def test_a_server_that_came_back_mid_batch_is_handed_the_weights_again(
    fake: Any, make_generator: Make, draw: Make
) -> None:
    """It may have been started anew, with the weights that it began with."""
    handed: list[int] = []
    generator = make_generator(fake.url, hand_over=lambda p, _urls: handed.append(p.version))
    generator.policy.version = 5

    def sick(number: int, body: Any) -> Any:
        if number == 0:
            fake.healthy = False
            threading.Timer(0.3, lambda: setattr(fake, "healthy", True)).start()
            return fake.server.http(503)
        return fake.well(body)

    fake.generate = sick
    made, _ = draw(generator, 9, 30)
    assert [group[0].ids[0] // 8 for group in made] == [9, 30]
    assert handed == [5, 5]


def test_one_that_went_between_two_calls_gets_the_weights_when_it_is_back(
    fake: Any, second: Any, make_generator: Make, draw: Make
) -> None:
    """A hand-over to a server that is gone would end the run."""
    handed: list[list[str]] = []
    generator = make_generator(
        fake.url, second.url, hand_over=lambda _p, urls: handed.append(list(urls)), concurrency=1
    )
    second.generate = lambda _n, body: second.server.after(
        0.1, second.server.http(200, json.dumps({"choices": second.well(body)}))
    )
    fake.healthy, generator.policy.version = False, 1
    threading.Timer(0.5, lambda: setattr(fake, "healthy", True)).start()
    made, _ = draw(generator, *range(9, 39))
    assert len(made) == 30
    assert handed == [[second.url], [fake.url]]
    assert fake.orders, "it took part again"


def test_it_is_a_generator(fake: Any, make_generator: Make) -> None:
    generator: Generator = make_generator(fake.url)
    assert isinstance(generator, VllmGenerator)
    assert generator.servers == [fake.url] and generator.versions == {fake.url: 0} and generator.health() == {}
    generator.close()
    generator.close()
    assert generator.servers == []


@pytest.mark.slow
def test_many_ranks_get_the_same_completions_and_share_what_follows(
    fake: Any, start_ranks: Make, tiny_dir: Path, tmp_path: Path
) -> None:
    """Rank 0 asks; each rank is told its share, so that rules and judge are shared out, and a failure is everyone's."""
    fake.generate = lambda _n, body: fake.server.http(500, "boom") if len(body["token_ids"]) == 13 else fake.well(body)
    ranks = start_ranks(2, Path(__file__).with_name("sampling_rank.py"), tiny_dir, fake.url, tmp_path)
    for rank in ranks:
        assert rank.wait(120.0) == 0, rank.err.read_text()[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["made"] == second["made"] and len(first["made"]) == 3
    assert len(fake.orders) == 4, "once, whatever the number of ranks"
    assert first["told"] == [[0, 0], [0, 1], [2, 0], [2, 1]] and second["told"] == [[1, 0], [1, 1]]
    assert first["handed"] == second["handed"] == [[3, [fake.url]]], "weights may be sharded: all ranks hand over"
    assert "no completions of prompt 'p9' (13 tokens) after one try" in first["failed"]
    assert first["failed"] == second["failed"]
    assert first["metrics"] == second["metrics"] and first["metrics"]["rollout/failed_requests"] == 1


class Watched(Handing):
    """Notes what is asked of it."""

    def __init__(self, sleep: int) -> None:
        super().__init__(SyncConfig(sleep=sleep), "here:/runs/a", Path("nowhere"))
        self.done: list[str] = []

    def __call__(self, policy: Policy, urls: Sequence[str]) -> None:
        self.sync = SimpleNamespace(served_model="m", base_model="m")  # type: ignore[assignment]
        self.done.append(f"push {policy.version}")

    def rest(self) -> None:
        self.done.append("sleep")

    def close(self) -> None:
        self.done.append("close")


@pytest.mark.parametrize("sleep", [0, 1])
def test_a_server_that_shares_a_gpu_sleeps_while_the_policy_trains_and_is_pushed_to_before_it_is_asked(
    fake: Any, make_generator: Make, draw: Make, sleep: int
) -> None:
    watched = Watched(sleep)
    generator = make_generator(fake.url, hand_over=watched, sync=SyncConfig(sleep=sleep))
    generator.rest()  # SFT comes first
    draw(generator, 9)
    generator.rest()
    draw(generator, 9)  # with the same weights: an update that nothing was learned from
    generator.rest()
    generator.policy.version = 1
    draw(generator, 9)
    generator.close()
    slept = ["push 0", "sleep", "push 0", "sleep", "push 0", "sleep", "push 1", "close"]
    assert watched.done == (slept if sleep else ["push 1", "close"])
