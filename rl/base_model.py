"""The demo's base model: a small Qwen3 that has read synthetic reports, and never a question.

`python -m longreach.rl.base_model OUT` builds the tokenizer and trains the model from nothing in about five minutes of
one core; the result ships in `rl/assets/demo-base`. Same seed, thread count and kind of processor: same bytes.

Copying from context is what a model of this size finds hard: from random weights, with AdamW or Muon, it was still
guessing among the document's values after two minutes. Two things make it reliable here. The weights start with a prior for
it (`prime_copying`, in the manner of Trockman and Kolter, "Mimetic initialization of self-attention layers", 2023):
the first layer's heads look one, two, three and four tokens back, and the second layer's compare what they find. That
prior alone predicts nothing (0 % at step 0); training sharpens it within a hundred steps. And the loss dwells on the
tokens that earlier text determines. What this gives up: it says nothing about how copying emerges by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .synthetic import KINDS, Synthetic, build_tokenizer, make_rows
from .synthetic.lexicon import HIGHEST
from .synthetic.reading import Reading, read_documents, read_leaflets
from .synthetic.tokenizer import EOS_ID, PAD_ID

ROPE_BASE = 1e6
EMBEDDING_STD = 0.5
COPY_GAIN = 2.0
SHARPNESS = 1.5
"""Gain of the query and key norms: with heads of 32, norms of 1 can't tell one token among a thousand."""


@dataclass(frozen=True)
class BaseTraining:
    """How the base model is trained.

    leaflet_steps: steps on leaflets of 96 tokens. growth: (steps, shortest, longest) of the documents that follow, in
    tokens. batch_tokens: tokens a step. mentions, explained: of the documents, as in Synthetic; both higher than in the
    demo's rows, for more to learn from. other_weight: weight of the mean loss over all tokens beside that over repeated
    values. other_share: share of the remaining tokens that the former is estimated on. decay_from: share of the steps
    after which the learning rate falls linearly to a tenth.
    """

    seed: int = 0
    leaflet_steps: int = 70
    growth: tuple[tuple[int, int, int], ...] = ((80, 160, 220), (80, 230, 455), (900, 160, 1100))
    batch_tokens: int = 2400
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    decay_from: float = 0.3
    mentions: float = 1.6
    explained: float = 0.3
    other_weight: float = 0.2
    other_share: float = 0.25


class _ByWords:
    """Stands in for the tokenizer while there is none: counts words."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * len(text.split())


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer, built from generated rows of a stream that nothing else uses."""
    config = Synthetic(split="tokenizer", rows=1200, kinds=tuple(KINDS), shortest=300, longest=400)
    rows = make_rows(config, _ByWords())
    texts = [text for row in rows for text in (row["context"], row["question"], row["response"])]
    return build_tokenizer(texts, range(1, 2 * HIGHEST + 1))


