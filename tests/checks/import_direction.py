"""Checks that imports point one way, rl -> engine -> kernels, and that each folder imports only what it may.

Usage: `python tests/checks/import_direction.py ROOT`. It reads syntax trees and imports nothing, so it sees imports
inside functions and under TYPE_CHECKING too: who knows whom is what counts, not when. What it gives up: imports by name
(`importlib.import_module`) are invisible to it.

Third-party packages: kernels/ and engine/ have short lists of their own; rl/ may use what pyproject.toml declares.
The product imports without its optional extras: one is imported inside a function, or at the top of a module that is
itself imported inside functions only.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ORDER = ("kernels", "engine", "rl")
KERNELS = frozenset({"torch", "triton", "numpy"})
ENGINE = KERNELS | {"transformers", "safetensors"}


@dataclass(frozen=True)
class Reference:
    """One name that one import statement refers to, and where."""

    path: Path  # relative to the root
    line: int
    name: str  # absolute, dotted
    relative: bool
    inside: bool  # a function

    @property
    def folder(self) -> str:
        return self.path.parts[0]


def imports(tree: ast.AST, inside_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement with whether it stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside_function
        else:
            yield from imports(node, inside_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def targets(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> list[str]:
    """Absolute dotted names that one statement of a module in `package` refers to."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if node.level == 0:
        return [node.module or ""]
    if node.level > len(package):
        return ["(beyond the top-level package)"]
    base = ".".join((*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ())))
    names = [f"{base}.{alias.name}" for alias in node.names]  # modules, as far as there are such
    return [base, *names] if node.module else names


def distributions(requirements: list[str]) -> set[str]:
    """Module names of requirement strings (our dependencies are all imported under their own name)."""
    return {re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].replace("-", "_").lower() for text in requirements}


def allowed(root: Path) -> tuple[dict[str, frozenset[str]], set[str]]:
    """Per folder the third-party modules it may always import, and the optional extras."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = frozenset(distributions(project.get("dependencies", [])))
    extras = project.get("optional-dependencies", {})
    optional = distributions([text for name, texts in extras.items() if name != "dev" for text in texts])
    return {"kernels": KERNELS, "engine": ENGINE, "rl": ENGINE | declared}, optional


def references(root: Path) -> Iterator[Reference]:
    """Every import of the product."""
    for folder in ORDER:
        for path in sorted((root / folder).rglob("*.py")):
            where = path.relative_to(root)
            for node, inside in imports(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                for name in targets(node, ("longreach", *where.parent.parts)):
                    yield Reference(where, node.lineno, name, relative, inside)


def violations(root: Path) -> list[str]:
    """One line per import that must not be there."""
    always, extras = allowed(root)
    found = list(references(root))
    optional = {
        dotted(ref.path): ref.name for ref in found if not ref.inside and not ref.relative and top(ref.name) in extras
    }
    problems: list[str] = []
    for ref in found:
        if ref.relative:
            problem = relative_problem(ref, optional)
        elif top(ref.name) in ("longreach", *ORDER):
            problem = f"imports {ref.name} absolutely: inside the product imports are relative"
        else:
            problem = foreign_problem(ref, always[ref.folder], extras)
        if problem:
            problems.append(f"{ref.path}:{ref.line}: {problem}")
    return list(dict.fromkeys(problems))  # a statement with several names has one fault


def top(name: str) -> str:
    return name.split(".")[0]


def dotted(path: Path) -> str:
    """engine/lora.py -> longreach.engine.lora; a package's __init__.py -> the package."""
    parts = path.with_suffix("").parts
    return ".".join(("longreach", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def relative_problem(ref: Reference, optional: dict[str, str]) -> str | None:
    parts = ref.name.split(".")
    if parts[0] != "longreach" or len(parts) < 2 or parts[1] not in ORDER:
        return f"relative import leaves kernels/, engine/ and rl/: {'.'.join(parts[:2])}"
    if ORDER.index(parts[1]) > ORDER.index(ref.folder):
        return f"{ref.folder}/ imports {parts[1]}/, but imports point rl -> engine -> kernels"
    if ref.name in optional and not ref.inside:
        return f"{ref.name} needs the optional {optional[ref.name]}: import it inside the function that uses it"
    return None


def foreign_problem(ref: Reference, always: frozenset[str], extras: set[str]) -> str | None:
    module = top(ref.name)
    if module in sys.stdlib_module_names or module in always:
        return None
    if module in extras and ref.folder != "kernels":
        if not ref.inside and ref.path.name == "__init__.py":
            return f"{module} is an optional extra: a package may not need it to be imported"
        return None
    return f"{ref.folder}/ may not import {module} (allowed: the standard library, {', '.join(sorted(always))})"


def main() -> int:
    root = Path(sys.argv[1])
    try:
        found = violations(root)
    except SyntaxError as error:
        print(f"{error.filename}:{error.lineno}: {error.msg}")
        return 1
    for line in found:
        print(line)
    count = sum(1 for folder in ORDER for _ in (root / folder).rglob("*.py"))
    print(f"import direction: {count} files, {len(found)} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
