"""The policy's completions from vLLM's servers: the `Generator` of `[generator] kind = "vllm"`.

Rank 0 has the servers and asks them, so that one place knows what is under way; what comes back goes to all ranks group by group,
and each hands in its share for scoring while others are generated. Before it is asked, a server has the policy's weights: where
they are not those it began with, `hand_over` brings them, and without one the run stops.
"""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from ...engine import Completion, Sampling
from ...engine.generate import OnDone, prompt_seeds
from ..background import Background
from ..generator import whole
from ..policy import Policy
from ..prompts import Prompt
from ..ranks import Ranks
from . import replies
from .asking import Asking, Batch, Job, well
from .command import lora_rank, seeded, server_command, server_settings
from .config import ServingConfig
from .handing import Handing
from .http import ServerError, get, post
from .pool import Host, Pool
from .server import Server

HandOver = Callable[[Policy, Sequence[str]], None]
"""Brings the policy's weights to the servers at these addresses; all ranks call it. Raises OSError if it didn't take."""

Message = tuple[list[tuple[int, list[Completion]]], list[str]]
"""To all ranks: finished groups, and servers that need the policy's weights."""

_BEAT_S = 10.0
"""Ranks that wait hear from rank 0 at least so often: no collective lasts as long as a generation, or a start."""

_ASK_S = 60.0
_LOOK_S = 0.5
"""How soon a generation notices that it was called off."""


