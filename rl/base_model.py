"""The demo's base model: a small Qwen3 that has read synthetic reports, and never a question."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from .synthetic import KINDS, Synthetic, build_tokenizer, make_rows
from .synthetic.lexicon import HIGHEST

IGNORE = -100


def demo_tokenizer() -> PreTrainedTokenizerFast:
    class ByWords:
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return [0] * len(text.split())

    rows = list(
        make_rows(Synthetic(rows=1200, split="tokenizer", shortest=300, longest=400, kinds=tuple(KINDS)), ByWords())
    )
    texts = [text for row in rows for text in (row["context"], row["question"], row["response"])]
    return build_tokenizer(texts, range(1, 2 * HIGHEST + 1))


def make_model(
    vocab: int, seed: int, hidden=128, layers=3, heads=4, kv=4, head_dim=32, inter=256, theta=10000.0
) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)
