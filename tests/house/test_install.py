"""The mapping of kernels/, engine/ and rl/ to longreach.*: as a wheel, as an editable install, beside transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

PRODUCT = ("kernels", "engine", "rl")
ASK = """
import importlib, importlib.metadata, json, sys
modules = [importlib.import_module(name) for name in ("longreach.kernels", "longreach.engine", "longreach.rl")]
(entry,) = [entry for entry in importlib.metadata.distribution("longreach").entry_points if entry.name == "longreach"]
print(json.dumps({
    "path": list(sys.modules["longreach"].__path__),
    "files": [module.__file__ for module in modules],
    "main": entry.load().__module__,
}))
"""


def ask(command: list[str], cwd: Path) -> Any:
    """What a fresh Python prints as JSON."""
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_wheel_imports_from_where_it_was_installed(wheel_target: Path) -> None:
    # -I and -S: no current folder, no environment, no .pth files, so the editable install can't answer instead.
    libraries = sysconfig.get_path("purelib")
    start = f"import sys; sys.path[:0] = [{str(wheel_target)!r}]; sys.path.append({libraries!r})"
    answer = ask(["-I", "-S", "-c", start + ASK], wheel_target)
    assert answer["path"] == [str(wheel_target / "longreach")]
    assert answer["files"] == [str(wheel_target / "longreach" / name / "__init__.py") for name in PRODUCT]
    assert answer["main"] == "longreach.rl.cli"


@pytest.mark.parametrize("folder", PRODUCT)
def test_the_wheel_has_every_file_of_the_checkout(
    root: Path, wheel_target: Path, folder: str, files: list[Path]
) -> None:
    """Modules, recipes and the demo's base model: what lies in the three folders is the product."""
    here = {path.relative_to(root) for path in files if path.is_relative_to(root / folder)}
    inside = {path.relative_to(wheel_target / "longreach") for path in (wheel_target / "longreach").rglob("*")}
    assert here
    assert here <= inside, f"not in the wheel (package-data in pyproject.toml): {sorted(map(str, here - inside))}"


def test_the_wheel_has_no_other_top_level_package(wheel_target: Path) -> None:
    """A bare `kernels` beside longreach would be taken for another package by transformers."""
    names = {path.name for path in wheel_target.iterdir() if not path.name.endswith(".dist-info")} - {
        "bin",
        "__pycache__",
    }
    assert names == {"longreach"}


def test_the_editable_install_is_this_checkout(root: Path, tmp_path: Path) -> None:
    find = "[find_spec('longreach.' + name).origin for name in ('kernels', 'engine', 'rl')]"
    answer = ask(["-c", f"import json; from importlib.util import find_spec; print(json.dumps({find}))"], tmp_path)
    assert answer == [str(root / name / "__init__.py") for name in PRODUCT]


def test_a_model_runs_from_the_root_where_a_folder_is_called_kernels(root: Path) -> None:
    """transformers imports any top-level `kernels` it finds while it loads models: ours has to be harmless."""
    code = """
import importlib.util, torch
assert importlib.util.find_spec("kernels").origin == "ROOT/kernels/__init__.py"
from transformers import Qwen3Config, Qwen3ForCausalLM
config = Qwen3Config(vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)
model, prompt = Qwen3ForCausalLM(config), torch.arange(7)[None]
print(list(model(prompt).logits.shape), list(model.generate(prompt, min_new_tokens=2, max_new_tokens=2).shape))
"""
    code = code.replace("ROOT", str(root))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1, 7, 11] [1, 9]\n"


def test_kernels_claims_nothing_that_transformers_asks_for(root: Path) -> None:
    """No version in the range that transformers accepts, and no import of transformers from inside its own import."""
    code = """
import sys
import kernels
assert not hasattr(kernels, "__version__"), "transformers would take us for the package of that name"
assert "transformers" not in sys.modules, "a circular import while transformers loads its models"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