class VllmGenerator:
    """See `Generator`. `home` gets the logs of servers that are started; `say` is told what takes long."""

    def __init__(
        self, policy: Policy, config: ServingConfig, home: Path, *, hand_over: HandOver | None = None,
        say: Callable[[str], object] = lambda text: None,
    ) -> None:  # fmt: skip
        self.policy, self.config, self.hand_over = policy, config, hand_over
        self._home, self._say, self._ranks = home, say, policy.ranks
        self._hosts: list[Host] = []
        self._background: Background | None = None
        self._off = threading.Event()

    @property
    def servers(self) -> list[str]:
        """Their addresses, on rank 0."""
        return [host.url for host in self._hosts]

    @property
    def versions(self) -> Mapping[str, int | None]:
        """See `Generator`; on rank 0."""
        return {host.url: host.version for host in self._hosts}

    def start(self, window: int) -> None:
        """See `Generator`.

        Raises:
            ValueError: what the recipe asks for can't be started, or a server can't do what we need.
            ServerError: a server doesn't come up.
        """
        self._ranks.together(lambda: self._start(window), lambda: None)
        while not self._ranks.together(self._started, lambda: None):
            pass

    def close(self) -> None:
        """See `Generator`. Ends what was started here, and nothing else; servers of others may be had by another run."""
        if self._ranks.main and self.config.urls and isinstance(self.hand_over, Handing):
            try:
                self.hand_over.close()
            except OSError as error:
                self._say(f"the servers don't know that this run has left them: {error}")
        if self._background is not None:
            self._background.__exit__(None, None, None)
            self._background = None
        ours = [host.server for host in self._hosts if host.server is not None]
        for server in ours:
            server.leave()
        for server in ours:
            server.stop()
        self._hosts = []

    def health(self) -> dict[str, str]:
        """See `Generator`; on rank 0."""
        return {} if self._background is None else self._background.submit(self._health()).result()

    def metrics(self) -> dict[str, float]:
        """See `Generator`. The same on all ranks."""
        taken = self._ranks.first(lambda: dict(self._asking.counts))
        if self._ranks.main:
            self._asking.counts.clear()
        made = {f"rollout/{name}": float(taken.get(f"rollout/{name}", 0)) for name in _COUNTED}
        handing = self.hand_over
        return made | (self._ranks.first(handing.metrics) if isinstance(handing, Handing) else {})

    def refresh(self) -> None:
        """See `Generator`."""
        behind = self._ranks.together(self._behind, lambda: None)
        if behind:
            self._bring_in_step(behind)

    def rest(self) -> None:
        """See `Generator`; where `generator.sync.sleep` says that a GPU is shared."""
        if not self.config.sync.sleep or not isinstance(self.hand_over, Handing):
            return
        if self.hand_over.sync is None:  # it sleeps only with weights that are known
            self._bring_in_step(self._ranks.first(lambda: self.servers))
        self._ranks.together(self._sleep, lambda: None)

    def _sleep(self) -> None:
        assert isinstance(self.hand_over, Handing) and self._background is not None
        self.hand_over.rest()
        for host in self._hosts:  # none is asked before a push has woken it
            self._background.submit(self._asking.pool.now(host, up=True, version=None)).result()

    def beside(self, policy: Policy) -> VllmGenerator:
        """See `Generator`. It must have been started."""
        made = copy.copy(self)
        made.policy, made.hand_over, made._ranks, made._off = policy, None, Ranks(), threading.Event()
        return made

    def call_off(self) -> None:
        """See `Generator`."""
        self._off.set()

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone
    ) -> list[list[Completion]]:
        """See `Generator`. Raises ServerError, on all ranks, when a group can't be had."""
        return self.sample_most(prompts, (), 0, group_size, sampling, seed, on_done)

    def sample_most(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[Completion]], spare: int, group_size: int,
        sampling: Sampling, seed: int, on_done: OnDone,
    ) -> list[list[Completion]]:  # fmt: skip
        """See `Generator`. Raises as `sample`."""
        ranks, made = self._ranks, dict[int, list[Completion]]()
        stream = self._stream(prompts, begun, spare, group_size, sampling, seed) if ranks.main else iter(())
        while len(made) < len(prompts):
            finished, behind = ranks.together(lambda: next(stream), lambda: None)
            for place, group in finished:
                made[place] = group
                ours = whole(group) and place % ranks.size == ranks.rank
                for index, completion in enumerate(group) if ours else ():
                    on_done(place, index, completion)
            if behind:
                self._bring_in_step(behind)
        return [made[place] for place in range(len(prompts))]

    def _start(self, window: int) -> None:
        assert not self._hosts, "it is started once"
        config = self.config
        if config.max_model_len and config.max_model_len < window:
            raise ValueError(
                f"generator.max_model_len = {config.max_model_len} can't hold the recipe's longest prompt with its completion "
                f"({window} tokens): raise it, or set 0"
            )
        self._hosts = [Host(url.rstrip("/")) for url in config.urls] or [
            Host(server.url, server) for server in self._servers(window)
        ]
        self._background = Background("generation").__enter__()
        self._asking = Asking(Pool(self._hosts, config.concurrency), config)
        for host in self._hosts:
            if host.server is not None:
                host.server.start()
                self._say(f"starting vLLM at {host.url} (log: {host.server.log})")
        self._starting = time.monotonic(), self._background.submit(self._all_up(window))

    def _started(self) -> bool:
        """Whether all servers are up, after a while of waiting."""
        began, starting = self._starting
        if not futures.wait([starting], _BEAT_S).done:
            return False
        starting.result()
        self._say(f"{len(self._hosts)} vLLM server(s) ready after {time.monotonic() - began:.0f} s")
        return True

    def _servers(self, window: int) -> list[Server]:
        config, python = self.config, self.config.interpreter()
        command = server_command(self.policy, config, window)
        return [
            Server(
                python, command, log=self._home / f"vllm-{index}.log", port=config.port and config.port + index,
                settings=server_settings(config, index, lora_rank(self.policy)),
            )
            for index in range(config.servers)
        ]  # fmt: skip

    async def _all_up(self, window: int) -> None:
        tasks = [asyncio.create_task(self._up(host, window)) for host in self._hosts]
        try:
            await asyncio.gather(*tasks)
        finally:  # the first failure is the message; the others needn't be waited for
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _up(self, host: Host, window: int) -> None:
        if host.server is not None:
            await host.server.ready(self.config.start_timeout_s)
        else:
            await self._asking.bring_up(host)
        try:
            await _check(host.url, window)
        except ServerError as error:
            told = f"; {host.server.tail()}" if host.server is not None else ""
            raise ServerError(host.url, f"{error.reason}{told}", error.status) from None
        version = 0 if host.server is not None or await _untouched(host.url) else None
        await self._asking.pool.now(host, up=True, version=version)

    async def _health(self) -> dict[str, str]:
        each = await asyncio.gather(*(well(host) for host in self._hosts))
        return {host.url: "not healthy" for host, fine in zip(self._hosts, each, strict=True) if not fine}

    def _stream(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[Completion]], spare: int, group_size: int,
        sampling: Sampling, seed: int,
    ) -> Iterator[Message]:  # fmt: skip
        """What rank 0 tells all of them, at least every few seconds until all groups are there."""
        assert self._background is not None, "it was started"
        own = seeded(self.policy, self.config)
        seeds = [each >> 1 if own else None for each in prompt_seeds(seed, len(prompts))]  # vLLM counts on from it
        begun = [*begun, *[()] * (len(prompts) - len(begun))]
        each = enumerate(zip(prompts, seeds, begun, strict=True))
        jobs = [Job(i, p.example.id, p.ids, s, b) for i, (p, s, b) in each]
        vocabulary = self.policy.model.config.get_text_config().vocab_size
        batch = Batch(group_size, sampling, self.policy.stop_ids, vocabulary)
        yield [], self._behind()
        under_way, missing = self._background.submit(self._asking.groups(jobs, batch)), len(jobs)
        try:
            while True:
                finished, behind = self._next(batch)
                missing -= len(finished)
                if spare and missing <= spare:
                    self._background.submit(self._asking.stop(batch)).result()
                yield finished, behind
        finally:
            under_way.cancel()

    def _behind(self) -> list[str]:
        assert self._background is not None
        self._background.submit(self._asking.look_at_all()).result()
        lacking = self._background.submit(self._asking.pool.behind(self.policy.version)).result()
        return [host.url for host in lacking]

    def _next(self, batch: Batch) -> Message:
        finished: list[tuple[int, list[Completion]]] = []
        behind: list[str] = []
        wait = _BEAT_S
        while True:
            if self._off.is_set():
                raise ValueError("sampling was called off")
            try:
                event = self._asking.events.get(timeout=min(wait, _LOOK_S))
            except queue.Empty:
                wait -= _LOOK_S
                if wait > 0:
                    continue
                return finished, behind
            wait = 1e-3  # what else is there goes along
            if isinstance(event, ServerError):
                raise event
            if isinstance(event, Host):
                behind += [event.url] if event.version != self.policy.version else []
            elif event.batch is batch:  # not of a call that was given up
                finished.append((event.place, event.completions))

    def _bring_in_step(self, behind: Sequence[str]) -> None:
        """All ranks: the policy's weights go to the servers that lack them."""
        if self.hand_over is None:
            raise ValueError(
                f"the servers {', '.join(behind)} have other weights than the policy, and nothing hands them over: "
                "generator.kind = 'vllm' can only evaluate the model that it was started with"
            )
        self.hand_over(self.policy, behind)
        if self._ranks.main:
            assert self._background is not None
            if isinstance(self.hand_over, Handing):
                self._asking.model = self.hand_over.model
            for host in self._hosts:
                if host.url in behind:
                    self._background.submit(self._asking.pool.now(host, up=True, version=self.policy.version)).result()


