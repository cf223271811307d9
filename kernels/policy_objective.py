"""A policy loss in two steps: what the current log-probs don't change, then value and closed-form gradients of them.

    objective = prepare(old, advantages, sequence_ids, kind=..., normalizer=..., with_entropy=...)
    loss, g, h, metrics = objective.evaluate(logp, entropy)              g = dL/dlogp, h = dL/dentropy, no autograd

Where `objective.token_level`, rows may be evaluated in any chunks, as soon as their log-probs exist: losses and metrics
of `objective.select(rows).evaluate(logp[rows])` add up, gradients fall into place. `select` and `evaluate` never make
the device wait; `prepare` does, to check what it was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import policy_corrections
from .policy_corrections import Importance, corrects, importance, needs_sequences
from .policy_kind import Kind, Term, Tokens, clamp, within
from .policy_kinds import KINDS
from .policy_kl import KL_ESTIMATORS, kl_term
from .policy_metrics import Mean, means
from .policy_options import choice, flag, nearest, number, positive, resolve
from .policy_sequences import Sequences

COMMON_OPTIONS = {
    "kl_weight": number(0.0),
    "kl": choice("k3", KL_ESTIMATORS, "KL estimator"),
    "kl_bias_correction": flag(False),
    "entropy_weight": number(0.0),
    **policy_corrections.OPTIONS,
    "off_policy_threshold": positive(None),
}

NEEDS = {
    "kl_weight": "ref_logp",
    "entropy_weight": "entropy",
    "importance_cap": "rollout_logp",
    "importance_range": "rollout_logp",
    "importance_sequence_range": "rollout_logp",
}


class Evaluation(NamedTuple):
    """Detached: the loss (0-d), g = dL/dlogp [N], h = dL/dentropy [N] (None: it is zero), metrics to be added with `+`."""

    loss: Tensor
    g: Tensor
    h: Tensor | None
    metrics: dict[str, Mean]


@dataclass(frozen=True)
class Objective:
    """A policy loss of N tokens that waits for their current log-probs; made by `prepare`. Tensors are [N]."""

    kind: Kind
    settings: Mapping[str, Any]
    with_entropy: bool
    token_level: bool
    """A token's (g, h) depends on its own log-prob and entropy alone: rows may be evaluated in any chunks."""
    ignored: Tensor
    """bool: not kept. These rows add nothing to value, gradient or metrics; their log-probs need not exist."""
    dead: Tensor
    """bool: ignored, or the gradient is zero whatever the log-prob is. Their log-probs are for loss and metrics alone."""
    weight: Tensor
    share: Tensor
    advantages: Tensor
    old: Tensor | None
    """None: on-policy, old is the current log-prob without gradient."""
    rollout: Tensor | None
    ref: Tensor | None
    correction: Importance | None
    """Known before the current log-probs unless on-policy."""
    sequences: Sequences | None

    def select(self, rows: Tensor | slice) -> Objective:
        """The objective of some rows (a slice, or integer indices), for token-level objectives alone."""
        assert self.token_level, "rows of this objective depend on one another: evaluate them together"

        def pick(x: Any) -> Any:
            if isinstance(x, Importance):
                return Importance(pick(x.weight), {name: pick(mark) for name, mark in x.marks.items()})
            return x[rows] if isinstance(x, Tensor) else x

        return replace(self, **{f.name: pick(getattr(self, f.name)) for f in fields(self)} | {"sequences": None})

    @torch.no_grad()
    def evaluate(self, logp: Tensor, entropy: Tensor | None = None) -> Evaluation:
        """Loss, gradients and metrics at `logp` [N] and `entropy` [N] (given exactly where `with_entropy` says so)."""
        assert logp.shape == self.weight.shape
        assert (entropy is not None) == self.with_entropy
        logp = self._only_kept(logp)
        old = logp if self.old is None else self.old
        correction = self.correction
        if correction is None:
            correction = _correct(self.kind, old, self.rollout, self.settings, self.sequences)
        tokens = self._tokens(logp, old, correction)
        term = self._policy_term(tokens, correction)
        loss, g, h = -term.value, -term.slope, None
        marks = {"ratio/mean": tokens.ratio, **term.marks, **correction.marks}
        if self.ref is not None:
            kl, slope = kl_term(tokens, self.ref, self.settings["kl"], corrected=self.settings["kl_bias_correction"])
            marks["kl"] = kl
            if self.settings["kl_weight"]:
                loss, g = loss + self.settings["kl_weight"] * kl, g + self.settings["kl_weight"] * slope
        if entropy is not None:
            bonus = marks["entropy"] = self._only_kept(entropy)
            if self.settings["entropy_weight"]:
                loss = loss - self.settings["entropy_weight"] * bonus
                h = -self.settings["entropy_weight"] * self.share
        return Evaluation((loss * self.share).sum(), g * self.share, h, means(marks, self.weight))

    def _only_kept(self, x: Tensor) -> Tensor:
        return _only_kept(x, self.ignored, self.weight.dtype)

    def _tokens(self, logp: Tensor, old: Tensor, correction: Importance) -> Tokens:
        folded = correction.weight if self.kind.folds_importance else None
        gap = logp - old if self.old is not None else torch.zeros_like(logp)
        return Tokens(
            logp, old, clamp(gap), within(gap), self.advantages,
            log_importance=None if folded is None else folded.log(), sequences=self.sequences,
        )  # fmt: skip

    def _policy_term(self, tokens: Tokens, correction: Importance) -> Term:
        """The kind's term, times the generator/trainer correction and the off-policy mask."""
        value, slope, marks = self.kind.objective(tokens, self.settings)
        if correction.weight is not None and not self.kind.folds_importance:
            value, slope = value * correction.weight, slope * correction.weight
        threshold = self.settings["off_policy_threshold"]
        if threshold is not None:
            # DeepSeek-V3.2 (arXiv 2512.02556): what sampled the sequence is the generator, where its log-probs are known
            sampled = tokens.old if self.rollout is None else self.rollout
            drift = tokens.sequence_mean(clamp(sampled - tokens.logp))
            behind = (tokens.advantages < 0) & (drift > threshold)
            marks = {**marks, "sampling/off_policy_masked_mean": behind}
            value, slope = torch.where(behind, 0.0, value), torch.where(behind, 0.0, slope)
        return Term(value, slope, marks)


