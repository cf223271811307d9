"""`longreach report RUN`: one self-contained HTML page for a run, finished or not.

Everything the page shows is embedded in it as JSON and drawn by the script beside it: no server, no network, no
library. A completion is a stranger's text, so it may hold HTML: the JSON is escaped so that no `<` stands in it, the
script only ever sets text (never markup), and the page's content security policy runs our script and style by their
hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

from .report_agreement import read_agreement
from .report_behaviours import read_behaviours
from .report_data import Notes, Row, embed, read_accuracy, read_metrics, read_recipe, stage_rank
from .report_pool import read_pools
from .report_samples import read_samples
from .report_timeline import read_time

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("report_charts.js", "report.js")


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html from what the run folder holds by now, and return its path. ValueError: no such folder."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: give a run folder, such as the one `longreach train` wrote")
    page = render(collect(run_dir))
    path = run_dir / "report.html"
    # Written aside and renamed: a browser that reloads during training never sees half a page.
    aside = path.with_suffix(".html.part")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def collect(run_dir: Path) -> Row:
    """Everything the page shows, as JSON-able data without NaN or infinities."""
    notes: Notes = []
    data: Row = {
        "run": run_dir.resolve().name,
        "recipe": read_recipe(run_dir, notes),
        "metrics": read_metrics(run_dir, notes),
        "accuracy": read_accuracy(run_dir, notes),
        "pools": read_pools(run_dir, notes),
        "agreement": read_agreement(run_dir, notes),
        "behaviours": read_behaviours(run_dir, notes),
        "time": read_time(run_dir, notes),
        "samples": read_samples(run_dir, notes),
    }
    return data | {"status": _status(run_dir, data), "notes": notes}


def _status(run_dir: Path, data: Row) -> Row:
    """Finished means that RUN/model, the last thing a run writes, is there.

    A stopped run and a running one look the same from outside, so the page says when the last step was logged.
    """
    evaluated = [stage["name"] for stage in data["accuracy"]["stages"] if stage["buckets"] or stage["benchmarks"]]
    trained = list(dict.fromkeys(data["metrics"]["stage"]))
    planned = {*trained, *(f"phase{index + 1}" for index in range(data["recipe"]["phases"] or 0))}
    metrics = run_dir / "metrics.jsonl"
    logged = datetime.fromtimestamp(metrics.stat().st_mtime, UTC) if metrics.is_file() else None
    return {
        "finished": (run_dir / "model").is_dir(),
        "waiting": sorted(planned - set(evaluated), key=stage_rank),
        "logged": f"{logged:%Y-%m-%d %H:%M} UTC" if logged else None,
    }


def render(data: Row) -> str:
    """The whole page as text."""
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": style, "DATA": embed(data), "SCRIPT": script}
    head, *rest = (ASSETS / "report.html").read_text(encoding="utf-8").split("{{")
    # One pass over the template, so that a `{{` inside the data is never taken for a slot.
    return head + "".join(parts[name] + tail for name, tail in (piece.split("}}", 1) for piece in rest))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
