"""Requests to servers that behave, and to servers that don't."""

from __future__ import annotations

import asyncio
import pickle
import socket
import time
from typing import Any

import pytest

from longreach.rl.serving.http import ServerError, get, post


def ask(server: Any, *, deadline: float = 5.0, **more: Any) -> Any:
    return asyncio.run(post(server.url, "/ask", {"a": [1, 2]}, deadline=deadline, **more))


def test_json_goes_there_and_comes_back(server: Any) -> None:
    server.respond = lambda _n, body: server.http(200, '{"b": 0.1}' if body == {"a": [1, 2]} else "{}")
    assert ask(server) == {"b": 0.1}
    assert server.paths == ["/v1/ask"]
    server.respond = lambda _n, _body: server.http(200)
    assert ask(server) is None, "an empty answer is one too: /health has no body"


@pytest.mark.parametrize(
    ("answer", "told", "status"),
    [
        (lambda s: s.http(500, "out of blocks"), "was answered 500: out of blocks", 500),
        (lambda s: s.http(307, "", {"Location": s.url}), "was answered 307: no reason given", 307),
        (lambda s: s.http(200, "<html>"), "the answer is not JSON: <html>", 200),
        (lambda s: s.http(200, b"\xff\xfe"), "the answer is not JSON", 200),
        (lambda s: s.http(200, "[" * 200_000), "the answer is not JSON", 200),
        (lambda s: s.http(200, "1" * 2000), "longer than 1000 bytes", None),
        (lambda s: s.Raw([b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", b" "]), "RemoteProtocolError", None),
        (lambda s: s.Raw([b"HTTP/1.1 200 OK\r\n"], reset=True), "Error", None),
    ],
    ids=["500", "redirect", "html", "bytes", "nested", "long", "half", "reset"],
)
def test_what_is_no_answer_is_an_error_with_server_path_and_reason(
    answer: Any, told: str, status: int | None, server: Any
) -> None:
    server.respond = lambda _n, _body: answer(server)
    with pytest.raises(ServerError) as raised:
        ask(server, largest=1 << 20 if "nested" in told or "JSON" in told else 1000)
    assert told in str(raised.value)
    assert server.url in str(raised.value)
    assert "POST /ask" in str(raised.value)
    assert raised.value.status == status


def test_a_deadline_covers_the_whole_of_it_a_drip_too(server: Any) -> None:
    drip = [b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n", *[b" "] * 80]
    server.respond = lambda _n, _body: server.Raw(drip, pause=0.25)
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"no answer to POST /ask within 0\.3 s"):
        ask(server, deadline=0.3)
    assert time.monotonic() - start < 15.0


def test_nobody_there_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, and nobody listens
        with pytest.raises(ServerError, match="GET /health: ConnectError"):
            asyncio.run(get(url, "/health", deadline=5.0))


def test_no_proxy_is_asked(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    server.respond = lambda _n, _body: server.http(200, "3")
    assert ask(server) == 3


def test_an_error_travels_between_ranks_as_it_is() -> None:
    error = pickle.loads(pickle.dumps(ServerError("http://a", "why", 500)))
    assert (error.url, error.reason, error.status, str(error)) == ("http://a", "why", 500, "http://a: why")
