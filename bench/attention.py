"""`kernels.attention` beside torch's own kernels and flash-attention: T queries on S keys, causal or all to all.

4 H E operations a pair of query and key forward, 10 H E backward, pairs T (T + 1) / 2 where causal. Grouped keys stay K
heads wide. `causal=0` with T < S is what completions do on the prompt they share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from longreach.kernels import attention, attention_flash

from .case import PASSES as PASSES
from .case import Case, Contender, Exact, Gap, Missing, Problem, gather
from .peers import need, need_gpu

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
_QWEN3_8B = {"H": 32, "K": 8, "E": 128}
SIZES = {
    "cpu": {
        "small": ({"T": 128, "S": 128, "H": 4, "K": 2, "E": 32, "causal": 1},),
        "default": ({"T": 2048, "S": 2048, "H": 8, "K": 2, "E": 64, "causal": 1},),
        "large": ({"T": 8192, "S": 8192, "H": 8, "K": 2, "E": 64, "causal": 1},),
    },
    "cuda": {
        "small": ({"T": 2048, "S": 2048, **_QWEN3_8B, "causal": 1},),
        "default": (
            *({"T": t, "S": t, **_QWEN3_8B, "causal": 1} for t in (16384, 32768, 65536)),
            {"T": 4096, "S": 65536, **_QWEN3_8B, "causal": 0},
        ),
        "large": (
            {"T": 131072, "S": 131072, **_QWEN3_8B, "causal": 1},
            {"T": 32768, "S": 122880, **_QWEN3_8B, "causal": 0},
        ),
    },
}
OURS = tuple(name for name in attention.BACKENDS if name not in ("auto", "reference"))
EXACT_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
"""Most that one head's fp64 scores may take; beyond it there are no error columns."""
SDPA = {
    "cpu": {"torch SDPA": None, "torch SDPA, math": SDPBackend.MATH},
    "cuda": {
        "torch SDPA, flash": SDPBackend.FLASH_ATTENTION,
        "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
        "torch SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}


def problem(case: Case) -> Problem:
    t, s, h, kv, e = (case.dims[name] for name in "TSHKE")
    causal = bool(case.dims["causal"])
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(n, heads, e, device=case.device).to(case.torch_dtype)
        for n, heads in ((t, h), (s, kv), (s, kv), (t, h))
    )
    contenders: list[Contender | Gap] = [
        gather(f"longreach, {name}", lambda name=name: own(name, q, k, v, dout, causal), ours=True) for name in OURS
    ]
    for name, backend in SDPA[case.device].items():
        contenders.append(sdpa(name, backend, q, k, v, dout, causal))
    contenders.append(gather("torch flex_attention", lambda: flex(q, k, v, dout, causal)))
    for name, module, package in (
        ("flash-attention 2", "flash_attn", "flash-attn"),
        ("flash-attention 3", "flash_attn_interface", "flash-attn-3"),
        ("flash-attention 4", "flash_attn.cute", "flash-attn-4"),
    ):
        found = gather(name, lambda name=name, m=module, p=package: flash(name, m, p, case, q, k, v, dout, causal))
        contenders.append(found)
    pairs = t * (t + 1) / 2 if causal else t * s
    side = (q.numel() + k.numel() + v.numel()) * q.element_size()
    out = q.numel() * q.element_size() + 4 * h * t
    flops = {"forward": 4 * h * e * pairs, "backward": 10 * h * e * pairs, "both": 14 * h * e * pairs}
    traffic = {"forward": side + out, "backward": 2 * (side + out), "both": 2 * side + 2 * out}
    fits = 8 * t * s <= EXACT_BYTES[case.device]
    truth = (lambda: reference(q, k, v, dout, causal)) if fits else None
    return Problem(contenders, flops, traffic, truth, ("dq", "dk", "dv"))


def own(name: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Contender:
    need_gpu(name, q)
    try:
        attention.forward(q[:1], k[:1], v[:1], causal=causal, backend=name)
    except ValueError as error:
        raise Missing(str(error)) from error

    def forward() -> tuple[Tensor, Tensor]:
        return attention.forward(q, k, v, causal=causal, backend=name)

    def backward(state: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
        return attention.backward(dout, q, k, v, *state, causal=causal, backend=name)

    package = attention_flash.PACKAGES.get(name)
    origin = package.distribution if package else None
    return Contender(f"longreach, {name}", "out and lse", lambda: forward()[0], forward, backward, origin, True)


def differentiable(
    name: str,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    package: str | None = None,
) -> Contender:
    """A peer that autograd sees: [T, H, E] in and out."""
    *parts, dout = tensors
    leaves = tuple(part.detach().requires_grad_() for part in parts)

    def backward(out: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(out, leaves, dout)

    return Contender(name, "out", lambda: call(*leaves), lambda: call(*leaves), backward, package)


def sdpa(name: str, backend: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Contender:
    def choice() -> AbstractContextManager[Any]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b_q, b_k, b_v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        with choice():
            out = scaled_dot_product_attention(b_q, b_k, b_v, is_causal=causal, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)

    return differentiable(name, call, (q, k, v, dout))


def flex(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Contender:
    """Compiled, as its documentation asks for; blocks above the diagonal are never made."""
    if not q.is_cuda:
        raise Missing("needs a CUDA device")
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        shape = (q.shape[0], k.shape[0])
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, *shape, device=q.device)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b_q, b_k, b_v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return compiled(b_q, b_k, b_v, block_mask=mask, enable_gqa=True).squeeze(0).transpose(0, 1)

    return differentiable("torch flex_attention", call, (q, k, v, dout))


def flash(
    name: str, module: str, package: str, case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool
) -> Contender:
    function = need(module, device=case.device, cuda=True).flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).squeeze(0)

    return differentiable(name, call, (q, k, v, dout), package)


def reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Exact:
    """fp64, one query head at a time, autograd through the plain formula."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out, dq = torch.empty_like(q, dtype=torch.float64), torch.empty_like(q, dtype=torch.float64)
    dk, dv = torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
    for i in range(heads):
        parts = (q[:, i], k[:, i // group], v[:, i // group])
        b_q, b_k, b_v = leaves = tuple(x.double().requires_grad_() for x in parts)
        scores = b_q @ b_k.t() / q.shape[2] ** 0.5
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        b_out = scores.softmax(1) @ b_v
        out[:, i] = b_out.detach()
        dq[:, i], grad_k, grad_v = torch.autograd.grad(b_out, leaves, dout[:, i].double())
        dk[:, i // group] += grad_k
        dv[:, i // group] += grad_v
    return Exact(out, (out * dout).sum(), {"dq": dq, "dk": dk, "dv": dv})
