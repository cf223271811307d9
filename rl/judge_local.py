"""The judge as a model in this process: any transformers model directory, on the engine's own generator.

The same prompt, grammar and cache as behind a server. It is asked for a group at a time, so that what it sees together is
the same in each run. It shares the device with the policy: there is no waiting for a network to hide, and on one GPU the
two take turns. It gives up system turns, which some chat templates refuse: all is said in the user's turn.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Generic, Self

import torch

from ..engine import Sampling, generate, load_model, load_tokenizer
from ..engine.model import DTYPES, pick_device, stop_tokens
from . import judge_prompt
from .judge_base import Judge, Tally
from .judge_cache import VerdictCache, cache_key
from .judge_config import JudgeConfig
from .judge_prompt import Case
from .judge_task import C, Chat, Task, V


class LocalClient(Generic[C, V]):
    """Asks one task of one model. It is loaded at once: what is wrong with it shows before the first step."""

    def __init__(self, config: JudgeConfig, cache: VerdictCache[V], task: Task[C, V]) -> None:
        self.config, self.cache, self.task = config, cache, task
        self.tally = Tally(config.max_failure_share, task.stakes)
        self.tokenizer = load_tokenizer(config.model_dir)
        self.model = load_model(config.model_dir, dtype=DTYPES[config.dtype], device=pick_device(config.device))
        self.model.requires_grad_(False)
        self._stops = stop_tokens(self.model, self.tokenizer)
        self._sampling = Sampling(config.max_tokens, temperature=0.0)
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", config.batch_tokens)
        self._longest = min(window, config.batch_tokens) - config.max_tokens
        if self._longest < 1:
            raise ValueError(
                f"judge max_tokens = {config.max_tokens} leaves no room for a prompt: the window is {window} tokens and "
                f"batch_tokens {config.batch_tokens}"
            )
        self._name = _fingerprint(Path(config.model_dir))
        self._turn = threading.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to close."""

    async def answers(self, cases: Sequence[C]) -> list[V | None]:
        """In order. Equal cases are asked once; generation runs in a thread of its own."""
        chats = [self.task.messages(case) for case in cases]
        keys = [cache_key(self.task.version, self._name, chat) for chat in chats]
        asked = zip(keys, cases, chats, strict=True)
        unknown = {key: (case, chat) for key, case, chat in asked if self.cache.get(key) is None}
        self.tally.counts["cache_hits"] += len(cases) - len(unknown)
        texts = await asyncio.to_thread(self._words, [chat for _, chat in unknown.values()]) if unknown else []
        for (key, (case, _)), text in zip(unknown.items(), texts, strict=True):
            verdict = None if text is None else self.task.parse(case, text)
            if verdict is None:
                self.tally.failure("too long a prompt" if text is None else "no clear verdict")
                continue
            self.tally.verdict()
            self.cache.put(key, verdict)
        return [self.cache.get(key) for key in keys]

    def overdue(self, count: int) -> None:
        for _ in range(count):
            self.tally.failure("overdue")

    def check(self) -> None:
        self.tally.check(f"the judge in {self.config.model_dir}")

    def metrics(self) -> dict[str, float]:
        return self.tally.metrics()

    def _words(self, chats: Sequence[Chat]) -> list[str | None]:
        """The model's words, greedily; None where the prompt is longer than its window."""
        prompts = [self._ids(chat) for chat in chats]
        fitting = [ids for ids in prompts if len(ids) <= self._longest]
        self.tally.counts["calls"] += len(fitting)
        with self._turn, self._device():
            made = generate(
                self.model, fitting, 1, self._sampling, stop_ids=self._stops, seed=0, batch_tokens=self.config.batch_tokens
            )  # fmt: skip
        words = iter(self.tokenizer.decode(list(one.ids), skip_special_tokens=True) for [one] in made)
        return [str(next(words)) if len(ids) <= self._longest else None for ids in prompts]

    def _ids(self, chat: Chat) -> torch.Tensor:
        text = "\n\n".join(message["content"] for message in chat)
        if self.tokenizer.chat_template is None:
            return torch.tensor(self.tokenizer(text + "\n")["input_ids"])
        turns = [{"role": "user", "content": text}]
        whole = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return torch.tensor(self.tokenizer(str(whole), add_special_tokens=False)["input_ids"])

    def _device(self) -> AbstractContextManager[object]:
        """A thread starts on the first GPU, whichever the model is on."""
        device = self.model.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class LocalJudge(LocalClient[Case, float], Judge):
    """See `Judge`."""

    by_group = True

    def __init__(self, config: JudgeConfig, cache: VerdictCache[float]) -> None:
        super().__init__(config, cache, judge_prompt.VERDICT)

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        return await self.answers(cases)


def _fingerprint(folder: Path) -> str:
    """The model in the cache's keys: other weights in the same folder are another judge."""
    files = sorted(folder.glob("*.safetensors"))
    return repr([str(folder), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)])
