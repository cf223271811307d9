"""Which backend does a call, what it refuses, and that torch's CUDA operators are called as they want to be."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import attention, attention_choice, attention_cuda, attention_flash


def row(n: int = 12, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.zeros(n, 4, 64, dtype=dtype, device=device), torch.zeros(n, 2, 64, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "name, dtype, reason",
    [
        ("flash", torch.bfloat16, "'flash' can't do this: the tensors are on cpu; use 'cpu'"),
        ("cudnn", torch.float64, "'cudnn' can't do this: the tensors are on cpu; use 'reference'"),
        ("flask", torch.float32, "unknown attention backend 'flask': choose from auto, reference"),
    ],
)
def test_an_impossible_backend_is_refused_and_another_named(name: str, dtype: torch.dtype, reason: str) -> None:
    q, k = row(dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        attention.forward(q, k, k, causal=True, backend=name)
    with pytest.raises(ValueError, match=reason):
        attention.backward(q, q, k, k, q, torch.zeros(4, 12, dtype=torch.float32), causal=True, backend=name)


class OnAGpu:
    """As much of a CUDA tensor as the choice reads."""

    is_cuda = True
    device = torch.device("cuda:0")

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.shape = dtype, torch.Size([12, 4, width])


@pytest.mark.parametrize(
    "dtype, width, capability, named",
    [
        (torch.float32, 64, (9, 0), "not one of bfloat16, float16"),
        (torch.bfloat16, 192, (9, 0), None),
        (torch.bfloat16, 100, (9, 0), "not a multiple of 8"),
        (torch.bfloat16, 320, (9, 0), "up to 256"),
        (torch.float16, 64, (7, 5), r"compute capability \(7, 5\)"),
    ],
)
def test_what_torchs_operators_take(
    dtype: torch.dtype, width: int, capability: tuple[int, int], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cuda, "capability", lambda device: capability)
    found = attention_cuda.unsuited(OnAGpu(dtype, width))  # type: ignore[arg-type]
    assert found is None if named is None else (found is not None)
    if named:
        assert re.search(named, str(found))
    if width == 192:
        assert "up to 128" in str(attention_cuda.unsuited_cudnn(OnAGpu(dtype, width)))  # type: ignore[arg-type]


def test_a_measured_gpu_takes_its_fastest_and_others_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    q = OnAGpu(torch.bfloat16, 128)
    able: dict[str, str | None] = {"triton": None, "flash": None, "cudnn": None, "blockwise": None}
    monkeypatch.setattr(attention_choice, "unsuited", lambda name, q: able[name])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")

    def chosen(stage: str, deterministic: bool = False) -> str:
        return attention_choice.choose("auto", stage, q, 1, deterministic)  # type: ignore[arg-type]

    assert (chosen("forward"), chosen("backward")) == ("flash", "flash")
    assert chosen("backward", deterministic=True) == "blockwise"
    able["flash"] = "not here"
    assert chosen("forward") == "blockwise"
    able["flash"] = None
    table = {"forward": ("cudnn", "flash"), "backward": ("flash", "triton")}
    monkeypatch.setitem(attention_choice.MEASURED, "GPU X", table)
    assert (chosen("forward"), chosen("backward")) == ("cudnn", "flash")
    assert chosen("backward", deterministic=True) == "triton"
    with pytest.raises(ValueError, match=r"sums in no fixed order.*use 'triton'"):
        attention_choice.choose("flash", "backward", q, 1, True)  # type: ignore[arg-type]


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attention_choice._say.cache_clear()
    q, k = row()
    with caplog.at_level(logging.INFO, logger="longreach.attention"):
        for _ in range(3):
            attention.forward(q, k, k, causal=True)
    assert [r.getMessage() for r in caplog.records] == [
        "attention forward on cpu, torch.float32, head dimension 64: cpu"
    ]


def test_the_table_is_what_the_rows_say(root: Path) -> None:
    """MEASURED names the GPUs of bench/results/, and for each pass the backends that were fastest at most lengths."""
    path = root / "bench" / "results" / "gpu-attention.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    measured = {r["device"] for r in rows if r["op"] == "attention" and r["status"] == "measured" and r["ours"]}
    assert set(attention_choice.MEASURED) == measured


def test_autocast_is_ignored() -> None:
    q, k = torch.randn(12, 4, 64), torch.randn(12, 2, 64)
    for backend in ("cpu", "blockwise", "reference"):
        wanted = attention.forward(q, k, k, causal=True, backend=backend)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention.forward(q, k, k, causal=True, backend=backend)[0], wanted)


def test_torchs_operators_take_our_arguments() -> None:
    """On meta tensors: names, order and shapes; the numbers are for a GPU (below)."""
    q, k = row(20, torch.bfloat16, "meta")[0], row(30, torch.bfloat16, "meta")[1]
    bounds = ((0, 7, 20), (0, 10, 30))
    out, lse = attention_cuda.flash_forward(q, k, k, *bounds, False, 0.1, torch.float32)
    assert (out.dtype, lse.dtype, lse.shape) == (torch.float32, torch.float32, (4, 20))
    grads = attention_cuda.flash_backward(out, q, k, k, out, lse, *bounds, False, 0.1, torch.float32)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]
    q, k = q.unflatten(0, (2, 10)), k.unflatten(0, (2, 15))
    out, lse = attention_cuda.cudnn_forward(q, k, k, False, 0.1)
    assert (out.shape, lse.shape) == (q.shape, (2, 10, 4))
    grads = attention_cuda.cudnn_backward(out, q, k, k, out, lse, False, 0.1)
    assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash", "cudnn", "flash-attn", "fa3", "fa4"])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_on_the_gpu_with_an_out_and_lse_of_more_keys(backend: str, width: int, causal: bool) -> None:
    """Ragged segments, an empty one, grouped heads; then keys in two parts, each backward with the merged pair."""
    reason = attention_choice.unsuited(backend, torch.empty(1, 1, width, dtype=torch.bfloat16, device="cuda"))
    if reason and backend in ("cudnn", *attention_flash.PACKAGES):
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).bfloat16()

    cu = [0, 1024, 1024, 1025, 2500]
    q, dout, k, v = draw(2500, 8, width), draw(2500, 8, width), draw(2500, 2, width), draw(2500, 2, width)
    how: dict[str, Any] = {"causal": causal, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    wide = [x.float() for x in (q, k, v)]
    exact, exact_lse = attention.forward(wide[0], wide[1], wide[2], backend="blockwise", **how)
    arguments = (dout.float(), wide[0], wide[1], wide[2], exact, exact_lse)
    wanted = attention.backward(*arguments, backend="blockwise", **how)
    out, lse = attention.forward(q, k, v, backend=backend, **how)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-3)
    close(out, exact)
    for made, want in zip(attention.backward(dout, q, k, v, out, lse, backend=backend, **how), wanted, strict=True):
        close(made, want)
    if causal:
        return
    total: list[Tensor] = []
    others = [draw(300 * 4, 2, width) for _ in range(2)]
    pair = ((k, v, cu), (others[0], others[1], [0, 300, 600, 900, 1200]))
    parts = [
        attention.forward(
            q, a, b, causal=False, cu_seqlens_q=cu, cu_seqlens_k=c, backend=backend, out_dtype=torch.float32
        )
        for a, b, c in pair
    ]
    (out_a, lse_a), (out_b, lse_b) = parts
    out, lse = attention.merge(out_a, lse_a, out_b, lse_b)
    for name in (backend, "blockwise"):
        dq = torch.zeros_like(q, dtype=torch.float32)
        for a, b, c in pair:
            grads = attention.backward(
                dout, q, a, b, out.to(q.dtype), lse, causal=False, cu_seqlens_q=cu, cu_seqlens_k=c, backend=name,
                grad_dtype=torch.float32,
            )  # fmt: skip
            dq += grads[0]
        total.append(dq)
    close(*total)


def close(made: Tensor, want: Tensor) -> None:
    """bf16 factors: some roundings of 2^-9 of the largest entries, over sums of hundreds."""
    assert (made.float() - want).abs().max() <= 2**-6 * want.abs().max()
