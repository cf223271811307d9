"""What the Triton backend must do wherever it runs; test_triton.py starts this file in the interpreter and on a GPU.

bfloat16 runs on a GPU alone: Triton's interpreter gets it wrong without a word.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import LowRank, gpu, linear_logprob, linear_policy_loss, policy_loss
from longreach.kernels import linear_logprob_triton as backend

DEVICE = "cpu" if gpu.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture(autouse=True)
def poisoned() -> Any:
    """Uninitialised memory holds NaN, so that a value which is read before it was written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    def __init__(
        self, n: int, width: int, vocab: int, dtype: torch.dtype, *, rank: int = 0, sharp: float = 2.0
    ) -> None:
        generator = torch.Generator().manual_seed(n + vocab)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)

        self.leaves = {"hidden": draw(n, width, scale=sharp), "weight": draw(vocab, width, scale=width**-0.5)}
        if rank:
            self.leaves |= {"bias": draw(vocab, scale=0.3), "down": draw(rank, width, scale=width**-0.5)}
            self.leaves["up"] = draw(vocab, rank, scale=0.5)
        self.targets = torch.randint(vocab, (n,), generator=generator).to(DEVICE)
        self.targets[-1] = vocab - 1
        self.upstream = [torch.randn(n, generator=generator).to(DEVICE) for _ in range(3)]

    def head(self, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Leaves, and `linear_logprob`'s arguments made of them."""
        leaves = {name: x.to(dtype or x.dtype).detach().requires_grad_() for name, x in self.leaves.items()}
        lora = LowRank(leaves["down"], leaves["up"], 0.5) if "up" in leaves else None
        arguments = {"hidden": leaves["hidden"], "weight": leaves["weight"], "targets": self.targets}
        return leaves, {**arguments, "bias": leaves.get("bias"), "lora": lora}

    def outcome(self, backend: str, dtype: torch.dtype | None = None, **how: Any) -> list[Tensor]:
        leaves, arguments = self.head(dtype)
        made = linear_logprob(**arguments, backend=backend, **how)
        loss = torch.stack([(x * g.to(x.dtype)).sum() for x, g in zip(made, self.upstream, strict=True)]).sum()
        return [*(x.detach() for x in made), *torch.autograd.grad(loss, list(leaves.values()))]


def close(made: list[Tensor], plain: list[Tensor], exact: list[Tensor], three_way: Any, summands: int = 1) -> None:
    """`summands`: a gradient is a sum of that many; roundings of its largest partial sums add up like a random walk, and
    a library's product may be lucky in one order and not in another."""
    scores = float(exact[2].abs().max())
    for i, (a, b, c) in enumerate(zip(made, plain, exact, strict=True)):
        walk = max(1.0, summands**0.5 / 16)
        three_way(a, b.to(a.dtype), c, terms=scores if i < 3 else walk * max(1.0, float(c.abs().max())))


WHOLE = [(vocab, dtype) for vocab in (129920, 151643, 151936, 256000) for dtype in DTYPES]
if DEVICE == "cpu":
    WHOLE = [(v, d) for v, d in WHOLE if d == torch.float32 or v == 151643]


@pytest.mark.parametrize("vocab, dtype", WHOLE)
def test_whole_vocabularies(three_way: Any, vocab: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter's time goes by tiles
    monkeypatch.setattr(gpu, "INTERPRETED", gpu.Tile(16, 2048, 64, warps=4, stages=1, parts=2))
    problem = Problem(3, 8, vocab, dtype)
    made, plain = problem.outcome("triton"), problem.outcome("reference")
    close(made, plain, problem.outcome("reference", torch.float64), three_way, summands=vocab)


@pytest.mark.parametrize("width", [16, 24, 33])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_rows_around_tiles_and_any_alignment(three_way: Any, n: int, width: int) -> None:
    problem = Problem(n, width, 300, torch.float32, rank=3)
    how = {"temperature": torch.linspace(0.5, 2.0, n, device=DEVICE), "softcap": 9.0}
    made, plain = problem.outcome("triton", **how), problem.outcome("reference", **how)
    close(made, plain, problem.outcome("reference", torch.float64, **how), three_way)


def test_views_that_are_not_dense() -> None:
    """A slice of a wider matrix at an odd place, every second column, a transpose."""
    wide = torch.randn(20, 200, device=DEVICE)
    hidden, weight, targets = wide[:, 1:34], torch.randn(33, 150, device=DEVICE).t(), torch.arange(20, device=DEVICE)
    for h in (hidden, wide[:, ::6][:, :33], wide[3:, 32:65]):
        a, b = (linear_logprob(h, weight, targets[: len(h)], backend=name) for name in ("triton", "reference"))
        torch.testing.assert_close(a.logp, b.logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_targets_that_are_not_dense(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(20, 40, device=DEVICE), torch.randn(150, 40, device=DEVICE)
    wide = torch.randint(150, (20, 2), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype)
    for targets in (wide[:, 0], wide[3, 1].expand(20)):
        leaves = [hidden.clone().requires_grad_() for _ in range(2)]
        a, b = (
            linear_logprob(x, weight, targets, backend=name).logp
            for x, name in zip(leaves, ("triton", "reference"), strict=True)
        )
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for x in (a, b):
            x.sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-4)


def test_a_target_that_a_bias_bars_spares_the_other_rows() -> None:
    bias = torch.zeros(150, device=DEVICE)
    bias[7] = -torch.inf
    targets = torch.tensor([3, 7, 9], device=DEVICE)
    for name in ("triton", "chunked"):
        hidden = torch.randn(3, 16, device=DEVICE, requires_grad=True)
        made = linear_logprob(hidden, torch.ones(150, 16, device=DEVICE), targets, bias=bias, backend=name)
        assert made.logp[1] == -torch.inf
        (made.entropy.sum() + made.logp[0]).backward()
        assert hidden.grad is not None
        assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32] if DEVICE == "cpu" else [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 4])
def test_many_tiles_blocks_chunks_and_steps(three_way: Any, dtype: torch.dtype, rank: int, monkeypatch: Any) -> None:
    """More row tiles than share a weight tile, several steps of the width, blocks of dx and one-pass chunks."""
    n, width, vocab = (1100, 200, 5000) if DEVICE == "cuda" else (150, 150, 600)
    problem = Problem(n, width, vocab, dtype, rank=rank)
    size = problem.leaves["hidden"].element_size()
    truth = problem.outcome("reference", torch.float64)
    for block in (128 * vocab * size, n * 300 * size):
        monkeypatch.setattr(backend, "BLOCK_BYTES", block)
        made, plain = problem.outcome("triton"), problem.outcome("reference")
        for name, a, b, c in zip(range(len(made)), made, plain, truth, strict=True):
            if dtype == torch.float32:
                three_way(a, b, c, terms=16 * max(1.0, float(c.abs().max())))
            else:
                assert (a.double() - c).norm() <= 8 * torch.finfo(dtype).eps * c.norm(), name
    tokens: dict[str, Any] = {
        "old_logp": truth[0].to(torch.float32), "sequence_ids": torch.arange(n, device=DEVICE) // 50,
        "advantages": torch.randn(n, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)),
    }  # fmt: skip
    monkeypatch.setattr(backend, "KEPT_BYTES", 256 * vocab * size)
    grads = []
    for name, of in (("triton", None), ("reference", torch.float64)):
        leaves, arguments = problem.head(of)
        # a factor that is no power of two: gradients are rounded after it
        loss = linear_policy_loss(**arguments, backend=name, kind="dapo", normalizer=float(n), **tokens).loss / 3
        grads.append(torch.autograd.grad(loss, list(leaves.values())))
    for a, c in zip(*grads, strict=True):
        assert (a.double() - c).norm() <= 8 * torch.finfo(dtype).eps * c.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    # more parts than are merged in one turn
    problem = Problem(200, 40, 4500 if DEVICE == "cuda" else 2500, dtype)
    _, given = problem.head()
    arguments: dict[str, Any] = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    with torch.no_grad():
        whole = linear_logprob(**arguments, backend="triton")
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        # 64 and 160 are multiples of 16, which compilers like to make use of; 200, 70 and 1 are not
        for rows in (order, *(order[:count] for count in (1, 64, 70, 160)), torch.arange(130, 200, device=DEVICE)):
            some: dict[str, Any] = {
                **arguments,
                "hidden": arguments["hidden"][rows],
                "targets": arguments["targets"][rows],
            }
            for a, b in zip(linear_logprob(**some, backend="triton"), whole, strict=True):
                assert torch.equal(a, b[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    problem = Problem(70, 40, 700, dtype, rank=8)
    for a, b in zip(problem.outcome("triton"), problem.outcome("triton"), strict=True):
        assert torch.equal(a, b)


def test_entries_that_a_bias_bars_have_no_mass(three_way: Any) -> None:
    """A padded vocabulary: whole tiles, and the first, of -inf."""
    problem = Problem(5, 16, 700, torch.float32, rank=2)
    problem.leaves["bias"][:200] = -torch.inf
    problem.leaves["bias"][650:] = -torch.inf
    problem.targets = torch.tensor([200, 300, 400, 500, 649], device=DEVICE)
    made, exact = problem.outcome("triton"), problem.outcome("chunked", torch.float64)
    for a, c in zip(made, exact, strict=True):
        three_way(a, c.float(), c, terms=10.0)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "cispo", "sapo", "gspo"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_policy_loss_in_one_pass_or_two(three_way: Any, kind: str, dtype: torch.dtype) -> None:
    problem = Problem(70, 24, 300, dtype, rank=2)
    generator = torch.Generator().manual_seed(1)
    ids = (torch.arange(70) // 9).to(DEVICE)
    with torch.no_grad():
        logp = linear_logprob(**problem.head()[1], backend="reference").logp
    noise = [torch.randn(70, generator=generator).to(DEVICE) for _ in range(3)]
    tokens = {
        "old_logp": logp + 0.2 * noise[0], "rollout_logp": logp + 0.2 * noise[1], "sequence_ids": ids,
        "advantages": torch.tensor([1.0, -1.0, 0.0, 0.5], device=DEVICE)[ids % 4], "keep": noise[2] > -1.0,
    }  # fmt: skip
    how = {"kind": kind, "normalizer": 8.0, "entropy_weight": 0.02, "importance_cap": 1.2}

    def composed(of: torch.dtype) -> list[Tensor]:
        leaves, arguments = problem.head(of)
        made = linear_logprob(**arguments, backend="reference", softcap=9.0, temperature=0.8)
        result = policy_loss(made.logp, entropy=made.entropy, **tokens, **how)
        return [result.loss.detach(), *torch.autograd.grad(result.loss, list(leaves.values()))]

    leaves, arguments = problem.head()
    result = linear_policy_loss(**arguments, backend="triton", softcap=9.0, temperature=0.8, **tokens, **how)
    ours = [result.loss.detach(), *torch.autograd.grad(result.loss, list(leaves.values()))]
    for a, b, c in zip(ours, composed(dtype), composed(torch.float64), strict=True):
        # half precision: the low-rank product and dx are rounded to the inputs' dtype, as plain torch's would be
        if dtype == torch.float32:
            three_way(a, b, c, terms=max(1.0, float(c.abs().max())))
        else:
            assert (a.double() - c).norm() <= 8 * torch.finfo(dtype).eps * c.norm()


def test_small_gradients_in_fp16_are_not_flushed() -> None:
    problem = Problem(40, 16, 300, torch.float16)
    problem.upstream = [x * 1e-9 for x in problem.upstream]
    made, exact = (problem.outcome("triton", dtype) for dtype in (None, torch.float32))
    # dh itself is below what fp16 holds here, so dW, summed unrounded, is looked at in units of the upstream
    problem.upstream = [x * 1e9 for x in problem.upstream]
    wanted = problem.outcome("triton")
    assert not made[3].any() or torch.isfinite(made[3]).all()
    assert torch.isfinite(wanted[3]).all()
    assert (wanted[3].float() - exact[3] * 1e9).norm() < 5e-3 * (exact[3] * 1e9).norm()


def test_nothing_is_legal() -> None:
    problem = Problem(1, 16, 300, torch.float32)
    leaves, arguments = problem.head()
    made = linear_logprob(leaves["hidden"][:0], leaves["weight"], arguments["targets"][:0], backend="triton")
    torch.cat(made).sum().backward()
    assert leaves["weight"].grad is not None
    assert not leaves["weight"].grad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU's memory")
def test_more_scores_than_32_bits_count_and_little_memory() -> None:
    n, width, vocab = 20000, 256, 151936
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, device=DEVICE, dtype=torch.bfloat16, generator=generator).mul_(width**-0.5)
    weight.requires_grad_()
    targets = torch.randint(vocab, (n,), device=DEVICE, generator=generator)
    assert n * vocab > 2**31
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = linear_logprob(hidden, weight, targets)
    (made.logp.sum() + made.entropy.sum()).backward()
    # a block of dx, the sums of dh, the gradients themselves; the scores alone would be 6 GB
    assert torch.cuda.max_memory_allocated() - before < 1.2 * 2**30
    last = hidden.detach()[-5:].float().requires_grad_()
    wanted = linear_logprob(last, weight.detach().float(), targets[-5:], backend="reference")
    torch.testing.assert_close(made.logp[-5:], wanted.logp, rtol=1e-3, atol=1e-3)
    (wanted.logp.sum() + wanted.entropy.sum()).backward()
    assert hidden.grad is not None
    assert last.grad is not None
    assert (hidden.grad[-5:].float() - last.grad).norm() < 1e-2 * last.grad.norm()
