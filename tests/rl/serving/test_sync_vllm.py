"""Weights pushed to vLLM itself (its CPU build): they arrive, what doesn't is caught, and running requests know whose tokens they have.

One server for all tests but the last, which trains; skipped where `make vllm` has set nothing up.
"""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Sampling
from longreach.engine.generate import GeneratorConfig
from longreach.engine.model import LoraConfig, ModelConfig
from longreach.engine.plain_weights import PlainWeights
from longreach.rl.policy import Policy
from longreach.rl.recipe import Recipe
from longreach.rl.serving import replies, sync_files
from longreach.rl.serving.command import server_command, server_settings
from longreach.rl.serving.config import ServingConfig
from longreach.rl.serving.control import Control, StaleServer, SyncError
from longreach.rl.serving.gate import Gate
from longreach.rl.serving.http import ServerError, post
from longreach.rl.serving.server import Server
from longreach.rl.serving.sync_config import SyncConfig
from longreach.rl.serving.sync_files import FileSync
from longreach.rl.serving.sync_lora import LoraSync
from longreach.rl.train import train as train_whole

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
OWNER = "here:/runs/a"
MODEL = "shipped:demo-base"
RANK = 4
WINDOW = 2048
TOKENS = 800
"""Of a completion that is still under way when weights are pushed."""
ROUNDING = 0.06
"""Nats, the mean of a probe: bfloat16 on both sides, tokens that are mostly unlikely. Seen: 0.03 to 0.05; a wrong head: 0.28."""


def load(**keywords: Any) -> Policy:
    return Policy(ModelConfig(MODEL, autocast=True, device="cpu", **keywords), GeneratorConfig())


def adapted() -> Policy:
    return load(lora=LoraConfig(rank=RANK, alpha=16.0, targets=("q_proj", "o_proj", "down_proj")))


@pytest.fixture
def policy() -> Policy:
    return load()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, vllm_python: Path) -> Iterator[Server]:
    config, policy = ServingConfig(kind="vllm"), adapted()
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    command, settings = server_command(policy, config, WINDOW), server_settings(config, 0, RANK)
    made = Server(vllm_python, command, log=log, settings=settings)
    try:
        made.start()
        asyncio.run(made.ready(300.0))
        yield made
    finally:
        made.stop()


@pytest.fixture
def make_sync(server: Server, policy: Policy, tmp_path: Path) -> Callable[..., FileSync]:
    def make(**keywords: Any) -> FileSync:
        config = SyncConfig(**{"kind": "safetensors", "deadline": 60.0, "take_over": True, **keywords})
        return FileSync([server.url], name(policy), OWNER, config, folder=tmp_path)

    return make


def name(policy: Policy) -> str:
    return str(policy.model.config.name_or_path)


