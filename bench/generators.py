"""What samples completions in this process, for `rollout`: our generator, transformers' generate and its continuous batching.

All of them load the weights that were saved in a folder, sample at temperature 1 and end at R tokens and nowhere else.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from longreach.engine import Sampling, generate, load_model
from longreach.engine.attention import NAME as OUR_ATTENTION

from .case import Case, Missing
from .train_step import make_model

Sample = Callable[[Tensor, int, int], int]
"""Takes a prompt [P], G and R, gives how many tokens were sampled after it."""
Make = Callable[[Path, Case, ExitStack], Sample]
"""A contender on the model saved in a folder, for sizes up to the case's; what it holds open goes on the stack."""

WAIT_S = 600.0
"""For one completion."""


def save(case: Case, folder: Path) -> None:
    """The weights that all of them load, and a tokenizer with a word for each token, which servers ask for."""
    from tokenizers import Tokenizer, models

    make_model(case, OUR_ATTENTION).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(case.dims["V"])}, "0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0").save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and what its continuous batching says of each call."""
    batching = logging.getLogger("ContinuousBatchingLogger")
    level, bars = batching.level, transformers_logging.is_progress_bar_enabled()
    batching.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        batching.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def ours(folder: Path, case: Case, *, shared: bool) -> Sample:
    model = load_model(folder, dtype=case.torch_dtype, device=torch.device(case.device))

    def sample(prompt: Tensor, g: int, r: int) -> int:
        prompts, size = ([prompt], g) if shared else ([prompt] * g, 1)
        made = generate(model, prompts, size, Sampling(r, 1.0), stop_ids=[], seed=0, batch_tokens=1 << 22)
        return sum(len(one.ids) for group in made for one in group)

    return sample


def of_generate(folder: Path, case: Case, stack: ExitStack) -> Sample:
    """The prompt G times."""
    model = _plain(folder, case)

    def sample(prompt: Tensor, g: int, r: int) -> int:
        ids = prompt[None].to(case.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), num_return_sequences=g, **_settings(r))
        return made[:, len(prompt) :].numel()

    return sample


def of_batches(folder: Path, case: Case, stack: ExitStack, *, shared: bool) -> Sample:
    """One request, whose completions fork from its computed prompt; or a request for each, which share no block."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, (p, most, r) = _plain(folder, case), (case.dims[name] for name in "PGR")

    @functools.cache
    def manager(size: int, tokens: int) -> Any:
        """The number of completions of a request is a manager's, for good."""
        options = {**_settings(tokens), "eos_token_id": -1, "num_return_sequences": size}
        del options["min_new_tokens"]  # nothing ends one before its time, and it knows no such limit
        batching = ContinuousBatchingConfig(allow_block_sharing=shared)
        if case.device == "cpu":  # else it takes all memory there is, and fills it first
            blocks = -(-(p + r) // batching.page_size)
            batching.num_blocks, batching.max_batch_tokens = 2 * most * blocks + 2, 2048
        made = model.init_continuous_batching(GenerationConfig(**options), batching)
        stack.callback(made.destroy)
        made.start()
        return made

    def sample(prompt: Tensor, g: int, r: int) -> int:
        asked = manager(g if shared else 1, r)
        asked.add_requests([prompt.tolist()] * (1 if shared else g))
        made = 0
        for _ in range(g):
            output = asked.get_result(timeout=WAIT_S)
            if output is None or output.error is not None:
                raise Missing(f"gave no completion: {output.error if output is not None else 'its thread has ended'}")
            made += len(output.generated_tokens)
        return made

    return sample


def _plain(folder: Path, case: Case) -> Any:
    made: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=case.torch_dtype)
    return made.to(case.device).eval()


def _settings(r: int) -> dict[str, Any]:
    return {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": r, "min_new_tokens": r,
            "pad_token_id": 0, "eos_token_id": None}  # fmt: skip