_COUNTED = ("failed_requests", "requeued", "restarts")


async def _check(url: str, window: int) -> None:
    """That the server can do what will be asked of it: the length, token ids, log-probs of what was sampled.

    Raises:
        ValueError: it can't.
    """
    models = await get(url, "/v1/models", deadline=_ASK_S)
    length = models["data"][0]["max_model_len"]
    if length < window:
        raise ValueError(
            f"{url} serves sequences of at most {length} tokens, and the recipe's longest prompt with its completion has {window}: "
            f"start it with --max-model-len {window}"
        )
    probe: dict[str, Any] = replies.order([1, 2, 3], 1, Sampling(1, top_k=1), (), None)
    try:
        reply = await post(url, replies.PATH, probe, deadline=_ASK_S)
    except ServerError as error:
        if error.status in (403, 404):
            raise ValueError(
                f"{error}; token ids go in and out by this path: start vLLM 0.32 with --enable-scale-out"
            ) from None
        raise
    [value] = [entry["logprob"] for entry in reply["choices"][0]["logprobs"]["content"]]
    if value < -1e-3:  # one token was left to draw from, so its log-prob is 0
        raise ValueError(
            f"{url} reports log-probs of another distribution than it samples from: start it with --logprobs-mode processed_logprobs"
        )


async def _untouched(url: str) -> bool:
    """Whether a server that was running has the weights it was started with, as far as it tells."""
    try:
        told = await get(url, "/weight_info", deadline=_ASK_S)
    except ServerError:  # it isn't in the mode that takes weights, so nobody gave it others
        return True
    return told.get("weight_version") == "default"
