"""One GRPO update with the prompt of a group computed once, against once for each completion, beside TRL's own.

`longreach, shared prefix` and `longreach, dense` differ in `shared_prefix` alone; both meet the vocabulary on completion
tokens only. TRL's is `GRPOTrainer._compute_loss` of the same weights, tokens, old log-probs and advantages. An update is
forward, loss and the gradients of all weights; the optimizer is left out, for it costs all of them the same. Errors are
against fp64 through transformers' own model, one completion after the other.

`python -m bench train_step` measures; `python -m bench.train_step [ROWS]` prints, from the rows, how many times faster
sharing is beside what the FLOP model says. Ratios are medians over rounds, in which all contenders take turns.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from longreach.engine import Group, completion_logprobs, completion_policy_loss
from longreach.engine.attention import NAME as OUR_ATTENTION

from . import results
from .case import Case, Contender, Exact, Problem, gather
from .peers import need
from .policy_loss import bare
from .results import Row
from .step import contender
from .table import print_table

SHARED, DENSE, TRL = "longreach, shared prefix", "longreach, dense", "TRL, GRPOTrainer"
PASSES = ("both",)
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
HEAD_DIM = 64
TINY = {"layers": 2, "D": 256, "V": 8192}
TWENTY_MILLION = {"P": 2048, "G": 8, "R": 64, "layers": 8, "D": 384}
ON_GPU = {"layers": 4, "D": 2048, "V": 151936}
SIZES = {
    "cpu": {
        "small": ({"P": 128, "G": 4, "R": 16, "layers": 1, "D": 128, "V": 512},),
        "default": tuple({"P": 512, "G": g, "R": r, **TINY} for r in (32, 128, 512) for g in (4, 8, 16)),
        "large": tuple({**TWENTY_MILLION, "V": v} for v in (8192, 151936)),
    },
    "cuda": {
        "small": ({"P": 1024, "G": 8, "R": 128, "layers": 2, "D": 1024, "V": 32768},),
        "default": tuple({"P": 16384, "G": g, "R": r, **ON_GPU} for r in (512, 4096) for g in (4, 8, 16)),
        "large": ({"P": 32768, "G": 8, "R": 1024, **ON_GPU},),
    },
}


def flops(dims: Mapping[str, int], *, shared: bool) -> float:
    """Operations of one update: 3 x (2 T W + 2 G R D V) + 3.5 x 4 H E layers pairs.

    T tokens meet the W weights of the layers and G R rows meet the vocabulary, forward and twice that backward; a pair of
    a query and a key costs 4 E operations forward in each of H heads, and 2.5 times that backward, where scores are
    computed again. Dense: T = G (P + R) and pairs = G (P + R) (P + R + 1) / 2. Shared: T = P + G R and
    pairs = P (P + 1) / 2 + G (R P + R (R + 1) / 2), for completions still look at the whole prompt.
    """
    p, g, r, layers, d, v = (dims[name] for name in ("P", "G", "R", "layers", "D", "V"))
    tokens = p + g * r if shared else g * (p + r)
    pairs = p * (p + 1) / 2 + g * (r * p + r * (r + 1) / 2) if shared else g * (p + r) * (p + r + 1) / 2
    return 3 * (2.0 * tokens * weights(dims) + 2.0 * g * r * d * v) + 3.5 * 4.0 * d * layers * pairs


def weights(dims: Mapping[str, int]) -> int:
    """Entries of all matrices of the layers; the heads together are as wide as the model, keys and values a third."""
    d, kv = dims["D"], HEAD_DIM * key_heads(dims)
    return dims["layers"] * (2 * d * (d + kv) + 12 * d * d)


def key_heads(dims: Mapping[str, int]) -> int:
    heads = dims["D"] // HEAD_DIM
    return heads // 3 if heads % 3 == 0 else heads // 2


def make_model(case: Case, attention: str) -> PreTrainedModel:
    d, heads = case.dims["D"], case.dims["D"] // HEAD_DIM
    config = Qwen3Config(
        vocab_size=case.dims["V"], hidden_size=d, intermediate_size=4 * d, num_hidden_layers=case.dims["layers"],
        num_attention_heads=heads, num_key_value_heads=key_heads(case.dims), head_dim=HEAD_DIM,
        max_position_embeddings=case.dims["P"] + case.dims["R"], initializer_range=0.5 / d**0.5,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(case.device):
        made = AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype, attn_implementation=attention)
    return made.train()


def problem(case: Case) -> Problem:
    p, g, r, v = (case.dims[name] for name in "PGRV")
    model = make_model(case, OUR_ATTENTION)
    group = Group(torch.randint(v, (p,)), [torch.randint(v, (r,)) for _ in range(g)])
    with torch.no_grad():
        old = completion_logprobs(model, [group]).logp + 0.1 * torch.randn(g * r, device=case.device)
    advantages = torch.randn(g, device=case.device)

    def own(name: str, shared: bool) -> Contender:
        def loss() -> Tensor:
            options: Any = {"kind": "grpo", "normalizer": g, "shared_prefix": shared}
            return completion_policy_loss(model, [group], old, advantages.repeat_interleave(r), **options).loss

        def logp() -> Tensor:
            return completion_logprobs(model, [group], shared_prefix=shared).logp

        return contender(name, model, logp, loss, ours=True)

    contenders = [own(SHARED, True), own(DENSE, False), gather(TRL, lambda: of_trl(case, group, old, advantages))]
    embedded = v * case.dims["D"]
    least = 3.0 * (weights(case.dims) + embedded) * case.torch_dtype.itemsize
    names = tuple(name for name, _ in model.named_parameters())
    return Problem(
        contenders, {"both": flops(case.dims, shared=True)}, {"both": least},
        lambda: reference(make_model(case, "sdpa"), group, old, advantages), names,
    )  # fmt: skip


def of_trl(case: Case, group: Group, old: Tensor, advantages: Tensor) -> Contender:
    """TRL's loss of the same batch, in one micro-batch and without checkpointing, as ours."""
    trl = need("trl")
    g, r = len(group.completions), len(group.completions[0])
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=case.device == "cpu", bf16=False, report_to=[], gradient_checkpointing=False,
            per_device_train_batch_size=g, num_generations=g, max_completion_length=r, loss_type="grpo",
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            make_model(case, "sdpa"), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config,
            train_dataset=need("datasets").Dataset.from_list([{"prompt": "0"}] * g), processing_class=tokenizer(),
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    completions = torch.stack(list(group.completions)).to(case.device)
    prompts = group.prompt_ids.to(case.device).expand(g, -1).contiguous()
    inputs = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": completions,
        "completion_mask": torch.ones_like(completions), "advantages": advantages,
        "old_per_token_logps": old.view(g, r), "num_items_in_batch": torch.tensor(g * r),
    }  # fmt: skip
    ids = torch.cat([prompts, completions], 1)

    def logp() -> Tensor:
        return trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), r)[0].flatten()

    made = contender(TRL, trainer.model, logp, lambda: trainer._compute_loss(trainer.model, inputs))
    return Contender(TRL, made.computes, made.forward, made.train, made.backward, package="trl")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token: a trainer asks for a tokenizer, and here every batch is tokens already."""
    from tokenizers import Tokenizer, models

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"0": 0}, "0")), pad_token="0", eos_token="0")  # fmt: skip


def reference(plain: PreTrainedModel, group: Group, old: Tensor, advantages: Tensor) -> Exact:
    """fp64 through transformers' model and logits; gradients of each completion's loss add up to the group's."""
    wide: Any = copy.deepcopy(plain).double()
    last = wide.config.num_hidden_layers - 1
    shown = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight",
             f"model.layers.{last}.self_attn.k_proj.weight", f"model.layers.{last}.mlp.down_proj.weight")  # fmt: skip
    named = dict(wide.named_parameters())
    parameters = [named[name] for name in shown]
    sums, logps, total = [torch.zeros_like(x) for x in parameters], [], torch.zeros((), dtype=torch.float64)
    g, prompt, device = len(group.completions), group.prompt_ids, plain.device
    for i, (completion, olds) in enumerate(zip(group.completions, old.double().chunk(g), strict=True)):
        ids = torch.cat([prompt, completion])[None].to(device)
        logits = wide(ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, completion.to(device)[:, None])[:, 0]
        one = torch.zeros(len(completion), dtype=torch.long, device=device)
        loss = bare(logp, olds, advantages[i].double().expand_as(logp), one, 1) / g
        for sum_, part in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += part
        logps.append(logp.detach())
        total = total + loss.detach().cpu()
    return Exact(torch.cat(logps), total, dict(zip(shown, sums, strict=True)))


