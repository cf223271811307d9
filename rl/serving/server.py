"""One server of our own: started, waited for, found dead, started again, and never left behind.

It runs under `keeper.py` in a session of its own, so that Ctrl-C at the terminal is the trainer's alone to handle, and ends
with the trainer whatever ends that. It writes to a log in the run folder, whose last lines are in every message about its
death. Its port is ours from before the start to the end: a socket that is bound and never listens keeps it from being given
to anybody else, and lets the server, which reuses addresses, have it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .http import ServerError, get

HOST = "127.0.0.1"
"""Servers of our own listen here alone: the interfaces that hand over weights trust whoever asks."""

TAIL = 15
"""Last lines of the log in a message."""

_KEEPER = Path(__file__).with_name("keeper.py")
_LOOK_S = 0.2
_ASK_S = 5.0
_STOP_S = 30.0


class Server:
    """`command` is what follows the interpreter; `--host` and `--port` are added, the latter a free one where `port` is 0.

    `url`, `log` and `process` (None before the start) are for whoever talks to it, reads or watches it.
    """

    def __init__(
        self, python: Path, command: Sequence[str], *, log: Path, port: int = 0, settings: Mapping[str, str] | None = None,
        host: str = HOST,
    ) -> None:  # fmt: skip
        self.log, self._host = log, host
        self._python, self._command, self._settings = python, tuple(command), dict(settings or {})
        self._reserved = reserve(port, host)
        self.port: int = self._reserved.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Begins to start it; `ready` waits. What is left of an earlier one is killed first."""
        self._kill()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        command = [
            str(self._python), "-I", str(_KEEPER), *settings, "--",
            str(self._python), *self._command, "--host", self._host, "--port", str(self.port),
        ]  # fmt: skip
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    async def ready(self, timeout_s: float) -> None:
        """Waits until it answers /health.

        Raises:
            ServerError: it died, or doesn't answer within `timeout_s` seconds.
        """
        until = time.monotonic() + timeout_s
        while True:
            if not self.alive:
                raise ServerError(self.url, f"the server died while it started; {self.tail()}")
            try:
                await get(self.url, "/health", deadline=_ASK_S)
            except ServerError as error:
                if time.monotonic() > until:
                    raise ServerError(
                        self.url, f"no healthy server after {timeout_s:g} s (/health: {error.reason}); {self.tail()}"
                    ) from None
                await asyncio.sleep(_LOOK_S)
            else:
                return

    def leave(self) -> None:
        """Asks it to end, and doesn't wait."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()  # what the keeper watches

    def stop(self) -> None:
        """Ends it: asked first, then killed. Its port is given back."""
        if self.process is not None:
            self.leave()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)
            self._kill()
        self._reserved.close()

    def tail(self) -> str:
        """The log's last lines, with its name, for a message."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        last = [f"  {line}" for line in text.splitlines()[-TAIL:]]
        return "\n".join([f"the last lines of {self.log}:", *last])

    def _kill(self) -> None:
        """The whole group, also where the keeper itself was killed and left its server."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process = None  # its number may be another's from now on


def reserve(port: int, host: str = HOST) -> socket.socket:
    """A port (0: a free one) that is ours while the socket is open, without listening on it.

    Raises:
        ValueError: somebody listens there.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise ValueError(
            f"generator.port = {port} can't be had for a server ({error.strerror}): free it, or set another (0: any free one)"
        ) from None
    return held
