"""How long a prompt fits into a given memory, feature by feature: each line adds one to the line before it.

    fixed + a + b P = budget      fixed: weights and AdamW's averages; a + b P: fitted to the peaks of updates of several P

`memory.py` measures a peak, this asks for the prompt that a peak allows. An update is a group's forward, policy loss and
gradients of all weights. Peaks are measured, the longest prompt is read off the fitted line, far beyond what was run: a peak
is linear in P once no score matrix exists and what no prompt changes is small beside it. `fit_error` is the line's largest
distance from a peak, `check_error` from one at half as many tokens again, which it hasn't seen. A shared prompt is a quarter
of the tokens, so it is measured at four times the length. On a CPU the model is small, and so is the budget: the order of the
lines is the result, not their lengths. Buffers on the host are counted beside. Sequence parallelism is modelled (b / ranks),
and marked so.

Further rows say what the optimizers and adapters save a parameter, which no prompt's length changes.

`python -m bench.longest` measures into bench/results/memory-cpu.json and draws docs/memory.png, some minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from longreach.engine import Group, completion_policy_loss
from longreach.engine.attention import NAME as OUR_ATTENTION
from longreach.engine.model import LoraConfig, save_memory
from longreach.engine.optimizer import OptimizerConfig, apply_update, make_optimizer

from . import results
from .memory import COUNTED, peak_bytes
from .results import Row

MIB = 1 << 20
DIMS = {
    "cpu": {"G": 4, "R": 32, "layers": 12, "D": 64, "V": 4096, "tile": 64},
    "cuda": {"G": 8, "R": 1024, "layers": 12, "D": 2048, "V": 151936, "tile": 8192},
}
LENGTHS = {"cpu": (512, 768, 1024), "cuda": (4096, 8192, 16384)}
BUDGET_MIB = {"cpu": 256, "cuda": 81920}
HEAD_DIM = {"cpu": 32, "cuda": 128}
RANKS = 8
NONE, SHARED = "none", "shared prefix"
LADDER: dict[str, dict[str, Any]] = {
    NONE: {},
    "fused loss": {},
    "checkpointing": {"gradient_checkpointing": True},
    "tiling": {"gradient_checkpointing": True, "tile": True},
    "offload": {"gradient_checkpointing": True, "tile": True, "offload_activations": True},
    SHARED: {"gradient_checkpointing": True, "tile": True, "offload_activations": True},
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.longest", description="Longest prompt by feature.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path, default=results.ROOT / "docs" / "memory.png")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)  # a peak is the same, and on a busy machine threads wait for each other
    path = options.out or results.FOLDER / f"{results.MEMORY}{options.device}.json"
    conditions = results.conditions(options.device)
    for row in rows(options.device, DIMS[options.device], LENGTHS[options.device], BUDGET_MIB[options.device]):
        results.append(path, {**row, **conditions})
        print(told(row), flush=True)
    from .longest_plot import draw  # matplotlib

    print(f"picture: {draw(results.load(path), options.plot)}")
    return 0


def rows(device: str, dims: Mapping[str, int], lengths: Sequence[int], budget_mib: float) -> Iterator[Row]:
    """All rows, one at a time as it is measured."""
    last: Row | None = None
    for name, options in LADDER.items():
        row = ladder_row(device, dims, lengths, budget_mib, name, options)
        if last is not None:
            row["saved_per_token"] = last["bytes_per_token"] - row["bytes_per_token"]
        yield (last := row)
    assert last is not None
    yield shared_out(last, budget_mib)
    yield from per_parameter(device, dims)


def ladder_row(
    device: str,
    dims: Mapping[str, int],
    lengths: Sequence[int],
    budget_mib: float,
    name: str,
    options: Mapping[str, Any],
) -> Row:
    model = make_model(device, dims)
    fixed = sum(p.nbytes + 8 * p.numel() for p in model.parameters())
    asked = {key: value for key, value in options.items() if key != "tile"}
    save_memory(model, tile_tokens=dims["tile"] if options.get("tile") else 0, **asked)
    stores = {id(s): s for s in map(_store, model.modules()) if s is not None}
    lengths = [length * (dims["G"] if name == SHARED else 1) for length in lengths]
    peaks, host = [], 0
    for length in (*lengths, further := lengths[-1] * 3 // 2):
        run = update(model, dims, length, name)
        if stores:
            run()  # buffers on the host stay, and no update after the first makes them
        peaks.append(peak_bytes(run, device))
        host = sum(s.bytes for s in stores.values())
    check = peaks.pop()
    slope, start = (float(x) for x in np.polyfit(lengths, peaks, 1))
    fitted = np.polyval([slope, start], lengths)
    return {
        **about(device, dims, name), "status": "measured", "reason": None, "counted": COUNTED[device],
        "lengths": list(lengths), "peaks_mib": [peak / MIB for peak in peaks], "fixed_mib": fixed / MIB,
        "host_mib": host / MIB, "bytes_per_token": slope, "start_mib": start / MIB,
        "fit_error": float(np.abs(fitted / np.array(peaks) - 1).max()),
        "check_error": float((start + slope * further) / check - 1), "budget_mib": budget_mib,
        "longest": longest(budget_mib, fixed, start, slope),
    }  # fmt: skip


def longest(budget_mib: float, fixed: float, start: float, slope: float) -> int:
    return max(0, int((budget_mib * MIB - fixed - start) / slope))


def shared_out(row: Row, budget_mib: float) -> Row:
    """The same with each prompt's tokens over RANKS ranks, by the formula alone: weights and averages stay whole on each."""
    slope = row["bytes_per_token"] / RANKS
    found = longest(budget_mib, row["fixed_mib"] * MIB, row["start_mib"] * MIB, slope)
    return {
        **row, "contender": f"sp = {RANKS}", "status": "modelled", "counted": "b / ranks", "bytes_per_token": slope,
        "peaks_mib": [], "lengths": [], "fit_error": None, "check_error": None, "saved_per_token": None, "longest": found,
        "reason": "tokens shared out evenly and nothing else changed; not measured",
    }  # fmt: skip


