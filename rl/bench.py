"""`longreach bench`: the bench of a checkout, started as a program of its own.

bench/ stands beside the product and is no part of it: it imports the product, is not in the wheel, and measures best in
a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_bench(arguments: Sequence[str]) -> int:
    """Its exit status: 0 done, 1 a failure or regression, 2 wrong input, 3 time ran out. ValueError without a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").exists():
        raise ValueError("the bench is not part of the installed package: run it from a checkout of the project")
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-P", "-m", "bench", *arguments], env=environment).returncode
