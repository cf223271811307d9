"""The four behaviours on the page: what `longreach behaviours` has written, where it has been run."""

from __future__ import annotations

from pathlib import Path

from .report_data import Notes, Row, read_json


def read_behaviours(run_dir: Path, notes: Notes) -> Row | None:
    """The content of behaviours.json; None where there is none."""
    found = read_json(run_dir / "behaviours.json", notes)
    return found if found is not None and found.get("points") else None
