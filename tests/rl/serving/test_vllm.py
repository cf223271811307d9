"""The real thing: one vLLM server on the CPU serves a small model, and its completions are the policy's own to rounding."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Completion, Group, Sampling
from longreach.rl.generator import UNFINISHED, whole
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.rollouts import roll_out
from longreach.rl.serving import replies
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.config import ServingConfig
from longreach.rl.serving.handing import Handing
from longreach.rl.serving.http import post
from longreach.rl.serving.server import Server
from longreach.rl.serving.sync_config import SyncConfig

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Make = Callable[..., Any]
CHUNK = 128
"""Tokens in one forward of the server: the longer prompts below are computed in several."""
WINDOW = 960
ROUNDING = 1e-4
"""Log-probs of the same fp32 weights by two implementations that sum in different orders; 2.4e-6 was measured."""


@pytest.fixture(scope="module")
def served(
    served_policy: Policy, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmGenerator]:  # fmt: skip
    config = ServingConfig(
        kind="vllm", python=str(vllm_python), args=("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "64"),
        environment={"HF_HUB_OFFLINE": "1"}, start_timeout_s=240.0, deadline_s=120.0, restarts=2,
    )  # fmt: skip
    generator = VllmGenerator(served_policy, config, tmp_path_factory.mktemp("servers"))
    try:
        generator.start(WINDOW)
        yield generator
    finally:
        generator.close()


def ask(served: VllmGenerator, prompts: list[Prompt], size: int, sampling: Sampling) -> list[list[Completion]]:
    return served.sample(prompts, size, sampling, 0, lambda *_: None)


def ours(policy: Policy, prompts: list[Prompt], made: list[list[Completion]], temperature: float) -> torch.Tensor:
    groups = [
        Group(torch.tensor(prompt.ids), [torch.tensor(c.ids) for c in group])
        for prompt, group in zip(prompts, made, strict=True)
    ]
    with torch.no_grad():
        return policy.logprobs(groups, temperature).logp.double()


def flat(made: list[list[Completion]]) -> torch.Tensor:
    return torch.tensor([x for group in made for c in group for x in c.logprobs], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_the_policys_own_at_the_temperature(
    temperature: float, served: VllmGenerator, make_prompts: Make, record_property: Make
) -> None:
    """Prompts of one chunk and of five; groups whose prompt is in the cache when their later members are computed."""
    prompts = make_prompts(9, 130, 600)
    made = ask(served, prompts, 4, Sampling(16, temperature=temperature))
    error = (flat(made) - ours(served.policy, prompts, made, temperature)).abs().max().item()
    wrong = (flat(made) - ours(served.policy, prompts, made, 1.7 - temperature)).abs().max().item()
    record_property("table", f"T = {temperature}: largest difference {error:.1e}, at the other temperature {wrong:.1e}")
    assert error < ROUNDING < 0.1 < wrong
    assert all(c.kept_logmass == (0.0,) * len(c.ids) for group in made for c in group)


def test_completions_end_with_a_stop_token_or_at_the_limit(served: VllmGenerator, make_prompts: Make) -> None:
    """One token in eight is a stop token of the model, and none of the tokenizer's."""
    made = ask(served, make_prompts(9, 30), 16, Sampling(8))
    each = [c for group in made for c in group]
    assert {c.finish_reason for c in each} == {"stop", "length"}
    for c in each:
        assert (c.ids[-1] in served.policy.stop_ids) == (c.finish_reason == "stop")
        assert not set(c.ids[:-1]) & set(served.policy.stop_ids)
        assert c.finish_reason == "stop" or len(c.ids) == 8
    assert len({c.ids for c in each}) > 20, "members of a group differ"


def test_tokens_are_drawn_with_the_policys_probabilities(served: VllmGenerator, make_prompts: Make) -> None:
    prompts, size = make_prompts(20) * 40, 50
    made = ask(served, prompts, size, Sampling(1, temperature=0.7))
    counts, draws = torch.bincount(torch.tensor([c.ids[0] for group in made for c in group])), size * len(prompts)
    likely = counts.argsort(descending=True)[:10]
    group = Group(torch.tensor(prompts[0].ids), [token[None] for token in likely])
    with torch.no_grad():
        p = served.policy.logprobs([group], 0.7).logp.double().exp()
    spread = (counts[likely] - draws * p) / (draws * p * (1 - p)).sqrt()
    assert spread.abs().max() < 5.0, spread


