"""One GRPO update of a model of 8B's shape with adapters, over long prompts, on one GPU: dense against shared.

Random bfloat16 weights of Qwen3-8B's shape, fp32 LoRA on every linear layer but the head, layers recomputed in the
backward, one group of G completions of R tokens on a prompt of P, on-policy. An update is forward, loss and the gradients
of all adapters; the optimizer is left out. `shared` is one packed row of P + G R tokens. `dense` is the same engine with
the prompt repeated, one completion after the other: only the first of its G equal updates is run, and its time is
multiplied by G (see `once`). What `tokens_per_s` counts is P + G R, whoever does it.

`bench/gpu.sh headline` measures on a GPU, the longest prompt first, so that what is begun late is short. Then
`python -m bench.headline [ROWS..] [--plot PICTURE]` prints the table and draws time and memory against P.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longreach.engine import Group, completion_logprobs, completion_policy_loss
from longreach.engine.attention import NAME as OUR_ATTENTION
from longreach.engine.model import LoraConfig

from . import curve, plot, results
from .case import Case, Contender, Exact, Gap, Missing, Problem
from .peers import need
from .policy_loss import bare
from .results import Row
from .step import HEAD_DIM, make_config
from .table import print_table

SHARED, DENSE = "longreach, shared prefix", "longreach, dense (one completion, times G)"
PASSES = ("both",)
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
EIGHT_B = {"G": 8, "R": 4096, "layers": 36, "D": 4096, "V": 151936, "rank": 32}
SIZES = {
    "cpu": {
        "small": ({"P": 64, "G": 4, "R": 8, "layers": 2, "D": 64, "V": 512, "rank": 4},),
        "default": ({"P": 512, "G": 4, "R": 32, "layers": 2, "D": 128, "V": 2048, "rank": 8},),
        "large": tuple({"P": p, "G": 8, "R": 64, "layers": 4, "D": 256, "V": 8192, "rank": 8} for p in (4096, 1024)),
    },
    "cuda": {
        "small": ({**EIGHT_B, "P": 4096, "R": 512, "layers": 4},),
        "default": tuple({**EIGHT_B, "P": p} for p in (122880, 65536, 32768, 16384)),
        "large": ({**EIGHT_B, "P": 122880, "R": 10240},),
    },
}
WARM = {"P": 512, "R": 64}
"""Most that the warm-up takes of each."""
EXACT_TOKENS = 1 << 11
"""Longest sequence that the fp64 answer is computed for."""


def linear_shapes(dims: Mapping[str, int], head_dim: int) -> list[tuple[int, int]]:
    """(in, out) of the linear layers of one block."""
    d, keys = dims["D"], max(1, dims["D"] // head_dim // 4) * head_dim
    heads = dims["D"] // head_dim * head_dim
    return [(d, heads), (d, keys), (d, keys), (heads, d), (d, 3 * d), (d, 3 * d), (3 * d, d)]


def flops(dims: Mapping[str, int], head_dim: int, *, shared: bool) -> float:
    """Operations of one update: 4 T W + 6 T A + 4 G R D V + 3.5 x 4 H E layers pairs.

    The frozen W weights of the layers and the head have a product forward and one for the gradient of their input; the A
    of the adapters have one for their own gradient too. Tokens and pairs as in `train_step.flops`. What is recomputed
    for want of memory earns no credit: with every layer recomputed a run does about 2 T W and 4 H E layers pairs more.
    """
    p, g, r, layers, d, v = (dims[name] for name in ("P", "G", "R", "layers", "D", "V"))
    tokens = p + g * r if shared else g * (p + r)
    pairs = p * (p + 1) / 2 + g * (r * p + r * (r + 1) / 2) if shared else g * (p + r) * (p + r + 1) / 2
    shapes = linear_shapes(dims, head_dim)
    weights, adapters = sum(a * b for a, b in shapes), dims["rank"] * sum(a + b for a, b in shapes)
    linear = layers * tokens * (4.0 * weights + 6.0 * adapters) + 4.0 * g * r * d * v
    return linear + 3.5 * 4.0 * (d // head_dim * head_dim) * layers * pairs


def make_model(case: Case) -> PreTrainedModel:
    """The model with its adapters, none of them zero, as if training had gone on for a while.

    Raises:
        Missing: peft isn't there, or the weights alone are too many for the device.
    """
    need("peft")
    from longreach.engine.lora import add_lora

    config = make_config(case)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    try:
        with torch.device(case.device):
            made = AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype, attn_implementation=OUR_ATTENTION)
            add_lora(made, LoraConfig(rank=case.dims["rank"], alpha=2.0 * case.dims["rank"]))
    except torch.OutOfMemoryError as error:
        raise Missing(f"the weights alone don't fit: {str(error).splitlines()[0]}") from error
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    # the newer of two names for one thing; both compute layers again without the reentrant form
    getattr(made, "activation_checkpointing_enable", made.gradient_checkpointing_enable)()
    return made.train()


def problem(case: Case) -> Problem:
    p, g, r, v = (case.dims[name] for name in "PGRV")
    head_dim, tokens = HEAD_DIM[case.device], p + g * r
    work = flops(case.dims, head_dim, shared=True)
    least = 2.0 * case.torch_dtype.itemsize * case.dims["layers"] * sum(a * b for a, b in linear_shapes(case.dims, head_dim))  # fmt: skip
    try:
        model = make_model(case)
    except Missing as missing:
        gaps = [Gap(name, str(missing), ours=True) for name in (SHARED, DENSE)]
        return Problem(gaps, {"both": work}, {"both": least}, None, once=True, tokens=tokens)
    group = Group(torch.randint(v, (p,)), [torch.randint(v, (r,)) for _ in range(g)])
    update = Update(model, group, torch.randn(g, device=case.device))
    little = Update(model, Group(group.prompt_ids[: WARM["P"]], [c[: WARM["R"]] for c in group.completions]), update.advantages)  # fmt: skip
    contenders = [
        Contender(
            SHARED, "gradients of all adapters", lambda: update.logp(shared=True), lambda: None,
            lambda _: update.shared(), None, True, part=update.shared, warm_up=little.shared,
        ),
        Contender(
            DENSE, "gradients of all adapters", lambda: update.logp(shared=False), lambda: None,
            lambda _: update.dense(), None, True, part=lambda: update.completion(0), parts=g,
            warm_up=lambda: little.completion(0),
        ),
    ]  # fmt: skip
    truth = (lambda: reference(update)) if p + r <= EXACT_TOKENS else None
    return Problem(contenders, {"both": work}, {"both": least}, truth, tuple(update.adapters), once=True, tokens=tokens)


class Update:
    """One group's update of a model's adapters, whole or completion by completion."""

    def __init__(self, model: PreTrainedModel, group: Group, advantages: Tensor) -> None:
        self.model, self.group, self.advantages = model, group, advantages
        self.adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def logp(self, *, shared: bool) -> Tensor:
        return completion_logprobs(self.model, [self.group], shared_prefix=shared).logp

    def loss(self, group: Group, advantages: Tensor, *, shared: bool) -> Tensor:
        """Its share of the whole group's loss."""
        lengths = torch.tensor([len(c) for c in group.completions], device=advantages.device)
        options: Any = {"kind": "grpo", "normalizer": len(self.group.completions), "shared_prefix": shared}
        made = completion_policy_loss(self.model, [group], None, advantages.repeat_interleave(lengths), **options)
        return made.loss

    def shared(self) -> list[Tensor]:
        return self._gradients(self.group, self.advantages, shared=True)

    def completion(self, i: int) -> list[Tensor]:
        """What completion i adds to the gradients, from its own prompt on."""
        alone = Group(self.group.prompt_ids, [self.group.completions[i]])
        return self._gradients(alone, self.advantages[i : i + 1], shared=False)

    def dense(self) -> list[Tensor]:
        sums = self.completion(0)
        for i in range(1, len(self.group.completions)):
            sums = [a + b for a, b in zip(sums, self.completion(i), strict=True)]
        return sums

    def _gradients(self, group: Group, advantages: Tensor, *, shared: bool) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(group, advantages, shared=shared), list(self.adapters.values())))


