"""`longreach bench`: every option reaches the bench, and an installed package says what it lacks."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from bench import results, roofline
from bench.__main__ import main, status
from bench.runner import Report
from longreach.rl import cli


def test_options_reach_the_bench(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "a.json")
    assert cli.main(["bench", "--compare", missing, missing, "--threshold=0.1"]) == 2
    assert capfd.readouterr().err.strip() == f"bench: there is no file {missing}"


def test_without_a_checkout(tmp_path: Path, root: Path) -> None:
    alone = tmp_path / "longreach" / "rl" / "bench.py"
    alone.parent.mkdir(parents=True)
    shutil.copy(root / "rl" / "bench.py", alone)
    found = importlib.util.spec_from_file_location("bench_command_alone", alone)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    with pytest.raises(ValueError, match="run it from a checkout"):
        module.run_bench([])


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attentoin"]) == 2
    assert capsys.readouterr().err == "bench: there is no bench named 'attentoin': did you mean 'attention'?\n"


def test_measuring_goes_on_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(roofline.MATMUL_SIDE, "cpu", 64)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 20)
    rows = tmp_path / "rows.json"
    command = ["attention", "--device=cpu", "--shapes=small", "--dtype=float32", "--seconds=0", f"--out={rows}"]
    assert main([*command, "--budget=0"]) == 3
    assert "1 cases are left" in capsys.readouterr().out
    assert not rows.exists()
    assert main(command) == 0
    before = [row for row in results.load(rows) if row["status"] == "measured"]
    shown = capsys.readouterr().out
    assert "attention, T=128 S=128 H=4 K=2 E=32 causal=1, float32" in shown
    assert "longreach, cpu" in shown
    assert f"picture: {tmp_path / 'rows.png'}" in shown
    assert (tmp_path / "rows.png").exists()
    assert main(command) == 0
    assert "12 stood already" in capsys.readouterr().out
    assert [row for row in results.load(rows) if row["status"] == "measured"] == before


@pytest.mark.parametrize(
    ("report", "expected"), [(Report(written=3), 0), (Report(failed=1), 1), (Report(left=2, failed=1), 3)]
)
def test_status(report: Report, expected: int) -> None:
    assert status(report) == expected
