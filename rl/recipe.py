"""A recipe is one TOML file: every component's settings, each dataclass living beside its owner.

`extends = "other"` starts from another recipe; command-line overrides come last. Combinations that can't work are
refused here, before a model or a document is read.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.mesh import ParallelConfig
from ..engine.model import ModelConfig
from ..engine.optimizer import OptimizerConfig
from .config import build, nearest, override
from .curriculum import Phase, check_bounds
from .data import DataConfig
from .evaluate import EvalConfig
from .grpo import GrpoConfig
from .retrospective import RetrospectiveConfig
from .rewards import RewardConfig
from .run import RunConfig
from .serving.config import ServingConfig
from .sft import SftConfig
from .synthetic import Synthetic

SYNTHETIC = "synthetic:"


@dataclass(frozen=True)
class Recipe:
    """The whole main job. Sections that are left out have their defaults; `sft` and `phases` may each be absent."""

    name: str
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    synthetic: dict[str, Synthetic] = field(default_factory=dict)
    sft: SftConfig | None = None
    rl: GrpoConfig = field(default_factory=GrpoConfig)
    phases: tuple[Phase, ...] = ()
    retrospective: RetrospectiveConfig | None = None
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generator: ServingConfig = field(default_factory=ServingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_bounds(self.phases)
        self._check_sources()
        for index, phase in enumerate(self.phases):
            self._check_phase(index, phase)
            self._check_staleness(index, phase)
        if not self.sft and not self.phases:
            raise ValueError("the recipe has neither [sft] nor [[phases]]: there is nothing to train")
        if self.retrospective and len(self.phases) < 2:
            raise ValueError("[retrospective] carries prompts into a later phase, but there is only one of [[phases]]")

    def _check_sources(self) -> None:
        if self.phases and not self.data.train:
            raise ValueError("[[phases]] need prompts: set data.train to a file, a datasets name or synthetic:NAME")
        for key, source in (
            ("data.train", self.data.train),
            *(("data.eval", s) for s in self.data.eval),
            ("sft.data", self.sft.data if self.sft else ""),
        ):
            name = source.removeprefix(SYNTHETIC)
            if source.startswith(SYNTHETIC) and name not in self.synthetic:
                raise ValueError(
                    f"{key} = {source!r}, but there is no section [synthetic.{name}]: {nearest(name, self.synthetic)}"
                )

    def _check_phase(self, index: int, phase: Phase) -> None:
        need = phase.upper + phase.max_completion
        if self.rl.micro_batch_tokens < need:
            raise ValueError(
                f"rl.micro_batch_tokens = {self.rl.micro_batch_tokens} can't hold one prompt of phases.{index} with one completion "
                f"({phase.upper} + {phase.max_completion} = {need} tokens): raise it to {need} at least, or lower the phase's limits"
            )
        self._check_cache(f"phases.{index}", phase.upper, self.rl.group_size, phase.max_completion)
        if self.rl.overlong_buffer >= phase.max_completion:
            raise ValueError(
                f"rl.overlong_buffer = {self.rl.overlong_buffer} covers all {phase.max_completion} tokens of phases.{index}'s "
                "completions: it must be smaller than max_completion"
            )
        if self.retrospective and self.retrospective.source == "fresh" and index + 1 < len(self.phases):
            limit, samples = self.phases[index + 1].max_completion, self.retrospective.samples
            self._check_cache(f"the difficulty pass after phases.{index}", phase.upper, samples, limit)

    def _check_staleness(self, index: int, phase: Phase) -> None:
        for key, what in (
            ("staleness", "samples while the policy trains"),
            ("stragglers", "stops completions and goes on with them later"),
        ):
            value = getattr(self.rl, key)
            if value and self.generator.kind == "local":
                raise ValueError(
                    f"rl.{key} = {value} {what}, which another program must do: set "
                    f'generator.kind = "vllm", or {key} = 0'
                )
            if value and (phase.top_p < 1 or phase.top_k):
                raise ValueError(
                    f"rl.{key} = {value} trains on tokens of older weights, corrected by the generator's log-probs, and "
                    f"phases.{index} cuts the distribution (top_p, top_k), of which servers give none that compare: set top_p = 1 and "
                    f"top_k = 0, or {key} = 0"
                )
        if self.rl.staleness and self.generator.sync.sleep:
            raise ValueError(
                f"rl.staleness = {self.rl.staleness} samples while the policy trains, and generator.sync.sleep gives the servers' "
                "GPU to the trainer meanwhile: set one of them to 0"
            )

    def _check_cache(self, what: str, prompt: int, samples: int, max_completion: int) -> None:
        need = prompt + samples * max_completion
        if self.generator.kind == "local" and self.generator.batch_tokens < need:
            raise ValueError(
                f"generator.batch_tokens = {self.generator.batch_tokens} can't hold one group of {what} "
                f"({prompt} + {samples} x {max_completion} = {need} tokens): raise it to {need} at least"
            )

    def buckets(self) -> list[int]:
        """Upper bounds of the length buckets of evaluation, in tokens."""
        return list(self.eval.buckets) or [part.upper for part in self.phases or (self.sft,) if part]

    def window(self) -> int:
        """Tokens that the model's positions must cover in training: the longest prompt with its completion."""
        return max(self.sft.upper if self.sft else 0, *(p.upper + p.max_completion for p in self.phases), 0)

    def served_window(self, evaluated: int = 0) -> int:
        """Tokens of the longest sequence that is generated; `evaluated` are the longest question's of the evaluation."""
        each = [phase.upper + phase.max_completion for phase in self.phases]
        if self.retrospective and self.retrospective.source == "fresh":
            each += [a.upper + b.max_completion for a, b in itertools.pairwise(self.phases)]
        return max(0, *each, evaluated + self.eval.max_completion if evaluated else 0)

    def check_eval_cache(self, longest: int) -> None:
        """Raises ValueError if the generator can't hold a question of `longest` tokens with its completions."""
        self._check_cache("eval", longest, self.eval.k, self.eval.max_completion)


