"""The local generator: prefill each prompt once, decode its G completions together, many prompts at a time.

It samples from exactly the distribution that temperature, top_k and top_p describe, and reports for every token the
log-prob under that distribution and `kept_logmass`, the log of the probability mass that top_k and top_p kept at this
temperature: `logprob + kept_logmass` is the token's full-vocabulary log-prob, which the trainer computes too.

Each completion draws from a random stream of its own, so what it becomes depends on the seed and its place in the
list, not on how prompts are batched or which others have ended (up to rounding: a matrix product of another shape may
sum in another order). Gives up paging and continuous batching: a serving engine does those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .completions import Head, decode, model_head
from .decoding import Decode, Prefill, PrefixCache
from .packing import Group, one_row
from .sampling import Drawn, Sampling, sample

PREFILL_TOKENS = 1 << 15
"""Prompts go through the model together up to this many tokens: more would hold activations and gain no speed."""

LOGITS_BYTES = 256 << 20
"""Budget of one fp64 buffer of [rows, V] while sampling."""


@dataclass(frozen=True)
class GeneratorConfig:
    """`batch_tokens` bounds the cached keys and values of the prompts and completions that are decoded together."""

    batch_tokens: int = 1 << 18

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"generator.batch_tokens must be positive, not {self.batch_tokens}")


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` ends with the stop token when `finish_reason` is "stop"; "length" was cut off.

    `kept_logmass` is empty where the generator doesn't know it: then nobody knows the full vocabulary's log-probs.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    kept_logmass: tuple[float, ...]
    finish_reason: str


OnDone = Callable[[int, int, Completion], object]
"""(index of the prompt, place in its group, a completion that has just ended)."""


class _Batch:
    """B x G completions under way; `alive` names those whose prompts are still in the cache."""

    def __init__(self, rows: int, stop_ids: frozenset[int]) -> None:
        self.stop_ids = stop_ids
        self.tokens: list[list[tuple[int, float, float]]] = [[] for _ in range(rows)]
        self.done = [False] * rows
        self.alive = torch.arange(rows)

    def add(self, drawn: Drawn) -> list[int]:
        """Appends one token to each completion that goes on; gives the rows that it ended."""
        ended, columns = [], (column.tolist() for column in drawn)
        for row, *token in zip(self.alive.tolist(), *columns, strict=True):
            if not self.done[row]:
                self.tokens[row].append(tuple(token))
                self.done[row] = token[0] in self.stop_ids
                if self.done[row]:
                    ended.append(row)
        return ended

    def completion(self, row: int) -> Completion:
        ids, logprobs, kept = zip(*self.tokens[row], strict=True)
        return Completion(ids, logprobs, kept, "stop" if self.done[row] else "length")


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    group_size: int,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    seed: int,
    batch_tokens: int = GeneratorConfig.batch_tokens,
    backend: str = "auto",
    on_done: OnDone = lambda prompt, place, completion: None,
    share: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """G completions of each prompt.

    Args:
        prompts: LongTensors [P].
        stop_ids: tokens that end a completion.
        seed: of this call alone; the same call gives the same completions.
        batch_tokens: prompts are batched so that cached keys (P padded + G * max_completion for each) stay below it.
        on_done: handed each completion as it ends, with its prompt's index and its place in the group.
        share: indices of the prompts that are this rank's; only theirs are generated and given, in that order, and they
            are what the whole call would have made of them.

    Raises:
        ValueError: a prompt is no LongTensor or empty, `group_size` is below 1, or a single prompt with its
            completions is over `batch_tokens`.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    groups = [Group(prompt, ()) for prompt in prompts]
    seeds = prompt_seeds(seed, len(groups))
    mine = list(range(len(groups))) if share is None else list(share)
    results: dict[int, list[Completion]] = {}
    with evaluating(model):
        for places in _batches([groups[i].tokens for i in mine], group_size * sampling.max_completion, batch_tokens):
            batch = [mine[place] for place in places]
            uniform = torch.cat([_stream(seeds[i], group_size, sampling.max_completion) for i in batch])

            def ended(row: int, completion: Completion, batch: list[int] = batch) -> None:
                on_done(batch[row // group_size], row % group_size, completion)

            made = _generate_batch(
                model, [groups[i] for i in batch], group_size, sampling, frozenset(stop_ids), uniform, backend, ended
            )
            results.update(zip(batch, made, strict=True))
    return [results[i] for i in mine]


def prompt_seeds(seed: int, count: int) -> list[int]:
    """Each prompt's own seed, by its place in the list."""
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back in its own afterwards, whatever happens."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _stream(seed: int, group_size: int, length: int) -> Tensor:
    """Uniform numbers of one prompt's completions, [G, length]. A greater length continues a smaller one."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand((length, group_size), generator=draw, dtype=torch.float64).t()


def _batches(lengths: list[int], completions: int, budget: int) -> list[list[int]]:
    """Prompts of similar length together, so that padding is small; each batch within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        cost = lengths[index] + completions
        if cost > budget:
            raise ValueError(
                f"prompt {index} of {lengths[index]} tokens with its completions ({completions} tokens at most) is "
                f"over batch_tokens = {budget}; raise it, or lower group size or max_completion"
            )
        if batches and cost * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _generate_batch(
    model: PreTrainedModel,
    groups: list[Group],
    G: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    uniform: Tensor,
    backend: str,
    ended: Callable[[int, Completion], object],
) -> list[list[Completion]]:
    cache = PrefixCache([g.tokens for g in groups], G, sampling.max_completion)
    batch, head = _Batch(len(groups) * G, stop_ids), model_head(model)
    hidden = _prefill(model, groups, cache, backend).repeat_interleave(G, dim=0)
    for step in range(sampling.max_completion):
        drawn = _draw(head, hidden, sampling, uniform[batch.alive, step])
        for row in batch.add(drawn):
            ended(row, batch.completion(row))
        if step + 1 == sampling.max_completion or all(batch.done):
            break
        tokens = _compact(batch, cache, drawn.tokens, G)
        positions = (cache.prompt_lengths + cache.decoded).repeat_interleave(G)
        hidden = decode(model, tokens, positions, Decode(cache))
        cache.decoded += 1
    completions = [batch.completion(row) for row in range(len(groups) * G)]
    for row, completion in enumerate(completions):
        if not batch.done[row]:
            ended(row, completion)
    return [completions[i : i + G] for i in range(0, len(completions), G)]


def _prefill(model: PreTrainedModel, groups: list[Group], cache: PrefixCache, backend: str) -> Tensor:
    """Runs the prompts once, fills the cache, and gives the hidden row of each last token, [B, D]."""
    lasts, first = [], 0
    while first < len(groups):
        end, tokens = first + 1, groups[first].tokens
        while end < len(groups) and tokens + groups[end].tokens <= PREFILL_TOKENS:
            tokens += groups[end].tokens
            end += 1
        row = one_row(groups[first:end])
        hidden = decode(model, row.input_ids(), row.position_ids(), Prefill(row, first, cache, backend))
        lasts.append(hidden[row.cu_prompts[1:].long().to(hidden.device) - 1])
        first = end
    return torch.cat(lasts)


def _draw(head: Head, hidden: Tensor, sampling: Sampling, uniform: Tensor) -> Drawn:
    """Samples a few rows at a time, so that no [B x G, V] tensor exists."""
    rows = max(1, LOGITS_BYTES // (8 * len(head.weight_VD)))
    parts = [sample(head.logits(h), sampling, u) for h, u in zip(hidden.split(rows), uniform.split(rows), strict=True)]
    return Drawn(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _compact(batch: _Batch, cache: PrefixCache, tokens: Tensor, G: int) -> Tensor:
    """Drops prompts whose completions have all ended, once they are half of the batch (each drop copies the cache)."""
    done = torch.tensor([batch.done[row] for row in batch.alive.tolist()]).view(-1, G).all(dim=1)
    if int(done.sum()) * 2 < len(done):
        return tokens
    keep = (~done).nonzero()[:, 0]
    cache.keep(keep)
    batch.alive = batch.alive.view(-1, G)[keep].flatten()
    return tokens.view(-1, G)[keep.to(tokens.device)].flatten()
