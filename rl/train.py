"""The main job: warm-up SFT -> phase 1 -> difficulty pass -> phase 2 -> ... with an evaluation after each -> report.

A run is a list of stages. Training stages count steps and write checkpoints; evaluations and difficulty passes keep their
finished batches in files. Killed at any moment, `train` on the same folder goes on and ends with the same weights.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from ..engine import Sampling
from ..engine.checkpoint import write_atomically
from ..engine.model import load_tokenizer, read_config, save_model
from ..engine.optimizer import Schedule, make_optimizer
from . import state
from .config import dump
from .console import Console
from .curriculum import Phase, phase_name
from .evaluate import evaluate
from .figures import accuracy_figure
from .grpo import GrpoTrainer
from .policy import Policy, model_source
from .recipe import Recipe, to_toml
from .report import write_report
from .retrospective import PoolEntry, score, select
from .rewards import make_reward
from .rollouts import RolloutGroup, regroup, roll_out
from .run import BatchLog, RunFolder, read_lines
from .sampler import PromptSampler
from .seeds import derive
from .sft import sft_batch, sft_examples, sft_schedule, sft_step, sft_steps
from .sources import read_prompts


class Stopped(Exception):
    """Ctrl-C: everything is saved, and the same command goes on from here."""


@dataclass(frozen=True)
class Stage:
    """`kind` is sft, phase, eval or pool; `index` counts phases."""

    name: str
    kind: str
    index: int = 0


def stages_of(recipe: Recipe) -> list[Stage]:
    """The run's stages in order."""
    listed: list[Stage] = []
    evaluated = bool(recipe.data.eval)
    if evaluated and recipe.eval.base:
        listed.append(Stage("base", "eval"))
    if recipe.sft:
        listed += [Stage("sft", "sft"), *([Stage("sft", "eval")] if evaluated else [])]
    for index in range(len(recipe.phases)):
        name = phase_name(index)
        listed += [Stage(name, "phase", index), *([Stage(name, "eval", index)] if evaluated else [])]
        if recipe.retrospective and index + 1 < len(recipe.phases):
            listed.append(Stage(name, "pool", index))
    return listed


def train(recipe: Recipe, run_dir: Path, *, replay: Path | None = None, console: Console | None = None) -> Path:
    """Runs or resumes the recipe in `run_dir`; gives the folder of the final model.

    Args:
        replay: another run's folder: phases train on its saved rollouts instead of generating.

    Raises:
        ValueError: anything wrong with the recipe, data, model or folder, before the first step.
        Stopped: after Ctrl-C, when all is saved.
    """
    return Run(recipe, run_dir, replay, console or Console()).go()


