"""One GRPO update (forward, loss, gradients of every weight) of one group on a small random Qwen3, through the engine.

A prompt of P tokens and G completions of R: `shared prefix` runs P + G R tokens, `repeated prompts` G (P + R), and so
does `transformers`, the padded batch that a trainer without packing makes. `forward` alone is the pass for old or
reference log-probs. Work is counted for P + G R tokens whoever does it, so repeating the prompt shows as a lower share.
The optimizer is left out: it costs all of them the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from longreach.engine import Group, completion_logprobs, completion_policy_loss
from longreach.engine.attention import NAME as OUR_ATTENTION

from .case import Case, Contender, Exact, Problem
from .policy_loss import bare

PASSES = ("forward", "both")
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
SIZES = {
    "cpu": {
        "small": ({"P": 64, "G": 4, "R": 8, "layers": 2, "D": 64, "V": 512},),
        "default": ({"P": 1024, "G": 8, "R": 64, "layers": 2, "D": 256, "V": 8192},),
        "large": ({"P": 4096, "G": 8, "R": 256, "layers": 2, "D": 256, "V": 8192},),
    },
    "cuda": {
        "small": ({"P": 1024, "G": 8, "R": 128, "layers": 2, "D": 1024, "V": 32768},),
        "default": ({"P": 16384, "G": 8, "R": 1024, "layers": 4, "D": 2048, "V": 151936},),
        "large": ({"P": 122880, "G": 8, "R": 4096, "layers": 2, "D": 4096, "V": 151936},),
    },
}
HEAD_DIM = {"cpu": 32, "cuda": 128}
EXACT_BYTES = 1 << 30
"""Most that the fp64 scores of the padded batch may take; beyond it there are no error columns."""


def make_config(case: Case) -> Qwen3Config:
    d = case.dims["D"]
    heads = d // HEAD_DIM[case.device]
    return Qwen3Config(
        vocab_size=case.dims["V"], hidden_size=d, intermediate_size=3 * d, num_hidden_layers=case.dims["layers"],
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), head_dim=HEAD_DIM[case.device],
        max_position_embeddings=case.dims["P"] + case.dims["R"], initializer_range=0.5 / d**0.5,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def make_model(case: Case, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(
            make_config(case), dtype=case.torch_dtype, attn_implementation=attention
        )
    return model.train()


def work(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Operations of P + G R tokens; bytes of the weights and their gradients."""
    p, g, r, layers, d, v = (case.dims[name] for name in ("P", "G", "R", "layers", "D", "V"))
    config = make_config(case)
    query = config.num_attention_heads * HEAD_DIM[case.device]
    key = (config.num_key_value_heads or 1) * HEAD_DIM[case.device]
    weights = layers * (d * (2 * query + 2 * key) + 9 * d * d)
    pairs = p * (p + 1) / 2 + g * r * p + g * r * (r + 1) / 2
    linear = 2.0 * (p + g * r) * weights + 2.0 * g * r * d * v
    attention = 4.0 * query * pairs * layers
    bytes_ = float((weights + v * d) * case.torch_dtype.itemsize)
    return {"forward": linear + attention, "both": 3 * linear + 3.5 * attention}, {
        "forward": bytes_,
        "both": 3 * bytes_,
    }


def problem(case: Case) -> Problem:
    p, g, r, v = (case.dims[name] for name in "PGRV")
    model, plain = make_model(case, OUR_ATTENTION), make_model(case, "sdpa")
    group = Group(torch.randint(v, (p,)), [torch.randint(v, (r,)) for _ in range(g)])
    n = g * r
    with torch.no_grad():
        old = completion_logprobs(model, [group]).logp + 0.1 * torch.randn(n, device=case.device)
    ids = torch.arange(g, device=case.device).repeat_interleave(r)
    advantages = torch.randn(g, device=case.device)[ids]

    def formula(logp: Tensor) -> Tensor:
        return bare(logp, old.to(logp.dtype), advantages.to(logp.dtype), ids, g)

    def own(name: str, shared: bool) -> Contender:
        def logp() -> Tensor:
            return completion_logprobs(model, [group], shared_prefix=shared).logp

        def loss() -> Tensor:
            options: Any = {"kind": "grpo", "normalizer": g, "shared_prefix": shared}
            return completion_policy_loss(model, [group], old, advantages, **options).loss

        return contender(name, model, logp, loss, ours=True)

    contenders = [
        own("longreach, shared prefix", True),
        own("longreach, repeated prompts", False),
        contender(
            "transformers, padded batch", plain, lambda: padded(plain, group), lambda: formula(padded(plain, group))
        ),
    ]
    scores = 8 * g * (p + r) ** 2 * make_config(case).num_attention_heads
    truth = (lambda: reference(plain, group, formula)) if scores <= EXACT_BYTES else None
    return Problem(contenders, *work(case), truth, tuple(name for name, _ in model.named_parameters()))


def contender(
    name: str, model: PreTrainedModel, logp: Callable[[], Tensor], loss: Callable[[], Tensor], ours: bool = False
) -> Contender:
    weights = list(model.parameters())

    def backward(value: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(value, weights)

    return Contender(name, "all gradients", logp, loss, backward, None if ours else "transformers", ours)


def padded(model: PreTrainedModel, group: Group) -> Tensor:
    """The same by transformers alone: a [G, P + R] batch, logits of the completions in full."""
    completions = torch.stack(list(group.completions)).to(model.device)
    prompts = group.prompt_ids.to(model.device).expand(len(completions), -1)
    r = completions.shape[1]
    logits = model(torch.cat([prompts, completions], 1), logits_to_keep=r + 1, use_cache=False).logits[:, :-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(2, completions.unsqueeze(2)).flatten()


def reference(plain: PreTrainedModel, group: Group, loss: Callable[[Tensor], Tensor]) -> Exact:
    """The padded batch in fp64; errors are told for the embedding and one matrix at either end."""
    wide: Any = copy.deepcopy(plain).double()
    logp = padded(wide, group)
    value = loss(logp)
    last = wide.config.num_hidden_layers - 1
    shown = (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        f"model.layers.{last}.mlp.down_proj.weight",
    )
    named = dict(wide.named_parameters())
    gradients = torch.autograd.grad(value, [named[name] for name in shown])
    return Exact(logp.detach(), value.detach(), dict(zip(shown, gradients, strict=True)))
