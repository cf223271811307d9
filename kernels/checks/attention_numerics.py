"""Numeric cases of attention's Triton kernels: results and gradients against the reference backend, in fp32 and fp16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .case import Comparison, NumericCase
from .three_way import ULPS

Bounds = tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """One call. Segments have `queries` and `keys` tokens (no keys given: causal, the same); q is `sharp` times as large.
    odd: addresses that no descriptor takes and are copied from. apart: heads lie apart, as after a transposition."""

    label: str
    queries: tuple[int, ...]
    keys: tuple[int, ...] | None = None
    heads: int = 2
    key_heads: int = 1
    width: int = 16
    sharp: float = 1.0
    odd: bool = False
    apart: bool = False


SETTINGS = (
    Setting("ragged, empty segments", (3, 0, 37, 1, 20), heads=4, key_heads=2),
    Setting("full, empty sides", (4, 0, 40, 2, 5), (7, 3, 0, 33, 16), heads=4, key_heads=2),
    Setting("full, tiles of keys", (33, 5, 2), (95, 64, 31)),
    Setting("full, tiles of queries", (31, 64, 70), (5, 1, 18)),
    Setting("around a tile", (31, 32, 33), heads=1),
    Setting("around two tiles, odd address", (63, 65), heads=1, odd=True),
    Setting("E=96, odd address", (37,), width=96, odd=True),
    Setting("E=96", (5, 34), width=96),
    Setting("E=32, a key head each", (34,), key_heads=2, width=32, apart=True),
    Setting("E=64, four heads share", (34,), heads=4, width=64, apart=True),
    Setting("E=128", (35,), (40,), width=128),
    Setting("E=256, eight heads share", (9,), heads=8, width=256),
    Setting("scores to 300", (40,), sharp=75.0),
    Setting("scores to 300, full", (20,), (40,), sharp=75.0),
    Setting("one token", (1,)),
)
HALVES = (Setting("keys in two halves", (40, 3, 20), (46, 2, 60), heads=4, key_heads=2),)
DEAD = (Setting("rows of infinite lse", (5, 37)),)


def numeric_cases() -> list[NumericCase]:
    """Every setting as a call of its own; then gradients of merged results, and with rows that have no keys anywhere."""
    plan = [*((s, whole) for s in SETTINGS), *((s, halves) for s in HALVES), *((s, dead) for s in DEAD)]
    return [
        NumericCase(setting.label, dtype, partial(way, Call(setting, dtype, _triton)))
        for dtype in (torch.float32, torch.float16)
        for setting, way in plan
    ]


def _triton() -> Any:
    from .. import attention_triton

    return attention_triton


class Call:
    """Inputs of a setting, and the sizes of what is summed."""

    def __init__(self, setting: Setting, dtype: torch.dtype, kernels: Callable[[], Any]) -> None:
        """kernels: gives the forward and the backward to be judged, as attributes."""
        self.kernels = kernels
        keys = setting.queries if setting.keys is None else setting.keys
        self.setting, self.dtype, self.causal = setting, dtype, setting.keys is None
        self.bounds_q, self.bounds_k = (tuple(accumulate(n, initial=0)) for n in (setting.queries, keys))
        self.scale = 1.5 / math.sqrt(setting.width)
        generator = torch.Generator().manual_seed(sum(setting.queries) + setting.width)

        def normal(tokens: int, heads: int, scale: float = 1.0) -> Tensor:
            shape = (heads, tokens) if setting.apart else (tokens, heads)
            flat = torch.randn(tokens * heads * setting.width + 1, generator=generator) * scale
            x = flat.to(dtype)[1:] if setting.odd else flat.to(dtype)[:-1]
            x = x.view(*shape, setting.width)
            return x.transpose(0, 1) if setting.apart else x

        tokens, spans, heads = sum(setting.queries), sum(keys), setting.key_heads
        self.q = normal(tokens, setting.heads, setting.sharp)
        self.k, self.v = normal(spans, heads), normal(spans, heads)
        self.dout = normal(tokens, setting.heads)

    def usual(self, dtype: torch.dtype, dout: Tensor) -> dict[str, Tensor]:
        """Of the reference backend, in `dtype`."""
        from .. import attention

        q, k, v, dout = (x.to(dtype) for x in (self.q, self.k, self.v, dout))
        how: dict[str, Any] = {
            "causal": self.causal, "scale": self.scale, "backend": "reference",
            "cu_seqlens_q": self.bounds_q, "cu_seqlens_k": self.bounds_k,
        }  # fmt: skip
        out, lse = attention.forward(q, k, v, **how)
        dq, dk, dv = attention.backward(dout, q, k, v, out, lse, **how)
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def compare(self, ours: Mapping[str, Tensor], dout: Tensor) -> Iterator[Comparison]:
        plain, exact = self.usual(self.dtype, dout), self.usual(torch.float64, dout)
        # sizes of summands: an error of a score is one of its exponential, and dp cancels against delta
        scores = float(exact["lse"][exact["lse"].isfinite()].abs().max())
        blur = max(1.0, scores / ULPS)
        q, k, v, do = (float(x.abs().max()) for x in (self.q, self.k, self.v, dout))
        dp = do * v * math.sqrt(self.setting.width)
        terms = {"out": blur * v, "dv": blur * do, "dq": blur * dp * k * self.scale, "dk": blur * dp * q * self.scale}
        for name, x in ours.items():
            if name == "lse":
                # a row without keys has -inf on both sides, compared as 0
                found, empty = (y == -math.inf for y in (x, exact[name]))
                yield Comparison("rows without keys", found.float(), empty.float(), empty.double())
                a, b, c = (torch.where(y == -math.inf, 0.0, y) for y in (x, plain[name].to(x.dtype), exact[name]))
                yield Comparison(name, a, b, c, scores)
            else:
                yield Comparison(name, x, plain[name], exact[name], terms[name])


def whole(call: Call) -> Iterator[Comparison]:
    kernels = call.kernels()
    where = (call.bounds_q, call.bounds_k, call.causal, call.scale)
    out, lse = kernels.forward(call.q, call.k, call.v, *where, call.dtype)
    dq, dk, dv = kernels.backward(call.dout, call.q, call.k, call.v, out, lse, *where, call.dtype, True)
    yield from call.compare({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, call.dout)


def halves(call: Call) -> Iterator[Comparison]:
    """Each segment's keys in two halves, results merged in fp32, each half's gradients of the merged results."""
    from ..attention import merge

    spans = list(zip(call.bounds_k, call.bounds_k[1:], strict=False))
    kernels, parts = call.kernels(), []
    sides = [[(a, (a + b) // 2) for a, b in spans], [((a + b) // 2, b) for a, b in spans]]
    for half in sides:
        rows = torch.cat([torch.arange(a, b) for a, b in half])
        bounds = tuple(accumulate((b - a for a, b in half), initial=0))
        parts.append((rows, call.k[rows], call.v[rows], (call.bounds_q, bounds, False, call.scale)))
    made = [kernels.forward(call.q, k, v, *where, torch.float32) for _, k, v, where in parts]
    out, lse = merge(*made[0], *made[1])
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (call.q, call.k, call.v))
    for rows, k, v, where in parts:
        part_q, part_k, part_v = kernels.backward(call.dout, call.q, k, v, out, lse, *where, torch.float32, True)
        dq += part_q
        dk[rows], dv[rows] = part_k, part_v
    yield from call.compare({"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, call.dout)


def dead(call: Call) -> Iterator[Comparison]:
    """Every third row has lse = -inf, every seventh +inf: it takes no part in any gradient."""
    kernels = call.kernels()
    where = (call.bounds_q, call.bounds_k, call.causal, call.scale)
    out, lse = kernels.forward(call.q, call.k, call.v, *where, call.dtype)
    lse[:, ::3], lse[:, ::7] = -math.inf, math.inf
    dq, dk, dv = kernels.backward(call.dout, call.q, call.k, call.v, out, lse, *where, call.dtype, True)
    dout = call.dout.clone()
    dout[::3], dout[::7] = 0, 0
    yield from call.compare({"dq": dq, "dk": dk, "dv": dv}, dout)