def prepare(
    old_logp: Tensor | None,
    advantages: Tensor,
    sequence_ids: Tensor,
    *,
    kind: str,
    normalizer: float | Tensor,
    with_entropy: bool,
    rollout_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    keep: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Objective:
    """Everything of `policy_loss` that the current log-probs don't change; arguments, options and errors are its own.

    `old_logp` None means on-policy: old is the current log-prob without gradient, every ratio exactly 1. Sequence kinds
    are then token-level too, as long as no correction looks at a whole sequence. `with_entropy` says whether `evaluate`
    will be given entropies. `dtype` is that of the maths: fp32, or fp64 for fp64 log-probs.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown policy loss {kind!r}{nearest(kind, KINDS)}")
    spec = KINDS[kind]
    settings = resolve(kind, {**COMMON_OPTIONS, **spec.options}, options)
    given = {"old_logp": old_logp, "rollout_logp": rollout_logp, "ref_logp": ref_logp, "keep": keep}
    check_shapes("advantages", advantages, {**given, "sequence_ids": sequence_ids})
    _check(spec, kind, settings, {**given, "entropy": with_entropy or None})
    if not float(normalizer) > 0:
        raise ValueError(f"normalizer must be positive, got {float(normalizer)}: skip a step without completions")
    if bool((sequence_ids[1:] < sequence_ids[:-1]).any()):
        raise ValueError("sequence_ids must never fall: hand tokens in sequence order")

    weight = torch.ones_like(advantages, dtype=dtype) if keep is None else keep.detach().to(dtype)
    ignored = weight == 0
    old, rollout, ref = (
        None if x is None else _only_kept(x.detach(), ignored, dtype) for x in (old_logp, rollout_logp, ref_logp)
    )
    sequences = Sequences(sequence_ids, weight)
    signal = _only_kept(advantages.detach(), ignored, dtype)
    signal = sequences.mean(signal) if spec.whole_sequence else signal
    correction = None if old is None else _correct(spec, old, rollout, settings, sequences)
    return Objective(
        spec, settings, with_entropy, _token_level(spec, settings, old, rollout), ignored,
        dead=ignored | _without_gradient(spec, settings, signal, correction), weight=weight,
        share=(weight / sequences.counts if spec.per_sequence else weight) / float(normalizer),
        advantages=signal, old=old, rollout=rollout, ref=ref, correction=correction, sequences=sequences,
    )  # fmt: skip


def check_shapes(name: str, leader: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """ValueError unless `leader` is [N] and all others have its shape."""
    if leader.dim() != 1:
        raise ValueError(f"{name} must be [N], one row per completion token; got {tuple(leader.shape)}")
    whose = f"{name}'" if name.endswith("s") else f"{name}'s"
    for other, x in others.items():
        if x is not None and x.shape != leader.shape:
            raise ValueError(f"{other} must have {whose} shape {tuple(leader.shape)}, got {tuple(x.shape)}")


def _only_kept(x: Tensor, ignored: Tensor, dtype: torch.dtype) -> Tensor:
    # where, not a product: a token left out may hold anything, and 0 x inf is NaN
    return torch.where(ignored, 0.0, x).to(dtype)


def _check(spec: Kind, kind: str, settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, needed in NEEDS.items():
        if settings[name] and given[needed] is None:
            raise ValueError(f"{name}={settings[name]} needs {needed}: hand it in, or leave {name} out")
    if spec.folds_importance and corrects(settings) and settings["importance_level"] == "sequence":
        raise ValueError(
            f"importance_level='sequence' would enter {kind}'s own product over the sequence once per token: use 'token'"
        )


def _correct(
    spec: Kind, old: Tensor, rollout: Tensor | None, settings: Mapping[str, Any], sequences: Sequences | None
) -> Importance:
    if rollout is None:
        return Importance(None, {})
    made = importance(old, rollout, settings, sequences)
    if made.weight is None or not spec.whole_sequence:
        return made
    assert sequences is not None
    # the loss is the same, for every token of the sequence has the same value; its gradient is then a product
    return Importance(sequences.mean(made.weight), made.marks)


def _token_level(spec: Kind, settings: Mapping[str, Any], old: Tensor | None, rollout: Tensor | None) -> bool:
    """Whether nothing of one token's gradient waits for another token's current log-prob."""
    if old is not None:
        return not spec.reduces and settings["off_policy_threshold"] is None
    if rollout is None:
        return True
    if settings["off_policy_threshold"] is not None:
        return False
    # on-policy the correction itself is one of the current log-probs
    joined = spec.whole_sequence or spec.folds_importance
    return not (needs_sequences(settings) or (corrects(settings) and joined))


def _without_gradient(
    spec: Kind, settings: Mapping[str, Any], advantages: Tensor, correction: Importance | None
) -> Tensor:
    """bool [N]: rows whose gradient is zero whatever their log-probs are."""
    if settings["kl_weight"] or settings["entropy_weight"]:
        return torch.zeros_like(advantages, dtype=torch.bool)
    # on-policy (no correction is known yet) a log-ratio is zero and pulls nowhere
    idle = advantages == 0
    if spec.penalises and correction is not None:
        idle = torch.zeros_like(idle)
    if correction is not None and correction.weight is not None and not spec.folds_importance:
        idle = idle | (correction.weight == 0)
    return idle