def test_greedy_is_the_local_greedy(served: VllmGenerator, make_prompts: Make) -> None:
    prompts, sampling = make_prompts(9, 200), Sampling(6, temperature=0.0)
    made, local = ask(served, prompts, 2, sampling), served.policy.sample(prompts, 2, sampling, 0)
    assert [[c.ids for c in group] for group in made] == [[c.ids for c in group] for group in local]
    masses = [torch.tensor([x for g in each for c in g for x in c.kept_logmass]) for each in (made, local)]
    torch.testing.assert_close(*masses, rtol=0, atol=ROUNDING)
    assert flat(made).eq(0).all()


def test_what_top_p_kept_is_not_known_and_log_probs_are_of_what_is_left(
    served: VllmGenerator, make_prompts: Make
) -> None:
    prompts = make_prompts(9)
    made = ask(served, prompts, 8, Sampling(4, temperature=1.0, top_p=0.5))
    assert all(c.kept_logmass == () for c in made[0])
    gain = flat(made) - ours(served.policy, prompts, made, 1.0)
    assert gain.min() > -ROUNDING and gain.max() > 0.1, "half of the mass is gone, so what is left weighs more"


def test_a_seed_repeats_a_group_and_its_members_differ(served: VllmGenerator, make_prompts: Make) -> None:
    """The whole group's prompts fit one chunk: cut in two, one would kill vLLM 0.32 on a CPU (so no seeds are sent there)."""
    [prompt] = make_prompts(20)
    assert 4 * len(prompt.ids) < CHUNK

    def tokens(seed: int) -> list[list[int]]:
        body = replies.order(prompt.ids, 4, Sampling(12), served.policy.stop_ids, seed)
        reply = asyncio.run(post(served.servers[0], replies.PATH, body, deadline=60.0))
        return [choice["token_ids"] for choice in sorted(reply["choices"], key=lambda c: c["index"])]

    first = tokens(2**62 - 1)
    assert tokens(2**62 - 1) == first != tokens(2)
    assert len(set(map(tuple, first))) == 4


def test_rollouts_are_scored_through_it(served: VllmGenerator, make_prompts: Make, scripted: Make) -> None:
    reward, told = scripted(lambda example, place: float(place)), []
    served.policy.served = served
    try:
        groups = roll_out(
            served.policy, reward, make_prompts(9, 30, 200), 3, Sampling(6), seed=1, stage="phase1", step=1, on_done=told.append
        )  # fmt: skip
    finally:
        served.policy.served = None
    assert [[r.reward for r in group.rollouts] for group in groups] == [[0.0, 1.0, 2.0]] * 3
    assert sum(told) == 9
    assert all(r.completion_ids and len(r.logprobs) == len(r.completion_ids) for g in groups for r in g.rollouts)


def test_a_straggler_is_stopped_and_gone_on_with_by_new_weights(
    served: VllmGenerator, make_prompts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Make
) -> None:
    """Stopped as one request for the group, handed new weights, stopped as one for each completion, joined: each part has the
    log-probs of the weights that sampled it."""
    policy, size, limit, soon = served.policy, 2, 920, 915
    monkeypatch.setattr(policy, "stop_ids", ())
    monkeypatch.setattr(served, "hand_over", Handing(SyncConfig(kind="safetensors"), "here:/run", tmp_path))
    short, long = make_prompts(9, 30)
    sampling, told = Sampling(limit, temperature=0.7), []
    ids, known = (20,) * limit, (-1.0,) * limit
    ending = [Completion(ids[:n], known[:n], known[:n], end) for n, end in ((limit, "length"), (soon, UNFINISHED))]

    def most(prompts: list[Prompt], begun: list[list[Completion]], spare: int) -> list[list[Completion]]:
        return served.sample_most(prompts, begun, spare, size, sampling, 0, lambda p, i, _: told.append((p, i)))

    quick, begun = [], []
    for _ in range(5):  # so small a model may have ended before the server hears of the stop
        told.clear()
        quick, begun = most([short, long], [ending], 1)
        if not whole(begun):
            break
    assert quick[0] == ending[0] and quick[1].ids[:soon] == ending[1].ids and whole(quick)
    assert {c.finish_reason for c in begun} == {UNFINISHED} and told == [(0, 0), (0, 1)]
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    old = ours(policy, [long], [begun], 0.7)
    try:
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.2)
        policy.version += 1
        further, _ = most([long, short], [begun, ending], 1)
        [made] = most([long], [further], 0)
        new = ours(policy, [long], [made], 0.7).split(limit)
    finally:
        policy.model.load_state_dict(before)
        policy.version -= 1
        served.refresh()
    sizes = [[len(c.ids) for c in group] for group in (begun, further, made)]
    record_property("table", f"{size} completions stopped twice, after so many tokens: {sizes}")
    assert all(0 < a <= b <= c == limit and a < c for a, b, c in zip(*sizes, strict=True)), sizes
    for a, b, c in zip(begun, further, made, strict=True):
        assert c.ids[: len(b.ids)] == b.ids and b.ids[: len(a.ids)] == a.ids
        assert c.logprobs[: len(b.ids)] == b.logprobs and b.logprobs[: len(a.ids)] == a.logprobs
    assert len({c.ids for c in made}) == size and {c.finish_reason for c in made} == {"length"}
    first = (flat([begun]) - old).abs().max().item()
    rest = max((flat([[c]])[n:] - each[n:]).abs().max().item() for c, n, each in zip(made, sizes[0], new, strict=True))
    wrong = min((flat([[c]])[:n] - each[:n]).abs().max().item() for c, n, each in zip(made, sizes[0], new, strict=True))
    record_property(
        "table",
        f"off by at most {first:.1e} (old weights), {rest:.1e} (new ones); the old part by the new ones: {wrong:.1e}",
    )
    assert max(first, rest) < ROUNDING < 0.1 < wrong


