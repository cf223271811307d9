"""What may stand in the project's files: nothing of one machine, nothing too large, no command that doesn't exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

LARGEST = 8_000_000  # bytes; the demo's base model is the only file near it
# Written in pieces, so that this file does not find itself.
OF_ONE_MACHINE = re.compile(
    r"(?<![\w.:/-])/(?:root|work|Users|home/\w+|opt/\w+|tmp/\w+)/"
    r"|\bpypi" r"\.org|pythonhosted" r"\.org|registry\.npm" r"js\.org|download\.pytorch" r"\.org|deb\.debian" r"\.org"
    r"|-----BEGIN [A-Z ]*PRIVATE" r" KEY"
)  # fmt: skip


def text_of(path: Path) -> str | None:
    """None for a binary file."""
    data = path.read_bytes()
    return None if b"\0" in data[:8192] else data.decode("utf-8")


@pytest.mark.parametrize(
    "text", ["see /ro" "ot/x", "'/wo" "rk/main'", "index = https://py" "pi.org/simple", "-----BEGIN RSA PRIVATE " "KEY"]
)  # fmt: skip
def test_the_pattern_finds_what_it_is_for(text: str) -> None:
    assert OF_ONE_MACHINE.search(text)


def test_no_path_of_one_machine_and_no_registry(root: Path, files: list[Path]) -> None:
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate((text_of(path) or "").splitlines(), 1)
        if OF_ONE_MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_file_is_too_large(root: Path, files: list[Path]) -> None:
    assert not {str(path.relative_to(root)): size for path in files if (size := path.stat().st_size) > LARGEST}


def commands(page: str) -> set[str]:
    """`make X` and `longreach X` in the code of a Markdown page: fenced, indented and inline."""
    fenced = re.findall(r"^```.*?^```", page, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^(?: {4}|\t).*$", page, flags=re.MULTILINE)
    inline = re.findall(r"`[^`\n]+`", page)
    code = "\n".join([*fenced, *indented, *inline])
    return {" ".join(found) for found in re.findall(r"(?<![\w./-])(make|longreach) ([a-z][a-z-]*)", code)}


def test_commands_are_found_in_each_kind_of_code() -> None:
    page = "prose: make sure\n\n```\nmake demo\n```\n\n    make test\n\n`longreach train demo --seed 3`\n"
    assert commands(page) == {"make demo", "make test", "longreach train"}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_commands_of_a_page_exist(root: Path, name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for command in sorted(commands((root / name).read_text(encoding="utf-8"))):
        tool, word = command.split()
        if tool == "make":
            assert word in targets, f"{name} speaks of `make {word}`; the Makefile has {sorted(targets)}"
        else:
            console = Path(sys.executable).with_name("longreach")
            done = subprocess.run([str(console), word, "--help"], capture_output=True, text=True)
            assert done.returncode == 0, f"{name} speaks of `{command}`:\n{done.stdout}{done.stderr}"


def test_paths_named_in_the_contributor_guide_exist(root: Path) -> None:
    page = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:kernels|engine|rl|tests|bench|\.ci)/[\w./-]*)`", page):
        assert (root / name).exists(), name
