"""What one decoder layer holds, token by token: a ledger of its buffers, forward and backward, in the order they live.

Written from transformers' eager modules and autograd's rules of what is saved, in bytes a token. Three numbers come of it:

    saved     what a layer keeps for its backward if it isn't computed again
    backward  the most that is held while a layer is computed again and its backward runs, its own buffers only
    forward   the most that a layer holds without gradients

A norm keeps an fp32 copy of its input, and of what it hands on if its weight is trained; a linear layer its input if its
weight is trained; an adapter (peft) an fp32 copy of its input; the gated MLP four inner widths; attention q, k, v, out.
`tests/engine/test_planner_memory.py` holds all of it against a trace of the real modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .planner_shape import ModelShape

WIDE = 4
"""Bytes of fp32."""


@dataclass(frozen=True)
class Compute:
    """How a layer computes: bytes of an activation, and of the residual stream (fp32 under autocast)."""

    size: int = 2
    residual: int = 2
    frozen: bool = False
    """The layer's own weights don't train."""
    adapters: frozenset[str] = frozenset()
    fused: bool = False
    """Norms, rotations and the gate are single kernels that keep their inputs alone (liger)."""
    tile: float = 0.0
    """Share of the row's tokens that norms and the MLP see at once, being computed again tile by tile; 0: all."""

    merged: float | None = None
    """Attention's results are merged in fp32 part by part (`partials`), of this share of the prompts' queries at once."""
    gathered: float = 0.0
    """Prompt tokens whose keys and values are there at once, for each of the rank's own (`gather`)."""

    @property
    def casts(self) -> bool:
        """Whether linear layers keep a rounded copy of what they are given (autocast)."""
        return self.residual > self.size


class LayerBytes(NamedTuple):
    """Bytes a token of the row."""

    saved: float
    backward: float
    forward: float


class _Ledger:
    def __init__(self) -> None:
        self.held: dict[str, float] = {}
        self.peak = 0.0

    @property
    def alive(self) -> float:
        return sum(self.held.values())

    def hold(self, name: str, size: float) -> None:
        self.held[name] = size
        self.pulse(0.0)

    def drop(self, *names: str) -> None:
        for name in names:
            self.held.pop(name, None)

    def pulse(self, size: float) -> None:
        """Something is held for a moment."""
        self.peak = max(self.peak, self.alive + size)


@lru_cache(maxsize=4096)
def layer_bytes(shape: ModelShape, how: Compute, prompt_share: float) -> LayerBytes:
    """Of one layer; `prompt_share` of the row's tokens are prompts."""
    kept = _Layer(shape, how, prompt_share)
    kept.forward()
    layer = _Layer(shape, how, prompt_share)
    layer.arrive()
    layer.forward()
    layer.backward()
    without = _Layer(shape, how, prompt_share, keep=False)
    without.forward()
    return LayerBytes(kept.ledger.alive, layer.ledger.peak, without.ledger.peak)


