"""linear_logprob against log_softmax of the full logits: values, every gradient, memory, and what it skips."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longreach.kernels import LogProbs, linear_logprob

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
module = importlib.import_module("longreach.kernels.linear_logprob_torch")


def make(n: int, width: int, vocab: int, dtype: torch.dtype, sharpness: float = 1.0) -> Inputs:
    generator = torch.Generator().manual_seed(n + vocab)
    hidden = torch.randn(n, width, generator=generator) * sharpness
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    bias = torch.randn(vocab, generator=generator) * 0.3
    targets = torch.randint(vocab, (n,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> LogProbs:
    """The usual way, in the inputs' dtype with its logits widened before the softmax."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logps = torch.log_softmax(logits, -1)
    picked = logps[torch.arange(len(targets)), targets]
    return LogProbs(picked, -(logps.exp() * logps).sum(-1), logits.logsumexp(-1))


def outcome(
    function: Callable[..., LogProbs], inputs: Inputs, dtype: torch.dtype, upstream: list[Tensor], **how: Any
) -> list[Tensor]:
    """logp, entropy, lse and the gradients of hidden, weight, bias under fixed upstream gradients."""
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in inputs[:3])
    result = function(hidden, weight, inputs[3], bias=bias, **how)
    loss = torch.stack([(x * g.to(x.dtype)).sum() for x, g in zip(result, upstream, strict=True)]).sum()
    return [*(x.detach() for x in result), *torch.autograd.grad(loss, (hidden, weight, bias))]


def upstream_of(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, generator=generator) for _ in range(3)]


@pytest.fixture(params=[(512, 8192), (2, 8192), (512, 30), (2, 30)], ids=["one", "rows", "tiles", "rows and tiles"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    monkeypatch.setattr(module, "ROWS", request.param[0])
    monkeypatch.setattr(module, "TILE", request.param[1])
    return request.param


ROWS = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0])

