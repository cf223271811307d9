"""What a run says while it runs: a progress bar on a terminal, plain lines anywhere else, one metrics line a step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("completions/mean_length", "length", "{:.0f}"),
    ("clip_ratio/region_mean", "clip", "{:.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("learning_rate", "lr", "{:.1e}"),
    ("perf/throughput", "tok/s", "{:.0f}"),
    ("timing_s/step", "s", "{:.2f}"),
)
_PLAIN_EVERY_S = 15.0
_BAR_AFTER_S = 2.0


class Advance(Protocol):
    def __call__(self, count: int = 1) -> None: ...


class Console:
    """Where a run reports to. `quiet` keeps only warnings, for tests; without `warns` nothing is said, as on ranks above 0."""

    def __init__(self, *, quiet: bool = False, warns: bool = True) -> None:
        self._warns = warns
        self._rich = RichConsole(highlight=False, soft_wrap=True, emoji=False)
        self._quiet = quiet
        self._warned: set[str] = set()

    def say(self, text: str) -> None:
        if not self._quiet:
            self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        if self._warns:
            self._rich.print(f"warning: {text}", markup=False, style="yellow")

    def warn_once(self, text: str) -> None:
        """What every step would warn of again."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def metrics(self, stage: str, step: int, steps: int, values: Mapping[str, float]) -> None:
        """One line: the numbers one watches; all of them are in metrics.jsonl."""
        shown = [
            f"{label} {form.format(values[key])}"
            for key, label, form in _SHOWN
            if not math.isnan(values.get(key, math.nan))
        ]
        self.say(f"{stage} {step}/{steps} | {' | '.join(shown)}")

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """A bar on a terminal; elsewhere a plain line every quarter of a minute, with the time that is left at this pace."""
        if self._rich.is_terminal and not self._quiet:
            yield from self._bar(what, total)
            return
        begun = time.monotonic()
        state = {"done": 0, "said": begun}

        def advance(count: int = 1) -> None:
            state["done"] += count
            if time.monotonic() - state["said"] > _PLAIN_EVERY_S:
                now = state["said"] = time.monotonic()
                left = (now - begun) / state["done"] * (total - state["done"]) if state["done"] else None
                self.say(f"{what}: {state['done']}/{total}" + ("" if left is None else f", {_clock(left)} left"))

        yield advance

    def _bar(self, what: str, total: int) -> Iterator[Advance]:
        """Appears only when the thing turns out to be long, so that short steps don't flicker."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        bar, begun = Progress(*columns, console=self._rich, transient=True), time.monotonic()
        task = bar.add_task(what, total=total)

        def advance(count: int = 1) -> None:
            bar.advance(task, count)
            if not bar.live.is_started and time.monotonic() - begun > _BAR_AFTER_S:
                bar.start()

        try:
            yield advance
        finally:
            bar.stop()

    def accuracies(self, summary: Mapping[str, Any]) -> None:
        """The headline table: a row a stage, a column a length bucket, and what guessing would give."""
        stages = summary["stages"]
        table = Table(title="accuracy on held-out questions, by tokens of the prompt", title_justify="left")
        table.add_column("stage")
        for bucket in stages[0]["buckets"] if stages else []:
            table.add_column(
                f"<= {bucket['upper']} (n = {bucket['n']})" if bucket["upper"] else "above", justify="right"
            )
        for stage in stages:
            table.add_row(stage["name"], *(_plus_minus(bucket) for bucket in stage["buckets"]))
        if not self._quiet and stages:
            self._rich.print(table)
            if summary["chance"] is not None:
                self.say(f"chance: {100 * summary['chance']:.1f} %")


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, to the second."""
    return str(timedelta(seconds=round(seconds)))


def _plus_minus(bucket: Mapping[str, Any]) -> str:
    if bucket["accuracy"] is None:
        return "-"
    spread = "" if bucket["stderr"] is None else f" ± {100 * bucket['stderr']:.1f}"
    return f"{100 * bucket['accuracy']:.1f}{spread} %"