class _Layer:
    def __init__(self, shape: ModelShape, how: Compute, prompt_share: float, keep: bool = True) -> None:
        self.shape, self.how, self.keep = shape, how, keep
        self.p, self.c = prompt_share, 1.0 - prompt_share
        self.ledger = _Ledger()
        self.trains = keep and not how.frozen

    def arrive(self) -> None:
        """The gradient of the layer's result; an adapter behind it has begun before the layer is computed again."""
        self.ledger.hold("g", self.how.residual * self.shape.hidden)
        if "down_proj" in self.how.adapters and not self.how.tile:
            self.ledger.hold("g.wide", (self.how.size + WIDE) * self.shape.hidden)

    def forward(self) -> None:
        """As recomputed: up to the last buffer that the backward needs."""
        ledger, s, r = self.ledger, self.shape, self.how.residual
        self._norm("n1", s.hidden, r)
        for name in ("q_proj", "k_proj", "v_proj"):
            self._linear(name, "n1")
            if s.qk_norm and name != "v_proj":
                self._norm(name, s.linears[name][1], self.how.size)
        self._used("n1")
        self._rope()
        self._attention()
        self._linear("o_proj", "out", last=True)
        ledger.drop("o_proj")
        ledger.hold("h1", r * s.hidden)
        self._mlp()
        if r < WIDE and not self.how.tile and not self.how.fused:
            ledger.drop("h1")  # the norm has a copy of its own

    def backward(self) -> None:
        ledger, s, r = self.ledger, self.shape, self.how.residual
        ledger.drop("g.wide")
        self._mlp_backward()
        ledger.hold("g", r * s.hidden)
        ledger.drop("h1")
        self._linear_backward("o_proj", "out", "dout")
        ledger.drop("attended")
        self._attention_backward()
        for name in ("v_proj", "k_proj", "q_proj"):
            if s.qk_norm and name != "v_proj":
                self._norm_backward(name, f"d{name}", s.linears[name][1], self.how.size)
            self._linear_backward(name, "n1", "dn1", grad=f"d{name}")
        ledger.drop("n1")
        self._norm_backward("n1", "dn1", s.hidden, r)

    def _mlp(self) -> None:
        """Norm, gate, up, down. In pieces the MLP keeps its input alone, and is computed again piece by piece."""
        self._norm("n2", self.shape.hidden, self.how.residual)
        if not self.how.tile:
            return self._inner()
        if not self.keep:
            self.ledger.hold("mlp", self.how.residual * self.shape.hidden)
            self.ledger.pulse(self.how.tile * self._piece(backward=False))
        return None

    def _mlp_backward(self) -> None:
        ledger, residual = self.ledger, self.how.residual * self.shape.hidden
        if self.how.tile:
            ledger.hold("dn2", residual)
            ledger.pulse(self.how.tile * self._piece(backward=True))
            ledger.drop("n2")
        else:
            self._inner_backward()
        self._norm_backward("n2", "dn2", self.shape.hidden, self.how.residual)
        ledger.drop("dn2")

    def _piece(self, backward: bool) -> float:
        """The most that the MLP of one piece holds beside its input, a token of the piece."""
        whole = replace(self.how, tile=0.0)
        piece = _Layer(self.shape, whole, self.p, self.keep and backward)
        piece._inner()
        if backward:
            piece.ledger.hold("out", self.how.residual * self.shape.hidden)
            piece._inner_backward()
        return piece.ledger.peak

    def _inner(self) -> None:
        ledger, b, inner = self.ledger, self.how.size, self.shape.inner
        self._linear("gate_proj", "n2")
        if not self.how.fused:
            ledger.hold("silu", b * inner)
            if not self.keep:
                ledger.drop("gate_proj")
        self._linear("up_proj", "n2")
        self._used("n2")
        ledger.hold("product", b * inner)
        if not self.keep:
            ledger.drop("silu", "up_proj", "gate_proj")
        self._linear("down_proj", "product", last=True)
        ledger.drop("down_proj")
        if not self.trains or self.how.casts:
            ledger.drop("product")

    def _inner_backward(self) -> None:
        ledger, b, inner = self.ledger, self.how.size, self.shape.inner
        self._linear_backward("down_proj", "product", "dproduct", grad="g", keep_grad=True)
        ledger.drop("product")
        if self.how.fused:  # gradients are written over what was kept
            ledger.held["dup_proj"], ledger.held["dgate_proj"] = (
                ledger.held.pop("up_proj"),
                ledger.held.pop("gate_proj"),
            )
            ledger.drop("dproduct")
            self._linear_backward("up_proj", "n2", "dn2", grad="dup_proj")
        else:
            ledger.hold("dup_proj", b * inner)
            ledger.hold("dsilu", b * inner)
            ledger.drop("dproduct", "silu", "up_proj")
            self._linear_backward("up_proj", "n2", "dn2", grad="dup_proj")
            ledger.hold("dgate_proj", b * inner)
            ledger.drop("dsilu", "gate_proj")
        self._linear_backward("gate_proj", "n2", "dn2", grad="dgate_proj")
        ledger.drop("n2")

    def _norm(self, name: str, width: int, size: int) -> None:
        """`name` becomes the norm's result, `name.x` and `name.y` what it keeps: fp32 input, normalised input."""
        ledger, tile = self.ledger, self.how.tile or 1.0
        result = WIDE if self.how.casts else size  # fp32 weights times whatever is fp32
        given = ledger.held.get(name, 0.0)
        if self.how.fused or self.how.tile:
            # the input itself is kept: a projection's, or the residual stream, which stands elsewhere
            if self.keep and given:
                ledger.held[f"{name}.x"] = ledger.held.pop(name)
            ledger.pulse(result * width + (0 if self.how.fused else tile * 3 * WIDE * width))
            ledger.hold(name, result * width)
            return
        if size < WIDE:
            ledger.hold(f"{name}.x", WIDE * width)
        ledger.pulse(WIDE * width)  # the square, then the quotient
        ledger.hold(f"{name}.y", size * width)
        ledger.pulse(WIDE * width * (size < WIDE) + result * width)
        if not self.trains:
            ledger.drop(f"{name}.y")
        if not self.keep:
            ledger.drop(f"{name}.x")
        ledger.hold(name, result * width)

    def _norm_backward(self, name: str, grad: str, width: int, size: int) -> None:
        ledger = self.ledger
        if self.how.fused or self.how.tile:
            ledger.pulse(size * width + (0 if self.how.fused else self.how.tile * 6 * WIDE * width))
            ledger.drop(f"{name}.x")
            return
        if self.trains:
            ledger.pulse(2 * size * width)
        ledger.drop(f"{name}.y", grad)
        ledger.hold(f"{grad}.wide", WIDE * width)
        ledger.pulse(4 * WIDE * width)  # the square's gradient
        ledger.drop(f"{grad}.wide", f"{name}.x")
        ledger.hold(grad, size * width)

    def _linear(self, name: str, given: str, last: bool = False) -> None:
        """`name` becomes the result. `last`: nothing behind it is computed again."""
        ledger, (wide_in, wide_out) = self.ledger, self.shape.linears[name]
        b = self.how.size
        if self.how.casts:
            ledger.hold(f"{given}>{name}", b * wide_in)
            if not self.trains:
                ledger.drop(f"{given}>{name}")
        if not (last and self.keep and name not in self.how.adapters):
            ledger.hold(name, b * wide_out)
        if name in self.how.adapters:
            ledger.hold(f"{given}>>{name}", WIDE * wide_in)
            if not (last and name == "down_proj" and self.keep):
                ledger.pulse(2 * WIDE * wide_out)
            if not self.keep:
                ledger.drop(f"{given}>>{name}")

    def _used(self, given: str) -> None:
        """A linear layer's input goes, unless a trained weight keeps it as it is."""
        if not self.trains or self.how.casts:
            self.ledger.drop(given)

    def _linear_backward(
        self, name: str, given: str, result: str, grad: str | None = None, keep_grad: bool = False
    ) -> None:
        ledger, (wide_in, wide_out) = self.ledger, self.shape.linears[name]
        b, grad = self.how.size, grad or "g"
        if self.how.casts and grad == "g":
            ledger.pulse(b * wide_out)
        if name in self.how.adapters:
            own = 0.0 if keep_grad or grad == "g" else ledger.held.get(grad, 0.0)
            ledger.pulse(2 * WIDE * wide_out + b * wide_out - own)
            ledger.pulse(WIDE * wide_in + b * wide_out - own)
            ledger.drop(f"{given}>>{name}")
            ledger.pulse(2 * b * wide_in + b * wide_out - own)
        ledger.pulse(b * wide_in)
        kind = self.how.residual if result in ("dn1", "dn2") else b
        ledger.hold(result, kind * wide_in)
        ledger.drop(f"{given}>{name}")
        if grad != "g":
            ledger.drop(grad)

    def _merged_backward(self) -> None:
        """Sums in fp32 and a part that is added to them; keys of one rank and the next, or of all, and their gradients."""
        ledger, s, b = self.ledger, self.shape, self.how.size
        keys, wide = 2 * s.kv, WIDE * 2 * s.kv
        ledger.hold("own", WIDE * s.q + wide)
        ledger.pulse(WIDE * (s.q + 2 * s.heads) + 2 * b * keys + 3 * wide)
        if self.how.gathered:
            ledger.pulse(WIDE * (s.q + 2 * s.heads) + self.how.gathered * (b * keys + 2 * wide))
            ledger.pulse(self.how.gathered * 3 * wide)  # as they leave, as they come, and in one

    def _rope(self) -> None:
        """q and k turned; the unturned go."""
        ledger, s = self.ledger, self.shape
        b = WIDE if self.how.casts else self.how.size
        if not self.how.fused:
            ledger.pulse(3 * b * s.q)
            ledger.pulse(b * s.q + 3 * b * s.kv)
        ledger.drop("q_proj", "k_proj", "v_proj")

    def _attention(self) -> None:
        """q, k, v, out and lse stay; completions' partial results are fp32."""
        ledger, s, b = self.ledger, self.shape, self.how.size
        ledger.hold("attended", b * (s.q + 2 * s.kv) + WIDE * s.heads)
        ledger.hold("out", b * s.q)
        if self.how.merged is None:
            ledger.pulse(b * s.q + 6 * WIDE * s.q * self.c)
        else:
            ledger.pulse(WIDE * s.q * (1 + 5 * max(self.c, self.how.merged)))
        if not self.keep:
            ledger.drop("attended")

    def _attention_backward(self) -> None:
        """FlashAttention's for prompts, for completions against prompts, for completions: fp32 sums of rounded parts."""
        ledger, s, b, p, c = self.ledger, self.shape, self.how.size, self.p, self.c
        grouped = 2 * b * s.q if s.heads != s.key_heads else 0

        def call(queries: float, keys: float) -> None:
            rounded = b * (s.q * queries + 2 * s.kv * keys)
            ledger.pulse(rounded + WIDE * (s.q + s.heads) * queries + grouped * keys + WIDE * s.heads)
            ledger.pulse(rounded + WIDE * (s.q * queries + 2 * s.kv * keys))

        ledger.hold("attended", b * (s.q + 2 * s.kv) + WIDE * s.heads)
        if self.how.merged is not None:
            p, c = 0.0, 0.0
            self._merged_backward()
        call(p, p)
        ledger.hold("prompts", WIDE * (s.q + 2 * s.kv) * p)
        if c:
            call(c, p)
            ledger.hold("cross", WIDE * (s.q * c + 2 * s.kv * p))
            call(c, c)
            ledger.hold("own", WIDE * (s.q + 2 * s.kv) * c)
            ledger.drop("prompts")
            ledger.hold("joined", WIDE * (s.q + 2 * s.kv))
        ledger.pulse(b * (s.q + 2 * s.kv))
        ledger.drop("prompts", "cross", "own", "joined", "attended", "out", "dout")
        for name, width in (("q_proj", s.q), ("k_proj", s.kv), ("v_proj", s.kv)):
            ledger.hold(f"d{name}", b * width)
        if not self.how.fused:
            ledger.pulse(3 * (WIDE if self.how.casts else b) * s.q)
