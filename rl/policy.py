"""The model being trained, with what turns text into completions: tokenizer, precision, stop tokens, generator.

Another generator (a serving engine) replaces `sample` and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..engine import (
    Completion,
    Group,
    Sampling,
    completion_logprobs,
    completion_policy_loss,
    generate,
    load_model,
    load_tokenizer,
)
from ..engine.generate import GeneratorConfig, OnDone
from ..engine.model import DTYPES, ModelConfig, pick_device, stop_tokens
from ..kernels import LogProbs, PolicyLoss
from .config import nearest
from .prompts import Prompt

SHIPPED = "shipped:"


def model_source(config: ModelConfig) -> str:
    """`config.path`, with `shipped:NAME` as the folder of a model that comes with the package."""
    if not config.path.startswith(SHIPPED):
        return config.path
    name, assets = config.path.removeprefix(SHIPPED), Path(__file__).with_name("assets")
    known = [folder.parent.name for folder in assets.glob("*/config.json")]
    if name not in known:
        raise ValueError(f"model.path = {config.path!r}: no such model comes with the package; {nearest(name, known)}")
    return str(assets / name)


class Policy:
    """A loaded model and how it is used. `path` overrides `config.path`, to load a checkpoint of the same model."""

    def __init__(self, config: ModelConfig, generator: GeneratorConfig, path: Path | str | None = None) -> None:
        source = model_source(config) if path is None else path
        self.config = config
        self.generator = generator
        self.tokenizer = load_tokenizer(model_source(config), trust_remote_code=config.trust_remote_code)
        self.model: PreTrainedModel = load_model(
            source,
            dtype=DTYPES[config.dtype],
            device=pick_device(config.device),
            yarn=config.yarn if path is None else None,  # a saved checkpoint already carries it
            rope_scaling=config.rope_scaling if path is None else None,
            gradient_checkpointing=config.gradient_checkpointing,
            offload_activations=config.offload_activations,
            tile_tokens=config.tile_tokens,
            liger=config.liger,
            trust_remote_code=config.trust_remote_code,
            lora=config.lora,
        )
        self.stop_ids = stop_tokens(self.model, self.tokenizer)

    def precision(self) -> AbstractContextManager[object]:
        """bfloat16 compute on fp32 weights where `autocast` asks for it."""
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def logprobs(self, groups: Sequence[Group], temperature: float, budget: int | None = None) -> LogProbs:
        """Of the groups' completions; `budget` as `engine.completion_logprobs` has it."""
        with self.precision():
            return completion_logprobs(self.model, groups, temperature=temperature, budget=budget)

    def loss(self, groups: Sequence[Group], temperature: float, **inputs: Any) -> PolicyLoss:
        """A policy loss of the groups' completions; `inputs` are those of `engine.completion_policy_loss`."""
        with self.precision():
            return completion_policy_loss(self.model, groups, temperature=temperature, **inputs)

    def sample(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: int,
        on_done: OnDone = lambda prompt, place, completion: None,
    ) -> list[list[Completion]]:
        """G completions of each prompt; the same call on the same weights gives the same completions.

        `on_done` is handed each as it ends (a generator that can't tell may leave it: what is returned counts).
        """
        ids = [torch.tensor(prompt.ids) for prompt in prompts]
        with self.precision():
            return generate(
                self.model,
                ids,
                group_size,
                sampling,
                stop_ids=self.stop_ids,
                seed=seed,
                batch_tokens=self.generator.batch_tokens,
                on_done=on_done,
            )

    def text(self, completion: Completion) -> str:
        """The completion as text, its stop token left out."""
        return str(self.tokenizer.decode(list(completion.ids), skip_special_tokens=True))

    def response_ids(self, response: str) -> Tensor:
        """A written response as the policy would have sampled it: its tokens and the end token."""
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])
