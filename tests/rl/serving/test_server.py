"""A server of our own: it comes up or says why not, and nothing of it is left, however the trainer ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.rl.serving.http import ServerError
from longreach.rl.serving.server import Server, reserve

PLAYED = Path(__file__).with_name("played_server.py")
Make = Callable[..., Server]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Server] = []

    def one(*, port: int = 0, **settings: str) -> Server:
        command = [str(PLAYED), str(tmp_path / "pids")]
        made.append(Server(Path(sys.executable), command, log=tmp_path / "server.log", port=port, settings=settings))
        return made[-1]

    yield one
    for server in made:
        server.stop()


def pids(tmp_path: Path) -> list[int]:
    """The server's own and its child's."""
    return [int(pid) for pid in (tmp_path / "pids").read_text().split()]


def gone(pid: int) -> bool:
    """Ended, or a zombie that only its parent has not taken note of."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def soon(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_it_comes_up_where_it_says_and_ends_with_its_children(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    asyncio.run(server.ready(20.0))
    assert server.alive and server.url == f"http://127.0.0.1:{server.port}"
    assert "listening" in server.log.read_text()
    running = pids(tmp_path)
    assert not any(map(gone, running))
    assert os.getpgid(running[0]) != os.getpgid(0), "Ctrl-C at the terminal is the trainer's alone"
    server.stop()
    assert soon(lambda: all(map(gone, running)), 2.0) and not server.alive


def test_one_that_is_deaf_to_being_asked_is_killed(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longreach.rl.serving.server._STOP_S", 1.0)
    server = make(STUBBORN="1")
    server.start()
    asyncio.run(server.ready(20.0))
    running = pids(tmp_path)
    server.stop()
    assert soon(lambda: all(map(gone, running)), 2.0)


def test_a_death_at_the_start_is_told_with_the_last_lines_of_the_log(make: Make) -> None:
    server = make(DIES="3")
    server.start()
    with pytest.raises(ServerError) as raised:
        asyncio.run(server.ready(20.0))
    told = str(raised.value)
    assert server.url in told and "died while it started" in told and str(server.log) in told
    assert "out of memory, or so" in told and "ended with status 3" in told


def test_a_server_that_is_never_healthy_is_waited_for_so_long(make: Make) -> None:
    server = make(HEALTH="503")
    server.start()
    assert soon(server.log.exists) and soon(lambda: "listening" in server.log.read_text())
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"no healthy server after 0\.5 s .*answered 503(.|\n)*listening"):
        asyncio.run(server.ready(0.5))
    assert time.monotonic() - start < 10.0


def test_it_starts_again_at_the_same_address(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    asyncio.run(server.ready(20.0))
    before = pids(tmp_path)
    os.kill(before[0], signal.SIGKILL)
    assert soon(lambda: not server.alive) and soon(lambda: gone(before[1])), "what a dead server leaves goes too"
    server.start()
    asyncio.run(server.ready(20.0))
    assert pids(tmp_path) != before


def test_a_keeper_that_is_killed_leaves_no_server(make: Make, tmp_path: Path) -> None:
    server = make()
    server.start()
    asyncio.run(server.ready(20.0))
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    assert soon(lambda: gone(pids(tmp_path)[0]))
    server.stop()
    assert soon(lambda: all(map(gone, pids(tmp_path))), 2.0)


TRAINER = """
import asyncio, sys, time
from pathlib import Path
from longreach.rl.serving.server import Server
server = Server(Path(sys.executable), [sys.argv[1], sys.argv[2]], log=Path(sys.argv[3]))
server.start()
asyncio.run(server.ready(30.0))
print("up", flush=True)
time.sleep(600)
"""


def test_a_trainer_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """Nothing of the trainer's runs after SIGKILL: it is the keeper that notices."""
    command = [sys.executable, "-c", TRAINER, str(PLAYED), str(tmp_path / "pids"), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "up\n"
        running = pids(tmp_path)
        trainer.kill()
    assert soon(lambda: all(map(gone, running))), [pid for pid in running if not gone(pid)]


def test_a_port_that_is_taken_is_named_before_the_start(make: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"generator\.port = {port} can't be had for a server \(Address already in use\)"
        ):
            make(port=port)
    server = make(port=port)
    assert server.port == port


def test_a_reserved_port_is_nobody_elses() -> None:
    """It is bound while the server starts, so nobody is given it; and free for it, which reuses addresses."""
    held = reserve(0)
    with held, socket.socket() as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(held.getsockname())
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(held.getsockname())
            server.listen()
    assert held.fileno() == -1


def test_settings_are_the_servers_alone(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEALTH", "500")
    server = make(HEALTH="200")
    server.start()
    asyncio.run(server.ready(20.0))
    assert os.environ["HEALTH"] == "500"
