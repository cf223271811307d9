"""Servers of our own that die: started again, so many times."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longreach.rl.serving.asking import Asking
from longreach.rl.serving.config import ServingConfig
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.pool import Host, Pool
from longreach.rl.serving.server import Server

PLAYED = Path(__file__).with_name("played_server.py")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    server = Server(Path(sys.executable), [str(PLAYED), str(tmp_path / "pids")], log=tmp_path / "log")
    yield Host(server.url, server, up=True, version=4)
    server.stop()


def asking(host: Host, **config: float) -> Asking:
    return Asking(Pool([host], 1), ServingConfig(kind="vllm", **config))  # type: ignore[arg-type]


def test_one_that_died_is_started_again_with_the_weights_it_began_with(host: Host, tmp_path: Path) -> None:
    assert host.server is not None
    host.server.start()
    asyncio.run(host.server.ready(20.0))
    asked = asking(host)
    assert asyncio.run(asked.bring_up(host)) == 4, "it is well: nothing is done"
    os.kill(int((tmp_path / "pids").read_text().split()[0]), signal.SIGKILL)
    assert host.server.process is not None
    host.server.process.wait(20)
    assert asyncio.run(asked.bring_up(host)) == 0
    assert asked.counts["rollout/restarts"] == host.restarts == 1


@pytest.mark.parametrize("restarts", [0, 2])
def test_one_that_dies_every_time_ends_the_run_with_its_last_words(restarts: int, tmp_path: Path) -> None:
    server = Server(Path(sys.executable), [str(PLAYED), "x"], log=tmp_path / "log", settings={"DIES": "9"})
    dead = Host(server.url, server, up=True, version=0)
    asked = asking(dead, restarts=restarts)
    told = rf"{dead.url}: the server has died, and was started again {restarts} times(.|\n)*{'out of memory' if restarts else ''}"
    with pytest.raises(ServerError, match=told):
        asyncio.run(asked.bring_up(dead))
    assert asked.counts["rollout/restarts"] == restarts
    server.stop()


def test_one_that_hangs_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.rl.serving.asking.HANGS_S", 0.5)
    server = Server(Path(sys.executable), [str(PLAYED), str(tmp_path / "pids")], log=tmp_path / "log")
    host = Host(server.url, server, up=True, version=4)
    server.start()
    asyncio.run(server.ready(20.0))
    first = int((tmp_path / "pids").read_text().split()[0])
    os.kill(first, signal.SIGSTOP)  # it runs and says nothing
    monkeypatch.setattr("longreach.rl.serving.asking._ASK_S", 0.2)
    assert asyncio.run(asking(host).bring_up(host)) == 0
    assert int((tmp_path / "pids").read_text().split()[0]) != first
    server.stop()
