"""`longreach serve`: the same server that training starts, for a trainer elsewhere, supervised to the end."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longreach.engine.generate import GeneratorConfig
from longreach.rl.cli import main
from longreach.rl.console import Console
from longreach.rl.policy import Policy
from longreach.rl.recipe import load_recipe
from longreach.rl.serving import serve_command
from longreach.rl.serving.command import server_command, server_settings
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.serve_command import commands_of, supervise
from longreach.rl.serving.server import Server

PLAYED = Path(__file__).with_name("played_server.py")
HERE = ("--generator.python", sys.executable)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def soon(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def test_the_command_is_the_one_that_training_starts() -> None:
    recipe = load_recipe(
        "smoke", [("model.yarn", "2.0"), ("generator.args", "--max-num-seqs,7"), ("generator.environment.A", "1")]
    )
    command, settings = commands_of(recipe, recipe.generator, Console(quiet=True))
    loaded = Policy(recipe.model, GeneratorConfig())
    window = int(command[command.index("--max-model-len") + 1])
    assert window >= recipe.served_window()
    assert command == server_command(loaded, recipe.generator, window) and "--hf-overrides" in command
    assert settings == [server_settings(recipe.generator, 0)] and settings[0]["A"] == "1"


def test_a_dry_run_prints_what_a_shell_can_run(capsys: pytest.CaptureFixture[str], port: int) -> None:
    keys = [
        "--rl.staleness",
        "1",
        "--generator.servers",
        "2",
        "--generator.devices",
        "0,1",
        "--host",
        "10.0.0.7",
        "--port",
        str(port),
    ]
    assert main(["serve", "smoke", "--dry-run", *HERE, *keys]) == 0
    first, second = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert first[0] == "env" and "VLLM_SERVER_DEV_MODE=1" in first and "CUDA_VISIBLE_DEVICES=0" in first
    assert "CUDA_VISIBLE_DEVICES=1" in second and sys.executable in second
    assert first[-4:] == ["--host", "10.0.0.7", "--port", str(port)] and second[-1] == str(port + 1)


@pytest.mark.parametrize(
    "keys, words",
    [
        (["--generator.sync.kind", "ipc", "--host", "10.0.0.7"], "take nccl or safetensors"),
        (["--port", "0"], "--port must be above 0"),
        (["--generator.python", "/nowhere/python"], "there is no /nowhere/python"),
        (["--host", "203.0.113.1"], "can't be had for a server"),
    ],
)
def test_what_can_not_be_served(
    keys: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = [] if "--generator.python" in keys else list(HERE)
    assert main(["serve", "smoke", "--run-dir", str(tmp_path / "run"), *given, *keys]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made: list[Server] = []

    def one(port: int, **settings: str) -> Server:
        command = [str(PLAYED), str(tmp_path / "pids")]
        made.append(Server(Path(sys.executable), command, log=tmp_path / "server.log", port=port, settings=settings))
        return made[-1]

    yield one
    for server in made:
        server.stop()


def test_one_that_dies_is_started_again_so_often_and_no_more(
    make: Callable[..., Server], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "_LOOK_S", 0.05)
    server, said, killed = make(port), list[str](), set[int]()
    config = load_recipe("smoke", [("generator.restarts", "2")]).generator

    def say(text: str) -> None:
        said.append(text)
        if "ready" in text:
            pid = int((tmp_path / "pids").read_text().split()[0])
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ServerError, match="was started again 2 times"):
        supervise([server], config, say, {server.url: "http://there:1"})
    assert len(killed) == 3
    assert "--generator.urls http://there:1" in said[1]
    assert [text for text in said if "has died" in text] == [
        "http://there:1 has died and is started again (1 more times)",
        "http://there:1 has died and is started again (0 more times)",
    ]


@pytest.mark.slow
def test_it_ends_with_its_servers_when_told_to(port: int, tmp_path: Path) -> None:
    """A program that plays vLLM stands where the interpreter would."""
    played = tmp_path / "python"
    played.write_text(
        f'#!/bin/sh\nfor word; do case $word in *keeper.py) exec {sys.executable} "$@";; esac; done\n'
        f'while [ "$1" != --host ]; do shift; done\nexec {sys.executable} {PLAYED} {tmp_path / "pids"} "$@"\n'
    )
    played.chmod(0o755)
    command = [sys.executable, "-m", "longreach.rl.cli", "serve", "smoke", "--generator.python", str(played),
               "--port", str(port), "--run-dir", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("ready" in line for line in lines)
    running = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    process.send_signal(signal.SIGTERM)  # Ctrl-C goes the same way
    assert process.wait(60) == 0
    assert soon(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in running[:1]))
    assert list((tmp_path / "run-servers").iterdir()), (
        "logs stand beside the run folder, which is the trainer's to claim"
    )
    assert not (tmp_path / "run").exists()