def test_a_server_that_hangs_misses_a_deadline_and_nothing_is_lost(
    served: VllmGenerator, make_prompts: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still from the first completion on, twice as long as a request may take, and then goes on."""
    [host] = served._hosts
    assert host.server is not None and host.server.process is not None
    group, hung = host.server.process.pid, list[threading.Timer]()
    served.metrics()
    monkeypatch.setattr(served._asking, "config", replace(served.config, deadline_s=4.0, tries=9))

    def hang(*_: object) -> None:
        if not hung:
            os.killpg(group, signal.SIGSTOP)
            hung.append(threading.Timer(8.0, os.killpg, (group, signal.SIGCONT)))
            hung[0].start()

    prompts = make_prompts(*[9] * 5, *[300] * 80)
    made = served.sample(prompts, 4, Sampling(64), 0, hang)
    hung[0].join()
    metrics = served.metrics()
    assert metrics["rollout/restarts"] == 0 < metrics["rollout/failed_requests"]
    assert (flat(made) - ours(served.policy, prompts, made, 1.0)).abs().max().item() < ROUNDING


def test_a_second_server_can_t_have_its_port(served: VllmGenerator, vllm_python: Path, tmp_path: Path) -> None:
    [host] = served._hosts
    assert host.server is not None
    with pytest.raises(ValueError, match=f"generator.port = {host.server.port} can't be had for a server"):
        Server(vllm_python, [], log=tmp_path / "log", port=host.server.port)


def engines(group: int) -> list[int]:
    """vLLM's engine and its workers in a process group; the server that answers for them is none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, pid = (folder / "comm").read_text(), int(folder.name)
            if name.startswith("VLLM::") and os.getpgid(pid) == group:
                found.append(pid)
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return found


def test_a_server_whose_engine_dies_answers_with_errors_and_is_started_again(
    served: VllmGenerator, make_prompts: Make
) -> None:
    [host] = served._hosts
    assert host.server is not None and host.server.process is not None
    group, killed = host.server.process.pid, list[int]()
    served.metrics()

    def kill(*_: object) -> None:
        for pid in engines(group) if not killed else ():
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    prompts = make_prompts(*[9] * 5, *[300] * 80)
    made = served.sample(prompts, 4, Sampling(64), 0, kill)
    metrics = served.metrics()
    assert killed and metrics["rollout/restarts"] == 1
    assert metrics["rollout/requeued"] == metrics["rollout/failed_requests"] > 0
    assert (flat(made) - ours(served.policy, prompts, made, 1.0)).abs().max().item() < ROUNDING


def test_a_server_killed_in_the_middle_of_a_batch_is_started_again_and_nothing_is_lost(
    served: VllmGenerator, make_prompts: Make
) -> None:
    """The last test of the file: it uses up the server's restarts."""
    [host] = served._hosts
    assert host.server is not None and host.server.process is not None
    served.metrics()
    prompts, killed = make_prompts(*[9] * 5, *[300] * 80), []  # most wait for their prefill yet

    def kill(*_: object) -> None:
        """At the first completion: the whole server, and its keeper."""
        if not killed:
            assert host.server is not None and host.server.process is not None
            killed.append(host.server.process.pid)
            os.killpg(host.server.process.pid, signal.SIGKILL)

    made = served.sample(prompts, 4, Sampling(64), 0, kill)
    assert killed and host.server.process.pid != killed[0]
    assert len(made) == len(prompts)
    metrics = served.metrics()
    assert metrics["rollout/restarts"] == 1 and metrics["rollout/requeued"] == metrics["rollout/failed_requests"] > 0
    error = (flat(made) - ours(served.policy, prompts, made, 1.0)).abs().max().item()
    assert error < ROUNDING
