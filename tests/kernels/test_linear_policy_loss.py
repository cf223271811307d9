"""linear_policy_loss is policy_loss(linear_logprob(...)): value, metrics and every gradient, in one pass or two."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.kernels import LowRank, PolicyLoss, linear_logprob, linear_policy_loss, policy_loss
from longreach.kernels.policy_loss import KINDS

blocks = importlib.import_module("longreach.kernels.linear_logprob_torch")
LENGTHS = [3, 1, 6, 2, 5]
N, D, V, R = sum(LENGTHS), 12, 90, 3
IDS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))


class Problem:
    """Leaves, per-token inputs, and the head's options of one call."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        leaves = {
            "hidden": draw(N, D) * 2, "weight": draw(V, D) / D**0.5, "bias": draw(V) * 0.3,
            "down": draw(R, D) / D**0.5, "up": draw(V, R) * 0.5,
        }  # fmt: skip
        self.leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
        self.targets = torch.randint(V, (N,), generator=generator)
        self.heat = torch.linspace(0.6, 1.4, N)
        with torch.no_grad():
            logp = linear_logprob(**self.head(), targets=self.targets).logp.double()
        self.tokens = {
            "old_logp": logp + 0.3 * draw(N), "rollout_logp": logp + 0.2 * draw(N), "ref_logp": logp + 0.2 * draw(N),
            "advantages": torch.tensor([1.2, -0.7, 0.0, -1.5, 0.4]).double()[IDS],
        }  # fmt: skip
        self.keep = torch.rand(N, generator=generator) > 0.2

    def head(self) -> dict[str, Any]:
        x = self.leaves
        lora = LowRank(x["down"], x["up"], 0.5)
        return {
            "hidden": x["hidden"], "weight": x["weight"], "bias": x["bias"], "lora": lora,
            "temperature": self.heat, "softcap": 9.0,
        }  # fmt: skip

    def outcome(self, result: PolicyLoss) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
        made = torch.autograd.grad(result.loss * 0.5, list(self.leaves.values()))
        metrics = {name: mean.value for name, mean in result.metrics.items()}
        return result.loss.detach(), metrics, dict(zip(self.leaves, made, strict=True))


def composed(problem: Problem, tokens: dict[str, Any], backend: str = "reference", **how: Any) -> PolicyLoss:
    made = linear_logprob(**problem.head(), targets=problem.targets, backend=backend)
    return policy_loss(made.logp, sequence_ids=IDS, entropy=made.entropy, **tokens, **how)


def fused(problem: Problem, tokens: dict[str, Any], **how: Any) -> PolicyLoss:
    return linear_policy_loss(**problem.head(), targets=problem.targets, sequence_ids=IDS, **tokens, **how)


REGULAR = {"kl_weight": 0.3, "entropy_weight": 0.05, "importance_cap": 1.1}


