"""One HTTP request to a generation server: a deadline for the whole of it, JSON both ways, and an error that says who, what and why.

Servers are neighbours on a network of one's own, so no proxy is asked; redirects are not followed, and a reply is read up
to a size. It gives up retries: what a failure means (another server, another try, the end of the run) is the caller's to say.
"""

from __future__ import annotations

import asyncio
import functools
import json as _json
import ssl
from typing import Any

import httpx

LARGEST = 16 << 20
"""Bytes of a reply that are read where the caller names no other limit."""

_SHOWN = 400
"""Characters of a server's own words in a message."""


class ServerError(OSError):
    """A server that can't be reached, takes too long, or answers with an error or with nonsense.

    `reason` is the message without the server's name; `status` the HTTP status of a refusal, None where there was no
    answer at all.
    """

    def __init__(self, url: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"{url}: {reason}")
        self.url, self.reason, self.status = url, reason, status

    def __reduce__(self) -> tuple[type[ServerError], tuple[str, str, int | None]]:
        """It travels between ranks: an OSError would be built again from its one message."""
        return type(self), (self.url, self.reason, self.status)


async def post(url: str, path: str, json: Any = None, *, deadline: float, largest: int = LARGEST) -> Any:
    """POST `json` to `url` + `path`, and the reply's JSON (None for an empty one).

    Args:
        url: of the server, such as "http://127.0.0.1:8000", without a path.
        deadline: seconds for connecting, sending, waiting and reading together.
        largest: bytes of a reply that are read; a longer one is an error.

    Raises:
        ServerError: no connection, no answer in time, a status other than 200, or a reply that is not JSON.
    """
    return await _ask("POST", url, path, json, deadline, largest)


async def get(url: str, path: str, *, deadline: float, largest: int = LARGEST) -> Any:
    """GET, as `post`."""
    return await _ask("GET", url, path, None, deadline, largest)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a short request."""
    return ssl.create_default_context()


async def _ask(method: str, url: str, path: str, json: Any, deadline: float, largest: int) -> Any:
    try:
        async with asyncio.timeout(deadline):
            status, body = await _exchange(method, url, path, json, largest)
    except TimeoutError:
        raise ServerError(url, f"no answer to {method} {path} within {deadline:g} s") from None
    except httpx.RequestError as error:
        raise ServerError(url, f"{method} {path}: {type(error).__name__} {error}".rstrip()) from None
    if status != 200:
        words = body.decode(errors="replace").strip()[:_SHOWN]
        raise ServerError(url, f"{method} {path} was answered {status}: {words or 'no reason given'}", status)
    try:
        return _json.loads(body) if body else None
    except (ValueError, RecursionError):  # also of bytes that are no UTF-8
        shown = body[:_SHOWN].decode(errors="replace")
        raise ServerError(url, f"{method} {path}: the answer is not JSON: {shown}", status) from None


async def _exchange(method: str, url: str, path: str, json: Any, largest: int) -> tuple[int, bytes]:
    """(status, body). A connection of its own: requests are few, long and large, and a broken one is nobody else's."""
    whole = httpx.Timeout(None)  # bounded as a whole above, so that a server that drips bytes meets the bound too
    async with (
        httpx.AsyncClient(
            timeout=whole, trust_env=False, headers={"Accept-Encoding": "identity"}, verify=_certificates()
        ) as client,
        client.stream(method, url.rstrip("/") + path, json=json) as response,
    ):
        read = bytearray()
        async for chunk in response.aiter_raw():
            read += chunk
            if len(read) > largest:
                raise ServerError(url, f"{method} {path}: the answer is longer than {largest} bytes")
        return response.status_code, bytes(read)
