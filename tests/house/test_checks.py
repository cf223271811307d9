"""The checks of `make test` hold for this checkout, and catch what they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def check(root: Path, name: str, tree: Path) -> subprocess.CompletedProcess[str]:
    script = root / "tests" / "checks" / name
    return subprocess.run([sys.executable, str(script), str(tree)], capture_output=True, text=True)


@pytest.fixture
def tree(root: Path, tmp_path: Path) -> Path:
    """A small product without fault."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    for path, text in {
        "kernels/__init__.py": "import math\nimport torch\n",
        "engine/__init__.py": "from ..kernels import x\nimport transformers\n",
        "engine/lora.py": "import peft\n",
        "engine/model.py": "def load():\n    from .lora import add_lora\n",
        "rl/__init__.py": "from .. import engine, kernels\nimport datasets, httpx\n",
        "rl/inner/__init__.py": "from ...engine.model import load\nfrom ..cli import main\n",
        "rl/log.py": "class Log:\n    def __init__(self):\n        import wandb\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["import_direction.py", "size_table.py"])
def test_the_checkout_and_a_faultless_tree_pass(root: Path, tree: Path, name: str) -> None:
    for place in (tree, root):
        done = check(root, name, place)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("kernels/a.py", "from ..engine import load_model", "kernels/ imports engine/"),
        ("kernels/a.py", "from .. import rl", "kernels/ imports rl/"),
        ("kernels/a/b.py", "from ...engine.packing import Group", "kernels/ imports engine/"),
        ("engine/a.py", "def f():\n    from ..rl.data import Example", "engine/ imports rl/"),
        ("engine/a.py", "if TYPE_CHECKING:\n    from ..rl.data import Example", "engine/ imports rl/"),
        ("engine/a.py", "try:\n    pass\nfinally:\n    from ..rl.data import Example", "engine/ imports rl/"),
        ("rl/a.py", "from longreach.kernels import attention", "absolutely"),
        ("rl/a.py", "import longreach.kernels as k", "absolutely"),
        ("engine/a.py", "import kernels", "absolutely"),
        ("rl/a.py", "from ..bench import timing", "leaves kernels/, engine/ and rl/"),
        ("rl/a.py", "from ...outside import x", "leaves kernels/, engine/ and rl/"),
        ("kernels/a.py", "import transformers", "kernels/ may not import transformers"),
        ("kernels/a.py", "def f():\n    import peft", "kernels/ may not import peft"),
        ("engine/a.py", "import datasets.utils", "engine/ may not import datasets"),
        ("engine/a.py", "from .lora import add_lora", "needs the optional peft"),
        ("engine/a.py", "from . import lora", "needs the optional peft"),
        ("rl/a/__init__.py", "import wandb", "a package may not need it"),
        ("rl/a.py", "def f():\n    import pandas", "rl/ may not import pandas"),
    ],
)
def test_a_planted_import_is_found(root: Path, tree: Path, path: str, text: str, complaint: str) -> None:
    (tree / path).parent.mkdir(exist_ok=True)
    (tree / path).write_text(text)
    done = check(root, "import_direction.py", tree)
    assert done.returncode == 1, done.stdout + done.stderr
    (line, total) = done.stdout.splitlines()
    assert line.startswith(f"{path}:")
    assert complaint in line
    assert total.endswith("1 violations")


def function(lines: int) -> str:
    return "class Noun:\n    def f(self):\n" + "        pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("rl/a.py", function(60), None),
        ("rl/a.py", function(61), "rl/a.py:2 f: 61 lines, limit 60"),
        ("engine/a.py", "\n" * 500, None),
        ("engine/a.py", "\n" * 501, "engine/a.py: 501 lines, limit 500"),
        ("tests/a.py", function(600), None),
    ],
)
def test_limits_of_size(root: Path, tree: Path, path: str, text: str, complaint: str | None) -> None:
    (tree / path).parent.mkdir(exist_ok=True)
    (tree / path).write_text(text)
    done = check(root, "size_table.py", tree)
    assert done.returncode == (complaint is not None), done.stdout + done.stderr
    assert path.split("/")[0] + "/" in done.stdout
    if complaint:
        assert complaint in done.stdout


def test_readme_lists_every_file_with_its_phrase(root: Path, tree: Path) -> None:
    script = root / "tests" / "checks" / "layout_table.py"
    printed = subprocess.run(
        [sys.executable, str(script), str(root)], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() in (root / "README.md").read_text(encoding="utf-8"), "run `make layout`"
    (tree / "kernels" / "new.py").write_text('"""A new noun.\n"""\n')
    assert (
        "- `new.py`: A new noun"
        in subprocess.run([sys.executable, str(script), str(tree)], capture_output=True, text=True).stdout
    )