def new_model(vocabulary: int) -> Qwen3ForCausalLM:
    """The untrained demo model: three layers, four heads of 32, 0.7 million parameters."""
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def prime_copying(model: Qwen3ForCausalLM, generator: torch.Generator) -> None:
    """Set all weights: at random, with a prior for copying what followed the same words before.

    Embedding dimension 0 is a constant. Layer 0, head h: queries and keys are made of that constant, rotated so that
    RoPE's fast pairs peak h + 1 tokens back; the value is a random projection of the token there, written to a subspace
    of its own. Layer 1: query = the token and the three before it, key = the four before, through the same random
    rotations, so they agree where the same four words came before; the value is the token itself.
    """
    hidden, heads, size = model.config.hidden_size, model.config.num_attention_heads, model.config.head_dim
    assert model.config.num_key_value_heads == heads and heads * size == hidden
    weights = dict(model.named_parameters())
    _random_weights(weights, hidden, generator)

    def rotation(n: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=generator))[0]

    look = {name: weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo"}
    match = {name: weights[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkvo"}
    project, spaces, copy = rotation(hidden)[:size], rotation(hidden), rotation(hidden)
    frequency = ROPE_BASE ** (-torch.arange(0, size, 2) / size)
    fast = (frequency > 0.25).float()
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        turn = (head + 1) * frequency
        look["q"][rows] *= 0.1
        look["k"][rows] *= 0.1
        look["q"][rows, 0] = torch.cat([fast * turn.cos(), -fast * turn.sin()])
        look["k"][rows, 0] = torch.cat([fast, torch.zeros_like(fast)])
        look["v"][rows] = project
        turns = [rotation(size) for _ in range(heads)]
        back = [spaces[:, i * size : (i + 1) * size].T for i in range(heads)]
        match["q"][rows] = turns[0] @ project + sum(turns[i] @ back[i - 1] for i in range(1, heads))
        match["k"][rows] = sum(turns[i] @ back[i] for i in range(heads))
    look["o"].copy_(spaces * EMBEDDING_STD)
    match["v"].copy_(copy)
    match["o"].copy_(copy.T * EMBEDDING_STD * COPY_GAIN)
    for name in "qkv":
        match[name][:, 0] = 0


def _random_weights(weights: dict[str, torch.nn.Parameter], hidden: int, generator: torch.Generator) -> None:
    """Everything random, the outputs of the blocks nearly silent, dimension 0 of the stream constant and unread."""
    for name, weight in weights.items():
        if weight.ndim == 2:
            quiet = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = EMBEDDING_STD if "embed_tokens" in name else 0.02 if quiet else hidden**-0.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.fill_(SHARPNESS)
    weights["model.embed_tokens.weight"][:, 0] = 4 * EMBEDDING_STD
    weights["model.norm.weight"].fill_(0.2)
    weights["model.norm.weight"][0] = 0


def reading_plan(config: BaseTraining, tokenizer: PreTrainedTokenizerFast) -> Iterator[Reading]:
    """The batches in order: leaflets first, then documents that grow."""
    encode = cache(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
    rng, pad = Random(f"base/{config.seed}"), PAD_ID
    for _ in range(config.leaflet_steps):
        yield read_leaflets(rng, encode, pad, explained=0.0, rows=config.batch_tokens // 75, length=96)
    for steps, shortest, longest in config.growth:
        documents = Synthetic(shortest=shortest, longest=longest, mentions=config.mentions, explained=config.explained)
        for _ in range(steps):
            yield read_documents(rng, encode, pad, config=documents, tokens=config.batch_tokens)


def reading_loss(
    model: Qwen3ForCausalLM, page: Reading, config: BaseTraining, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """(loss, share of repeated values that are predicted). Next-token loss: mean over repeated values + weighted rest."""
    repeated, real = page.repeated[:, 1:], page.real[:, 1:]
    keep = repeated | (real & (torch.rand(real.shape, generator=generator) < config.other_share))
    hidden = model.model(input_ids=page.ids, attention_mask=None, use_cache=False).last_hidden_state[:, :-1]
    logits, target = model.lm_head(hidden[keep]), page.ids[:, 1:][keep]
    each = F.cross_entropy(logits, target, reduction="none")
    determined = repeated[keep]
    hits = (logits.argmax(-1) == target)[determined].float().mean().item()
    return each[determined].mean() + config.other_weight * each.mean(), hits


def train_base(config: BaseTraining, tokenizer: PreTrainedTokenizerFast, out: Path, *, report_every: int = 50) -> None:
    """Train and save into `out` (transformers layout, fp32 safetensors); a copy is kept there while training goes on."""
    generator = torch.Generator().manual_seed(config.seed)
    model = new_model(len(tokenizer))
    prime_copying(model, generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    steps = config.leaflet_steps + sum(stage[0] for stage in config.growth)
    fall = max(1.0, (1 - config.decay_from) * steps)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / config.warmup_steps, max(0.1, (steps - step) / fall))
    )
    tokenizer.save_pretrained(out)
    start, hits = time.perf_counter(), 0.0
    for step, page in enumerate(reading_plan(config, tokenizer), start=1):
        loss, hit = reading_loss(model, page, config, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        hits = hit if step == 1 else 0.9 * hits + 0.1 * hit
        if step % report_every == 0 or step == steps:
            print(
                f"step {step}/{steps}  tokens/row {page.ids.shape[1]}  loss {loss.item():.3f}  "
                f"repeated values right {hits:.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longreach.rl.base_model", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for model and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="more is faster, but other bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train_base(BaseTraining(seed=arguments.seed), train_tokenizer(), arguments.out)


if __name__ == "__main__":
    main()
