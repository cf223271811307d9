"""`kernels.linear_logprob` beside every fused cross-entropy: mean negative log-likelihood of N rows, the one thing all do.

2NDV operations forward, 4NDV backward: what recomputes scores does 2NDV more and earns nothing for it. Ours, naive and
TRL give per-row log-probs and entropies, from which the mean is taken; Liger, CCE and QuACK give the mean alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from longreach.kernels import linear_logprob
from longreach.kernels.linear_logprob import BACKENDS

from . import exact
from .case import PASSES as PASSES
from .case import Case, Contender, Gap, Missing, Problem, gather
from .peers import need, need_gpu

DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
SIZES = {
    "cpu": {
        "small": ({"N": 64, "D": 64, "V": 1024},),
        "default": ({"N": 512, "D": 512, "V": 32768},),
        "large": ({"N": 1024, "D": 1024, "V": 151936},),
    },
    "cuda": {
        "small": ({"N": 1024, "D": 1024, "V": 32768},),
        "default": ({"N": 8192, "D": 4096, "V": 128256}, {"N": 4096, "D": 4096, "V": 128256}),
        "large": ({"N": 32000, "D": 4096, "V": 131072}, {"N": 16384, "D": 4096, "V": 128256}),
    },
}
OURS = tuple(name for name in BACKENDS if name not in ("auto", "reference"))
TRL_CHUNK = 32768
"""Vocabulary entries of one tile, as TRL's trainers have it (trl/trainer/utils.py of 1.16)."""


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D] and weight [V, D], scaled so that logits have a deviation of about 2, as trained heads do."""
    n, d, v = (case.dims[name] for name in "NDV")
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device=case.device)
    weight = torch.randn(v, d, device=case.device) * (2 / d**0.5)
    targets = torch.randint(v, (n,), device=case.device)
    return (
        hidden.to(case.torch_dtype).requires_grad_(),
        weight.to(case.torch_dtype).requires_grad_(),
        targets,
    )


def work(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Operations and bytes of each pass: h, W and targets read; log-probs, dh and dW written."""
    n, d, v = (case.dims[name] for name in "NDV")
    product = 2.0 * n * d * v
    read = (n * d + v * d) * case.torch_dtype.itemsize + 8.0 * n
    written = (n * d + v * d) * case.torch_dtype.itemsize
    flops = {"forward": product, "backward": 2 * product, "both": 3 * product}
    return flops, {"forward": read + 4 * n, "backward": read + written + 4 * n, "both": read + written}


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Full logits in the inputs' dtype, then an fp32 softmax, as most trainers do: logp and entropy [N]."""
    logps = (hidden @ weight.t()).float().log_softmax(-1)
    return logps.gather(1, targets.unsqueeze(1)).squeeze(1), -(logps.exp() * logps).sum(-1)


def problem(case: Case) -> Problem:
    hidden, weight, targets = inputs(case)
    leaves = (hidden, weight)

    def rows(name: str, logp: Callable[[], Tensor], package: str | None = None, ours: bool = False) -> Contender:
        return Contender(
            name, "logp and entropy per row", logp, lambda: -logp().mean(), lambda loss: grads(loss, leaves), package, ours
        )  # fmt: skip

    def mean(name: str, loss: Callable[[], Tensor], package: str | None = None) -> Contender:
        return Contender(name, "mean loss", loss, loss, lambda value: grads(value, leaves), package)

    contenders: list[Contender | Gap] = [*ours(case, leaves, targets, rows)]
    contenders.append(rows("torch, full logits", lambda: naive(hidden, weight, targets)[0]))
    contenders.append(rows("torch.compile, full logits", compiled(leaves, targets)))
    contenders += peers(case, leaves, targets, rows, mean)
    flops, traffic = work(case)

    def truth() -> Any:
        return exact.linear(hidden.detach(), weight.detach(), targets, lambda logp: -logp.mean())

    return Problem(contenders, flops, traffic, truth, ("dhidden", "dweight"))


def grads(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def ours(case: Case, leaves: Sequence[Tensor], targets: Tensor, rows: Any) -> Iterator[Contender | Gap]:
    """One contender per backend that this device has."""
    hidden, weight = leaves
    for backend in OURS:
        name = f"longreach, {backend}"
        yield gather(
            name, lambda name=name, backend=backend: _own(name, backend, hidden, weight, targets, rows), ours=True
        )


def _own(name: str, backend: str, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Any) -> Contender:
    probe(backend, hidden, weight)
    return rows(name, lambda: linear_logprob(hidden, weight, targets, backend=backend).logp, ours=True)


def probe(backend: str, hidden: Tensor, weight: Tensor) -> None:
    """Missing, with the library's own words, where a backend refuses tensors of this device and dtype."""
    need_gpu(backend, hidden)
    none = torch.zeros(0, dtype=torch.long, device=hidden.device)
    try:
        linear_logprob(hidden[:0].detach(), weight.detach(), none, backend=backend)
    except ValueError as error:
        raise Missing(str(error)) from error


def compiled(leaves: Sequence[Tensor], targets: Tensor) -> Callable[[], Tensor]:
    """torch.compile of the naive way, static shapes; entropy is returned too, so it can't be dropped."""
    function = compile_fresh(naive)
    return lambda: function(leaves[0], leaves[1], targets)[0]


def compile_fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes of this case; without the reset it would go eager, silently, after eight of them."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def peers(case: Case, leaves: Sequence[Tensor], targets: Tensor, rows: Any, mean: Any) -> list[Contender | Gap]:
    hidden, weight = leaves
    # off Hopper it takes its plain torch form
    scaled = "Liger, scaled CE" if case.device == "cuda" else "Liger, scaled CE, torch form"

    def liger(name: str, **options: Any) -> Contender:
        function = need("liger_kernel.transformers.functional", device=case.device, cuda=True)
        loss = function.liger_fused_linear_cross_entropy
        return mean(name, lambda: loss(hidden, weight, targets, **options), "liger-kernel")

    def liger_scaled() -> Contender:
        module = need("liger_kernel.ops.fused_linear_scaled_cross_entropy")
        apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply
        return rows("Liger, scaled CE", lambda: -apply(hidden, weight, targets, return_entropy=True)[0], "liger-kernel")

    def cce() -> Contender:
        module = need("cut_cross_entropy", device=case.device, cuda=True)
        loss = module.linear_cross_entropy
        return mean("cut-cross-entropy", lambda: loss(hidden, weight, targets, impl="cce"), "cut-cross-entropy")

    def trl() -> Contender:
        return rows("TRL, chunked", lambda: trl_rows(hidden, weight, targets)[0], trl_package())

    def quack() -> Contender:
        module = need("quack.linear_cross_entropy", device=case.device, cuda=True)
        loss = module.chunked_linear_cross_entropy
        return mean("QuACK, chunked", lambda: loss(hidden, weight, targets), "quack-kernels")

    return [
        gather("Liger, fused linear CE", lambda: liger("Liger, fused linear CE")),
        gather(
            "Liger, fused linear CE, fp32 sums",
            lambda: liger("Liger, fused linear CE, fp32 sums", accum_dtype=torch.float32),
        ),
        gather(scaled, liger_scaled),
        gather("cut-cross-entropy", cce),
        gather("TRL, chunked", trl),
        gather("QuACK, chunked", quack),
    ]


def trl_package() -> str:
    need("trl.kernels")
    return "trl"


def trl_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's own function, asked for what its GRPO trainer asks for: logp and entropy [N]."""
    apply = need("trl.kernels").ChunkedLogProbFunction.apply
    found = apply(hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return found[0], found[1]
