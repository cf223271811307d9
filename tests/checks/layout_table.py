"""The layout section of README.md: a phrase for every file, taken from the first line of its docstring.

`python tests/checks/layout_table.py . --write` brings README.md up to date; without `--write` it prints the section.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

BEGIN, END = "<!-- layout: made by `make layout` -->", "<!-- end of layout -->"
TOPS = ("kernels", "engine", "rl")


def phrase(path: Path) -> str:
    """The first sentence of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return first.rstrip(".").replace("|", "\\|")


def folders(root: Path) -> list[str]:
    """The product's packages: each of the three with those inside it."""
    found = (path.parent for top in TOPS for path in sorted((root / top).rglob("__init__.py")))
    return [folder.relative_to(root).as_posix() for folder in found]


def section(root: Path) -> str:
    """One list a folder."""
    parts = []
    for folder in folders(root):
        files = sorted(path for path in (root / folder).glob("*.py") if path.name != "__init__.py")
        lines = [f"**{folder}/** {phrase(root / folder / '__init__.py')}", ""]
        lines += [f"- `{path.name}`: {phrase(path)}" for path in files]
        parts.append("\n".join(lines))
    return f"{BEGIN}\n" + "\n\n".join(parts) + f"\n{END}"


def updated(readme: str, root: Path) -> str:
    """README's text with the section as it should be now."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + section(root) + tail


if __name__ == "__main__":
    here = Path(sys.argv[1])
    if "--write" in sys.argv:
        readme = here / "README.md"
        readme.write_text(updated(readme.read_text(encoding="utf-8"), here), encoding="utf-8")
    else:
        print(section(here))