@pytest.fixture(params=[(512, 8192, 1 << 28), (2, 30, 1), (2, 30, 7 * V * 8)], ids=["one", "rows", "chunks"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(("ROWS", "TILE", "KEPT_BYTES"), request.param, strict=True):
        monkeypatch.setattr(blocks, name, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, REGULAR], ids=["plain", "regularised"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_value_metrics_and_gradients(small: None, kind: str, options: dict[str, float], masked: bool) -> None:
    problem = Problem()
    tokens = dict(problem.tokens) if options else {k: v for k, v in problem.tokens.items() if k[:3] in ("old", "adv")}
    if masked:
        tokens["keep"] = problem.keep
    how = {"kind": kind, "normalizer": 3.0, **options}
    loss, metrics, gradients = problem.outcome(fused(problem, tokens, **how))
    want_loss, want_metrics, want = problem.outcome(composed(problem, tokens, **how))
    torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=1e-12)
    assert metrics == pytest.approx(want_metrics, rel=1e-9, abs=1e-12, nan_ok=True)
    assert want["hidden"].any(), "a case without gradients shows nothing"
    for name, made in gradients.items():
        torch.testing.assert_close(made, want[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_on_policy_needs_no_old_log_probs(kind: str) -> None:
    problem = Problem()
    tokens = {"advantages": problem.tokens["advantages"], "old_logp": None}
    loss, _, gradients = problem.outcome(fused(problem, tokens, kind=kind, normalizer=3.0))
    with torch.no_grad():
        tokens["old_logp"] = linear_logprob(**problem.head(), targets=problem.targets).logp
    want_loss, _, want = problem.outcome(composed(problem, tokens, kind=kind, normalizer=3.0))
    torch.testing.assert_close(loss, want_loss)
    for name, made in gradients.items():
        torch.testing.assert_close(made, want[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_the_truth_than_two_passes(three_way, dtype: torch.dtype) -> None:
    problem, exact = Problem(dtype), Problem(dtype)
    exact.leaves = {name: x.detach().double().requires_grad_() for name, x in problem.leaves.items()}
    how = {"kind": "dapo", "normalizer": 3.0, **REGULAR}
    loss, _, gradients = problem.outcome(fused(problem, problem.tokens, **how))
    plain_loss, _, plain = problem.outcome(composed(problem, problem.tokens, **how))
    exact_loss, _, truth = exact.outcome(composed(exact, problem.tokens, **how))
    three_way(loss, plain_loss, exact_loss, terms=5.0)
    for name, made in gradients.items():
        assert made.dtype == dtype
        three_way(made, plain[name], truth[name], terms=float(truth[name].abs().max()))


@pytest.mark.parametrize("rows", [512, 5], ids=["one chunk", "chunks"])
def test_a_weight_gradient_is_rounded_once_whatever_the_loss_is_multiplied_by(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "KEPT_BYTES", rows * V * 4)
    problem, wide = Problem(torch.bfloat16), Problem(torch.bfloat16)
    wide.leaves = {name: x.detach().float().requires_grad_() for name, x in problem.leaves.items()}
    made = []
    for p in (problem, wide):
        p.heat = torch.ones(N)
        head: dict[str, Any] = {"hidden": p.leaves["hidden"], "weight": p.leaves["weight"], "targets": p.targets}
        advantages = p.tokens["advantages"]
        loss = linear_policy_loss(
            **head, old_logp=None, advantages=advantages, sequence_ids=IDS, kind="dapo", normalizer=7.0
        )
        made.append(torch.autograd.grad(loss.loss / 3, p.leaves["weight"])[0])
    # the same products of the same numbers, so the wide one rounded is the other, but for sums that lie on a tie
    assert (made[0] == made[1].bfloat16()).float().mean() > 0.99


def test_rows_that_are_not_kept_may_have_any_target() -> None:
    problem = Problem()
    tokens = {**problem.tokens, "keep": problem.keep}
    how = {"kind": "grpo", "normalizer": 3.0}
    wanted = problem.outcome(fused(problem, tokens, **how))[2]
    problem.targets = torch.where(problem.keep, problem.targets, -100)
    for name, made in problem.outcome(fused(problem, tokens, **how))[2].items():
        torch.testing.assert_close(made, wanted[name])


class Products(TorchDispatchMode):
    """Sizes of matrix products and of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.products.append(tuple(result.shape))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def plain_call(n: int, kind: str, *, frozen: bool = False, advantages: Tensor | None = None, **how: Any) -> Products:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).requires_grad_(not frozen)
    with Products() as seen:
        result = linear_policy_loss(
            hidden, weight, torch.arange(n) % 50, torch.full((n,), -3.0),
            torch.ones(n) if advantages is None else advantages, torch.arange(n) // 5,
            kind=kind, normalizer=2.0, **how,
        )  # fmt: skip
        result.loss.backward()
    return seen


def test_one_pass_makes_the_scores_once_and_a_sequence_loss_twice() -> None:
    n = 40
    assert plain_call(n, "grpo").products == [(n, 50), (n, 8), (50, 8)]
    assert plain_call(n, "gspo").products == [(n, 50), (n, 50), (n, 8), (50, 8)]


def test_a_frozen_head_and_rows_without_gradient_cost_nothing() -> None:
    assert plain_call(40, "grpo", frozen=True).products == [(40, 50), (40, 8)]
    advantages = torch.zeros(40)
    advantages[[3, 17]] = 1.0
    # the others forward alone, for the metrics
    assert plain_call(40, "grpo", advantages=advantages).products == [(38, 50), (2, 50), (2, 8), (50, 8)]
    keep = torch.zeros(40, dtype=torch.bool)
    keep[[3, 17, 20]] = True
    assert plain_call(40, "grpo", keep=keep).products == [(3, 50), (3, 8), (50, 8)]
    # one of the three is clipped
    assert plain_call(40, "gspo", keep=keep).products == [(3, 50), (2, 50), (2, 8), (50, 8)]


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "KEPT_BYTES", 16 * 50 * 4)
    assert plain_call(300, "grpo").largest == 300 * 8, "the largest tensor is the hidden rows' gradient"
    monkeypatch.setattr(blocks, "ROWS", 16)
    assert plain_call(300, "gspo").largest == 300 * 8


def test_without_gradients_it_is_a_forward() -> None:
    problem = Problem()
    with torch.no_grad(), Products() as seen:
        made = fused(problem, problem.tokens, kind="grpo", normalizer=3.0)
    assert not made.loss.requires_grad
    assert (N, V) in seen.products
    assert (V, D) not in seen.products
    assert made.loss == pytest.approx(composed(problem, problem.tokens, kind="grpo", normalizer=3.0).loss.item())


def test_nothing_learned_from_is_a_differentiable_zero_and_gradients_come_once() -> None:
    hidden, weight = torch.ones(4, 3, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    args = (torch.arange(4), torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.long))
    made = linear_policy_loss(hidden, weight, *args, kind="grpo", normalizer=1.0)
    made.loss.backward(retain_graph=True)
    assert made.loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    with pytest.raises(RuntimeError, match="gives its gradients once"):
        made.loss.backward()
    none = linear_policy_loss(hidden[:0], weight, *(x[:0] for x in args), kind="grpo", normalizer=1.0)
    none.loss.backward()
    assert none.metrics.keys() == made.metrics.keys()


def test_runs_are_bitwise_equal() -> None:
    first, second = (Problem(torch.float32) for _ in range(2))
    a, b = (p.outcome(fused(p, p.tokens, kind="grpo", normalizer=3.0, **REGULAR)) for p in (first, second))
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(a[2][name], b[2][name]) for name in a[2])


def test_bad_input_is_refused_by_either_side() -> None:
    problem = Problem()
    good = {"kind": "grpo", "normalizer": 1.0}
    with pytest.raises(ValueError, match="did you mean 'grpo'"):
        fused(problem, problem.tokens, **{**good, "kind": "grop"})
    with pytest.raises(ValueError, match="advantages must have"):
        fused(problem, {**problem.tokens, "advantages": torch.ones(3)}, **good)
    problem.targets[0] = V
    with pytest.raises(ValueError, match="outside the vocabulary"):
        fused(problem, problem.tokens, **good)