def reference(update: Update) -> Exact:
    """fp64 through transformers' model and logits, one completion after the other."""
    wide: Any = copy.deepcopy(update.model).double()
    wide.set_attn_implementation("sdpa")
    last = wide.config.num_hidden_layers - 1
    shown = [name for name in update.adapters if f".{last}.mlp.down_proj.lora_B" in name or ".0.self_attn.k_proj.lora_A" in name]  # fmt: skip
    named = dict(wide.named_parameters())
    parameters = [named[name] for name in shown]
    sums, logps, total = [torch.zeros_like(x) for x in parameters], [], torch.zeros((), dtype=torch.float64)
    g, device = len(update.group.completions), update.model.device
    for i, completion in enumerate(update.group.completions):
        ids = torch.cat([update.group.prompt_ids, completion])[None].to(device)
        logits = wide(ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        logp = logits.log_softmax(-1).gather(1, completion.to(device)[:, None])[:, 0]
        one = torch.zeros(len(completion), dtype=torch.long, device=device)
        loss = bare(logp, logp.detach(), update.advantages[i].double().expand_as(logp), one, 1) / g
        for sum_, part in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            sum_ += part
        logps.append(logp.detach())
        total = total + loss.detach().cpu()
    return Exact(torch.cat(logps), total, dict(zip(shown, sums, strict=True)))


HEADER = ("case", "shared s", "dense s", "one completion s", "dense / shared", "FLOP model", "tokens/s", "shared GB", "dense GB")  # fmt: skip


def pairs(rows: Iterable[Row]) -> dict[str, list[tuple[Row, Row | None]]]:
    """By device: the shared and the dense row of each case, shortest prompt first."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["op"] == "headline" and row["status"] == "measured":
            place = (row["device"], row["threads"], row["dtype"], *sorted(row["dims"].items()))
            cases.setdefault(place, {})[row["contender"]] = row
    made: dict[str, list[tuple[Row, Row | None]]] = {}
    for found in sorted((f for f in cases.values() if SHARED in f), key=lambda f: f[SHARED]["dims"]["P"]):
        made.setdefault(found[SHARED]["device"], []).append((found[SHARED], found.get(DENSE)))
    return made


def line(shared: Row, dense: Row | None) -> list[str]:
    dims = shared["dims"]
    head_dim = HEAD_DIM["cpu" if shared["threads"] else "cuda"]
    model = flops(dims, head_dim, shared=False) / flops(dims, head_dim, shared=True)
    told = ["", "", ""]
    if dense is not None:
        told = [f"{dense['median_s']:.3g}", f"{dense['part_s']:.3g}", f"{dense['median_s'] / shared['median_s']:.2f}"]
    return [
        " ".join(f"{name}={value}" for name, value in dims.items()),
        f"{shared['median_s']:.3g}", *told, f"{model:.2f}", f"{shared['tokens_per_s']:.0f}",
        *(f"{curve.gigabytes(row):.3g}" if row is not None else "" for row in (shared, dense)),
    ]  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Time and memory against P; bars where no case has a shared row."""
    found = pairs(rows)
    return curve.draw(found, path) if found else plot.draw(rows, path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.headline", description="The headline's table and picture.")
    parser.add_argument("rows", nargs="*", type=Path, help="files of rows; those of bench/results unless given")
    parser.add_argument("--plot", type=Path, help="picture to draw, .png or .svg")
    options = parser.parse_args(arguments)
    files = options.rows or sorted(results.FOLDER.glob("*.json"))
    found = pairs(row for path in files for row in results.load(path))
    for device, cases in found.items():
        print_table(f"headline, {device}", HEADER, [line(*case) for case in cases])
    if options.plot is not None:
        try:
            print(f"picture: {curve.draw(found, options.plot)}")
        except ValueError as error:
            print(f"no picture: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
