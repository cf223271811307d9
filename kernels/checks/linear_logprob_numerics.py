"""Numeric cases of linear_logprob's Triton kernels: values and gradients against torch's usual way, in fp32 and fp16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ..scores import Scores, Stats, Upstream, finish, merge
from .case import Comparison, NumericCase
from .three_way import ULPS

BACKEND = "triton"
SPLIT = 150
"""Entries from which a vocabulary is also tried in shards."""


@dataclass(frozen=True)
class Setting:
    """One call. Scores have deviation `sharpness` around `level`, which rises by `rise` to the last entry; `rank` is that
    of a LoRA head; every `dead`-th row has no upstream gradient; `first` is the id of the first entry."""

    label: str
    n: int
    width: int
    vocab: int
    sharpness: float = 1.0
    level: float = 0.0
    rise: float = 0.0
    temperature: float | str = 1.0
    softcap: float | None = None
    rank: int = 0
    dead: int = 0
    bias: bool = True
    first: int = 0


SETTINGS = (
    Setting("one entry", 3, 16, 1),
    Setting("seven entries, one row", 1, 3, 7),
    Setting("odd sizes, T=0.7", 5, 97, 151, temperature=0.7),
    Setting("a T per row, dead rows", 7, 64, 300, temperature="rows", dead=3),
    Setting("soft-cap", 5, 40, 270, sharpness=4.0, softcap=3.0),
    Setting("LoRA head", 5, 40, 270, rank=3),
    Setting("all scores about -300", 5, 72, 270, level=-300.0),
    Setting("peaked", 5, 40, 270, sharpness=30.0),
    Setting("all dead, no bias", 3, 16, 130, dead=1, bias=False),
)
LARGE = (
    Setting("more rows than share a weight tile", 530, 16, 130),
    Setting("more entries than are merged at once", 3, 16, 2200, rise=20.0),
)
SHARDS = tuple(
    # where tokenizers end: multiples of a tile, odd, and beyond what 16 bits hold
    Setting(f"end of {vocab} entries", 5, 40, 256 + vocab % 128, first=vocab - 256 - vocab % 128)
    for vocab in (129920, 151643, 151936, 256000)
)


def numeric_cases() -> list[NumericCase]:
    """Three ways, in fp32 and fp16: scores made twice (linear_logprob), made once and kept, and in shards."""
    ways = {"two passes": _two_passes, "one pass": _one_pass, "shards": _shards}
    plan = [
        *((setting, way) for setting in SETTINGS for way in ways if way != "shards" or setting.vocab >= SPLIT),
        *((setting, "shards") for setting in SHARDS),
    ]
    # what these two show doesn't depend on the dtype, and they take long
    large = [(setting, "two passes") for setting in LARGE]
    return [
        NumericCase(f"{setting.label}; {way}", dtype, partial(ways[way], setting, dtype))
        for dtype, chosen in ((torch.float32, plan + large), (torch.float16, plan))
        for setting, way in chosen
    ]


class _Call:
    """Inputs and upstream gradients of a setting."""

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(setting.n + setting.vocab)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale

        n, width, vocab = setting.n, setting.width, setting.vocab
        tensors = {
            "hidden": normal(n, width, scale=setting.sharpness),
            "weight": normal(vocab, width, scale=width**-0.5),
            "bias": normal(vocab, scale=0.3) + setting.level + torch.linspace(0, setting.rise, vocab)
            if setting.bias
            else None,
            "down": normal(setting.rank, width, scale=width**-0.5) if setting.rank else None,
            "up": normal(vocab, setting.rank) if setting.rank else None,
        }
        self.tensors = {name: x.to(dtype) for name, x in tensors.items() if x is not None}
        self.targets = torch.randint(vocab, (n,), generator=generator)
        self.upstream = [normal(n) for _ in range(3)]
        if setting.dead:
            for gradient in self.upstream:
                gradient[:: setting.dead] = 0.0
        rows = torch.linspace(0.5, 2.0, n)
        self.temperature = rows if isinstance(setting.temperature, str) else setting.temperature
        self.softcap = setting.softcap

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: x.clone().to(dtype).requires_grad_() for name, x in self.tensors.items()}

    def usual(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Results and gradients of the usual way: logits in the inputs' dtype, widened for the softmax."""
        leaves, wide = self.leaves(dtype), torch.promote_types(dtype, torch.float32)
        logits = torch.nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        if "up" in leaves:
            logits = logits + leaves["hidden"] @ leaves["down"].t() @ leaves["up"].t()
        z = logits.to(wide)
        z = z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap
        z = z / (self.temperature[:, None].to(wide) if isinstance(self.temperature, Tensor) else self.temperature)
        logps = torch.log_softmax(z, -1)
        picked = logps[torch.arange(len(self.targets)), self.targets]
        results = {"logp": picked, "entropy": -(logps.exp() * logps).sum(-1), "lse": z.logsumexp(-1)}
        return {**results, **self.gradients(results, {**leaves, "scores": logits})}

    def gradients(self, results: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pairs = zip(results.values(), self.upstream, strict=True)
        loss = torch.stack([(x * g.to(x.dtype)).sum() for x, g in pairs]).sum()
        made = torch.autograd.grad(loss, list(leaves.values()))
        return {f"gradient of {name}": x for name, x in zip(leaves, made, strict=True)}

    def compare(self, ours: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Comparison]:
        plain, exact = self.usual(dtype), self.usual(torch.float64)
        # sizes of summands: results are differences of scores; a gradient's are an input times an upstream gradient
        # times a probability, whose exponent is such a difference
        scores = float(exact["lse"].detach().abs().max())
        inputs = max(1.0, float(self.tensors["hidden"].abs().max())) * max(1.0, scores / ULPS)
        if "up" in self.tensors:  # its inner product is rounded to the inputs' dtype
            scores *= torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        for name, x in ours.items():
            terms = inputs if name.startswith("gradient") else scores
            yield Comparison(name, x, plain[name], exact[name], terms)


def _two_passes(setting: Setting, dtype: torch.dtype) -> Iterator[Comparison]:
    from ..linear_logprob import LowRank, linear_logprob

    call = _Call(setting, dtype)
    leaves = call.leaves(dtype)
    made = linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        call.targets,
        bias=leaves.get("bias"),
        temperature=call.temperature,
        softcap=call.softcap,
        lora=LowRank(leaves["down"], leaves["up"]) if "up" in leaves else None,
        backend=BACKEND,
    )
    results = made._asdict()
    yield from call.compare({**results, **call.gradients(results, leaves)}, dtype)


