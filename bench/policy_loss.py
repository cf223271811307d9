"""`kernels.policy_loss`: the loss on per-token scalars, which must vanish beside the vocabulary.

Memory-bound: four inputs read (20 bytes a token), one gradient written. Beside it the bare formula, which checks
nothing and reports no metrics, and torch.compile of that. Liger's and TRL's losses on logits are another op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longreach.kernels import policy_loss

from .case import PASSES as PASSES
from .case import Case, Contender, Exact, Problem
from .linear_logprob import compile_fresh

DTYPES = {"cpu": ("float32",), "cuda": ("float32",)}
SIZES = {
    "cpu": {"small": ({"N": 4096, "sequences": 8},), "default": ({"N": 1 << 20, "sequences": 128},), "large": ()},
    "cuda": {
        "small": ({"N": 4096, "sequences": 8},),
        "default": ({"N": 1 << 20, "sequences": 128},),
        "large": ({"N": 1 << 24, "sequences": 1024},),
    },
}


def bare(logp: Tensor, old: Tensor, advantages: Tensor, ids: Tensor, sequences: int) -> Tensor:
    """Mean over sequences of the token mean of -min(r A, clip(r, 0.8, 1.2) A) (arXiv 2402.03300 eq. 3)."""
    ratio = (logp - old).exp()
    tokens = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    counts = torch.zeros(sequences, dtype=logp.dtype, device=logp.device).index_add(0, ids, torch.ones_like(logp))
    return (tokens / counts[ids]).sum() / sequences


def problem(case: Case) -> Problem:
    n, sequences = case.dims["N"], case.dims["sequences"]
    torch.manual_seed(0)
    logp = (-torch.rand(n, device=case.device) * 3).requires_grad_()
    old = logp.detach() + 0.1 * torch.randn(n, device=case.device)
    ids = torch.arange(sequences, device=case.device).repeat_interleave(n // sequences)
    advantages = torch.randn(sequences, device=case.device)[ids]
    compiled = compile_fresh(bare)

    def contender(name: str, loss: Callable[[], Tensor], ours: bool = False) -> Contender:
        def backward(value: Tensor) -> Sequence[Tensor]:
            return torch.autograd.grad(value, (logp,))

        return Contender(name, "loss and metrics" if ours else "loss", loss, loss, backward, None, ours)

    def own() -> Tensor:
        return policy_loss(logp, old, advantages, ids, kind="grpo", normalizer=sequences).loss

    contenders = [
        contender("longreach", own, ours=True),
        contender("torch, bare formula", lambda: bare(logp, old, advantages, ids, sequences)),
        contender("torch.compile, bare formula", lambda: compiled(logp, old, advantages, ids, sequences)),
    ]

    def truth() -> Exact:
        wide = logp.detach().double().requires_grad_()
        loss = bare(wide, old.double(), advantages.double(), ids, sequences)
        return Exact(loss.detach(), loss.detach(), {"dlogp": torch.autograd.grad(loss, wide)[0]})

    read, written = 20.0 * n, 4.0 * n
    traffic = {"forward": read, "backward": read + written, "both": read + written}
    return Problem(contenders, dict.fromkeys(PASSES, 10.0 * n), traffic, truth, ("dlogp",))
