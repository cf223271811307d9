"""The parts of a run that don't train: evaluations, difficulty passes, and the summary with its picture.

A pass keeps its finished batches in a file, so a killed one goes on where it was; its result is a file that is either
whole or absent, and one that is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.checkpoint import write_atomically
from .console import Console
from .curriculum import Phase
from .evaluate import evaluate
from .figures import accuracy_figure
from .policy import Policy
from .recipe import Recipe
from .retrospective import score, select
from .rewards import Reward
from .rollouts import RolloutGroup, regroup, roll_out
from .run import BatchLog, RunFolder, read_lines
from .seeds import derive
from .sources import Prompts


@dataclass
class Context:
    """What a run's stages share. `check` raises when the run was asked to stop."""

    recipe: Recipe
    folder: RunFolder
    console: Console
    prompts: Prompts
    policy: Policy
    reward: Reward
    replay: Path | None
    check: Callable[[], None]


def evaluation(run: Context, name: str, step: int) -> None:
    """Scores the policy on the evaluation data: `evals/<name>.json` and every completion beside it."""
    path = run.folder.eval_file(name)
    ranks = run.policy.ranks
    log = BatchLog(path.with_suffix(".batches.jsonl"), {"step": step}) if ranks.main else None
    if ranks.first(path.exists):
        if log:
            log.path.unlink(missing_ok=True)  # a kill may have come between the two
        return
    ranks.note(f"evaluation {name}", step)
    with run.console.progress(f"evaluating {name}", len(run.prompts.eval)) as advance:

        def on_batch(count: int) -> None:
            advance(count)
            run.check()

        summary, rows = evaluate(
            run.policy, run.reward, run.prompts.eval, run.recipe.eval, bounds=run.recipe.buckets(), seed=run.recipe.run.seed,
            name=name, step=step, log=log, on_batch=on_batch,
        )  # fmt: skip
    run.folder.write_lines(path.with_suffix(".completions.jsonl"), rows)
    run.folder.write_text(path, json.dumps(summary, indent=1))
    if log:
        log.path.unlink()
    run.console.say(f"accuracy {name} | {', '.join(bucket_line(bucket) for bucket in summary['buckets'])}")


def pool(run: Context, stage: str, members: Sequence[int], next_phase: Phase, step: int) -> None:
    """Scores the prompts of a phase and writes who is carried on, and why: `pool/<stage>.jsonl`."""
    path, config = run.folder.pool_file(stage), run.recipe.retrospective
    assert config is not None
    ranks = run.policy.ranks
    if ranks.first(path.exists):
        return
    ranks.note(f"difficulty pass after {stage}", step)
    if run.replay is not None:
        saved = RunFolder(run.replay).pool_file(stage)
        if not saved.exists():
            raise ValueError(f"{saved} is missing: {run.replay} has no pool of {stage} to replay")
        run.folder.write_lines(path, read_lines(saved))
        return
    if config.source == "records" and not ranks.main:
        return  # the records are in files, which are rank 0's
    groups = _recorded(run, stage) if config.source == "records" else _fresh(run, stage, members, next_phase, step)
    entries = select(score(groups), config, derive(run.recipe.run.seed, stage))
    run.folder.write_lines(path, [entry.dump() for entry in entries])
    selected = sum(entry.selected for entry in entries)
    run.console.say(
        f"retrospective pool after {stage}: {selected} of {len(entries)} scored prompts ({len(members)} in the phase) go on"
    )


def _recorded(run: Context, stage: str) -> list[RolloutGroup]:
    """The phase's own rollouts, as they were rewarded in training but without the length penalty."""
    prompts = {p.example.id: p for p in run.prompts.train}
    files = sorted((run.folder.root / "rollouts" / stage).glob("*.jsonl"))
    return [group.bare() for file in files for group in regroup(read_lines(file), prompts)]


def _fresh(run: Context, stage: str, members: Sequence[int], next_phase: Phase, step: int) -> list[RolloutGroup]:
    """G fresh completions of every prompt with the next phase's limits."""
    recipe, config = run.recipe, run.recipe.retrospective
    assert config is not None
    batch, by_id = recipe.rl.batch_prompts, {p.example.id: p for p in run.prompts.train}
    file, ranks = run.folder.root / "rollouts" / f"difficulty-{stage}.jsonl", run.policy.ranks
    log = BatchLog(file, {"step": step}) if ranks.main else None
    groups: list[RolloutGroup] = []
    with run.console.progress(f"difficulty pass after {stage}", len(members)) as advance:
        for number, start in enumerate(range(0, len(members), batch)):
            prompts = [run.prompts.train[i] for i in members[start : start + batch]]
            lines = ranks.first(lambda number=number: log.get(number) if log else None)
            if lines is None:
                made = roll_out(
                    run.policy, run.reward, prompts, config.samples, next_phase.sampling(),
                    seed=derive(recipe.run.seed, "difficulty", stage, number), stage=f"difficulty-{stage}", step=step,
                )  # fmt: skip
                lines = [r.dump() for group in made for r in group.rollouts]
                if log:
                    log.add(number, lines)
            groups += [group.bare() for group in regroup(lines, by_id)]
            advance(len(prompts))
            run.check()
    return groups


def summary(folder: RunFolder, names: Sequence[str]) -> None:
    """summary.json and the picture, from the evaluations so far."""
    if not folder.writes:
        return
    made = [json.loads(folder.eval_file(n).read_text()) for n in names if folder.eval_file(n).exists()]
    chances = [one["chance"] for one in made if one["chance"] is not None]
    text = {
        "chance": chances[0] if chances else None,
        "stages": [{"name": one["stage"], "buckets": one["buckets"]} for one in made],
    }
    write_atomically(folder.root / "summary.json", json.dumps(text, indent=1))
    if any(bucket["n"] for one in made for bucket in one["buckets"]):
        accuracy_figure(text, folder.root / "accuracy.png")


def bucket_line(bucket: Mapping[str, Any]) -> str:
    """One length bucket as the console shows it."""
    name = "above" if bucket["upper"] is None else f"<= {bucket['upper']}"
    return f"{name}: {percent(bucket['accuracy'])} ± {percent(bucket['stderr'])} % (n = {bucket['n']})"


def percent(value: float | None) -> str:
    """As the console shows shares, in %."""
    return "-" if value is None else f"{100 * value:.1f}"
