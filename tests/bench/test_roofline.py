"""The floor, its share, and the work that is counted."""

from __future__ import annotations

import pytest
import torch

from bench import exact, roofline, runner
from bench.case import Case
from bench.linear_logprob import work


def test_the_floor_is_the_slower_of_the_two() -> None:
    ceilings = roofline.Ceilings(flops=100e12, bytes=2e12)
    assert ceilings.floor(50e12, 1e9) == 0.5
    assert ceilings.bound(50e12, 1e9) == "compute"
    assert ceilings.floor(1e9, 4e12) == 2.0
    assert ceilings.bound(1e9, 4e12) == "memory"


def test_figures_of_a_row() -> None:
    found = runner.figures([2.0, 1.0, 4.0], 100e12, 1e12, roofline.Ceilings(flops=200e12, bytes=5e12))
    assert found["median_s"] == 2.0
    assert found["tflops"] == pytest.approx(50)
    assert found["gbs"] == pytest.approx(500)
    assert found["floor_s"] == 0.5
    assert found["roofline_share"] == 0.25
    assert found["samples_s"] == [2.0, 1.0, 4.0]
    assert found["rounds"] == 3


def test_ceilings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.MATMUL_SIDE, "cpu", 128)
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 1 << 20)
    ticks = iter([0.5, *[1.0, 3.0] * 3, 1.0, 0.5, *[2.0, 9.0] * 3, 2.0])  # the first of each is the warm-up
    found = roofline.measure(lambda task: (task.run(None), next(ticks))[1], "cpu", torch.float32)
    assert found == roofline.Ceilings(flops=2 * 128**3 / 1.0, bytes=2 * (1 << 20) / 2.0)


def test_work_is_that_of_the_formula() -> None:
    flops, traffic = work(Case("linear_logprob", {"N": 3, "D": 5, "V": 7}, "bfloat16", "cpu"))
    product = 2 * 3 * 5 * 7
    assert flops == {"forward": product, "backward": 2 * product, "both": 3 * product}
    tensors = 2 * (3 * 5 + 7 * 5)
    assert traffic["both"] == 2 * tensors + 8 * 3
    assert traffic["forward"] == tensors + 8 * 3 + 4 * 3


def test_the_exact_side_is_autograd_in_fp64() -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 4), torch.randn(11, 4), torch.randint(11, (9,))

    def loss(logp: torch.Tensor) -> torch.Tensor:
        return (logp * logp).mean()

    found = exact.linear(hidden, weight, targets, loss)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = (h @ w.t()).log_softmax(1)[torch.arange(9), targets]
    dh, dw = torch.autograd.grad(loss(logp), (h, w))
    assert torch.allclose(found.values, logp, rtol=0, atol=1e-14)
    assert exact.relative_error(found.gradients["dhidden"], dh) < 1e-14
    assert exact.relative_error(found.gradients["dweight"], dw) < 1e-14
    # what a wrong contender looks like
    assert exact.relative_error(2 * dw, dw) == pytest.approx(1)
    assert exact.value_error(logp + torch.tensor([0.5] + [0.0] * 8), found) == pytest.approx(0.5)
    assert exact.value_error(loss(logp) + 0.25, found) == pytest.approx(0.25)


def test_rows_in_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(9, 4), torch.randn(11, 4), torch.randint(11, (9,))
    whole = exact.linear(*inputs, lambda logp: logp.mean())
    monkeypatch.setitem(exact.CHUNK_BYTES, "cpu", 2 * 8 * 11)
    parts = exact.linear(*inputs, lambda logp: logp.mean())
    assert exact.relative_error(parts.gradients["dweight"], whole.gradients["dweight"]) < 1e-14
    assert torch.allclose(parts.values, whole.values, rtol=0, atol=1e-14)
