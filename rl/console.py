"""What a run says while it runs: a progress bar on a terminal, plain lines anywhere else, one metrics line a step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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


class Advance(Protocol):
    def __call__(self, count: int = 1) -> None: ...


class Console:
    """Where a run reports to. `quiet` keeps only warnings, for tests."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._rich = RichConsole(highlight=False, soft_wrap=True, emoji=False)
        self._quiet = quiet

    def say(self, text: str) -> None:
        if not self._quiet:
            self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        self._rich.print(f"warning: {text}", markup=False, style="yellow")

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
        """A bar on a terminal; elsewhere a plain line every quarter of a minute, so logs stay short and alive."""
        if self._rich.is_terminal and not self._quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._rich, transient=True) as bar:
                task = bar.add_task(what, total=total)
                yield lambda count=1: bar.advance(task, count)
            return
        state = {"done": 0, "said": time.monotonic()}

        def advance(count: int = 1) -> None:
            state["done"] += count
            if time.monotonic() - state["said"] > _PLAIN_EVERY_S:
                state["said"] = time.monotonic()
                self.say(f"{what}: {state['done']}/{total}")

        yield advance
