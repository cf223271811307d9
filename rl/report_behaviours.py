"""The four behaviours on the page: what `longreach behaviours` has written, where it has been run."""

from __future__ import annotations

from pathlib import Path

from .report_data import Notes, Row, read_json

_KEYS = ("behaviours", "samples", "judge", "points", "comparison")


def read_behaviours(run_dir: Path, notes: Notes) -> Row | None:
    """The content of behaviours.json; None where there is none."""
    found = read_json(run_dir / "behaviours.json", notes)
    if found is None:
        return None
    if any(key not in found for key in _KEYS):
        notes.append("behaviours.json is of another version and is left out: run `longreach behaviours` again.")
        return None
    return found
