"""The one way everything is measured: case by case, pass by pass, all contenders in turn.

For each case: ceilings of the device, then for each pass a first run of every contender (which compiles, and may fail),
its error against fp64, its peak memory, and rounds of timings. Each row is written as soon as it is whole. A contender
that can't run is a row too, with the reason.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import exact, once, results, roofline, summary, timing
from .case import Case, Contender, Exact, Gap, Op, Problem
from .memory import COUNTED, peak_bytes, tensor_bytes
from .peers import failures, version
from .results import Row

MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """How long to measure: seconds of rounds per case and pass, their bounds, and when to begin nothing more."""

    seconds: float = 10.0
    least: int = 5
    most: int = 40
    deadline: float = float("inf")
    """On `time.monotonic`; a run that is resumed begins where this one stopped."""


@dataclass
class Report:
    """What a run did: rows written, rows that stood already, cases that no time was left for, own failures."""

    written: int = 0
    standing: int = 0
    left: int = 0
    failed: int = 0


class Runner:
    """Measures cases into one file."""

    def __init__(
        self, path: Path, device: str, conditions: Row, plan: Plan, *, fresh: bool, say: Callable[[str], None]
    ) -> None:
        self.path, self.device, self.plan, self.say = path, device, plan, say
        self.conditions, self.report = conditions, Report()
        self.clock = timing.make_clock(device)
        self._ceilings: dict[str, roofline.Ceilings] = {}
        self._failures = failures()
        self._done = set() if fresh else results.measured(results.load(path), conditions["sources"])

    def run(self, op: Op, cases: Iterable[Case]) -> None:
        """Every case and pass of one op, as far as time allows."""
        for case in cases:
            if time.monotonic() > self.plan.deadline:
                self.report.left += 1
                continue
            problem = op.problem(case)
            truth = None
            for name in op.PASSES:
                waiting = [c for c in problem.contenders if not self._stands(case, name, c)]
                if not any(isinstance(c, Contender) for c in waiting):
                    for gap in waiting:
                        self._write(case, name, gap, {})
                    continue
                if truth is None and problem.exact is not None:
                    truth = problem.exact()
                if problem.once:
                    self._once(case, name, problem, waiting, truth)
                else:
                    self._pass(case, name, problem, waiting, truth, tells_value=name == op.PASSES[0])
            del problem, truth
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _stands(self, case: Case, name: str, contender: Contender | Gap) -> bool:
        standing = results.identity(self._place(case, name, contender)) in self._done
        self.report.standing += standing
        return standing

    def _place(self, case: Case, name: str, contender: Contender | Gap) -> Row:
        what = {"op": case.op, "dims": dict(case.dims), "dtype": case.dtype, "pass": name}
        return {**self.conditions, **what, "contender": contender.name, "ours": contender.ours}

    def _pass(
        self,
        case: Case,
        name: str,
        problem: Problem,
        waiting: Sequence[Contender | Gap],
        truth: Exact | None,
        tells_value: bool,
    ) -> None:
        ceilings = self._ceiling(case)
        ready: dict[str, tuple[Contender, timing.Task, Row, float]] = {}
        for contender in waiting:
            if isinstance(contender, Gap):
                self._write(case, name, contender, {})
                continue
            try:
                first = self._first(contender, name, problem, truth)
                if tells_value and truth is not None:
                    with torch.no_grad():
                        first[1]["value_error"] = exact.value_error(contender.forward(), truth)
                ready[contender.name] = (contender, *first)
            except self._failures as error:
                self._lose(case, name, contender, error)
        if not ready:
            return
        tasks = {label: task for label, (_, task, _, _) in ready.items()}
        one_round = sum(warm for *_, warm in ready.values())
        rounds = timing.rounds_for(one_round, self.plan.seconds, self.plan.least, self.plan.most)
        with torch.set_grad_enabled(name != "forward"):
            taken, lost = timing.round_robin(tasks, self.clock, rounds, self._failures)
        for label, seconds in taken.items():
            contender, _, facts, _ = ready[label]
            speed = figures(seconds, problem.flops[name], problem.bytes[name], ceilings)
            self._write(case, name, contender, {**facts, **speed})
        for label, error in lost.items():
            self._lose(case, name, ready[label][0], error)

    def _once(
        self, case: Case, name: str, problem: Problem, waiting: Sequence[Contender | Gap], truth: Exact | None
    ) -> None:
        """A single run of each, which stands before the next begins."""
        ceilings = self._ceiling(case)
        for contender in waiting:
            if isinstance(contender, Gap):
                self._write(case, name, contender, {})
                continue
            try:
                seconds, found, facts = once.measure(contender, self.clock, self.device)
            except self._failures as error:
                self._lose(case, name, contender, error)
                continue
            if contender.parts == 1:
                facts |= errors(name, found, problem, truth)
            if problem.tokens is not None:
                facts["tokens_per_s"] = problem.tokens / seconds
            speed = figures([seconds], problem.flops[name], problem.bytes[name], ceilings)
            self._write(case, name, contender, {**facts, **self._about(contender), **speed})

    def _about(self, contender: Contender) -> Row:
        about = {"computes": contender.computes, "package": contender.package, "version": version(contender.package)}
        return {**about, "memory_counted": COUNTED[self.device]}

    def _lose(self, case: Case, name: str, contender: Contender, error: Exception) -> None:
        self._write(case, name, _gap(contender, error), {})
        if isinstance(error, torch.AcceleratorError):
            raise error  # nothing runs on the device any more in this process

    def _ceiling(self, case: Case) -> roofline.Ceilings:
        if case.dtype not in self._ceilings:
            self._ceilings[case.dtype] = roofline.measure(self.clock, self.device, case.torch_dtype)
        return self._ceilings[case.dtype]

    def _first(
        self, contender: Contender, name: str, problem: Problem, truth: Exact | None
    ) -> tuple[timing.Task, Row, float]:
        """First run, errors, memory, and the time of one warm run."""
        task = make_task(contender, name)
        with torch.set_grad_enabled(name != "forward"):
            found = task.run(task.prepare())
            facts: Row = errors(name, found, problem, truth) | {"result_mib": tensor_bytes(found) / MIB}
            del found
            facts["peak_mib"] = self._peak_mib(task)
            warm = self.clock(task)
        return task, {**facts, **self._about(contender)}, warm

    def _peak_mib(self, task: timing.Task) -> float:
        state = task.prepare()
        return peak_bytes(lambda: task.run(state), self.device) / MIB

    def _write(self, case: Case, name: str, contender: Contender | Gap, facts: Mapping[str, Any]) -> None:
        row = {**self._place(case, name, contender), **facts, "status": "measured", "reason": None}
        if isinstance(contender, Gap):
            row |= {"status": "gap", "reason": contender.reason}
            self.report.failed += contender.ours and contender.reason.startswith("failed")
        results.append(self.path, row)
        self.report.written += 1
        self.say(f"{case.op} {case.label} {case.dtype} {name}: {contender.name}: " + outcome(row))


def outcome(row: Mapping[str, Any]) -> str:
    """One line for the log of a run."""
    if row["status"] == "gap":
        return f"gap: {row['reason']}"
    return f"{1e3 * row['median_s']:.3g} ms, {100 * row['roofline_share']:.0f} % of the roofline"


def make_task(contender: Contender, name: str) -> timing.Task:
    if name == "forward":
        return timing.Task(lambda _: contender.forward())
    if name == "backward":
        return timing.Task(contender.backward, contender.train)
    return timing.Task(lambda _: contender.backward(contender.train()))


def errors(name: str, found: Any, problem: Problem, truth: Exact | None) -> Row:
    """Relative errors of the gradients against fp64, where the pass makes any."""
    if truth is None or name == "forward":
        return {}
    named = zip(problem.gradients, found, strict=True)
    return {
        "gradient_errors": {
            label: exact.relative_error(gradient, truth.gradients[label])
            for label, gradient in named
            if gradient is not None and label in truth.gradients
        }
    }


def figures(seconds: Sequence[float], flops: float, traffic: float, ceilings: roofline.Ceilings) -> Row:
    """Statistics, throughput and share of the roofline of one contender's timings."""
    found = summary.summarize(seconds)
    floor = ceilings.floor(flops, traffic)
    return {
        "median_s": found.median, "iqr_s": found.iqr, "least_s": found.least, "rounds": found.rounds,
        "statistics": found.source, "samples_s": [float(f"{value:.6g}") for value in seconds],
        "tflops": flops / found.median / 1e12, "gbs": traffic / found.median / 1e9,
        "floor_s": floor, "roofline_share": floor / found.median, "bound": ceilings.bound(flops, traffic),
        "ceiling_tflops": ceilings.flops / 1e12, "ceiling_gbs": ceilings.bytes / 1e9,
    }  # fmt: skip


def _gap(contender: Contender, error: Exception) -> Gap:
    lines = str(error).strip().splitlines()
    return Gap(contender.name, f"failed: {type(error).__name__}: {lines[0] if lines else ''}"[:300], contender.ours)