class Run:
    def __init__(self, recipe: Recipe, run_dir: Path, replay: Path | None, console: Console) -> None:
        self.recipe, self.replay, self.console = recipe, replay, console
        self.folder = RunFolder(run_dir)
        self.interrupted = False
        check_window(recipe)

    def go(self) -> Path:
        if self.recipe.run.threads:
            torch.set_num_threads(self.recipe.run.threads)
        self.folder.open(to_toml(dump(self.recipe)))
        try:
            with self._catching_ctrl_c():
                self._prepare()
                stages = stages_of(self.recipe)
                while self.progress.stage < len(stages):
                    stage = stages[self.progress.stage]
                    {"sft": self._sft, "phase": self._phase, "eval": self._eval, "pool": self._pool}[stage.kind](stage)
                    self._stage_done(stage)
                return self._finish()
        finally:
            self.folder.close()

    def _prepare(self) -> None:
        recipe, found = self.recipe, state.newest(self.folder.checkpoints, self.console.warn)
        torch.manual_seed(recipe.run.seed)
        self.progress = found[1] if found else state.Progress()
        self.checkpoint = found[0] if found else None
        self.folder.rewind(self.progress.step)
        tokenizer = load_tokenizer(model_source(recipe.model), trust_remote_code=recipe.model.trust_remote_code)
        self.prompts = read_prompts(recipe, tokenizer, self.folder.root / "data", self.console)
        full = self.checkpoint / "model" if self.checkpoint and recipe.model.lora is None else None
        self.policy = Policy(recipe.model, recipe.generator, full)
        if self.checkpoint and recipe.model.lora:
            state.load_adapters(self.policy, self.checkpoint)
        self.reward = make_reward(recipe.reward)
        self.optimizer: torch.optim.Optimizer | None = None
        if found:
            self.console.say(f"resuming {self.folder.root} at step {self.progress.step}")

    # --- training stages

    def _sft(self, stage: Stage) -> None:
        recipe, config = self.recipe, self.recipe.sft
        assert config is not None
        groups, longer = sft_examples(self.policy, self.prompts.sft, config.upper)
        if longer:
            self.console.warn(
                f"sft: {longer} of {longer + len(groups)} rows are longer than sft.upper = {config.upper} tokens and are left out"
            )
        if not groups:
            raise ValueError(f"sft: no row fits within sft.upper = {config.upper} tokens")
        steps, seed = sft_steps(len(groups), config), recipe.run.seed

        def one(step: int, learning_rate: float) -> dict[str, float]:
            assert self.optimizer is not None
            batch = sft_batch(groups, config, seed, step)
            return sft_step(
                self.policy,
                self.optimizer,
                batch,
                config,
                learning_rate=learning_rate,
                grad_clip=recipe.optimizer.grad_clip,
            )

        self._steps(stage, steps, sft_schedule(config), one=one)

    def _phase(self, stage: Stage) -> None:
        recipe, phase, index = self.recipe, self.recipe.phases[stage.index], stage.index
        if self.progress.stage_step == 0:
            self.progress.members = sorted({*self.prompts.phases[index], *self._carried(index)})
        members = self.progress.members
        tasks = {i: self.prompts.train[i].example.benchmark for i in members}
        sampler = PromptSampler(
            members, tasks, seed=derive(recipe.run.seed, stage.name), balanced=recipe.rl.balanced_tasks
        )
        if self.progress.sampler is not None:
            sampler.load(self.progress.sampler)
        trainer = GrpoTrainer(
            recipe.rl, self.policy, self.reward, self._new_optimizer(), stage=stage.name, sampling=phase_sampling(phase),
            prompts=self.prompts.train, sampler=sampler, seed=recipe.run.seed, grad_clip=recipe.optimizer.grad_clip,
            reference=self._reference(),
        )  # fmt: skip

        def one(step: int, learning_rate: float) -> dict[str, float]:
            number = self.progress.step + 1
            metrics, groups = trainer.step(number, learning_rate, self._replayed(stage.name, number))
            self.folder.write_lines(
                self.folder.rollouts_file(stage.name, number), [r.dump() for g in groups for r in g.rollouts]
            )
            self.progress.sampler = sampler.state()
            return metrics

        schedule = Schedule(phase.learning_rate, phase.warmup_steps, phase.schedule)
        self._steps(stage, phase.steps, schedule, one=one)

    def _steps(
        self,
        stage: Stage,
        steps: int,
        schedule: Schedule,
        *,
        one: Callable[[int, float], dict[str, float]],
    ) -> None:
        """The loop that all training stages share: step, metrics line, evaluation, checkpoint, Ctrl-C."""
        self._new_optimizer()
        while self.progress.stage_step < steps:
            done = self.progress.stage_step
            metrics = one(done, schedule.at(done, steps))
            self.progress.stage_step += 1
            self.progress.step += 1
            line = {"stage": stage.name, "step": self.progress.step, "stage_step": done + 1, **metrics}
            self.folder.add_metrics(line)
            self.console.metrics(stage.name, done + 1, steps, metrics)
            every = self.recipe.eval.every
            if (
                every
                and stage.kind == "phase"
                and (done + 1) % every == 0
                and done + 1 < steps
                and self.recipe.data.eval
            ):
                self._evaluate(f"{stage.name}-{done + 1:06d}")
            if self.interrupted or ((done + 1) % self.recipe.run.save_every == 0 and done + 1 < steps):
                self._save()
            self._stop_if_interrupted()

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """A stage's own optimizer, with the checkpoint's averages where a stage goes on."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.policy.model, self.recipe.optimizer)
            if self.checkpoint is not None and self.progress.stage_step:
                state.load_optimizer(self.optimizer, self.checkpoint)
        return self.optimizer

    def _reference(self) -> Policy | None:
        """The policy as it was when RL began, loaded from the run folder; None while the KL term has no weight."""
        if not self.recipe.rl.kl_weight:
            return None
        folder = self.folder.root / "reference"
        if not (folder / "config.json").exists():
            save_model(self.policy.model, self.policy.tokenizer, folder)
        plain = dump(self.recipe.model) | {"path": str(folder)}
        plain.pop("lora", None)
        plain.pop("yarn", None)
        policy = Policy(type(self.recipe.model)(**plain), self.recipe.generator)
        policy.model.requires_grad_(False)
        return policy

    def _carried(self, index: int) -> list[int]:
        """Prompts that the pool of the phase before carries into this one."""
        pool = self.folder.pool_file(phase_name(index - 1))
        if index == 0 or not pool.exists():
            return []
        selected = {line["prompt_id"] for line in read_lines(pool) if line["selected"]}
        return [i for i, prompt in enumerate(self.prompts.train) if prompt.example.id in selected]

    def _replayed(self, stage: str, step: int) -> list[RolloutGroup] | None:
        if self.replay is None:
            return None
        path = RunFolder(self.replay).rollouts_file(stage, step)
        if not path.exists():
            raise ValueError(f"{path} is missing: {self.replay} has no saved rollouts of that step to replay")
        return regroup(read_lines(path), {p.example.id: p for p in self.prompts.train})

    # --- passes without training

    def _eval(self, stage: Stage) -> None:
        self._evaluate(stage.name)

    def _evaluate(self, name: str) -> None:
        path = self.folder.eval_file(name)
        if path.exists():
            return
        prompts, config = self.prompts.eval, self.recipe.eval
        log = BatchLog(path.with_suffix(".batches.jsonl"))
        with self.console.progress(f"evaluating {name}", len(prompts)) as advance:
            summary, rows = evaluate(
                self.policy, self.reward, prompts, config, bounds=self.recipe.buckets(), seed=self.recipe.run.seed,
                name=name, step=self.progress.step, log=log, on_batch=lambda count: (advance(count), self._stop_if_interrupted()),
            )  # fmt: skip
        self.folder.write_lines(path.with_suffix(".completions.jsonl"), rows)
        write_atomically(path, json.dumps(summary, indent=1))
        log.path.unlink(missing_ok=True)
        table = ", ".join(
            f"<={b['upper']}: {_percent(b['accuracy'])} ± {_percent(b['stderr'])}" for b in summary["buckets"]
        )
        self.console.say(f"accuracy {name} | {table}")

    def _pool(self, stage: Stage) -> None:
        path, config = self.folder.pool_file(stage.name), self.recipe.retrospective
        assert config is not None
        if path.exists():
            return
        members = self.progress.members
        if self.replay is not None:
            self.folder.write_lines(path, read_lines(RunFolder(self.replay).pool_file(stage.name)))
            return
        groups = self._recorded(stage.name) if config.source == "records" else self._fresh(stage, members)
        entries = select(score(groups), config, self.recipe.run.seed)
        self.folder.write_lines(path, [entry.dump() for entry in entries])
        self._say_pool(entries, len(members), stage.index)

    def _recorded(self, stage: str) -> list[RolloutGroup]:
        prompts = {p.example.id: p for p in self.prompts.train}
        files = sorted((self.folder.root / "rollouts" / stage).glob("*.jsonl"))
        return [group for file in files for group in regroup(read_lines(file), prompts)]

    def _fresh(self, stage: Stage, members: list[int]) -> list[RolloutGroup]:
        """G fresh completions of every prompt with the next phase's limits."""
        config, recipe = self.recipe.retrospective, self.recipe
        assert config is not None
        sampling, batch = phase_sampling(recipe.phases[stage.index + 1]), recipe.rl.batch_prompts
        log = BatchLog(self.folder.root / "rollouts" / f"difficulty-{stage.name}.jsonl")
        by_id = {p.example.id: p for p in self.prompts.train}
        groups: list[RolloutGroup] = []
        with self.console.progress(f"difficulty pass after {stage.name}", len(members)) as advance:
            for number, start in enumerate(range(0, len(members), batch)):
                prompts = [self.prompts.train[i] for i in members[start : start + batch]]
                lines = log.get(number)
                if lines is None:
                    made = roll_out(
                        self.policy, self.reward, prompts, config.samples, sampling, seed=derive(recipe.run.seed, "difficulty", stage.name, number),
                        stage=f"difficulty-{stage.name}", step=self.progress.step,
                    )  # fmt: skip
                    lines = [r.dump() for group in made for r in group.rollouts]
                    log.add(number, lines)
                groups += regroup(lines, by_id)
                advance(len(prompts))
                self._stop_if_interrupted()
        return groups

    def _say_pool(self, entries: list[PoolEntry], members: int, index: int) -> None:
        selected = sum(entry.selected for entry in entries)
        self.console.say(
            f"retrospective pool after {phase_name(index)}: {selected} of {len(entries)} scored prompts ({members} in the phase) go on"
        )

    # --- between stages

    def _stage_done(self, stage: Stage) -> None:
        """Moves on; what a training stage made is saved, passes are in their own files."""
        self.progress.stage += 1
        self.progress.stage_step = 0
        if stage.kind in ("sft", "phase"):
            self.progress.sampler = None
            self.optimizer = None
            self._save()
        if stage.kind == "eval":
            self._summarize()

    def _save(self) -> None:
        try:
            self.checkpoint = state.save(
                self.policy, self.optimizer, self.progress, self.folder.checkpoints, self.recipe.run.keep_checkpoints
            )
        except OSError as error:
            self.console.warn(
                f"no checkpoint of step {self.progress.step}: {error}; the last good one is {self.checkpoint}, training goes on"
            )

    def _summarize(self) -> None:
        """summary.json and the picture, from the evaluations so far."""
        names = [s.name for s in stages_of(self.recipe) if s.kind == "eval"]
        made = [json.loads(self.folder.eval_file(n).read_text()) for n in names if self.folder.eval_file(n).exists()]
        chances = [summary["chance"] for summary in made if summary["chance"] is not None]
        summary = {
            "chance": chances[0] if chances else None,
            "stages": [{"name": s["stage"], "buckets": s["buckets"]} for s in made],
        }
        write_atomically(self.folder.root / "summary.json", json.dumps(summary, indent=1))
        if any(bucket["n"] for s in made for bucket in s["buckets"]):
            accuracy_figure(summary, self.folder.root / "accuracy.png")

    def _finish(self) -> Path:
        final = self.folder.root / "model"
        save_model(self.policy.model, self.policy.tokenizer, final)
        report = write_report(self.folder.root)
        self.console.say(f"final model: {final}\nreport: {report}")
        return final

    def _stop_if_interrupted(self) -> None:
        if self.interrupted:
            raise Stopped(f"stopped at step {self.progress.step}; the same command goes on from here")

    @contextmanager
    def _catching_ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C finishes the step and saves; the second one is the ordinary one."""
        if threading.current_thread() is not threading.main_thread():  # signals belong to the main thread
            yield
            return

        def note(_signal: int, _frame: FrameType | None) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, before)
            self.console.say("stopping after this step (Ctrl-C again to stop at once)")

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def phase_sampling(phase: Phase) -> Sampling:
    return Sampling(phase.max_completion, phase.temperature, phase.top_p, phase.top_k)


def check_window(recipe: Recipe) -> None:
    """Raises ValueError if the model's positions end before the longest prompt with its completion does."""
    config = read_config(
        model_source(recipe.model), yarn=recipe.model.yarn, trust_remote_code=recipe.model.trust_remote_code
    )
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is not None and recipe.window() > window:
        factor = -(-recipe.window() // window)
        raise ValueError(
            f"the longest prompt with its completion takes {recipe.window()} tokens, but {recipe.model.path} has positions for "
            f"{window}: set model.yarn = {factor}.0, or lower the phases' limits"
        )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
