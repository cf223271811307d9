"""What the client adds to what the judge's tests show of it (test_judge_http.py): GET, a refusal's words, an outage."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from longreach.rl.http_client import Client, Reply
from longreach.rl.judge_config import JudgeConfig


class Refused(Exception):
    pass


def client(server: Any, *, outage: float = 5.0, **options: Any) -> Client[str]:
    config = JudgeConfig(
        base_url=server.url, model="m", **{"backoff": 0.001, "timeout": 2.0, "breaker_pause": 0.02, **options}
    )
    return Client(
        config, read=lambda body: Reply(body.decode()), refused=lambda status: Refused(status), max_reply=1000, outage=outage
    )  # fmt: skip


def post(one: Client[str], count: int = 1) -> list[Reply[str]]:
    async def run() -> list[Reply[str]]:
        async with one:
            return list(
                await asyncio.gather(*(one.post(f"{URL[0]}/x", {"a": 1}, size=3, most=1) for _ in range(count)))
            )

    return asyncio.run(run())


URL = [""]


@pytest.fixture(autouse=True)
def url(server: Any) -> None:
    URL[0] = server.url


def test_a_refusal_comes_with_the_servers_words_and_no_more_of_them_than_a_page(server: Any) -> None:
    server.respond = lambda _n, _body: server.http(400, "too long " + "x" * 100_000)
    [reply] = post(client(server))
    assert (reply.why, reply.again, reply.value) == ("400", False, None)
    assert reply.detail.startswith("too long xxx") and len(reply.detail) == 2000
    assert len(server.bodies) == 1


def test_words_that_are_no_text_or_packed_are_no_trouble(server: Any) -> None:
    server.respond = lambda _n, _body: server.http(422, b"\xff\xfe bad")
    assert post(client(server))[0].detail == "\ufffd\ufffd bad"
    server.respond = lambda _n, _body: server.http(422, b"packed", {"Content-Encoding": "gzip"})
    assert post(client(server))[0] == Reply(why="422")


def test_what_is_refused_outright_is_the_callers_exception(server: Any) -> None:
    server.respond = lambda _n, _body: server.http(404)
    with pytest.raises(Refused, match="404"):
        post(client(server))


def test_get_asks_without_a_body(server: Any) -> None:
    server.respond = lambda _n, body: server.http(200, json.dumps({"sent": body}))

    async def run() -> Reply[str]:
        async with (one := client(server)):
            return await one.get(f"{server.url}/models")

    assert asyncio.run(run()).value == '{"sent": {}}'
    assert server.paths == ["/v1/models"]


def test_a_server_is_down_after_its_outage_and_well_after_a_success(server: Any) -> None:
    server.respond = lambda _n, _body: server.http(500)
    one = client(server, outage=0.1, breaker_failures=2, retries=100, deadline=1.0, concurrency=2)
    replies = post(one, 4)
    assert one.down and {reply.value for reply in replies} == {None}
    server.respond = lambda _n, _body: server.http(200, "well")
    assert [reply.value for reply in post(client(server, outage=0.1))] == ["well"]


def test_a_reply_is_read_up_to_its_limit(server: Any) -> None:
    server.respond = lambda _n, body: server.http(200, "y" * 1000)
    assert post(client(server))[0].value == "y" * 1000
    server.respond = lambda _n, body: server.http(200, "y" * 1001)
    assert post(client(server))[0].why == "endless reply"