# why each row: plain; a vocabulary of one (logp = 0, entropy = 0); tiny; no multiple of any tile; temperature both
# ways; capped; peaked rows (p close to 1: cancellation in p - 1); both at once
CASES = {
    "plain": (5, 16, 64, 1.0, {}),
    "one entry": (5, 16, 1, 1.0, {}),
    "seven entries, one row": (1, 3, 7, 1.0, {}),
    "odd": (5, 33, 151, 1.0, {"temperature": 0.7}),
    "temperature per row": (5, 16, 61, 1.0, {"temperature": ROWS}),
    "capped": (5, 16, 61, 4.0, {"softcap": 3.0}),
    "peaked": (5, 16, 61, 40.0, {}),
    "all": (5, 16, 61, 10.0, {"temperature": ROWS, "softcap": 15.0}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(three_way, blocks: tuple[int, int], case: str, dtype: torch.dtype) -> None:
    n, width, vocab, sharpness, how = CASES[case]
    inputs, upstream = make(n, width, vocab, dtype, sharpness), upstream_of(n)

    def usual(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, temperature=1.0, softcap=None) -> LogProbs:
        return plain(hidden, weight, targets, bias, temperature, softcap)

    got = outcome(linear_logprob, inputs, dtype, upstream, **how)
    naive, exact = (
        outcome(usual, inputs, dtype, upstream, **how),
        outcome(usual, inputs, torch.float64, upstream, **how),
    )
    names = ("logp", "entropy", "lse", "hidden", "weight", "bias")
    for name, a, b, c in zip(names, got, naive, exact, strict=True):
        assert a.dtype == (b.dtype if name in names[:3] else dtype)
        # log-probs and entropies are differences of scores, gradients of upstream times probabilities: their terms
        three_way(a, b, c, terms=float(exact[2].abs().max()) if name in names[:3] else sharpness)


@pytest.mark.parametrize("dropped", ["logp", "entropy", "lse"])
def test_a_gradient_without_one_of_its_terms_fails(three_way, dropped: str) -> None:
    inputs, upstream = make(5, 16, 61, torch.float32), upstream_of(5)

    def reference(*args: Any, **kwargs: Any) -> LogProbs:
        return linear_logprob(*args, **kwargs, backend="reference")

    exact = outcome(reference, inputs, torch.float64, upstream)
    upstream[LogProbs._fields.index(dropped)] = torch.zeros(5)
    mutant = outcome(linear_logprob, inputs, torch.float32, upstream)
    for a, c in zip(mutant[3:], exact[3:], strict=True):
        with pytest.raises(AssertionError):
            three_way(a, c.float(), c)


def test_reference_is_the_usual_way() -> None:
    hidden, weight, bias, targets = make(5, 16, 61, torch.float64)
    got = linear_logprob(hidden, weight, targets, bias=bias, temperature=0.7, softcap=4.0, backend="reference")
    for a, b in zip(got, plain(hidden, weight, targets, bias, 0.7, 4.0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, bias, targets = make(4, 6, 11, torch.float64)
    for x in (hidden, weight, bias):
        x.requires_grad_()

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> LogProbs:
        return linear_logprob(hidden, weight, targets, bias=bias, temperature=ROWS[:4], softcap=2.0)

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


@pytest.mark.parametrize("level", [-300.0, 300.0])
def test_scores_far_from_zero(three_way, level: float) -> None:
    hidden, weight, _, targets = make(5, 16, 61, torch.float32)
    inputs, upstream = (hidden, weight, torch.full((61,), level), targets), upstream_of(5)

    def usual(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> LogProbs:
        return plain(hidden, weight, targets, bias, 1.0, None)

    got = outcome(linear_logprob, inputs, torch.float32, upstream)
    naive, exact = (outcome(usual, inputs, dtype, upstream) for dtype in (torch.float32, torch.float64))
    for a, b, c in zip(got, naive, exact, strict=True):
        three_way(a, b, c, terms=abs(level))


def test_a_certain_token_keeps_its_digits() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[40.0], [22.0]])
    got = linear_logprob(hidden, weight, torch.tensor([0]))
    # p = 1 - 1.5e-8 is 1 in fp32 and its log is lost, not so its distance to the peak
    assert got.logp.item() == pytest.approx(0.0, abs=2e-8)
    assert linear_logprob(hidden, weight, torch.tensor([1])).logp.item() == pytest.approx(-18.0, rel=1e-6)


class Recorder(TorchDispatchMode):
    """Sizes of every tensor made, and how many rows each matrix product took."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.products.append(tuple(result.shape))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.sizes.add(x.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_ever_exists(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    n, width, vocab, rows = 300, 8, 500, 16
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "TILE", 100)
    hidden, weight, _, targets = make(n, width, vocab, dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Recorder() as recorder:
        result = linear_logprob(hidden, weight, targets, softcap=5.0, temperature=torch.ones(n))
        (result.logp.sum() + result.entropy.sum()).backward()
    assert max(recorder.sizes) == vocab * width, "neither blocks nor sums are larger than the weight"
    with Recorder() as recorder:
        plain(hidden, weight, targets, None, 1.0, None).logp.sum().backward()
    assert max(recorder.sizes) == n * vocab, "the recorder must see what the usual way makes"


def test_rows_without_gradient_cost_nothing() -> None:
    hidden, weight, _, targets = make(40, 8, 50, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    mask = torch.zeros(40)
    mask[[3, 17, 18]] = 1.0
    result = linear_logprob(hidden, weight, targets)
    with Recorder() as recorder:
        (result.logp * mask).sum().backward()
    assert recorder.products == [(3, 50), (3, 8), (50, 8)]
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.any(1), mask.bool())
    (want,) = torch.autograd.grad((plain(hidden, weight, targets, None, 1.0, None).logp * mask).sum(), hidden)
    torch.testing.assert_close(hidden.grad, want)


def test_a_frozen_head_costs_no_weight_gradient_and_a_frozen_body_no_hidden_one() -> None:
    hidden, weight, _, targets = make(40, 8, 50, torch.float32)
    result = linear_logprob(hidden.clone().requires_grad_(), weight, targets)
    with Recorder() as recorder:
        result.logp.sum().backward()
    assert recorder.products == [(40, 50), (40, 8)]
    result = linear_logprob(hidden, weight.clone().requires_grad_(), targets)
    with Recorder() as recorder:
        result.logp.sum().backward()
    assert recorder.products == [(40, 50), (50, 8)]


def test_gradients_do_not_depend_on_micro_batches() -> None:
    hidden, weight, _, targets = make(64, 16, 90, torch.float32)
    grads = []
    for parts in (1, 4):
        leaf = weight.clone().requires_grad_()
        for h, t in zip(hidden.chunk(parts), targets.chunk(parts), strict=True):
            linear_logprob(h, leaf, t).logp.sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_runs_are_bitwise_equal_and_nothing_is_legal(blocks: tuple[int, int]) -> None:
    inputs, upstream = make(5, 16, 61, torch.float32), upstream_of(5)
    first, second = (outcome(linear_logprob, inputs, torch.float32, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    hidden, weight, _, targets = make(0, 16, 61, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    result = linear_logprob(hidden, weight, targets)
    torch.cat(result).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.shape == (0, 16)
    assert not weight.grad.any()


def test_autocast_does_not_round_the_scores() -> None:
    hidden, weight, _, targets = make(5, 16, 61, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprob(hidden, weight, targets)
    assert torch.equal(got.logp, linear_logprob(hidden, weight, targets).logp)


def test_what_cannot_be_is_refused_with_a_way_out() -> None:
    hidden, weight, bias, targets = make(5, 16, 61, torch.float32)
    bad = [
        ((hidden, weight[:, :8], targets), {}, r"hidden \[N, D\] and weight \[V, D\]"),
        ((hidden, weight, targets[:4]), {}, "targets must be 5 integers"),
        ((hidden, weight, targets.float()), {}, "targets must be 5 integers"),
        ((hidden, weight, targets.clone().fill_(61)), {}, "outside the vocabulary of 61"),
        ((hidden, weight, targets.clone().fill_(-100)), {}, "drop ignored rows"),
        ((hidden, weight, targets), {"bias": bias[:3]}, "bias must be"),
        ((hidden, weight, targets), {"temperature": 0.0}, "temperature must be positive"),
        ((hidden, weight, targets), {"temperature": ROWS * 0}, "temperature must be a positive float or 5"),
        ((hidden, weight, targets), {"temperature": ROWS[:2]}, "temperature must be a positive float or 5"),
        ((hidden, weight, targets), {"softcap": -1.0}, "softcap must be positive"),
        ((hidden, weight, targets), {"softcap": float("inf")}, "softcap must be positive and finite"),
        ((hidden, weight, targets), {"backend": "liger"}, "choose from auto, reference, chunked"),
    ]
    for args, kwargs, message in bad:
        with pytest.raises(ValueError, match=message):
            linear_logprob(*args, **kwargs)


def test_a_sharded_weight_is_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, _, targets = make(5, 16, 61, torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="weight is a DTensor"):
            linear_logprob(hidden, sharded, targets)
    finally:
        dist.destroy_process_group()
