"""The fp64 answer of the linear ops, row chunk by row chunk, from the formula alone: shares no code with what it judges.

z = h W^T,  logp = z[target] - lse(z),  dz = g (1[target] - softmax(z)),  dh = dz W,  dW = dz^T h
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Exact

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


def linear(hidden: Tensor, weight: Tensor, targets: Tensor, loss: Callable[[Tensor], Tensor]) -> Exact:
    """Log-probs [N] in fp64, `loss(logp)`, and its gradients by hidden and weight."""
    wide = weight.double()
    rows = max(1, CHUNK_BYTES[hidden.device.type] // (8 * weight.shape[0]))
    parts = [
        (h.double() @ wide.t()).log_softmax(1).gather(1, t.unsqueeze(1)).squeeze(1)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logp = torch.cat(parts).requires_grad_()
    value = loss(logp)
    (g,) = torch.autograd.grad(value, logp)
    dhidden, dweight = torch.empty_like(hidden, dtype=torch.float64), torch.zeros_like(wide)
    for i in range(0, len(hidden), rows):
        part = slice(i, i + rows)
        h = hidden[part].double()
        dz = (h @ wide.t()).softmax(1).mul_(-g[part].unsqueeze(1))
        dz.scatter_add_(1, targets[part].unsqueeze(1), g[part].unsqueeze(1))
        dhidden[part] = dz @ wide
        dweight.addmm_(dz.t(), h)
    return Exact(logp.detach(), value.detach(), {"dhidden": dhidden, "dweight": dweight})


def value_error(found: Tensor, exact: Exact) -> float:
    """Largest |difference| of the values, or of the loss where that is all a contender gives."""
    truth = exact.values if found.shape == exact.values.shape else exact.loss
    return float((found.detach().double() - truth).abs().max())


def relative_error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||; NaN stays NaN."""
    return float((found.detach().double() - truth).norm() / truth.norm())