_SHORT = {"generator": "generator.kind"}
"""A section's short name on the command line, for its kind."""


def shipped() -> dict[str, Path]:
    """Recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.toml"))}


def load_recipe(name: str, overrides: Sequence[tuple[str, str]] = ()) -> Recipe:
    """The recipe file or shipped recipe `name` with `overrides` [(dotted key, text)] applied.

    Raises:
        ValueError: no such recipe, unreadable TOML, or anything that `build` or the recipe's own checks refuse.
    """
    values = _read_toml(name, ())
    for key, text in overrides:
        override(values, _SHORT.get(key, key), text)
    values.setdefault("name", Path(name).stem)
    return build(Recipe, values)


def _read_toml(name: str, chain: tuple[Path, ...]) -> dict[str, Any]:
    path = Path(name) if name.endswith(".toml") else shipped().get(name)
    if path is None or not path.is_file():
        raise ValueError(f"no recipe {name!r}: {nearest(name, shipped())} (or give the path of a .toml file)")
    if path.resolve() in chain:
        raise ValueError(f"{chain[-1]} extends {path}, which extends it in turn: a recipe can't be its own ancestor")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ValueError(f"{path}: extends must be the name or the path of one recipe, not {parent!r}")
    beside = path.parent / parent
    base = _read_toml(str(beside) if parent.endswith(".toml") else parent, (*chain, path.resolve()))
    return _merge(base, {"name": path.stem, **values})


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; values and lists (phases) are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def to_toml(values: Mapping[str, Any], where: str = "") -> str:
    """TOML text of `config.dump(recipe)`: what a run folder keeps, readable by `load_recipe`."""
    scalars = {k: v for k, v in values.items() if not isinstance(v, Mapping) and not _is_tables(v)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in scalars.items()]
    for key, value in values.items():
        name = f"{where}.{_toml_key(key)}" if where else _toml_key(key)
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]", to_toml(value, name)]
        elif _is_tables(value):
            for item in value:
                lines += ["", f"[[{name}]]", to_toml(item, name)]
    return "\n".join(lines).strip() + "\n" if not where else "\n".join(lines)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
