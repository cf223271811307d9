"""Tensors in, tensors out: knows no model, no process group, no file.

transformers imports any top-level module called `kernels` that it finds, so this package must stay harmless to import
under that bare name: no transformers here, no version, nothing that raises.
"""

from . import attention
from .linear_logprob import LogProbs, LowRank, linear_logprob
from .linear_policy_loss import linear_policy_loss
from .policy_loss import Mean, PolicyLoss, policy_loss

__all__ = [
    "LogProbs",
    "LowRank",
    "Mean",
    "PolicyLoss",
    "attention",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
]
