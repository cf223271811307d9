"""Which server gets which group: the one that has the prompt's beginning in its cache, unless it has too much to do.

Rendezvous hashing: each prompt has an order of its own in which it prefers servers, by a hash of its first tokens and the
server's address, so that prompts of one document meet again at one server, and a server that goes moves no others. A server
that has more than its share of the tokens under way, or no place left, is passed over for the one with least to do.
It holds no lock: one event loop uses it.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from .server import Server

PREFIX_TOKENS = 2048
"""A prompt's first tokens, by which it is known: beyond templates, which all prompts begin with, and within a document."""

SLACK = 1.25
"""A server may have so many times its even share of what is under way before prompts that prefer it go elsewhere."""


@dataclass
class Host:
    """A server as the client sees it. `server` is None for one that somebody else started.

    `up`: it answers. `version` is that of its weights (None: not known).
    """

    url: str
    server: Server | None = None
    up: bool = False
    version: int | None = None
    restarts: int = 0
    tokens: int = 0
    groups: int = 0


@dataclass
class Pool:
    """The servers, each with `concurrency` places: `take` one, and `give_back` when the reply is there or isn't to come.

    Asked are those that are up and have the weights of `version`.
    """

    hosts: list[Host]
    concurrency: int
    version: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def take(
        self, ids: Sequence[int], tokens: int, avoid: Collection[str] = (), stop: asyncio.Event | None = None
    ) -> Host | None:
        """A server for a prompt of these ids and, with its completions, of so many tokens; waits for a place.

        Servers in `avoid` get it if there is no other that is up. None: `stop` was set, of which `look` must tell.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._places(avoid) or (stop is not None and stop.is_set()))
            if stop is not None and stop.is_set():
                return None
            host = choose(self._places(avoid), ids, tokens)
            host.tokens += tokens
            host.groups += 1
            return host

    async def give_back(self, host: Host, tokens: int) -> None:
        async with self._changed:
            host.tokens -= tokens
            host.groups -= 1
            self._changed.notify_all()

    async def look(self) -> None:
        """Whoever waits for a place looks whether it still needs one."""
        async with self._changed:
            self._changed.notify_all()

    async def now(self, host: Host, *, up: bool, version: int | None) -> None:
        """What is known of it from now on."""
        async with self._changed:
            host.up, host.version = up, version
            self._changed.notify_all()

    async def behind(self, version: int) -> list[Host]:
        """From now on `version` is asked for: those that are up and lack it."""
        async with self._changed:
            self.version = version
            return [host for host in self.hosts if host.up and host.version != version]

    def _places(self, avoid: Collection[str]) -> list[Host]:
        asked = [host for host in self.hosts if host.up and host.version == self.version]
        asked = [host for host in asked if host.url not in avoid] or asked
        return [host for host in asked if host.groups < self.concurrency]


def choose(hosts: Sequence[Host], ids: Sequence[int], tokens: int) -> Host:
    """The prompt's first choice, or the one with least to do if that has more than its share."""
    prefix = array("q", ids[:PREFIX_TOKENS]).tobytes()
    first = max(hosts, key=lambda host: hashlib.blake2b(host.url.encode() + b"\0" + prefix, digest_size=8).digest())
    share = (sum(host.tokens for host in hosts) + tokens) / len(hosts)
    least = min(hosts, key=lambda host: host.tokens)
    return first if first.tokens == least.tokens or first.tokens + tokens <= SLACK * share else least
