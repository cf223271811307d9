"""The main job: warm-up SFT -> phase 1 -> difficulty pass -> phase 2 -> ... with an evaluation after each -> report.

On many ranks (`ranks.py`) all of them walk the same stages; rank 0 alone writes the folder and talks.
A run is a list of stages. Training stages count steps and write checkpoints; evaluations and difficulty passes keep their
finished batches in files. Killed at any moment, `train` on the same folder goes on and ends with the same weights.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from ..engine.launch import Job, join
from ..engine.model import load_tokenizer, pick_device
from ..engine.optimizer import Schedule, make_optimizer
from . import passes, state
from .config import dump
from .console import Console
from .curriculum import phase_name
from .grpo import GrpoTrainer
from .policy import Policy, model_source
from .ranks import Ranks
from .recipe import Recipe, to_toml
from .report import write_report
from .rewards import make_reward
from .rollouts import RolloutGroup, Unjudged, regroup
from .run import RunFolder, Stopwatch, read_lines
from .sampler import PromptSampler
from .seeds import derive, seed_everything
from .serving.session import generating
from .sft import sft_batch, sft_examples, sft_step, sft_steps
from .sources import check_window, fingerprint, read_prompts

Step = Callable[[int, float, Stopwatch], dict[str, float]]


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


def train(
    recipe: Recipe, run_dir: Path, *, replay: Path | None = None, console: Console | None = None, job: Job | None = None
) -> Path:
    """Runs or resumes the recipe in `run_dir`, which all ranks must see; gives the folder of the final model.

    Args:
        replay: another run's folder: phases train on its saved rollouts instead of generating.
        job: the ranks of this run, for a caller that has joined them already; None joins those that torchrun started.

    Raises:
        ValueError: anything wrong with the recipe, data, model or folder, before the first step.
        Stopped: after Ctrl-C, when all is saved.
    """
    check_window(recipe)
    if replay is not None and (not (replay / "rollouts").is_dir() or replay.resolve() == run_dir.resolve()):
        raise ValueError(
            f"{replay} can't be replayed in {run_dir}: give --replay another run's folder with saved rollouts"
        )
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    with nullcontext(job) if job else join() as joined:
        ranks = Ranks(joined, joined.connect(recipe.parallel, pick_device(recipe.model.device)))
        folder = RunFolder(run_dir, writes=ranks.main)
        try:
            folder.open(to_toml(dump(recipe)))
            voice = (console or Console()) if ranks.main else Console(quiet=True, warns=False)
            return Run(recipe, folder, replay, voice, ranks).go()
        finally:
            folder.close()


class Run:
    """One run of a recipe: where it stands (`progress`), and the stages that move it on."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, replay: Path | None, console: Console, ranks: Ranks | None = None
    ) -> None:
        self.recipe, self.folder, self.console, self.ranks = recipe, folder, console, ranks or Ranks()
        self.interrupted = False
        if self.ranks.mesh is not None:
            console.say(str(self.ranks))
        self.ranks.note("loading")
        found = self.ranks.first(lambda: state.newest(folder.checkpoints, console.warn))
        self.checkpoint, self.progress = found or (None, state.Progress())
        self.saved = self.progress.step
        unfinished = [s.name for s in stages_of(recipe)[self.progress.stage :] if s.kind == "phase"]
        folder.rewind(self.progress.step, unfinished)
        tokenizer = load_tokenizer(model_source(recipe.model), trust_remote_code=recipe.model.trust_remote_code)
        prompts = read_prompts(recipe, tokenizer, folder.root / "data" if self.ranks.main else None, console)
        read = self.ranks.every(fingerprint(prompts))
        if len(set(read)) > 1:
            others = [rank for rank, print in enumerate(read) if print != read[0]]
            raise ValueError(f"ranks {others} read other data than rank 0: all nodes must see the same files")
        folder.claim("data", read[0])
        folder.claim("replay", "none" if replay is None else "rollouts of another run")
        seed_everything(recipe.run.seed)
        full = self.checkpoint / "model" if self.checkpoint and recipe.model.lora is None else None
        policy = Policy(recipe.model, recipe.generator, full, self.ranks)
        if self.checkpoint and recipe.model.lora:
            state.load_adapters(policy, self.checkpoint)
        reward = make_reward(recipe.reward, home=folder.root, warn=console.warn, ranks=self.ranks)
        self.context = passes.Context(
            recipe, folder, console, prompts, policy, reward, replay, self._stop_if_interrupted
        )
        self.optimizer: torch.optim.Optimizer | None = None
        if self.checkpoint:
            state.restore_random_states(self.checkpoint)
            console.say(f"resuming {folder.root} at step {self.progress.step}")

    def go(self) -> Path:
        stages = stages_of(self.recipe)
        prompts = self.context.prompts
        longest = max((len(prompt.ids) for prompt in prompts.eval), default=0)
        probe_ids = next((prompt.ids for prompt in (*prompts.train, *prompts.eval)), ())
        window, home = self.recipe.served_window(longest), self.folder.root / "servers"
        with (
            self._catching_ctrl_c(),
            generating(self.context.policy, self.recipe, window, home=home, probe_ids=probe_ids, say=self.console.say),
        ):
            while self.progress.stage < len(stages):
                stage = stages[self.progress.stage]
                {"sft": self._sft, "phase": self._phase, "eval": self._eval, "pool": self._pool}[stage.kind](stage)
                self._stage_done(stage)
        final = self.folder.root / "model"
        state.save_plain(self.context.policy, final)
        self.ranks.first(lambda: self._report(final))
        return final

    def _report(self, final: Path) -> None:
        report = write_report(self.folder.root)
        if any(stage.kind == "eval" for stage in stages_of(self.recipe)):
            self.console.accuracies(json.loads((self.folder.root / "summary.json").read_text()))
        self.console.say(f"final model: {final}\nreport: {report}")

    def _sft(self, stage: Stage) -> None:
        policy, config = self.context.policy, self.recipe.sft
        assert config is not None
        groups, longer = sft_examples(policy, self.context.prompts.sft, config.upper)
        if longer:
            total = longer + len(groups)
            self.console.warn(
                f"sft: {longer} of {total} rows are longer than sft.upper = {config.upper} tokens and are left out"
            )
        if not groups:
            raise ValueError(f"sft: no row fits within sft.upper = {config.upper} tokens")

        def one(step: int, learning_rate: float, watch: Stopwatch) -> dict[str, float]:
            batch = sft_batch(groups, config, self.recipe.run.seed, step)
            clip = self.recipe.optimizer.grad_clip
            policy.rest()
            return sft_step(
                policy, self._optimizer(), batch, config, learning_rate=learning_rate, grad_clip=clip, watch=watch
            )

        self._steps(stage, sft_steps(len(groups), config), config.rates(), one)

    def _phase(self, stage: Stage) -> None:
        recipe, phase, prompts = self.recipe, self.recipe.phases[stage.index], self.context.prompts
        if self.progress.stage_step == 0:
            self.progress.members = sorted({*prompts.phases[stage.index], *self._carried(stage.index)})
        members = self.progress.members
        tasks = {i: prompts.train[i].example.benchmark for i in members}
        seed = derive(recipe.run.seed, stage.name)
        sampler = PromptSampler(members, tasks, seed=seed, balanced=recipe.rl.balanced_tasks)
        if self.progress.sampler is not None:
            sampler.load(self.progress.sampler)
        trainer = GrpoTrainer(
            recipe.rl, self.context.policy, self.context.reward, self._optimizer(), stage=stage.name,
            sampling=phase.sampling(), prompts=prompts.train, sampler=sampler, seed=recipe.run.seed,
            grad_clip=recipe.optimizer.grad_clip, reference=self._reference(stage), console=self.console,
        )  # fmt: skip
        if self.progress.entropy is not None:
            trainer.entropy.load(self.progress.entropy)

        def one(step: int, learning_rate: float, watch: Stopwatch) -> dict[str, float]:
            number = self.progress.step + 1
            try:
                metrics, groups = trainer.step(
                    number, learning_rate, self._replayed(stage.name, number), self._unjudged(stage.name), watch
                )
            except Unjudged as error:
                self._keep(error)
                raise
            rollouts = [rollout.dump() for group in groups for rollout in group.rollouts]
            self.folder.write_lines(self.folder.rollouts_file(stage.name, number), rollouts)
            if self.folder.writes:
                self.folder.unjudged_file.unlink(missing_ok=True)
            self.progress.sampler = sampler.state()
            self.progress.entropy = trainer.entropy.state()
            trainer.hand_over(number, watch)
            return metrics | {name: value for name, value in watch.seconds.items() if name == "timing_s/update_weights"}

        first = self.progress.step + 1
        last = self.progress.step + phase.steps - self.progress.stage_step if self.context.replay is None else 0
        with trainer.overlapping(first, last, self._unjudged_of(stage.name)) as alone:
            self._steps(stage, phase.steps, phase.rates(), one, alone)

    def _steps(
        self, stage: Stage, steps: int, schedule: Schedule, one: Step,
        alone: Callable[[int], AbstractContextManager[object]] = lambda step: nullcontext(),
    ) -> None:  # fmt: skip
        """The loop that all training stages share: evaluation where one is due, step, metrics line, checkpoint, Ctrl-C.

        `alone` makes the block in which an evaluation has the generator for itself.
        """
        every = self.recipe.eval.every if stage.kind == "phase" and self.recipe.data.eval else 0
        while (done := self.progress.stage_step) < steps:
            if self._asked_to_stop() and self.progress.step > self.saved:
                self._save()
            self._stop_if_interrupted()
            if every and done and done % every == 0:  # before the step: a run killed in it comes back to it
                with alone(self.progress.step), self._timed("evaluation", stage.name):
                    passes.evaluation(self.context, f"{stage.name}-{done:06d}", self.progress.step)
            self.ranks.note(stage.name, self.progress.step + 1)
            watch = Stopwatch()
            metrics = one(done, schedule.at(done, steps), watch)
            done = self.progress.stage_step = done + 1
            self.progress.step += 1
            self.folder.add_metrics({"stage": stage.name, "step": self.progress.step, "stage_step": done, **metrics})
            self.folder.add_timeline("step", stage.name, self.progress.step, watch)
            self.console.metrics(stage.name, done, steps, metrics)
            if done < steps and (done % self.recipe.run.save_every == 0 or (every and done % every == 0)):
                self._save()

    def _eval(self, stage: Stage) -> None:
        with self._timed("evaluation", stage.name):
            passes.evaluation(self.context, stage.name, self.progress.step)
        passes.summary(self.folder, [s.name for s in stages_of(self.recipe) if s.kind == "eval"])

    def _pool(self, stage: Stage) -> None:
        following = self.recipe.phases[stage.index + 1]
        with self._timed("difficulty", stage.name):
            passes.pool(self.context, stage.name, self.progress.members, following, self.progress.step)

    def _stage_done(self, stage: Stage) -> None:
        """Moves on. What a training stage made is saved; passes are in files of their own."""
        self.progress = replace(self.progress, stage=self.progress.stage + 1, stage_step=0)
        if stage.kind in ("sft", "phase"):
            self.progress.sampler = None
            self.optimizer = None
            self._save()
        self._stop_if_interrupted()

    def _optimizer(self) -> torch.optim.Optimizer:
        """A stage's own optimizer, with the checkpoint's averages where a stage goes on."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.context.policy.model, self.recipe.optimizer)
            if self.checkpoint is not None and self.progress.stage_step:
                state.load_optimizer(self.optimizer, self.checkpoint)
        return self.optimizer

    def _save(self) -> None:
        keep = self.recipe.run.keep_checkpoints
        self.ranks.note("checkpoint", self.progress.step)
        try:
            with self._timed("checkpoint", ""):
                self.checkpoint = state.save(
                    self.context.policy, self.optimizer, self.progress, self.folder.checkpoints, keep
                )
            self.saved = self.progress.step
        except OSError as error:
            good = self.checkpoint or "none yet"
            self.console.warn(
                f"no checkpoint of step {self.progress.step}: {error}; last good one: {good}; training goes on"
            )

    @contextmanager
    def _timed(self, kind: str, stage: str) -> Iterator[None]:
        """Puts what is no step, and went well, on the time line."""
        watch = Stopwatch()
        with watch(kind):
            yield
        self.folder.add_timeline(kind, stage, self.progress.step, watch)

    def _reference(self, stage: Stage) -> Policy | None:
        """The policy as it was when RL began, loaded from the run folder; None while the KL term has no weight."""
        if not self.recipe.rl.kl_weight:
            return None
        folder = self.folder.root / "reference"
        if stage.index == 0 and self.progress.stage_step == 0:
            state.save_plain(self.context.policy, folder)
        elif not self.ranks.first(folder.is_dir):
            raise ValueError(
                f"{folder}, the model that the KL term compares with, is gone: restore it, or begin a new run"
            )
        policy = Policy(replace(self.recipe.model, lora=None), self.recipe.generator, folder, self.ranks)
        policy.model.requires_grad_(False)
        return policy

    def _carried(self, index: int) -> list[int]:
        """Prompts that the pool of the phase before carries into this one."""
        if index == 0 or self.recipe.retrospective is None:
            return []
        pool = self.folder.pool_file(phase_name(index - 1))
        selected = self.ranks.first(lambda: {line["prompt_id"] for line in read_lines(pool) if line["selected"]})
        return [i for i, prompt in enumerate(self.context.prompts.train) if prompt.example.id in selected]

    def _replayed(self, stage: str, step: int) -> list[RolloutGroup] | None:
        if self.context.replay is None:
            return None
        path = RunFolder(self.context.replay).rollouts_file(stage, step)
        lines = self.ranks.first(lambda: list(read_lines(path)) if path.exists() else None)
        if lines is None:
            raise ValueError(f"{path} is missing: {self.context.replay} has no saved rollouts of that step to replay")
        return regroup(lines, {p.example.id: p for p in self.context.prompts.train})

    def _asked_to_stop(self) -> bool:
        """Whether any rank was interrupted: signals come at different moments, and all must stop at the same one."""
        self.interrupted = self.ranks.any(self.interrupted)
        return self.interrupted

    def _unjudged_of(self, stage: str) -> Callable[[int], list[RolloutGroup]]:
        """By step, for rank 0: what `_unjudged` gives of the one that it is of."""
        kept = self._unjudged(stage)
        step = kept[0].rollouts[0].step if kept else 0
        return lambda number: kept if number == step else []

    def _unjudged(self, stage: str) -> list[RolloutGroup]:
        """What the step before us, this one, had sampled when the judge failed it."""
        path = self.folder.unjudged_file
        lines = self.ranks.first(
            lambda: [line for line in read_lines(path) if line["stage"] == stage] if path.exists() else []
        )
        return regroup(lines, {p.example.id: p for p in self.context.prompts.train})

    def _keep(self, error: Unjudged) -> None:
        """The step's completions, and the weights that made them: the same command scores them and goes on."""
        if self.progress.stage_step:  # else the stage's beginning is saved already
            self._save()
        rollouts = [rollout.dump() for group in error.groups for rollout in group.rollouts]
        self.folder.write_lines(self.folder.unjudged_file, rollouts)
        self.console.warn(f"{len(rollouts)} completions of this step are kept in {self.folder.unjudged_file}")

    def _stop_if_interrupted(self) -> None:
        if self._asked_to_stop():
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