def train(policy: Policy, by: float, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.requires_grad:
                spread = float(p.std().nan_to_num(0.0)) or 0.1  # the B of a new adapter is 0
                p.add_(by * spread * torch.randn(p.shape, generator=draw))


def test_both_sides_agree_before_and_after(policy: Policy, make_sync: Callable[..., FileSync]) -> None:
    sync = make_sync()
    reports = [sync.push(policy, 0)]
    for version in (1, 2):
        train(policy, 0.1, version)
        reports.append(sync.push(policy, version))
        sync.check()
    for report in reports:
        (difference,) = report.differences
        assert max(difference.mean.values()) < ROUNDING, difference
        assert report.bytes == PlainWeights(policy.model, torch.bfloat16).bytes
    (telling,) = sync.sums._telling.values()
    assert any("model.norm.weight" in name for name in telling), telling
    assert max(sync.gauge.noise.values()) > 1e-4, "noise is what two roundings make, not nothing"


def test_a_head_that_save_pretrained_leaves_out_is_caught(
    policy: Policy, make_sync: Callable[..., FileSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithoutHead(PlainWeights):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.entries = [entry for entry in self.entries if entry.name != "lm_head.weight"]

        def pairs(self, *, keep: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
            return (pair for pair in super().pairs(keep=keep) if pair[0] != "lm_head.weight")

    sync = make_sync()
    sync.push(policy, 0)
    train(policy, 0.1)
    monkeypatch.setattr(sync_files, "PlainWeights", WithoutHead)
    with pytest.raises(SyncError, match="tied head"):
        sync.push(policy, 1)
    monkeypatch.undo()
    sync.push(policy, 2)


def test_a_cache_that_was_not_reset_is_caught(policy: Policy, make_sync: Callable[..., FileSync]) -> None:
    class Forgetful(Gate):
        def close(self) -> None:
            self.control.post("/pause", mode="wait", clear_cache="false")

        def open(self) -> None:
            self.control.post("/resume")

    sync = make_sync()
    sync.push(policy, 0)
    sync.gate = Forgetful(sync.control, sync.config)
    train(policy, 0.1)
    with pytest.raises(SyncError, match=r"cached route .*prefix cache"):
        sync.push(policy, 1)


class Chains:
    """Two requests under way at any time, of different lengths so that they don't end together; `made` has the tokens asked
    for and the versions told of each that ended."""

    lengths = (TOKENS, TOKENS - 300)

    def __init__(self, url: str) -> None:
        self.url, self.enough = url, threading.Event()
        self.made: list[tuple[int, list[dict[str, Any]]]] = []

    def run(self) -> None:
        async def both() -> None:
            await asyncio.gather(*map(self._one_after_another, self.lengths))

        asyncio.run(both())

    async def _one_after_another(self, tokens: int) -> None:
        order = replies.order(range(20, 60), 1, Sampling(tokens), (), None)
        while not self.enough.is_set():
            reply = await post(self.url, replies.PATH, order, deadline=120.0)
            self.made.append((tokens, reply["choices"][0]["weight_versions"]))

    def more(self, count: int = 2, seconds: float = 120.0) -> None:
        """Waits for so many more to end."""
        until, wanted = time.monotonic() + seconds, len(self.made) + count
        while len(self.made) < wanted:
            assert time.monotonic() < until, "no reply"
            time.sleep(0.05)


@pytest.mark.parametrize("pause", ["wait", "keep"])
def test_a_request_under_way_ends_with_the_old_weights_or_says_where_the_new_ones_begin(
    server: Server, policy: Policy, make_sync: Callable[..., FileSync], pause: str
) -> None:
    sync = make_sync(pause=pause)
    sync.push(policy, 0)
    names, seen, chains = [f"version 0 of {OWNER}"], set[tuple[str, ...]](), Chains(server.url)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(chains.run)
        try:
            # A busy machine may hand the pause on so late that both requests have ended: then once more.
            chains.more()
            while not any(len(versions) > 1 for versions in seen) and len(names) < (2 if pause == "wait" else 8):
                train(policy, 0.1, len(names))
                sync.push(policy, len(names))
                names.append(f"version {len(names)} of {OWNER}")
                chains.more()
                seen = {tuple(span["version"] for span in spans) for _, spans in chains.made}
        finally:
            chains.enough.set()
        asking.result(240.0)
    assert all(sum(span["end"] - span["start"] for span in spans) == tokens for tokens, spans in chains.made)
    assert {versions for versions in seen if len(versions) == 1} <= {(name,) for name in names}
    across = {versions for versions in seen if len(versions) > 1}
    assert across <= set(pairwise(names)) and bool(across) == (pause == "keep"), seen


def test_two_runs_at_one_server_and_a_disk_that_is_full(
    policy: Policy, make_sync: Callable[..., FileSync], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, config = make_sync(), SyncConfig(kind="safetensors", deadline=60.0)
    sync.push(policy, 0)
    other = FileSync([server.url], name(policy), "there:/runs/b", config, folder=tmp_path / "b")
    with pytest.raises(SyncError, match=r"there:/runs/b.*here:/runs/a.*take_over"):
        other.push(policy, 0)
    train(policy, 0.1)

    def full(path: Path, *arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sync_files, "write_tensors", full)
        with pytest.raises(SyncError, match=r"version 1 can't be written .* the servers still have version 0"):
            sync.push(policy, 1)
    sync.check()
    (difference,) = sync.push(policy, 1).differences
    assert max(difference.mean.values()) < ROUNDING


def test_adapters_are_served_without_being_merged(
    server: Server, policy: Policy, tmp_path: Path, make_sync: Callable[..., FileSync]
) -> None:
    make_sync().push(policy, 0)
    tuned = adapted()
    config = SyncConfig(kind="lora", deadline=60.0, keep=1)
    sync = LoraSync([server.url], name(policy), OWNER, config, folder=tmp_path / "adapters")
    for version in (1, 2):
        train(tuned, 1.0, version)
        (difference,) = sync.push(tuned, version).differences
        sync.check()
        assert max(difference.mean.values()) < ROUNDING, difference
    with pytest.raises(SyncError, match="other weights"):  # the base's own differ, or the adapters did nothing
        sync.gauge.judge([server.url], sync_probe(sync, tuned, sync.base_model), 2)


def sync_probe(sync: LoraSync, policy: Policy, model: str) -> Any:
    probe = sync._probe
    assert probe is not None
    return probe.compare(policy, probe.ask(sync.control, model))


def test_the_states_of_a_shared_gpu_are_the_servers_too(server: Server) -> None:
    gate = Gate(Control([server.url], 30.0), SyncConfig(sleep=1))
    for _ in range(2):
        gate.sleep()
        gate.close()
        gate.open()
    order = replies.order([5, 6, 7], 1, Sampling(4), (), 3)
    assert asyncio.run(post(server.url, replies.PATH, order, deadline=30.0))["choices"]


def test_a_server_that_does_not_see_the_folder_and_one_that_starts_again(
    server: Server, policy: Policy, make_sync: Callable[..., FileSync], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, sync = make_sync(), make_sync()
    train(policy, 0.1)
    watching.push(policy, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sync_files, "write_handover", lambda root, *_: root / "elsewhere")
        with pytest.raises(SyncError, match=r"did not arrive by safetensors.*do they see"):
            sync.push(policy, 2)
    with pytest.raises((SyncError, ServerError)):
        watching.check()
    server.start()
    asyncio.run(server.ready(300.0))
    with pytest.raises(StaleServer, match=r"was started again .* not version 1"):
        watching.check()
    (difference,) = watching.push(policy, 1).differences
    watching.check()
    assert max(difference.mean.values()) < ROUNDING


def test_training_samples_from_the_weights_that_it_made(
    make_recipe: Callable[..., Recipe], served_policy: Policy, vllm_python: Path, tmp_path: Path
) -> None:
    """Steps that change the policy by a nat or so: sampled from older weights, rollouts would not agree with the trainer."""
    recipe = make_recipe(
        model__path=served_policy.config.path, model__lora={"rank": RANK, "alpha": 8.0, "targets": ["q_proj", "v_proj"]}, sft=None, retrospective=None, phases__0__steps=3,
        generator__kind="vllm", generator__python=str(vllm_python), data__eval=[], eval=None,
        rl__group_size=8, rl__batch_prompts=4,  # nothing seeds the server: in some group rewards differ, or a step trains on nothing
    )  # fmt: skip
    recipe = replace(recipe, phases=recipe.phases[:1])
    train_whole(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "sync/version" in line]
    assert [line["sync/version"] for line in steps] == [1.0, 2.0], steps
    for line in steps:
        assert line["sync/probe_mean_diff"] < 0.002 and line["sync/seconds"] > 0 and line["sync/bytes"] > 0
    rollouts = [line["sampling/sampling_logp_difference/max"] for line in lines if "sampling/groups" in line]
    assert len(rollouts) == 3 and max(rollouts) < 1e-4, rollouts  # fp32 on both sides: 1e-6 was seen
