"""The model being trained, with what turns text into completions: tokenizer, precision, stop tokens, generator.

It generates itself unless `served` is somebody else (`generator.py`).
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
    load_model,
    load_tokenizer,
)
from ..engine.generate import GeneratorConfig, OnDone
from ..engine.model import DTYPES, ModelConfig, pick_device, stop_tokens
from ..engine.optimizer import apply_update
from ..engine.sharding import place
from ..kernels import LogProbs, PolicyLoss
from .config import nearest
from .generator import Generator, LocalGenerator
from .prompts import Prompt
from .ranks import Ranks

SHIPPED = "shipped:"
_IDLE_TOKENS = 64
"""Of an idle turn's prompt: a few for each of the ranks that a row may be shared out over."""


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
    """A loaded model and how it is used. `path` overrides `config.path`, to load a checkpoint of the same model.

    On many ranks all of them make the same calls: `logprobs` and `loss` with the groups of their own data rank (or `idle`,
    while others have some), everything else with the same arguments.

    `version` counts how often the weights changed since they were those of `config.path`.
    """

    def __init__(
        self,
        config: ModelConfig,
        generator: GeneratorConfig,
        path: Path | str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        source = model_source(config) if path is None else path
        self.ranks = ranks or Ranks()
        mesh, device = self.ranks.mesh, pick_device(config.device)
        sharded = mesh is not None and mesh.config.shard  # its whole weights need not fit on a device
        self.config = config
        self.generator = generator
        self.served: Generator | None = None
        self.version = 0 if path is None else 1
        self.tokenizer = load_tokenizer(model_source(config), trust_remote_code=config.trust_remote_code)
        self.model: PreTrainedModel = load_model(
            source,
            dtype=DTYPES[config.dtype],
            device="cpu" if sharded else device,
            yarn=config.yarn if path is None else None,  # a saved checkpoint already carries it
            rope_scaling=config.rope_scaling if path is None else None,
            gradient_checkpointing=config.gradient_checkpointing,
            offload_activations=config.offload_activations,
            tile_tokens=config.tile_tokens,
            liger=config.liger,
            trust_remote_code=config.trust_remote_code,
            lora=config.lora,
        )
        self.weights = place(self.model, mesh, compute=torch.bfloat16 if config.autocast else None, device=device)
        self.stop_ids = stop_tokens(self.model, self.tokenizer)

    @property
    def foreign(self) -> bool:
        """Whether somebody else generates, whose log-probs differ from the trainer's by more than rounding."""
        return self.served is not None

    @property
    def in_step(self) -> bool:
        """Whether ranks wait for each other within a forward, so that all must run the same ones."""
        return self.weights.lockstep or self.ranks.sequence is not None

    def precision(self) -> AbstractContextManager[object]:
        """bfloat16 compute on fp32 weights where `autocast` asks for it."""
        if not self.config.autocast:
            return nullcontext()
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16)

    def logprobs(self, groups: Sequence[Group], temperature: float, budget: int | None = None) -> LogProbs:
        """Of the groups' completions; `budget` as `engine.completion_logprobs` has it."""
        with self.precision():
            return self.weights.run(
                lambda: completion_logprobs(
                    self.model, groups, temperature=temperature, mesh=self.ranks.sequence, budget=budget
                )
            )

    def loss(self, groups: Sequence[Group], temperature: float, **inputs: Any) -> PolicyLoss:
        """A policy loss of the groups' completions; `inputs` are those of `engine.completion_policy_loss`."""
        with self.precision():
            return self.weights.run(
                lambda: completion_policy_loss(
                    self.model, groups, temperature=temperature, mesh=self.ranks.sequence, **inputs
                )
            )

    def idle(self) -> None:
        """A turn without a row of one's own: weights are gathered by all ranks or none, and gradients summed likewise."""
        if not self.weights.lockstep:
            return
        group = Group(torch.zeros(_IDLE_TOKENS, dtype=torch.long), [torch.zeros(1, dtype=torch.long)])
        nothing = torch.zeros(1, device=self.model.device)
        made = self.loss([group], 1.0, old_logp=None, advantages=nothing + 1.0, kind="reinforce", normalizer=1.0)
        if torch.is_grad_enabled():
            (made.loss * 0.0).backward()

    def update(self, optimizer: torch.optim.Optimizer, learning_rate: float, grad_clip: float) -> float:
        """One update from the gradients of all ranks; as `apply_update`."""
        self.weights.sum_gradients()
        self.version += 1
        return apply_update(optimizer, self.model, learning_rate, grad_clip)

    def sample(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        sampling: Sampling,
        seed: int,
        on_done: OnDone = lambda prompt, place, completion: None,
    ) -> list[list[Completion]]:
        """G completions of each prompt; the same call on the same weights gives the same completions.

        `on_done` is as `Generator.sample` has it.
        """
        return (self.served or LocalGenerator(self)).sample(prompts, group_size, sampling, seed, on_done)

    def rest(self) -> None:
        """Training begins: a generator that shares the GPU gives it up until it is asked again."""
        if self.served is not None:
            self.served.rest()

    def generation_metrics(self) -> dict[str, float]:
        """What the generator counted since the last time."""
        return {} if self.served is None else self.served.metrics()

    def text(self, completion: Completion) -> str:
        """The completion as text, its stop token left out."""
        return str(self.tokenizer.decode(list(completion.ids), skip_special_tokens=True))

    def response_ids(self, response: str) -> Tensor:
        """A written response as the policy would have sampled it: its tokens and the end token."""
        ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, self.tokenizer.eos_token_id])
