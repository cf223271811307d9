"""`python -m longreach.kernels.check`: green on a right kernel, red on a broken one, whatever the caller's environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longreach.kernels import check
from longreach.kernels.checks import load, names
from longreach.kernels.checks.case import Comparison, NumericCase, Work
from longreach.kernels.checks.floor import floor
from longreach.kernels.checks.mutation import write
from longreach.kernels.checks.numerics import require_interpreter, run_case
from longreach.kernels.checks.three_way import judge
from longreach.kernels.checks.worker import read

pytest.importorskip("triton", reason="Triton has no wheels for this system")
TRIAL = Path(__file__).parent / "trial"


def run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True)


def package_with(source: Path, target: Path) -> None:
    """A copy of kernels/ as `target`, with the trial matmul as one of its ops."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TRIAL, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def trial(root: Path, tmp_path: Path) -> Path:
    package_with(root / "kernels", tmp_path / "trial")
    return tmp_path / "trial"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.py")}


def test_a_right_kernel_passes_all_four_parts(trial: Path) -> None:
    """Also where the caller's own processes are interpreted, which would leave nothing to compile."""
    before = contents(trial)
    done = run(trial.parent, "trial.check", "matmul", "--arch", "90", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "matmul: all passed"
    for line in ("forward", "33x31x40  fp16", "90  matmul bf16", "last block of depth dropped"):
        assert any(row.startswith(line) for row in done.stdout.splitlines()), done.stdout
    assert contents(trial) == before


def test_a_broken_kernel_fails(trial: Path) -> None:
    edit(trial / "matmul.py", "tl.store(p_out, total,", "tl.store(p_out, -total,")
    done = run(trial.parent, "trial.check", "matmul", "--skip", "compile", "floor", "mutants")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert "element " in done.stdout  # says where, and by how much
    assert done.stdout.splitlines()[-1] == "matmul: 4 failed"


def test_a_mutant_that_survives_fails(trial: Path) -> None:
    edit(trial / "checks" / "matmul.py", '"o_col < n_cols - 1"', '"n_cols > o_col"')
    done = run(trial.parent, "trial.check", "matmul", "--skip", "compile", "numerics")
    assert done.returncode == 1
    assert "no numeric case caught it" in done.stdout
    assert done.stdout.splitlines()[-1] == "matmul: 1 failed"


def test_a_mutant_of_a_text_that_is_gone_fails(trial: Path) -> None:
    edit(trial / "matmul.py", "o_col < n_cols", "n_cols > o_col")
    done = run(trial.parent, "trial.check", "matmul", "--skip", "compile", "numerics")
    assert done.returncode == 1
    assert "last block of depth dropped" in done.stdout  # the rows before it are shown
    assert "stands there 0 times: 'o_col < n_cols'" in done.stderr
    assert "FAILED: mutants ended with exit code 1" in done.stdout


def test_a_part_without_cases_fails(trial: Path) -> None:
    edit(trial / "checks" / "matmul.py", "MUTANTS = (", "MUTANTS = () and (")
    done = run(trial.parent, "trial.check", "matmul", "--skip", "compile", "numerics")
    assert done.returncode == 1
    assert "FAILED: mutants has no case" in done.stdout


UNFIT = """

from dataclasses import replace

fitting = compile_cases


def compile_cases(arch):
    half, single = fitting(arch)
    return [
        replace(half, label="spills", constexprs={"ROWS": 256, "COLS": 256, "DEPTH": 16}),
        replace(half, label="too much shared memory", constexprs={"ROWS": 128, "COLS": 128, "DEPTH": 128}, num_stages=6),
        replace(half, label="unexpected tensor cores", tensor_cores=False),
        replace(single, label="no tensor cores", tensor_cores=True),
        replace(half, label="fits"),
    ]
"""


def test_what_does_not_fit_the_hardware_is_found(trial: Path) -> None:
    with (trial / "checks" / "matmul.py").open("a", encoding="utf-8") as file:
        file.write(UNFIT)
    into = trial.parent / "rows"
    done = run(trial.parent, "trial.checks.worker", "compile", "matmul", "--into", str(into), "--arch", "90")
    assert done.returncode == 0, done.stderr
    found = {row.label: row.problems for row in read("compile", into)}
    words = {
        "spills": "registers are spilled",
        "too much shared memory": "bytes of shared memory, sm_90 has 232448",
        "unexpected tensor cores": "TF32",
        "no tensor cores": "no wgmma instruction",
    }
    assert found.pop("fits") == []
    assert set(found) == set(words)
    for label, problems in found.items():
        assert any(words[label] in problem for problem in problems), (label, problems)


@pytest.mark.slow
def test_linear_logprob_is_right_and_its_mutants_are_caught(root: Path) -> None:
    """Its compiled code is checked in test_compile.py."""
    done = run(root, "longreach.kernels.check", "linear_logprob", "--skip", "compile")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "linear_logprob: all passed"
    for mutant in load("linear_logprob").MUTANTS:
        assert mutant.label in done.stdout


def test_linear_logprob_with_a_fault_fails(root: Path, tmp_path: Path) -> None:
    fault = next(mutant for mutant in load("linear_logprob").MUTANTS if mutant.label == "no temperature")
    write(fault, tmp_path / "faulty")
    done = run(tmp_path, "faulty.check", "linear_logprob", "--skip", "compile", "floor", "mutants")
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = (
        line
        for line in done.stdout.splitlines()
        if line.startswith("odd sizes, T=0.7; two passes  ") and "fp32" in line
    )
    assert row.endswith("FAILED")
    (right,) = (line for line in done.stdout.splitlines() if line.startswith("peaked; two passes  ") and "fp32" in line)
    assert not right.endswith("FAILED")  # its temperature is 1


def comparison(dtype: torch.dtype) -> NumericCase:
    values = torch.arange(1.0, 4.0)
    return NumericCase("a case", dtype, lambda: iter([Comparison("c", values.bfloat16(), values, values.double())]))


def test_bf16_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.bfloat16 can't be interpreted"):
        run_case(comparison(torch.bfloat16))
    with pytest.raises(ValueError, match="c is bfloat16, which can't be interpreted"):
        run_case(comparison(torch.float32))


def test_a_case_that_compares_nothing_fails() -> None:
    def nothing() -> Iterator[Comparison]:
        return iter(())

    assert run_case(NumericCase("empty", torch.float32, nothing)).problems == ["it compares nothing"]


def test_numbers_are_taken_from_the_interpreter_only() -> None:
    from triton import knobs

    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            require_interpreter()
        knobs.runtime.interpret = True
        require_interpreter()


def test_share_of_the_allowed_error() -> None:
    exact = torch.tensor([1.0, 8.0], dtype=torch.float64)
    plain = exact.float()
    room = 8 * 8.0 * torch.finfo(torch.float32).eps
    half, more = (exact + torch.tensor([part * room, 0.0], dtype=torch.float64) for part in (0.5, 1.5))
    assert judge(half, plain, exact).ok and judge(half, plain, exact).share == pytest.approx(0.5, rel=1e-3)
    assert not judge(more, plain, exact).ok and judge(more, plain, exact).share == pytest.approx(1.5, rel=1e-3)
    zero = torch.zeros(2, dtype=torch.float64)
    assert judge(zero.float(), zero.float(), zero)[:2] == (True, 0.0)


def test_the_floor_is_the_slower_of_compute_and_memory() -> None:
    compute = floor(Work("forward", 2e12, 1e9), tflops=500.0, terabytes=4.0)
    assert (compute.milliseconds, compute.bound) == (pytest.approx(4.0), "compute")
    memory = floor(Work("forward", 1e9, 2e9), tflops=500.0, terabytes=4.0)
    assert (memory.milliseconds, memory.bound) == (pytest.approx(0.5), "memory")
    with pytest.raises(ValueError, match="ceiling of bytes a second must be positive, got 0"):
        floor(Work("forward", 1.0, 1.0), terabytes=0.0)


def test_names_are_those_of_described_ops(trial: Path) -> None:
    done = run(trial.parent, "trial.check", "--list")
    assert done.stdout.split() == sorted([*names(), "matmul"])
    wrong = run(trial.parent, "trial.check", "matmal")
    assert wrong.returncode == 2
    assert "no check is called 'matmal': did you mean matmul?" in wrong.stderr
    assert "floor" not in names()  # the machinery is no op
    with pytest.raises(ValueError, match="no check is called 'floor'"):
        load("floor")


def test_wrong_arguments_are_refused(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "which kernel?"),
        (["matmul", "--skip", *check.PARTS], "nothing would be checked"),
        (["matmul", "--shape", "N=many"], "'N=many' is no size"),
        (["matmul", "--arch", "70"], "invalid choice: 70"),
    ):
        with pytest.raises(SystemExit) as stopped:
            check.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    done = run(trial.parent, "trial.check", "matmul", "--shape", "X=8")
    assert done.returncode == 2
    assert "matmul has no size 'X': choose from N, V, D" in done.stderr


def test_sizes_and_ceilings_move_the_floor(trial: Path) -> None:
    command = ["trial.check", "matmul", "--skip", "numerics", "compile", "mutants"]
    done = run(trial.parent, *command, "--shape", "N=4000", "D=1000", "V=1000", "--tflops", "2", "--terabytes", "1")
    assert done.returncode == 0
    label, tflop, gigabytes, milliseconds, bound = done.stdout.splitlines()[2].split()
    assert (label, float(tflop), float(milliseconds), bound) == ("forward", 0.008, 4.0, "compute")
    assert float(gigabytes) == pytest.approx(0.026)
    slower = run(
        trial.parent, *command, "--shape", "N=4000", "D=1000", "V=1000", "--tflops", "2", "--terabytes", "0.001"
    )
    assert slower.stdout.splitlines()[2].split()[-2:] == ["26", "memory"]