def _scores(call: _Call, x: Mapping[str, Tensor], entries: slice, first: int) -> Scores:
    """The scores of some entries, whose ids begin at `first`."""
    from ..linear_logprob import scores_of

    low = (x["hidden"] @ x["down"].t(), x["up"][entries]) if "up" in x else (None, None)
    bias = x["bias"][entries] if "bias" in x else None
    heat, weight = call.temperature, x["weight"][entries]
    return replace(scores_of(x["hidden"], weight, call.targets, bias, heat, call.softcap, *low), first=first)


def _scaled(backend: ModuleType, scores: Scores, upstream: Upstream) -> tuple[Upstream, float]:
    """Upstream gradients in the unit that the backend makes dx in, and that unit."""
    unit = backend.unit(scores, upstream)
    return (upstream, 1.0) if unit is None else (Upstream(*(x / unit for x in upstream)), float(unit))


def _one_pass(setting: Setting, dtype: torch.dtype) -> Iterator[Comparison]:
    from ..linear_logprob import backend_of

    call = _Call(setting, dtype)
    scores = _scores(call, call.tensors, slice(None), 0)
    backend = backend_of(BACKEND, scores.hidden, scores.weight)
    made, kept = backend.keep(scores)
    stats = finish(made)
    upstream, unit = _scaled(backend, scores, Upstream(*call.upstream))
    dx = backend.kept_gradient(scores, kept, stats, upstream) * unit
    yield from call.compare(_results(stats, dx), dtype)


def _shards(setting: Setting, dtype: torch.dtype) -> Iterator[Comparison]:
    """A vocabulary in two parts, as ranks hold it, each part's gradient in two blocks."""
    from ..linear_logprob import backend_of

    call = _Call(setting, dtype)
    call.targets = call.targets + setting.first
    cut = setting.vocab // 3
    parts = [
        _scores(call, call.tensors, entries, setting.first + (entries.start or 0))
        for entries in (slice(0, cut), slice(cut, setting.vocab))
    ]
    backend = backend_of(BACKEND, parts[0].hidden, parts[0].weight)
    stats, blocks = finish(merge([backend.partial(part) for part in parts])), []
    for part in parts:
        upstream, unit = _scaled(backend, part, Upstream(*call.upstream))
        for start in range(0, part.vocab, 128):
            stop = min(start + 128, part.vocab)
            blocks.append(backend.gradient(part, stats, upstream, start, stop) * unit)
    call.targets = call.targets - setting.first
    yield from call.compare(_results(stats, torch.cat(blocks, 1)), dtype)


def _results(stats: Stats, dx: Tensor) -> dict[str, Tensor]:
    results = {"logp": stats.logp, "entropy": stats.entropy, "lse": stats.peak + stats.log_sum}
    return {**results, "gradient of scores": dx}