def per_parameter(device: str, dims: Mapping[str, int]) -> Iterator[Row]:
    """Bytes of gradients and averages a parameter, on the device, by optimizer; with adapters, over all parameters."""
    for name, kind, lora in (
        ("adamw", "adamw", None),
        ("adamw-8bit", "adamw-8bit", None),
        ("adamw-offload", "adamw-offload", None),
        ("adamw, LoRA of rank 16", "adamw", LoraConfig()),
    ):
        row = {**about(device, dims, name), "op": "optimizer"}
        missing = "peft" if lora and find_spec("peft") is None else None
        missing = "torchao" if kind != "adamw" and find_spec("torchao") is None else missing
        if missing or (kind == "adamw-offload" and device == "cpu"):
            reason = (
                f"{missing} is not installed" if missing else "needs a GPU: on a CPU there is nowhere to move them to"
            )
            yield {**row, "status": "gap", "reason": reason}
            continue
        yield {**row, "status": "measured", "reason": None, **optimizer_bytes(device, dims, kind, lora)}
    yield {**about(device, dims, "liger"), "op": "optimizer", "status": "gap", "reason": "not measured on a GPU yet"}


def optimizer_bytes(device: str, dims: Mapping[str, int], kind: str, lora: LoraConfig | None) -> Row:
    model = make_model(device, dims)
    count = sum(p.numel() for p in model.parameters())
    if lora is not None:
        from longreach.engine.lora import add_lora

        add_lora(model, lora)
    optimizer = make_optimizer(model, OptimizerConfig(kind=kind))
    update(model, dims, 64, SHARED)(keep=True)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    with torch.compiler.set_stance("force_eager"):  # sizes are the same, and compiling takes a minute
        apply_update(optimizer, model, 1e-4, 1.0)
    states: Any = optimizer.state.values()
    averages = sum(_bytes(x) for state in states for x in state.values() if x.device.type == device and x.numel() > 1)
    return {"gradients": gradients / count, "averages": averages / count}


def _bytes(x: Any) -> int:
    """An 8-bit average is made of codes, scales and a table."""
    parts = [getattr(x, name) for name in x.__tensor_flatten__()[0]] if hasattr(x, "__tensor_flatten__") else [x]
    return sum(part.nbytes for part in parts)


def update(model: PreTrainedModel, dims: Mapping[str, int], length: int, name: str) -> Callable[..., None]:
    """An update of one group as the ladder's line `name` has it; gradients are dropped unless told to `keep` them."""
    draw = torch.Generator().manual_seed(0)
    G, R, V = dims["G"], dims["R"], dims["V"]
    group = Group(
        torch.randint(V, (length,), generator=draw), [torch.randint(V, (R,), generator=draw) for _ in range(G)]
    )
    advantages = torch.randn(G, generator=draw).repeat_interleave(R).to(model.device)

    def run(keep: bool = False) -> None:
        if name == NONE:
            plain_loss(model, group, advantages).backward()
        else:
            shared: Any = {"kind": "grpo", "normalizer": G, "shared_prefix": name == SHARED}
            completion_policy_loss(model, [group], None, advantages, **shared).loss.backward()
        if not keep:
            model.zero_grad(set_to_none=True)

    return run


def plain_loss(model: PreTrainedModel, group: Group, advantages: Tensor) -> Tensor:
    """By transformers alone: a batch of G x (P + R) tokens, each with its logits, prompt included."""
    completions = torch.stack(list(group.completions)).to(model.device)
    ids = torch.cat([group.prompt_ids.to(model.device).expand(len(completions), -1), completions], 1)
    logp = model(ids, use_cache=False).logits.float().log_softmax(-1)
    R = completions.shape[1]
    found = logp[:, -R - 1 : -1].gather(2, completions[..., None]).flatten()
    return -((found - found.detach()).exp() * advantages).sum() / len(found)


def make_model(device: str, dims: Mapping[str, int]) -> PreTrainedModel:
    d, E = dims["D"], HEAD_DIM[device]
    config = Qwen3Config(
        vocab_size=dims["V"], hidden_size=d, intermediate_size=4 * d, num_hidden_layers=dims["layers"],
        num_attention_heads=d // E, num_key_value_heads=max(1, d // E // 2), head_dim=E, max_position_embeddings=1 << 20,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=OUR_ATTENTION).train()


def _store(module: Any) -> Any:
    function = getattr(module, "_gradient_checkpointing_func", None)
    owner = getattr(getattr(function, "func", None), "__self__", None)
    return owner if hasattr(owner, "bytes") else None


def about(device: str, dims: Mapping[str, int], name: str) -> Row:
    return {
        "op": "longest",
        "dims": dict(dims),
        "dtype": "float32",
        "pass": "both",
        "contender": name,
        "ours": name != NONE,
    }


def told(row: Row) -> str:
    if row["status"] == "gap":
        return f"{row['contender']}: {row['reason']}"
    if row["op"] == "optimizer":
        return f"{row['contender']}: {row['gradients']:.2f} + {row['averages']:.2f} bytes a parameter"
    return (
        f"{row['contender']} ({row['status']}): {row['bytes_per_token'] / 1024:.2f} KiB a token, {row['longest']:,} tokens in "
        f"{row['budget_mib']} MiB"
        + (f"; the line is off by {row['check_error']:.1%}" if row["check_error"] is not None else "")
    )


if __name__ == "__main__":
    sys.exit(main())
