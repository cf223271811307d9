"""The ranks of tests/engine/test_sequence_parallel.py: WORLD FOLDER. Each saves what it got to FOLDER/RANK.pt.

Everything is imported once and then forked, since the imports cost more than the cases. A rank that fails or hangs ends
them all, and what each said last is printed.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

import longreach.engine.blocks
import longreach.engine.partials
import longreach.engine.ring
import longreach.engine.shards
from longreach.engine import (
    Group,
    Mesh,
    ParallelConfig,
    completion_hidden,
    completion_logprobs,
    completion_policy_loss,
    load_model,
    make_mesh,
)
from longreach.engine.completions import decode, token_costs
from longreach.engine.cost import layer_bytes
from longreach.engine.model import LoraConfig
from longreach.engine.packing import one_row
from longreach.engine.parallel_attention import ParallelSharedPrefix
from longreach.engine.sequence_parallel import local_rows
from longreach.engine.shards import cut_row
from longreach.engine.ulysses import Heads

LIMIT_S = 240
VOCAB = 61
FAMILIES = ("qwen3", "qwen2", "llama")
CASES: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "ragged groups": [(29, (4, 0, 6, 13, 2)), (1, (3, 2)), (17, ()), (11, (5,))],
    "a prompt of one token": [(1, (3, 2))],
    "completions that outweigh it": [(3, (20, 1))],
    "plain": [(23, (9,))],
}
"""Groups of one row, by prompt and completion lengths: of few ranks each holds something, of many some hold nothing."""
LAYOUTS: dict[int, list[tuple[int, int]]] = {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)], 8: [(8, 1), (4, 2), (2, 4)]}  # fmt: skip
SCHEDULES = ("ring", "all-gather", "auto")

Result = dict[str, Any]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


clean = _script("test_shared_prefix").clean
"""RMSNorms that compute in fp64."""


def make_groups(case: str, seed: int = 0) -> list[Group]:
    draw = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> Tensor:
        return torch.randint(VOCAB, (n,), generator=draw)

    return [Group(tokens(prompt), [tokens(n) for n in lengths]) for prompt, lengths in CASES[case]]


def scores(n: int, seed: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens_of(groups: Sequence[Group]) -> int:
    return sum(len(c) for g in groups for c in g.completions)


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    """Of this rank; on a mesh they are added up."""
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def summed(found: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    if group is not None:
        flat = torch.cat([x.flatten() for x in found.values()])
        dist.all_reduce(flat, group=group)
        parts = flat.split([x.numel() for x in found.values()])
        return {name: part.view_as(x) for (name, x), part in zip(found.items(), parts, strict=True)}
    return found


def of_logprobs(model: PreTrainedModel, groups: list[Group], mesh: Mesh | None, **options: Any) -> Result:
    """Values, and gradients of a loss in which log-probs and entropies count, each token differently."""
    made = completion_logprobs(model, groups, temperature=0.8, mesh=mesh, **options)
    n = len(made.logp)
    loss = (made.logp * scores(n, 1)).sum() + (made.entropy * scores(n, 2)).sum()
    values = {name: x.detach() for name, x in made._asdict().items()}
    grads = summed(gradients(model, loss), None if mesh is None else mesh.sequence_group)
    return {"values": values, "loss": loss.detach(), "gradients": grads}


def of_policy(model: PreTrainedModel, groups: list[Group], mesh: Mesh | None, kind: str, logp: Tensor) -> Result:
    """An update whose old log-probs are far enough off for ratios to be clipped."""
    n, sequences = len(logp), sum(len(g.completions) for g in groups)
    made = completion_policy_loss(
        model,
        groups,
        logp + 0.3 * scores(n, 3),
        scores(n, 4),
        kind=kind,
        normalizer=sequences,
        temperature=0.8,
        mesh=mesh,
    )
    values = {name: torch.stack([m.total, m.count]) for name, m in made.metrics.items()}
    grads = summed(gradients(model, made.loss), None if mesh is None else mesh.sequence_group)
    return {"values": values, "loss": made.loss.detach(), "gradients": grads}


def of_hidden(model: PreTrainedModel, groups: list[Group], mesh: Mesh | None) -> Result:
    hidden, targets = completion_hidden(model, groups, mesh=mesh)
    loss = (hidden * scores(hidden.numel(), 5).view_as(hidden)).sum()
    grads = summed(gradients(model, loss), None if mesh is None else mesh.sequence_group)
    return {"values": {"hidden": hidden.detach(), "targets": targets}, "loss": loss.detach(), "gradients": grads}


def of_data(model: PreTrainedModel, groups: list[list[Group]], mesh: Mesh | None, fault: str = "") -> Result:
    """One update over the groups of all data ranks: losses and metrics normalised over all, gradients added up."""
    mine = [g for part in groups for g in part] if mesh is None else groups[mesh.data_rank]
    seeds = [9] if mesh is not None and mesh.data_rank else [8] if mesh is not None else [8, 9]
    parts = groups if mesh is None else [mine]
    noise = torch.cat([scores(tokens_of(part), seed) for part, seed in zip(parts, seeds, strict=True)])
    sequences = sum(len(g.completions) for part in groups for g in part)
    if fault == "loss":
        sequences = sum(len(g.completions) for g in mine) * (1 if mesh is None else mesh.data)
    made = completion_policy_loss(model, mine, None, noise, kind="grpo", normalizer=sequences, mesh=mesh)
    grads = gradients(model, made.loss)
    metric = made.metrics["entropy"]
    found = torch.stack([metric.total, metric.count, made.loss.detach()])
    if fault == "metric":  # the mean of means
        found[:2] = torch.stack([metric.total / metric.count, torch.ones(())])
    if mesh is not None:
        dist.all_reduce(found, group=mesh.data_group)
        grads = summed(grads, dist.group.WORLD)
    return {"values": {"entropy": found[0] / found[1]}, "loss": found[2], "gradients": grads}


def data_groups() -> list[list[Group]]:
    return [make_groups("ragged groups")[:2], make_groups("ragged groups", 1)[3:]]


class Problem:
    """One layer's attention by itself: rows of q, k, v and dout for the whole row, in one dtype."""

    def __init__(self, case: str, heads: int, keys: int, width: int, dtype: torch.dtype) -> None:
        self.row = one_row(make_groups(case))
        draw = torch.Generator().manual_seed(6)
        shapes = (heads, keys, keys, heads)
        self.tensors = [torch.randn((self.row.tokens, n, width), generator=draw).to(dtype) for n in shapes]

    def run(self, layout: Any, held: Tensor) -> tuple[Tensor, ...]:
        """out, dq, dk, dv of the tokens held."""
        q, k, v, dout = (x[held] for x in self.tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = layout.attend(0, *leaves, 0.25)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


class Counter:
    """Bytes that this rank hands to collectives for others, while it is open."""

    def __enter__(self) -> Counter:
        self.sent, self._kept = 0, (dist.all_to_all_single, dist.batch_isend_irecv)
        swap, post = self._kept

        def counted_swap(made: Tensor, given: Tensor, arrive: Any, leave: Any, *args: Any, **options: Any) -> Any:
            assert leave[dist.get_rank(options["group"])] == 0
            self.sent += given.numel() * given.element_size()
            return swap(made, given, arrive, leave, *args, **options)

        def counted_post(ops: list[Any]) -> Any:
            self.sent += sum(o.tensor.numel() * o.tensor.element_size() for o in ops if o.op is dist.isend)
            return post(ops)

        dist.all_to_all_single, dist.batch_isend_irecv = counted_swap, counted_post
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single, dist.batch_isend_irecv = self._kept


def counted_bytes(world: int) -> Result:
    """By layout, schedule and case: (forward, backward) counted over all ranks, and by the formula."""
    found: Result = {}
    for ring, ulysses in LAYOUTS[world]:
        for schedule in ("ring", "all-gather"):
            mesh = make_mesh(ParallelConfig(ring, ulysses, schedule), "cpu")
            for case in CASES:
                problem = Problem(case, 8, 2, 4, torch.bfloat16)
                cut = cut_row(problem.row, ring, ulysses)
                q, k, v, dout = (x[cut.tokens[mesh.sequence_rank]] for x in problem.tensors)
                leaves = [x.requires_grad_() for x in (q, k, v)]
                with Counter() as forward:
                    out = ParallelSharedPrefix(cut, mesh).attend(0, leaves[0], leaves[1], leaves[2], 0.25)
                with Counter() as backward:
                    torch.autograd.grad(out, leaves, dout)
                total = torch.tensor([forward.sent, backward.sent])
                dist.all_reduce(total)
                formula = layer_bytes(cut, Heads(8, 2, ulysses), 4, torch.bfloat16, schedule)
                found[f"{ring}x{ulysses} {schedule} {case}"] = {
                    "counted": tuple(total.tolist()), "formula": formula, "tokens": cut.tokens, "ring": ring,
                }  # fmt: skip
    return found


def rounding(world: int, fault: ModuleType | None = None) -> Result:
    """out, dq, dk, dv of a bf16 layer over a ring of all ranks, whole."""
    found: Result = {}
    problem = Problem("ragged groups", 4, 2, 16, torch.bfloat16)
    for schedule in ("ring", "all-gather") if fault is None else ("ring",):
        mesh = make_mesh(ParallelConfig(world, 1, schedule), "cpu")
        cut = cut_row(problem.row, world, 1)
        layout = ParallelSharedPrefix(cut, mesh)
        if fault is not None:
            layout.schedule = fault.RingSchedule(cut.shards, mesh.ring_rank, mesh.ring_group)
        made = problem.run(layout, cut.tokens[mesh.ring_rank])
        found[schedule] = [spread(x, cut.tokens[mesh.ring_rank], problem.row.tokens) for x in made]
    return found


def spread(mine: Tensor, held: Tensor, rows: int) -> Tensor:
    """The whole row from every rank's part."""
    whole = torch.zeros(rows, *mine.shape[1:], dtype=torch.float64).index_copy_(0, held, mine.double())
    dist.all_reduce(whole)
    return whole


MUTANTS: dict[str, tuple[str, str, str]] = {
    "nothing is changed": ("partials", "attention.merge(*seen, *part)", "attention.merge(*seen, *part)"),
    "the merge is dropped": ("partials", "attention.merge(*seen, *part)", "part"),
    "each piece reads itself again": ("blocks", "key.stop <= query.start", "key.start <= query.start"),
    "pieces stand the wrong way round": ("shards", "for p in shard.pieces]", "for p in reversed(shard.pieces)]"),
    "a gradient misses a hop": ("ring", "arriving.wait())", "arriving.wait().zero_())"),
    "completions read half the prompt": ("blocks", "keys[group][-1][2]))", "keys[group][0][2]))"),
    "keys and values change places": ("ring", "kv[:, 0], kv[:, 1])\n        return", "kv[:, 1], kv[:, 0])\n        return"),
    "gradients of the queries miss a step": ("partials", "self.dq[at] += dq", "self.dq[at] = dq"),
    "partial results are rounded": ("partials", "torch.promote_types(dtype, torch.float32)", "dtype"),
}  # fmt: skip
"""Module of engine/, a text of it and what it becomes."""


def edited(stem: str, text: str, becomes: str) -> ModuleType:
    """A copy of `ring` whose parts come from copies of the other modules, one of them with a text replaced."""
    made: dict[str, ModuleType] = {}
    for name in ("shards", "blocks", "partials", "ring"):
        path = Path(str(getattr(longreach.engine, name).__file__))
        source = path.read_text(encoding="utf-8")
        if name == stem:
            assert source.count(text) == 1, f"{name} has {source.count(text)} times: {text}"
            source = source.replace(text, becomes)
        for other in made:
            source = source.replace(f"from .{other} import", f"from .edited_{other} import")
        copy = ModuleType(f"longreach.engine.edited_{name}")
        copy.__package__ = "longreach.engine"
        sys.modules[copy.__name__] = copy
        exec(compile(source, str(path), "exec"), copy.__dict__)
        made[name] = copy
    made["ring"].__dict__["cut_row"] = made["shards"].__dict__["cut_row"]
    return made["ring"]


def of_mutant(model: PreTrainedModel, groups: list[Group], mesh: Mesh, copy: ModuleType) -> Result:
    """`of_logprobs` with the edited copy's cut and schedule."""
    row = one_row(groups)

    def own_decode(ids: Tensor, positions: Tensor, layout: Any) -> Tensor:
        cut = copy.cut_row(row, mesh.ring, 1, token_costs(model))
        held = cut.tokens[mesh.sequence_rank]
        layout.schedule = copy.RingSchedule(cut.shards, mesh.ring_rank, mesh.ring_group)
        return decode(model, row.input_ids()[held], row.position_ids()[held], layout)

    part = local_rows(own_decode, row, mesh, "auto", token_costs(model), model.device)
    logp = part.whole(part.hidden)
    loss = (logp * scores(logp.numel(), 5).view_as(logp)).sum()
    grads = summed(gradients(model, loss), mesh.sequence_group)
    return {"values": {"hidden": logp.detach()}, "loss": loss.detach(), "gradients": grads}


def refusals(models: Callable[..., PreTrainedModel], world: int) -> dict[str, str]:
    """What bad calls say."""
    model, groups, ring = models("qwen3"), make_groups("ragged groups"), make_mesh(ParallelConfig(world), "cpu")
    bad: dict[str, Callable[[], object]] = {
        "different groups": lambda: completion_logprobs(model, make_groups("plain", dist.get_rank()), mesh=ring),
        "budget": lambda: completion_logprobs(model, groups[:1], mesh=ring, budget=50),
        "ranks": lambda: make_mesh(ParallelConfig(ring=3, ulysses=world), "cpu"),
    }
    if world == 8:
        heads = make_mesh(ParallelConfig(1, 8), "cpu")
        bad["heads"] = lambda: completion_logprobs(model, groups, mesh=heads)
    if world == 2:
        flash = make_mesh(ParallelConfig(2, 1, "ring-flash-attn"), "cpu")
        bad["flash shared"] = lambda: completion_logprobs(model, groups, mesh=flash)
        both = make_mesh(ParallelConfig(1, 2, "ring-flash-attn"), "cpu")
        bad["flash heads"] = lambda: completion_logprobs(model, make_groups("plain"), mesh=both)
        bad["flash missing"] = lambda: completion_logprobs(model, make_groups("plain"), mesh=flash)
    said: dict[str, str] = {}
    for name, call in bad.items():
        try:
            call()
        except ValueError as error:
            said[name] = str(error)
    return said


def together(models: Callable[..., PreTrainedModel], mesh: Mesh, logp: Tensor) -> Result:
    """What else a run may ask for."""
    groups, found = make_groups("ragged groups"), {}
    model = clean(models("qwen3"))
    found["unshared"] = of_logprobs(model, groups, mesh, shared_prefix=False)
    found["a budget it fits in"] = of_logprobs(model, groups, mesh, budget=200)
    found["checkpointed"] = of_logprobs(clean(models("qwen3", gradient_checkpointing=True)), groups, mesh)
    found["hidden"] = of_hidden(model, groups, mesh)
    for kind in ("grpo", "gspo"):
        found[kind] = of_policy(model, groups, mesh, kind, logp)
    with torch.no_grad():
        made = completion_logprobs(model, groups, temperature=0.8, mesh=mesh)
    found["without gradients"] = {"values": made._asdict(), "loss": torch.ones(()), "gradients": {}}
    return found


def adapters(models: Callable[..., PreTrainedModel], mesh: Mesh | None) -> Result:
    """Only keys' adapters train, so in the first layer neither queries nor values have a gradient to pass on."""
    torch.manual_seed(0)
    model = clean(models("qwen3", lora=LoraConfig(rank=3, targets=("k_proj",))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would hide the other factor
                parameter.copy_(scores(parameter.numel(), 7).view_as(parameter) * 0.3)
    return of_logprobs(model, make_groups("ragged groups"), mesh)


def peer(models: Callable[..., PreTrainedModel], world: int) -> Result:
    """ring-flash-attn on the stand-in for flash-attn: as our schedule in fp64, and its zigzag beside our ring in bf16."""
    sys.path.insert(0, str(Path(__file__).with_name("stand_in")))
    from longreach.engine import ring_flash

    ring_flash.load.cache_clear()
    mesh, found = make_mesh(ParallelConfig(world, 1, "ring-flash-attn"), "cpu"), {}
    groups = make_groups("ragged groups")
    found["plain"] = of_logprobs(clean(models("qwen3")), make_groups("plain"), mesh)
    found["unshared"] = of_logprobs(clean(models("qwen3")), groups, mesh, shared_prefix=False)
    zigzag = importlib.import_module(f"{ring_flash.load().__package__}.zigzag_ring_flash_attn")
    draw = torch.Generator().manual_seed(6)
    whole = [torch.randn((16 * world, n, 16), generator=draw).bfloat16() for n in (4, 2, 2, 4)]
    held = torch.cat([torch.arange(16 * world).chunk(2 * world)[i] for i in (mesh.ring_rank, 2 * world - 1 - mesh.ring_rank)])  # fmt: skip
    q, k, v, dout = (x[held][None] for x in whole)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = zigzag.zigzag_ring_flash_attn_func(*leaves, softmax_scale=0.25, causal=True, group=mesh.ring_group)
    made = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    found["zigzag"] = [spread(x[0], held, 16 * world) for x in made]
    row = one_row([Group(torch.zeros(16 * world, dtype=torch.long), [])])
    own, cut = make_mesh(ParallelConfig(world, 1, "ring"), "cpu"), cut_row(row, world, 1)
    problem = Problem("plain", 4, 2, 16, torch.bfloat16)
    problem.row, problem.tensors = row, whole
    mine = cut.tokens[own.ring_rank]
    found["ours"] = [spread(x, mine, 16 * world) for x in problem.run(ParallelSharedPrefix(cut, own), mine)]
    found["whole"] = whole
    return found


def everything(rank: int, world: int, folder: Path) -> Result:
    given = torch.load(folder / "given.pt", weights_only=False)

    def models(name: str, **options: Any) -> PreTrainedModel:
        return load_model(given["folders"][name], dtype=torch.float64, device="cpu", verify=False, **options)

    found: Result = {"exact": {}, "log": []}
    heard = logging.Handler()
    heard.emit = lambda record: found["log"].append(record.getMessage())
    logging.getLogger("longreach.parallel").addHandler(heard)
    logging.getLogger("longreach.parallel").setLevel(logging.INFO)
    for ring, ulysses in LAYOUTS[world]:
        for schedule in SCHEDULES if ring > 1 else SCHEDULES[:1]:
            mesh = make_mesh(ParallelConfig(ring, ulysses, schedule), "cpu")
            for family in FAMILIES if schedule == "ring" else FAMILIES[:1]:
                model = clean(models(family))
                for case in CASES if family == FAMILIES[0] else list(CASES)[:1]:
                    made = of_logprobs(model, make_groups(case), mesh)
                    found["exact"][f"{ring}x{ulysses} {schedule}/{family}/{case}"] = made
    mesh = make_mesh(ParallelConfig(*LAYOUTS[world][-2], "ring"), "cpu")
    found["together"] = together(models, mesh, given["logp"])
    shared = make_mesh(ParallelConfig(world // 2, 1), "cpu")
    found["data"] = {f: of_data(clean(models("qwen3")), data_groups(), shared, f) for f in ("", "loss", "metric")}
    found["bytes"] = counted_bytes(world)
    found["rounding"] = rounding(world)
    found["refused"] = refusals(models, world)
    if world == 2:
        found["mutants"] = mutants(models)
    if given["peft"]:
        found["adapters"] = adapters(models, mesh)
    if given["ring-flash-attn"] and world < 8:
        found["peer"] = peer(models, world)
    return found


def mutants(models: Callable[..., PreTrainedModel]) -> Result:
    mesh, found = make_mesh(ParallelConfig(2), "cpu"), {}
    for fault, (stem, text, becomes) in MUTANTS.items():
        copy = edited(stem, text, becomes)
        if "rounded" in fault:
            found[fault] = rounding(2, copy)
        else:
            found[fault] = of_mutant(clean(models("qwen3")), make_groups("ragged groups"), mesh, copy)
    return found


def one_rank(rank: int, world: int, folder: Path) -> None:
    sys.stderr = (folder / f"{rank}.said").open("w", buffering=1, encoding="utf-8")
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(LIMIT_S - 20, file=sys.stderr)  # where it hangs, before the parent ends it
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        found = everything(rank, world, folder)
        if rank:  # they are the same on all after they were added up
            for part in (*found["exact"].values(), *found["together"].values()):
                del part["gradients"]
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(world: int, folder: Path) -> int:
    """Forks the ranks and waits for them; 1 if any failed or time ran out, after all were ended."""
    ranks: dict[int, int] = {}
    for rank in range(world):
        pid = os.fork()
        if not pid:
            one_rank(rank, world, folder)
        ranks[pid] = rank
    deadline, failed = time.monotonic() + LIMIT_S, []
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = ranks.pop(pid)
            if status:
                failed.append(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}")
                deadline = min(deadline, time.monotonic() + 5)
        elif time.monotonic() > deadline:
            failed += [f"rank {rank} was still running" for rank in ranks.values()]
            for child in ranks:
                os.kill(child, signal.SIGKILL)
            break
        else:
            time.sleep(0.02)
    print("\n".join(failed))
    for rank in range(world) if failed else ():
        print(f"--- rank {rank} said\n{(folder / f'{rank}.said').read_text(encoding='utf-8')[-3000:]}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
