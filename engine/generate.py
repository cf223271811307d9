"""The local generator: prefill each prompt once, decode its G completions together, many prompts at a time.

It samples from exactly the distribution that temperature, top_k and top_p describe, and reports for every token the
log-prob under that distribution and `kept_logmass`, the log of the probability mass that top_k and top_p kept at this
temperature: `logprob + kept_logmass` is the token's full-vocabulary log-prob, which the trainer computes too.

One uniform number per completion and step is drawn for the whole batch, so what a completion becomes doesn't depend on
which others of its batch have ended. Gives up paging and continuous batching: a serving engine does those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .completions import model_head
from .decoding import Decode, Prefill, PrefixCache
from .packing import Group, one_row


@dataclass(frozen=True)
class GeneratorConfig:
    """`batch_tokens` bounds the cached keys and values of the prompts and completions that are decoded together."""

    batch_tokens: int = 1 << 20


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep the whole vocabulary."""

    max_completion: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_completion < 1:
            raise ValueError(f"max_completion must be at least 1 token, not {self.max_completion}")
        if not 0.0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, not {self.top_k}")


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `ids` ends with the stop token when `finish_reason` is "stop"; "length" was cut off."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    kept_logmass: tuple[float, ...]
    finish_reason: str


@dataclass
class _Batch:
    """Completions under way: rows of tensors [B * G], of which `alive` names the original row."""

    ids: list[list[int]]
    logprobs: list[list[float]]
    kept: list[list[float]]
    done: list[bool]
    alive: Tensor
    stop_ids: frozenset[int] = field(default_factory=frozenset)

    def add(self, tokens: Tensor, logprobs: Tensor, kept: Tensor) -> None:
        for row, token, logp, mass in zip(
            self.alive.tolist(), tokens.tolist(), logprobs.tolist(), kept.tolist(), strict=True
        ):
            if not self.done[row]:
                self.ids[row].append(token)
                self.logprobs[row].append(logp)
                self.kept[row].append(mass)
                self.done[row] = token in self.stop_ids


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Tensor],
    group_size: int,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    seed: int,
    batch_tokens: int = 1 << 20,
    backend: str = "auto",
) -> list[list[Completion]]:
    """G completions of each prompt.

    Args:
        prompts: LongTensors [P].
        stop_ids: tokens that end a completion.
        seed: of this call alone; the same call gives the same completions.
        batch_tokens: prompts are batched so that cached keys (P padded + G * max_completion for each) stay below it.

    Raises:
        ValueError: a single prompt with its completions is over `batch_tokens`.
    """
    draw = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    results: list[list[Completion] | None] = [None] * len(prompts)
    for batch in _batches([len(p) for p in prompts], group_size * sampling.max_completion, batch_tokens):
        made = _generate_batch(
            model, [prompts[i] for i in batch], group_size, sampling, frozenset(stop_ids), draw, backend
        )
        for index, completions in zip(batch, made, strict=True):
            results[index] = completions
    model.train(training)
    return [completions for completions in results if completions is not None]


