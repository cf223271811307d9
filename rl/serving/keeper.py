"""Runs a server and takes it along when the trainer goes, however that goes: a program of its own, in vLLM's interpreter.

    python keeper.py NAME=VALUE ... -- COMMAND ...

The trainer holds the other end of our standard input. When that closes (it ended, or was killed with a signal that nobody
can catch), or when our parent is another one, the whole process group gets SIGTERM, and SIGKILL after a grace: vLLM's engine
and workers are in it. When the server ends by itself, what it left behind goes as well. Standard library alone: the
environment that runs this has no longreach.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 15.0
_LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """In the server: it dies with us, should somebody kill us alone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the group, ourselves too."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    until = time.monotonic() + GRACE_S
    while server.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


def main(arguments: list[str]) -> None:
    split, parent = arguments.index("--"), os.getppid()
    settings = dict(setting.split("=", 1) for setting in arguments[:split])
    assert os.getpgid(0) == os.getpid(), "a process group of our own: it is killed whole"
    command = arguments[split + 1 :]
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, env={**os.environ, **settings}, preexec_fn=_die_with_parent
    )
    signal.signal(signal.SIGTERM, lambda *_: _end(server))
    while server.poll() is None and os.getppid() == parent:
        if select.select([0], [], [], _LOOK_S)[0] and not os.read(0, 1):
            break
    if server.poll() is not None:
        print(f"keeper: the server ended with status {server.returncode}", flush=True)
    _end(server)


if __name__ == "__main__":
    main(sys.argv[1:])
