"""Where prompts come from: files, `datasets` names, or the generator of synthetic reports; read, rendered and tokenized."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .console import Console
from .curriculum import assign
from .data import read_examples
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


def read_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path, console: Console) -> Prompts:
    """Reads all data of the recipe; generated rows and set-aside bad rows are kept in `folder`.

    Raises:
        ValueError: a bad row, an unknown source, a prompt id that stands twice, or a phase without a prompt.
    """
    data = recipe.data
    sft = _read(recipe, recipe.sft.data, "response", tokenizer, folder, console) if recipe.sft else []
    train = _read(recipe, data.train, "answers", tokenizer, folder, console, limit=data.limit) if recipe.phases else []
    evaluation = [
        p
        for source in data.eval
        for p in _read(recipe, source, "answers", tokenizer, folder, console, split=data.eval_split)
    ]
    for name, prompts in (("data.train", train), ("data.eval", evaluation)):
        _refuse_twins(name, prompts)
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


def _read(
    recipe: Recipe, source: str, needs: Literal["answers", "response"], tokenizer: PreTrainedTokenizerBase, folder: Path,
    console: Console, split: str | None = None, limit: int | None = None,
) -> list[Prompt]:  # fmt: skip
    data = recipe.data
    path: str | Path = source
    if source.startswith(SYNTHETIC):
        name = source.removeprefix(SYNTHETIC)
        path = write_rows(recipe.synthetic[name], tokenizer, folder / f"{name}.jsonl")
    aside = folder / f"bad-{Path(source.replace(':', '-')).name}.jsonl"
    result = read_examples(
        path, split=split or data.split, limit=limit, skip_bad_rows=data.skip_bad_rows, set_aside=aside, needs=needs
    )
    if result.bad:
        console.warn(f"{source}: {len(result.bad)} bad rows were left out and written to {aside}")
    prompts = tokenize(result.examples, tokenizer, max_length=data.max_length, truncate=data.truncate)
    cut = sum(prompt.truncated_from is not None for prompt in prompts)
    if cut:
        console.warn(f"{source}: {cut} of {len(prompts)} prompts were cut in the middle to {data.max_length} tokens")
    return prompts


def fingerprint(prompts: Prompts) -> str:
    """SHA-256 over ids and tokens of everything a run reads."""
    digest = hashlib.sha256()
    for prompt in (*prompts.sft, *prompts.train, *prompts.eval):
        digest.update(
            json.dumps([prompt.example.id, prompt.ids, prompt.example.answers, prompt.example.response]).encode()
        )
    return digest.hexdigest()


def _refuse_twins(name: str, prompts: list[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.example.id in seen:
            raise ValueError(
                f"{name}: two rows have the id {prompt.example.id!r}; ids name prompts in the pool and in saved rollouts"
            )
        seen.add(prompt.example.id)