def _batches(lengths: list[int], completions: int, budget: int) -> list[list[int]]:
    """Prompts of similar length together, so that padding is small; each batch within the budget."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        cost = lengths[index] + completions
        if cost > budget:
            raise ValueError(
                f"prompt {index} of {lengths[index]} tokens with its completions ({completions} tokens at most) is over "
                f"batch_tokens = {budget}; raise it, or lower group size or max_completion"
            )
        if batches and cost * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _generate_batch(
    model: PreTrainedModel,
    prompts: list[Tensor],
    G: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    draw: torch.Generator,
    backend: str,
) -> list[list[Completion]]:
    rows = len(prompts) * G
    cache = PrefixCache([len(p) for p in prompts], G, sampling.max_completion)
    batch = _Batch(
        [[] for _ in range(rows)],
        [[] for _ in range(rows)],
        [[] for _ in range(rows)],
        [False] * rows,
        torch.arange(rows),
        stop_ids,
    )
    hidden = _prefill(model, prompts, cache, backend).repeat_interleave(G, dim=0)
    for step in range(sampling.max_completion):
        uniform = torch.rand(rows, generator=draw, dtype=torch.float64)[batch.alive]
        tokens, logprobs, kept = sample(_logits(model, hidden), sampling, uniform)
        batch.add(tokens, logprobs, kept)
        if step + 1 == sampling.max_completion or all(batch.done):
            break
        tokens = _compact(batch, cache, tokens, G)
        positions = (cache.prompt_lengths + cache.decoded).repeat_interleave(G)
        hidden = _decoder(model, tokens, positions.to(tokens.device), Decode(cache))
        cache.decoded += 1
    completions = [
        Completion(tuple(i), tuple(p), tuple(m), "stop" if done else "length")
        for i, p, m, done in zip(batch.ids, batch.logprobs, batch.kept, batch.done, strict=True)
    ]
    return [completions[i : i + G] for i in range(0, rows, G)]


def _prefill(model: PreTrainedModel, prompts: list[Tensor], cache: PrefixCache, backend: str) -> Tensor:
    """Runs the prompts once, fills the cache, and gives the hidden row of each last token, [B, D]."""
    row = one_row([Group(p, ()) for p in prompts])
    last = row.cu_prompts[1:].long() - 1
    hidden = _decoder(
        model, row.input_ids().to(model.device), row.position_ids().to(model.device), Prefill(row, cache, backend)
    )
    return hidden[last.to(model.device)]


def _decoder(model: PreTrainedModel, ids: Tensor, positions: Tensor, layout: Prefill | Decode) -> Tensor:
    output = model.get_decoder()(input_ids=ids[None], position_ids=positions[None], use_cache=False, layout=layout)
    return output.last_hidden_state[0]


def _compact(batch: _Batch, cache: PrefixCache, tokens: Tensor, G: int) -> Tensor:
    """Drops prompts whose completions have all ended, once they are half of the batch (each drop copies the cache)."""
    done = torch.tensor([batch.done[row] for row in batch.alive.tolist()]).view(-1, G).all(dim=1)
    if int(done.sum()) * 2 < len(done):
        return tokens
    keep = (~done).nonzero()[:, 0]
    cache.keep(keep.to(tokens.device))
    batch.alive = batch.alive.view(-1, G)[keep].flatten()
    return tokens.view(-1, G)[keep.to(tokens.device)].flatten()


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = model_head(model)
    logits = torch.nn.functional.linear(hidden.to(head.weight_VD.dtype), head.weight_VD, head.bias).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def sample(logits: Tensor, sampling: Sampling, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row by inverting the cumulative distribution.

    Temperature first, then top_k, then top_p on what top_k left (the order of transformers and vLLM); top_p keeps the
    smallest set of most probable tokens whose mass reaches it.

    Args:
        logits: [B, V] fp32; uniform: [B] in [0, 1).

    Returns:
        tokens [B], their log-probs under the kept distribution [B], log of the kept mass [B]. Greedy reports log-prob 0
        and the log-mass of the one token it keeps at temperature 1.
    """
    if sampling.temperature == 0.0:
        tokens = logits.argmax(-1)
        logp = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens, torch.zeros_like(logp), logp
    logp = (logits.double() / sampling.temperature).log_softmax(-1)
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        tokens = _invert(logp.exp(), uniform.to(logits.device))
        return tokens, logp.gather(1, tokens[:, None])[:, 0], torch.zeros_like(logp[:, 0])
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ranked, order = ranked[:, : sampling.top_k], order[:, : sampling.top_k]
    probs = ranked.exp()
    probs = probs / probs.sum(-1, keepdim=True)
    kept = probs.cumsum(-1) - probs < sampling.top_p
    kept[:, 0] = True
    kept_logmass = ranked.masked_fill(~kept, -torch.inf).logsumexp(-1)
    rank = _invert(probs * kept, uniform.to(logits.device))[:, None]
    return order.gather(1, rank)[:, 0], ranked.gather(1, rank)[:, 0] - kept_logmass, kept_logmass


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Index at which the cumulative weight passes `uniform` of the total; never one of weight zero. [B, V], [B] -> [B]."""
    cumulative = weights.cumsum(-1)
    index = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0]
    positive = weights > 0
    last = weights.shape[-1] - 1 - positive.flip(-1).int().argmax(-1)
    return torch.minimum(index, last)