HEADER = ("case", "shared s", "dense s", "TRL s", "dense / shared", "TRL / shared", "FLOP model", "MiB", "grad err")


def tables(rows: Iterable[Row]) -> dict[str, list[list[str]]]:
    """By device: a line for each case that has a shared and a dense row.

    Seconds, how many times faster sharing is than either and than the FLOP model says of dense, peak MiB of the three,
    and the worst relative error of a gradient among them.
    """
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] == "train_step" and row["status"] == "measured":
            place = (*row["dims"].items(), row["dtype"], row["device"], row["threads"])
            cases.setdefault(place, {})[row["contender"]] = row
    made: dict[str, list[list[str]]] = {}
    for found in cases.values():
        if {SHARED, DENSE} <= found.keys():
            made.setdefault(found[SHARED]["device"], []).append(line(found))
    return made


def line(found: Mapping[str, Row]) -> list[str]:
    """Of one case, from its rows by contender; a cell of TRL's is empty where it has none."""
    shared, others = found[SHARED], [found.get(name) for name in (DENSE, TRL)]
    dims = shared["dims"]
    model = flops(dims, shared=False) / flops(dims, shared=True)
    errors = [max(row["gradient_errors"].values()) for row in found.values() if row["gradient_errors"]]
    return [
        " ".join(f"{name}={value}" for name, value in dims.items()),
        *("" if row is None else f"{row['median_s']:.3g}" for row in (shared, *others)),
        *("" if row is None else ratio(row["samples_s"], shared["samples_s"]) for row in others),
        f"{model:.2f}",
        " ".join(f"{row['peak_mib']:.0f}" for row in (shared, *others) if row is not None),
        f"{max(errors):.0e}" if errors else "",
    ]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Median of the ratios of rounds, and their quartiles: what else the machine did in a round hits both."""
    low, middle, high = np.quantile(np.divide(slow, fast), (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted(results.FOLDER.glob("*.json"))
    for device, lines in tables(row for path in files for row in results.load(path)).items():
        print_table(f"train_step, {device}", HEADER, lines)
