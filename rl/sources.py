"""Where prompts come from: files, `datasets` names, or the generator of synthetic reports; read, rendered and tokenized."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..engine.model import read_config
from .config import nearest
from .console import Console
from .curriculum import assign
from .data import read_examples
from .policy import model_source
from .prompts import Prompt, tokenize
from .recipe import SYNTHETIC, Recipe
from .synthetic import write_rows


@dataclass(frozen=True)
class Prompts:
    """Everything a run reads, in the policy's own tokens. `phases[k]` are indices into `train`; `beyond` fit no phase."""

    sft: list[Prompt]
    train: list[Prompt]
    eval: list[Prompt]
    phases: list[list[int]]
    beyond: list[int]


def read_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path | None, console: Console) -> Prompts:
    """Reads all data of the recipe; generated rows and set-aside bad rows are kept in `folder`, or nowhere.

    Raises:
        ValueError: a bad row, an unknown source, a prompt id that stands twice, a phase without a prompt, or questions
            that can't be evaluated.
    """
    reader = _Reader(recipe, tokenizer, folder, console)
    sft = reader.read("sft", recipe.sft.data, "response", recipe.data.split) if recipe.sft else []
    train = reader.read("train", recipe.data.train, "answers", recipe.data.split) if recipe.phases else []
    evaluation = read_eval(recipe, tokenizer, folder, console)
    _refuse_twins("data.train", train)
    phases, beyond = assign([len(p.ids) for p in train], recipe.phases)
    for index, members in enumerate(phases):
        if not members:
            raise ValueError(
                f"no prompt of data.train has a length within phases.{index} (up to {recipe.phases[index].upper} tokens)"
            )
    if beyond:
        console.warn(
            f"{len(beyond)} prompts are longer than the last phase's {recipe.phases[-1].upper} tokens and are not trained on"
        )
    return Prompts(sft, train, evaluation, phases, beyond)


def read_eval(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path | None, console: Console
) -> list[Prompt]:
    """The evaluation data alone, with what `read_prompts` says of it."""
    reader = _Reader(recipe, tokenizer, folder, console)
    made = [
        prompt
        for index, source in enumerate(recipe.data.eval)
        for prompt in reader.read(f"eval-{index}", source, "answers", recipe.data.eval_split)
    ]
    _refuse_twins("data.eval", made)
    if made:
        _check_eval(recipe, made)
    return made


def _check_eval(recipe: Recipe, questions: list[Prompt]) -> None:
    longest = max(len(question.ids) for question in questions)
    recipe.check_eval_cache(longest)
    check_window(recipe, longest + recipe.eval.max_completion)
    names = {question.example.benchmark for question in questions}
    for name in recipe.eval.headline:
        if name not in names:
            raise ValueError(
                f"eval.headline: no question of data.eval has the benchmark {name!r}; {nearest(name, names)}"
            )


def check_window(recipe: Recipe, evaluated: int = 0) -> None:
    """Raises ValueError if the model's positions end before the longest prompt with its completion does.

    Args:
        evaluated: tokens of the longest question of the evaluation with its completion, once they are known.
    """
    model, need = recipe.model, max(recipe.window(), evaluated)
    source, trust = model_source(model), model.trust_remote_code
    config = read_config(source, yarn=model.yarn, rope_scaling=model.rope_scaling, trust_remote_code=trust)
    text = config.get_text_config()
    window = getattr(text, "max_position_embeddings", None)
    if window is None or need <= window:
        return
    lower = "cut long questions (data.truncate, data.max_length)" if evaluated == need else "lower the phases' limits"
    raise ValueError(
        f"the longest prompt with its completion takes {need} tokens, but {source} has positions for {window}: "
        f"{_longer_window(recipe, read_config(source, trust_remote_code=trust).get_text_config(), need)}, or {lower}"
    )


def _longer_window(recipe: Recipe, plain: PreTrainedConfig, need: int) -> str:
    """What to set for `need` positions; `plain` is the model's configuration without the recipe's stretching."""
    rope = getattr(plain, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return f"its config.json stretches them already ({rope['rope_type']}), and only a larger factor there would do"
    scaling = recipe.model.rope_scaling
    original = (scaling.original if scaling else None) or plain.max_position_embeddings
    factor = math.ceil(need / original)
    return f"set model.{'rope_scaling.factor' if scaling else 'yarn'} = {factor}.0"


@dataclass(frozen=True)
class _Reader:
    """Reads sources of one recipe. Without a folder, generated rows go through a temporary file and bad rows are only counted."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    folder: Path | None
    console: Console

    def read(self, role: str, source: str, needs: Literal["answers", "response"], split: str) -> list[Prompt]:
        data, warn = self.recipe.data, self.console.warn
        aside = self.folder and self.folder / f"bad-{role}.jsonl"
        with tempfile.TemporaryDirectory() as temporary:
            result = read_examples(
                self._written(source, self.folder or Path(temporary)), split=split, set_aside=aside, needs=needs,
                limit=data.limit if role == "train" else None, skip_bad_rows=data.skip_bad_rows,
            )  # fmt: skip
        if result.bad:
            warn(f"{source}: {len(result.bad)} bad rows were left out" + (f" and written to {aside}" if aside else ""))
        prompts = tokenize(result.examples, self.tokenizer, max_length=data.max_length, truncate=data.truncate)
        cut = sum(prompt.truncated_from is not None for prompt in prompts)
        if cut:
            warn(f"{source}: {cut} of {len(prompts)} prompts were cut in the middle to {data.max_length} tokens")
        return prompts

    def _written(self, source: str, folder: Path) -> str | Path:
        """The source, or the file that its generated rows are written to."""
        if not source.startswith(SYNTHETIC):
            return source
        name = source.removeprefix(SYNTHETIC)
        return write_rows(self.recipe.synthetic[name], self.tokenizer, folder / f"{name}.jsonl")


def fingerprint(prompts: Prompts) -> str:
    """SHA-256 over everything a run reads: prompts as tokens, answers, responses, benchmarks and other columns."""
    digest = hashlib.sha256()
    for prompt in (*prompts.sft, *prompts.train, *prompts.eval):
        row = {**prompt.example.to_row(), "context": None, "prompt": None, "ids": prompt.ids}  # ids stand for the text
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _refuse_twins(name: str, prompts: list[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.example.id in seen:
            raise ValueError(
                f"{name}: two rows have the id {prompt.example.id!r}; ids name prompts in the pool and in saved rollouts"
            )
        seen.add(prompt.example.id)
