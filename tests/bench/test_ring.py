from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import results, ring

ABOUT: dict[str, Any] = {
    "op": "ring", "dims": {"P": 8, "ranks": 4}, "dtype": "float32", "pass": "both", "contender": "longreach, ring",
    "device": "a CPU", "threads": 1,
}  # fmt: skip


def test_the_share_is_of_the_busiest_rank_s_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    for what in ("forward", "both"):
        ring.write(path, {**ABOUT, "pass": what}, [(2.0, 0.5), (4.0, 1.5), (3.0, 1.0)], alone=3.0)
        ring.write(path, {**ABOUT, "pass": what, "contender": "a peer"}, "not here", alone=4.5)
    rows = results.load(path)
    assert [row["share_of_ideal"] for row in rows if row["status"] == "measured"] == [0.75, 0.75]  # 3 / (4 x 1)
    capsys.readouterr()
    ring.show(rows)
    shown = capsys.readouterr().out
    assert "3000 ms" in shown and "75 %" in shown and "gap: a peer, P=8: not here" in shown


@pytest.mark.slow
def test_two_processes_measure_every_schedule_and_name_what_does_not_run(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "rows.json"
    ended = subprocess.run(
        [sys.executable, "-m", "bench.ring", "--small", "--ranks", "2", "--rounds", "1", "--out", str(path)],
        capture_output=True, text=True, timeout=240, cwd=root,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = results.load(path)
    done = {row["contender"] for row in rows if row["status"] == "measured"}
    assert {"longreach, one rank", "longreach, ring", "longreach, all-gather", "longreach, ulysses"} <= done
    reasons = {row["contender"]: row["reason"] for row in rows if row["status"] == "gap" and row["dims"]["G"] == 0}
    assert {"ring-flash-attn, zigzag", "ring-flash-attn, llama3", "torch context parallel"} == reasons.keys()
    assert all("missing" in reason for name, reason in reasons.items() if "flash" in name)
    assert "sharding strategy" in reasons["torch context parallel"]  # on a CPU it has none
