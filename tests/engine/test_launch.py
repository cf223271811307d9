"""A rank that dies, hangs, fails or never comes ends the run on all ranks, in time, with one message that names it.

Every case runs two real processes; the operations are those of a step, the collectives go through gloo.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine.launch import Job, join
from longreach.engine.mesh import ParallelConfig

SCRIPT = Path(__file__).with_name("launch_rank.py")
TIMEOUT_S = 4.0
START_S = 40.0
"""Two processes import torch, on a machine that has other things to do."""


class Run:
    """Two ranks of one mode."""

    def __init__(self, start: Callable[..., list[Any]], folder: Path, mode: str, timeout_s: float, agent: bool) -> None:
        self.folder = folder
        self.ranks = start(2, SCRIPT, mode, timeout_s, folder, agent=agent)

    def reach(self, step: int) -> float:
        """Waits until rank 0 has done a step and both are in the next one; gives when that was."""
        until, file = time.monotonic() + START_S, self.folder / "step-0"
        while not (file.exists() and int(file.read_text() or 0) >= step):
            assert time.monotonic() < until, self.words()
            time.sleep(0.02)
        begun = time.monotonic()
        time.sleep(0.4)
        return begun

    def wait(self) -> list[int]:
        return [rank.wait(START_S) for rank in self.ranks]

    def words(self) -> str:
        """What both said on stderr."""
        return "".join(rank.err.read_text() for rank in self.ranks)

    def said(self) -> str:
        """Our own words of it."""
        return "\n".join(line for line in self.words().splitlines() if "longreach:" in line)


@pytest.fixture
def run(start_ranks: Callable[..., list[Any]], tmp_path: Path) -> Callable[..., Run]:
    return lambda mode, timeout_s=TIMEOUT_S, agent=True: Run(start_ranks, tmp_path, mode, timeout_s, agent)


@pytest.mark.parametrize("mode, status", [("none", [0, 0]), ("busy", [0, 0])])
def test_a_run_without_failure_ends_well(run: Callable[..., Run], mode: str, status: Sequence[int]) -> None:
    ranks = run(mode, 1.0 if mode == "none" else 2.0)
    assert ranks.wait() == status, ranks.words()
    assert ranks.said() == ""


def test_a_killed_rank_is_named_with_its_step_and_operation(run: Callable[..., Run]) -> None:
    ranks = run("die")
    begun = ranks.reach(2)
    assert ranks.wait() == [1, -signal.SIGKILL], ranks.words()
    assert time.monotonic() - begun < TIMEOUT_S + 20.0
    assert "rank 1 of 2 no longer answers: last seen rank 1 in update of step 3" in ranks.said()
    assert "Traceback" not in ranks.words()


def test_a_rank_that_hangs_ends_all_ranks_within_the_timeout(run: Callable[..., Run]) -> None:
    ranks = run("hang")
    begun = ranks.reach(2)
    assert ranks.wait() == [1, 1], ranks.words()
    assert TIMEOUT_S - 0.5 < time.monotonic() - begun < TIMEOUT_S + 20.0
    message = ranks.said()
    assert message.count("longreach:") == 1, message
    assert (
        "rank 1 of 2 kept the others waiting for more than parallel.timeout_s = 4 s: rank 1 in update of step 3"
        in message
    )


def test_a_frozen_process_is_named_like_a_dead_one(run: Callable[..., Run]) -> None:
    ranks = run("stop")
    ranks.reach(2)
    assert ranks.ranks[0].wait(START_S) == 1
    ranks.ranks[1].send(signal.SIGKILL)
    ranks.wait()
    assert "rank 1 in update of step 3" in ranks.said()


def test_a_users_error_on_one_rank_is_the_only_message(run: Callable[..., Run]) -> None:
    ranks = run("user", 300.0)
    begun = ranks.reach(2)
    assert ranks.wait() == [2, 2], ranks.words()
    assert time.monotonic() - begun < 60.0
    assert ranks.said() == "longreach: sft.upper = 3 is too small: raise it"
    assert "Traceback" not in ranks.words()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_users_error_where_rank_0_has_the_store(run: Callable[..., Run], rank: int) -> None:
    """So it is when torchrun is given no rendezvous."""
    ranks = run(f"user{rank}", 300.0, agent=False)
    assert ranks.wait() == [2, 2], ranks.words()
    assert ranks.said() == "longreach: sft.upper = 3 is too small: raise it"


def test_the_death_of_the_rank_that_has_the_store_ends_the_other(run: Callable[..., Run]) -> None:
    ranks = run("die0", 300.0, agent=False)
    assert ranks.wait() == [-signal.SIGKILL, 1], ranks.words()
    assert "rank 1 lost the launcher's store, so rank 0 or its node is gone" in ranks.said()


def test_an_error_before_the_ranks_have_met_ends_the_others_too(run: Callable[..., Run]) -> None:
    ranks = run("early", 300.0)
    assert ranks.wait() == [2, 2], ranks.words()
    assert ranks.said() == "longreach: unknown key 'rl.grup_size'"


def test_a_bug_shows_its_traceback_and_ends_the_others(run: Callable[..., Run]) -> None:
    ranks = run("bug", 300.0)
    assert ranks.wait() == [1, 1], ranks.words()
    assert "KeyError: 'nothing of that name'" in ranks.ranks[1].err.read_text()
    assert "Traceback" not in ranks.ranks[0].err.read_text()


def test_a_rank_that_never_comes_is_named(run: Callable[..., Run]) -> None:
    ranks = run("late")
    assert ranks.ranks[0].wait(START_S) == 2
    ranks.ranks[1].send(signal.SIGKILL)
    ranks.wait()
    assert "1 of 2 ranks have started; not within parallel.timeout_s = 4 s: 1" in ranks.said()


def test_sigterm_names_the_rank_that_the_launcher_has_seen_die(run: Callable[..., Run]) -> None:
    """torchrun ends the others so, often before a collective has noticed."""
    ranks = run("hang", 300.0)
    ranks.reach(2)
    ranks.ranks[1].send(signal.SIGKILL)
    ranks.ranks[0].send(signal.SIGTERM)
    assert ranks.wait() == [1, -signal.SIGKILL], ranks.words()
    assert "rank 1 of 2 no longer answers: last seen rank 1 in update of step 3" in ranks.said()


def test_sigterm_alone_says_so(run: Callable[..., Run]) -> None:
    ranks = run("hang", 300.0)
    ranks.reach(2)
    ranks.ranks[0].send(signal.SIGTERM)
    assert ranks.wait() == [143, 143], ranks.words()
    assert ranks.said() == "longreach: rank 0 was told to end (SIGTERM) in update of step 3"


def test_one_process_without_torchrun_is_alone() -> None:
    with join() as job:
        assert (job.rank, job.size, job.watchdog) == (0, 1, None)
        assert job.connect(ParallelConfig(), torch.device("cpu")) is None
        assert job.fail("why", 2)
        with pytest.raises(ValueError, match="this process is alone: start 4 or a multiple of it with torchrun"):
            Job().connect(ParallelConfig(ring=2, ulysses=2), torch.device("cpu"))
