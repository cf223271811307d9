"""The stand-in of the Triton backend allocates what that one allocates: held to the real one's own Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from longreach.kernels import linear_logprob_traced as traced
from longreach.kernels import linear_logprob_triton as real
from longreach.kernels.linear_logprob import scores_of
from longreach.kernels.scores import Scores, Stats, Upstream

N, D, V = 300, 32, 1000


def scores() -> Scores:
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=draw) for n in (N, V))
    return scores_of(hidden, weight, torch.zeros(N, dtype=torch.long), None, 1.0, None)


class Allocated(TorchDispatchMode):
    """Shapes of fresh buffers of at least `least` elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func) or "full" in str(func) or "zeros" in str(func):
            self.shapes += [
                tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor) and x.numel() >= self.least
            ]
        return result


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real backend's Python with its kernels left out: what it allocates doesn't hang on what they compute."""
    monkeypatch.setattr(real, "launch", lambda *_, **__: None)
    monkeypatch.setattr(real.TensorDescriptor, "from_tensor", staticmethod(lambda x, *_: x))


def test_chunks_and_blocks_are_the_real_ones() -> None:
    assert traced.chunk_rows is real.chunk_rows
    assert traced.block is real.block


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("what", ["partial", "keep"])
def test_forward_buffers(what: str) -> None:
    made = []
    for module in (real, traced):
        with Allocated(4 * N) as seen:
            getattr(module, what)(scores())
        made.append(sorted(seen.shapes))
    assert _without_tiles(made[0]) == _without_tiles(made[1])
    assert len(made[1]) == (2 if what == "keep" else 1)


def _without_tiles(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The parts' results depend on the tile: a GPU's has parts of 128 entries, the interpreter's of 64."""
    return [(-1, *shape[1:]) if len(shape) == 3 else shape for shape in shapes]


@pytest.mark.usefixtures("silent")
def test_gradient_buffers() -> None:
    stats = Stats(*[torch.zeros(N)] * 4)
    upstream = Upstream(*[torch.zeros(N)] * 3)
    made = []
    for module in (real, traced):
        with Allocated(N * 64) as seen:
            dx = module.gradient(scores(), stats, upstream, 100, 400)
        made.append(seen.shapes)
        assert dx.shape == (N, 300)
    assert made[0] == made[1] == [(N, 320)]
    kept = traced.keep(scores())[1]
    assert traced.kept_gradient(scores(), kept, stats, upstream) is kept[0]


def test_operations_are_told() -> None:
    told: list[int] = []

    class Told(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.longreach.spend.default:
                told.append(args[0])
            return func(*args, **(kwargs or {}))

    with Told():
        traced.keep(scores())
        traced.gradient(scores(), Stats(*[torch.zeros(N)] * 4), Upstream(*[torch.zeros(N)] * 3), 0, 400)
    assert told == [2 * N * D * V, 2 * N * D * 400]
