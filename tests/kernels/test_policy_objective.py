"""What the fused kernel relies on: rows in any chunks, rows that need no log-prob, rows without gradient, no old pass."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels.policy_corrections import Importance
from longreach.kernels.policy_loss import KINDS, policy_loss
from longreach.kernels.policy_metrics import Mean
from longreach.kernels.policy_objective import Evaluation, Objective, prepare

LENGTHS = torch.tensor([3, 1, 8, 2, 5, 1, 4])
N = int(LENGTHS.sum())
TOKEN = [kind for kind, spec in KINDS.items() if not spec.reduces]
SEQUENCE = [kind for kind, spec in KINDS.items() if spec.reduces]
PENALISING = {"dro", "kimi"}

EVERYTHING: dict[str, Any] = {
    "kl_weight": 0.3, "kl_bias_correction": True, "entropy_weight": 0.05, "importance_cap": 1.2,
    "importance_range": (0.7, 1.5), "importance_sequence_range": (0.9, 1.1),
}  # fmt: skip


class Case:
    """Inputs of one seed: log-ratios of 0.3, some tokens left out, one sequence without advantage, one without tokens."""

    def __init__(self, seed: int = 5, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw() -> Tensor:
            return torch.randn(N, generator=generator, dtype=torch.float64).to(dtype)

        self.ids = torch.repeat_interleave(torch.arange(len(LENGTHS)) * 2, LENGTHS)
        self.old = -draw().abs()
        self.logp, self.rollout, self.ref = self.old + 0.3 * draw(), self.old + 0.2 * draw(), self.old + 0.2 * draw()
        self.entropy = draw().abs()
        self.advantages = torch.tensor([1.2, -0.7, 0.0, -1.5, 0.4, 2.0, -0.3], dtype=dtype).repeat_interleave(LENGTHS)
        self.keep = torch.rand(N, generator=generator) > 0.3
        self.keep[:3] = False
        self.dtype = dtype

    def prepare(self, kind: str, *, on_policy: bool = False, **options: Any) -> Objective:
        old = None if on_policy else self.old
        return prepare(
            old, self.advantages, self.ids, kind=kind, normalizer=6.0, keep=self.keep, with_entropy=True,
            rollout_logp=self.rollout, ref_logp=self.ref, dtype=self.dtype, **options,
        )  # fmt: skip


def added(parts: list[Evaluation]) -> tuple[Tensor, dict[str, Mean]]:
    loss, metrics = parts[0].loss, parts[0].metrics
    for part in parts[1:]:
        assert part.metrics.keys() == metrics.keys()
        loss, metrics = loss + part.loss, {name: mean + part.metrics[name] for name, mean in metrics.items()}
    return loss, metrics


def chunks_agree(case: Case, objective: Objective, *, entropy: bool = True) -> None:
    whole = objective.evaluate(case.logp, case.entropy if entropy else None)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    tolerance = 100 * torch.finfo(case.dtype).eps
    cuts: list[list[Any]] = [
        [slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 7), slice(7, N)],  # through sequences, and an empty one
        list(shuffled.split(7)),
        [torch.arange(N)],
    ]
    for rows in cuts:
        parts = [objective.select(row).evaluate(case.logp[row], case.entropy[row] if entropy else None) for row in rows]
        loss, metrics = added(parts)
        torch.testing.assert_close(loss, whole.loss, rtol=tolerance, atol=tolerance)
        assert metrics.keys() == whole.metrics.keys()
        for name, mean in metrics.items():
            assert mean.value == pytest.approx(whole.metrics[name].value, rel=tolerance, abs=tolerance), name
        for row, part in zip(rows, parts, strict=True):
            assert torch.equal(part.g, whole.g[row])
            assert (part.h is None) == (whole.h is None)
            assert part.h is None or torch.equal(part.h, whole.h[row])  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("kind", TOKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_token_level_rows_go_in_any_chunks(kind: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = Case(dtype=dtype)
    objective = case.prepare(kind, **options)
    assert objective.token_level
    chunks_agree(case, objective)


@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_kind_goes_in_any_chunks(kind: str) -> None:
    case = Case()
    objective = prepare(
        None, case.advantages, case.ids, kind=kind, normalizer=6.0, keep=case.keep, ref_logp=case.ref,
        with_entropy=False, dtype=torch.float64, kl_weight=0.1, off_policy_threshold=0.01,
    )  # fmt: skip
    assert objective.token_level
    chunks_agree(case, objective, entropy=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"off_policy_threshold": 0.01}], ids=["plain", "all", "off"])
def test_on_policy_is_old_equal_to_current(kind: str, options: dict[str, Any]) -> None:
    case = Case()
    case.old = case.logp.clone()
    want = case.prepare(kind, **options).evaluate(case.logp, case.entropy)
    got = case.prepare(kind, on_policy=True, **options).evaluate(case.logp, case.entropy)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(got.g, want.g, rtol=1e-14, atol=1e-14)
    assert got.metrics.keys() == want.metrics.keys()
    for name, mean in want.metrics.items():
        assert got.metrics[name].value == pytest.approx(mean.value, rel=1e-12), name
    assert got.metrics["ratio/mean"].value == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_what_makes_rows_depend_on_one_another(kind: str) -> None:
    case, alone = Case(), kind in TOKEN
    sequence_cap: dict[str, Any] = {"importance_cap": 1.2, "importance_level": "sequence"}
    sequence_mask: dict[str, Any] = {"importance_sequence_range": (0.9, 1.1)}
    assert case.prepare(kind).token_level == alone
    assert case.prepare(kind, **EVERYTHING).token_level == alone
    assert not case.prepare(kind, off_policy_threshold=0.1).token_level
    # corrections between old and rollout log-probs are known beforehand, unless old is the current one
    if kind != "vespo":
        assert case.prepare(kind, **sequence_cap).token_level == alone
        assert not case.prepare(kind, on_policy=True, **sequence_cap).token_level
    # as a metric alone, the ratio of a sequence needs the sequence too
    assert not case.prepare(kind, on_policy=True, importance_level="sequence").token_level
    assert case.prepare(kind, **sequence_mask).token_level == alone
    assert not case.prepare(kind, on_policy=True, **sequence_mask).token_level
    assert not case.prepare(kind, on_policy=True, off_policy_threshold=0.1).token_level
    joined = KINDS[kind].whole_sequence or KINDS[kind].folds_importance
    assert case.prepare(kind, on_policy=True, importance_cap=1.2).token_level == (not joined)
    assert case.prepare(kind, on_policy=True).token_level


@pytest.mark.parametrize("kind", SEQUENCE)
def test_rows_that_depend_on_one_another_are_not_torn_apart(kind: str) -> None:
    with pytest.raises(AssertionError, match="depend on one another"):
        Case().prepare(kind).select(slice(0, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_ignored_rows_need_no_log_probs(kind: str, on_policy: bool) -> None:
    case, poisoned = Case(), Case()
    out = ~case.keep
    for name, junk in {
        "logp": math.nan,
        "old": -math.inf,
        "rollout": math.nan,
        "ref": math.inf,
        "entropy": math.nan,
    }.items():
        getattr(poisoned, name)[out] = junk
    poisoned.advantages[out] = math.nan
    options = {**EVERYTHING, "off_policy_threshold": 0.01}
    clean = case.prepare(kind, on_policy=on_policy, **options)
    assert torch.equal(clean.ignored, out)
    want = clean.evaluate(case.logp, case.entropy)
    got = poisoned.prepare(kind, on_policy=on_policy, **options).evaluate(poisoned.logp, poisoned.entropy)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.g, want.g)
    assert not got.g[out].any()
    assert got.h is not None
    assert not got.h[out].any()
    assert {name: mean.value for name, mean in got.metrics.items()} == {n: m.value for n, m in want.metrics.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_dead_rows_have_no_gradient_and_the_others_have_one(kind: str, on_policy: bool, masked: bool) -> None:
    case = Case()
    span = {"importance_range": (0.9, 1.1)} if masked else {}
    objective = case.prepare(kind, on_policy=on_policy, **span)
    seen = torch.zeros(N, dtype=torch.bool)
    for seed in range(40):
        other = Case(seed)
        # from a hair away, for bounds of 3e-4, to far out
        logp = case.old + 10.0 ** -(seed % 5) * (other.logp - other.old)
        g = objective.evaluate(logp, case.entropy).g
        assert not g[objective.dead].any()
        seen |= g != 0
    if on_policy and masked:
        seen |= ~objective.dead  # which rows the correction masks is known with their log-probs only
    assert torch.equal(seen, ~objective.dead)
    zero = (case.advantages == 0) | ~case.keep
    if kind not in PENALISING or on_policy:
        assert objective.dead[zero].all()
    if not masked:
        assert torch.equal(objective.dead, ~case.keep if kind in PENALISING and not on_policy else zero)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["kl_weight", "entropy_weight"])
def test_a_regulariser_leaves_no_kept_row_dead(kind: str, option: str) -> None:
    case = Case()
    regularised: dict[str, Any] = {option: 0.1}
    objective = case.prepare(kind, **regularised)
    assert torch.equal(objective.dead, ~case.keep)
    got = objective.evaluate(case.logp, case.entropy)
    gradient = got.g if option == "kl_weight" else got.h
    assert gradient is not None
    assert gradient[case.keep].all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_public_gradients_are_these(kind: str) -> None:
    case = Case(dtype=torch.float32)
    logp, entropy = case.logp.clone().requires_grad_(), case.entropy.clone().requires_grad_()
    extras = {"keep": case.keep, "rollout_logp": case.rollout, "ref_logp": case.ref}
    got = policy_loss(
        logp, case.old, case.advantages, case.ids, kind=kind, normalizer=6.0, entropy=entropy, **extras, **EVERYTHING
    )
    (got.loss * 3).backward()
    want = case.prepare(kind, **EVERYTHING).evaluate(case.logp, case.entropy)
    assert torch.equal(got.loss.detach(), want.loss)
    assert logp.grad is not None
    assert entropy.grad is not None
    assert want.h is not None
    assert torch.equal(logp.grad, 3 * want.g)
    assert torch.equal(entropy.grad, 3 * want.h)
    assert not any(x.requires_grad for x in (want.loss, want.g, want.h))


def test_half_precision_log_probs_get_gradients_of_their_own_dtype() -> None:
    case = Case(dtype=torch.float32)
    logp = case.logp.bfloat16().requires_grad_()
    got = policy_loss(logp, case.old.bfloat16(), case.advantages, case.ids, kind="dapo", normalizer=6.0)
    assert got.loss.dtype == torch.float32
    got.loss.backward()
    assert logp.grad is not None
    assert logp.grad.dtype == torch.bfloat16


def test_a_second_derivative_is_refused() -> None:
    case = Case()
    logp = case.logp.requires_grad_()
    loss = policy_loss(logp, case.old, case.advantages, case.ids, kind="dapo", normalizer=6.0).loss
    (g,) = torch.autograd.grad(loss.square(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def on_meta(objective: Objective) -> Objective:
    def move(x: Any) -> Any:
        if isinstance(x, Importance):
            return Importance(move(x.weight), {name: move(mark) for name, mark in x.marks.items()})
        return x.to("meta") if isinstance(x, Tensor) else x

    moved = {f.name: move(getattr(objective, f.name)) for f in fields(objective)}
    return replace(objective, **{**moved, "sequences": None})


@pytest.mark.parametrize("kind", TOKEN)
@pytest.mark.parametrize("on_policy", [False, True])
def test_a_chunk_never_makes_the_device_wait(kind: str, on_policy: bool) -> None:
    # a tensor without data can't be read: whatever asks for a value fails
    span = {"importance_sequence_range": None} if on_policy else {}
    chunk = on_meta(Case().prepare(kind, on_policy=on_policy, **{**EVERYTHING, **span})).select(slice(2, 9))
    rows = torch.empty(7, device="meta", dtype=torch.float64)
    got = chunk.evaluate(rows, rows)
    assert got.g.shape == (7,)
    with pytest.raises(RuntimeError):
        float(got.loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_no_rows_at_all(kind: str, on_policy: bool) -> None:
    none = torch.zeros(0)
    objective = prepare(
        None if on_policy else none, none, none.long(), kind=kind, normalizer=1.0, with_entropy=True, rollout_logp=none,
        ref_logp=none, **EVERYTHING,
    )  # fmt: skip
    got = objective.evaluate(none, none)
    assert got.loss.item() == 0.0
    assert got.g.shape == (0,)
    assert all(mean.count == 0 for mean in got.metrics.values())


def test_an_entropy_without_weight_is_a_metric_alone() -> None:
    case = Case()
    got = case.prepare("dapo").evaluate(case.logp, case.entropy)
    assert got.h is None
    assert got.metrics["entropy"].value == pytest.approx(float(case.entropy[case.keep].mean()))


def test_what_prepare_refuses() -> None:
    case = Case()
    good: dict[str, Any] = {"kind": "grpo", "normalizer": 1.0, "with_entropy": False}
    with pytest.raises(ValueError, match=r"entropy_weight=0\.1 needs entropy"):
        prepare(case.old, case.advantages, case.ids, **good, entropy_weight=0.1)
    with pytest.raises(ValueError, match="rollout_logp must have advantages' shape"):
        prepare(case.old, case.advantages, case.ids, **good, rollout_logp=case.rollout[:2])
    with pytest.raises(ValueError, match=r"advantages must be \[N\]"):
        prepare(case.old, case.advantages[None], case.ids, **good)
