"""Starts Python scripts by forking a process that has imported everything: half a second instead of half a minute.

Reads a JSON line for each process to start ({"script", "argv", "env", "cwd", "out", "err"}) and answers with a line
{"pid"}; when one ends, with {"pid", "status"} (negative: the signal). Started by the `start_ranks` fixture. A child is a process
like any other: its own environment, files for its words, signals as by default.
"""

from __future__ import annotations

import json
import os
import runpy
import selectors
import signal
import sys
import threading
import traceback
from typing import Any

import torch

import longreach.rl.cli  # noqa: F401  (imported for the children)


def child(wanted: dict[str, Any]) -> None:
    """Runs the script as `python SCRIPT ...` would, and never returns."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    for descriptor, path in ((1, wanted["out"]), (2, wanted["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [wanted["script"], *wanted["argv"]]
    sys.path[0] = os.path.dirname(wanted["script"])
    status = 1
    try:
        runpy.run_path(wanted["script"], run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0) if not isinstance(stop.code, str) else 1
    except BaseException:  # as the interpreter does at its end
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    assert threading.active_count() == 1, "a thread would not survive the fork"
    ear, bell = os.pipe()
    os.set_blocking(bell, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell)
    ready = selectors.DefaultSelector()
    ready.register(0, selectors.EVENT_READ)
    ready.register(ear, selectors.EVENT_READ)
    buffered = b""
    while True:
        for key, _ in ready.select():
            got = os.read(key.fd, 1 << 16)
            if key.fd == 0 and not got:
                return
            if key.fd == ear:
                reap()
                continue
            *lines, buffered = (buffered + got).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    child(json.loads(line))
                print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    main()
