"""The servers that one policy is pushed to, asked together: every one must answer, each within one deadline.

What is asked here are vLLM's own routes for training (`VLLM_SERVER_DEV_MODE=1` opens them). A `mark` is the text that a server
keeps as its weight version: whose weights it has, of which version, and whether they were still on their way. A server that
started again has none, one that another run pushes to has that run's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

import torch

from ...engine.model import DTYPES
from .http import ServerError, get, post

T = TypeVar("T")
FRESH = "default"
"""What a server calls the weights that it started with."""


class SyncError(OSError):
    """Weights that did not arrive, or that are not the ones they should be. The run can't go on with such a server."""


class StaleServer(SyncError):
    """A server that has other weights than were pushed, because it started again: pushing once more mends it."""


@dataclass(frozen=True)
class Mark:
    """Whose weights a server has: `word` is "version" (they arrived), "loading" (not yet, or never) or "left" (by a run that ended)."""

    owner: str
    version: int
    word: str = "version"

    def __str__(self) -> str:
        return f"{self.word} {self.version} of {self.owner}"

    @classmethod
    def read(cls, text: str) -> Mark | None:
        """None: no mark of ours."""
        found = re.fullmatch(r"(version|loading|left) (\d+) of (.+)", text, re.DOTALL)
        return None if found is None else cls(found[3], int(found[2]), found[1])


@dataclass(frozen=True)
class Facts:
    """What a server says of itself. `block`: tokens of a block of its KV cache; `ranks`: its workers; `lora_rank`: the largest that it serves, 0 for none."""

    dtype: torch.dtype
    block: int
    longest: int
    ranks: int
    prefix_cache: bool
    transfer: str | None
    lora_rank: int
    can_sleep: bool

    @classmethod
    def read(cls, url: str, info: Any) -> Facts:
        try:
            config = info["vllm_config"]
            parallel, transfer, lora = (config[f"{key}_config"] for key in ("parallel", "weight_transfer", "lora"))
            return cls(
                dtype=DTYPES[str(config["model_config"]["dtype"]).removeprefix("torch.")],
                block=int(config["cache_config"]["block_size"]),
                longest=int(config["model_config"]["max_model_len"]),
                ranks=int(parallel["world_size"]) * int(parallel["data_parallel_size"]),
                prefix_cache=bool(config["cache_config"]["enable_prefix_caching"]),
                transfer=None if transfer is None else str(transfer["backend"]),
                lora_rank=0 if lora is None else int(lora["max_lora_rank"]),
                can_sleep=bool(config["model_config"]["enable_sleep_mode"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(
                url, f"/server_info lacks what weight sync needs to know ({type(error).__name__}: {error})"
            ) from None


class Control:
    """`urls` of the servers that are asked at present; `deadline` seconds for each answer."""

    def __init__(self, urls: Sequence[str], deadline: float) -> None:
        self.urls, self.deadline = tuple(urls), deadline

    def post(self, path: str, json: Any = None, **query: str | int) -> list[Any]:
        """Every server's answer, in order; the first error of any, when all have answered."""
        asked = f"{path}?{urlencode(query)}" if query else path
        return self._all(lambda url: post(url, asked, json, deadline=self.deadline))

    def each(self, path: str, bodies: Sequence[Any]) -> list[Any]:
        """As `post`, with a body of its own for every server."""
        own = dict(zip(self.urls, bodies, strict=True))
        return self._all(lambda url: post(url, path, own[url], deadline=self.deadline))

    def get(self, path: str) -> list[Any]:
        return self._all(lambda url: get(url, path, deadline=self.deadline))

    def facts(self) -> list[Facts]:
        return [
            Facts.read(url, info)
            for url, info in zip(self.urls, self.get("/server_info?config_format=json"), strict=True)
        ]

    def marks(self) -> list[str]:
        """Each server's weight version."""
        made = []
        for url, answer in zip(self.urls, self.get("/weight_info"), strict=True):
            text = answer.get("weight_version") if isinstance(answer, dict) else None
            if not isinstance(text, str):
                raise ServerError(url, f"/weight_info answered {answer!r}: no weight version")
            made.append(text)
        return made

    def set_mark(self, mark: Mark) -> None:
        self.post("/update_weight_version", {"new_version": str(mark)})

    def checksums(self) -> list[dict[str, str]]:
        """Of each server's weights, by its own names for them."""
        made = []
        for url, answer in zip(self.urls, self.post("/weight_checker", {"action": "checksum"}), strict=True):
            sums = answer.get("checksums") if isinstance(answer, dict) else None
            if not isinstance(sums, dict):
                raise ServerError(url, f"/weight_checker answered {answer!r}: no checksums")
            made.append(sums)
        return made

    def _all(self, ask: Callable[[str], Coroutine[Any, Any, T]]) -> list[T]:
        async def together() -> list[T | BaseException]:
            return await asyncio.gather(*map(ask, self.urls), return_exceptions=True)

        answers = asyncio.run(together())
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]
