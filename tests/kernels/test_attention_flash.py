"""kernels/attention_flash.py against stand-ins of the packages, which need a GPU to be installed.

A stand-in has the parameters of the real functions, names and order, copied from the release that is named, as torch
custom operators where the real ones are; it checks what the real kernels check; its numbers are the reference's; and
where releases differ (what a query without keys gets, which rows are left unwritten) it does the least pleasant thing.
Where a package is installed, its parameters are compared with the stand-in's, and on a GPU its numbers (see also
test_attention_choice.py) with fp32.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.kernels import attention, attention_choice, attention_cuda, attention_flash

Given = dict[str, Any]


def on_reference(given: Given) -> tuple[dict[str, Any], list[tuple[int, int, int, int]]]:
    """Options of `attention` for what a kernel was given, after the checks that all the packages make."""
    q, k = given["q"], given["k"]
    segments = []
    for x in (q, k, given["v"]):
        assert x.dtype in (torch.float16, torch.bfloat16) and x.dtype == q.dtype and x.stride(-1) == 1
    options: dict[str, Any] = {"causal": given["causal"], "scale": given["softmax_scale"], "backend": "reference"}
    for side, total in (("q", len(q)), ("k", len(k))):
        lengths = given[f"cu_seqlens_{side}"]
        assert lengths.dtype == torch.int32 and lengths.is_contiguous() and int(lengths[-1]) == total
        assert given[f"max_seqlen_{side}"] == int(lengths.diff().max())
        options[f"cu_seqlens_{side}"] = lengths.tolist()
        segments.append(list(pairwise(lengths.tolist())))
    spans = [(*a, *b) for a, b in zip(*segments, strict=True)]
    assert any(b > a and d > c for a, b, c, d in spans), "an empty launch"
    return options, spans


def forward(given: Given, without_keys: float) -> tuple[Tensor, Tensor]:
    options, segments = on_reference(given)
    out, lse = attention.forward(given["q"], given["k"], given["v"], **options)
    for a, b, c, d in segments:
        if c == d:
            lse[:, a:b] = without_keys
            out[a:b] = torch.nan if without_keys > 0 else 0.0
    return out, lse


def backward(given: Given) -> None:
    """Writes into dq, dk and dv; rows of a segment with an empty side stay as they were."""
    options, segments = on_reference(given)
    dout, q, k, v, out = (given[name] for name in ("dout", "q", "k", "v", "out"))
    assert dout.dtype == out.dtype == q.dtype
    lse = given["softmax_lse"]
    assert lse.dtype == torch.float32 and lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    grads = attention.backward(dout, q, k, v, out, lse, **options)
    for a, b, c, d in segments:
        if b > a and d > c:
            for name, grad, (start, end) in zip(("dq", "dk", "dv"), grads, ((a, b), (c, d), (c, d)), strict=True):
                given[name][start:end] = grad[start:end]


SEEN: list[Given] = []
"""What the backwards were given, last one last."""


# flash-attn 2.8.3.post2, flash_attn/flash_attn_interface.py
@torch.library.custom_op("standin::fa2_forward", mutates_args=(), device_types="cpu")
def fa2_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout_p == 0.0
    return *forward(locals(), math.inf), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@torch.library.custom_op("standin::fa2_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
    assert not softmax_lse.isneginf().any()  # its own forward never makes one
    SEEN.append(locals())
    backward(locals())
    return torch.empty(0)


# hopper/flash_attn_interface.py of flash-attn 2.8.3.post2: FlashAttention-3's first release
def fa3_forward(
    q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    others = (k_new, v_new, qv, out, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k)
    assert all(x is None for x in (*others, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale))
    return *forward(locals(), -math.inf), None, None


def fa3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k, dq, dk,
    dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert sequed_q is None and sequed_k is None
    SEEN.append(locals())
    backward(locals())
    return dq, dk, dv, torch.empty(0)


# hopper/flash_attn_interface.py of 2026
@torch.library.custom_op("standin::fa3_forward", mutates_args=(), device_types="cpu")
def fa3_2026_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None, qv: Tensor | None = None,
    out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None, seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None, leftpad_k: Tensor | None = None, rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0,
    softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Tensor | None = None,
    num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert out_ is None and num_splits == 1
    return *forward(locals(), -math.inf), torch.empty(0), torch.empty(0)


@torch.library.custom_op("standin::fa3_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def fa3_2026_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None, sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, dq: Tensor | None = None, dk: Tensor | None = None,
    dv: Tensor | None = None, softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    SEEN.append(locals())
    backward({**locals(), "causal": is_causal})
    return torch.empty(0)


# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py
def fa4_forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
    k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
    disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    made, its_lse = forward(locals(), -math.inf)
    return made, its_lse if return_lse else None, None, None, None


def fa4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
    m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
    dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False,
    cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None,
):  # fmt: skip
    SEEN.append(locals())
    backward({**locals(), "softmax_lse": lse})
    return dq, dk, dv


STANDINS: dict[str, tuple[str, Any, Any]] = {
    "flash-attn": ("flash-attn", fa2_forward, fa2_backward),
    "fa3": ("fa3", fa3_2026_forward, fa3_2026_backward),
    "fa3, first release": ("fa3", fa3_forward, fa3_backward),
    "fa4": ("fa4", fa4_forward, fa4_backward),
}
Install = Callable[[str, Any, Any], str]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(backend, forward, backward) puts two functions where the backend looks for them, on a Hopper of a kind."""

    def put(name: str, its_forward: Any, its_backward: Any) -> str:
        package = attention_flash.PACKAGES[name]
        functions = dict(zip(package.functions, (its_forward, its_backward), strict=True))
        monkeypatch.setitem(sys.modules, package.module, SimpleNamespace(**functions))
        monkeypatch.setattr(attention_cuda, "unsuited", lambda q: None)
        monkeypatch.setattr(attention_flash, "capability", lambda device: (9, 0))
        attention_flash._load.cache_clear()
        return name

    yield put
    attention_flash._load.cache_clear()


SEGMENTS = {
    "one": ([17], [17], True),
    "ragged with an empty one": ([3, 0, 17, 1], [3, 0, 17, 1], True),
    "full, sides without queries, without keys": ([4, 0, 6, 2], [7, 3, 0, 9], False),
    "no query sees a key": ([4, 0], [0, 5], False),
}
SCALE = 0.31
"""Not 1 / sqrt(E), so that a dropped scale shows."""


def inputs(queries: int, keys: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries + 31 * keys)
    return [torch.randn(n, heads, 16, generator=draw).half() for n, heads in ((queries, 4), (queries, 4), (keys, 2), (keys, 2))]  # fmt: skip


def bounds(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def check_alone(name: str, segments: str) -> None:
    lengths_q, lengths_k, causal = SEGMENTS[segments]
    dout, q, k, v = inputs(sum(lengths_q), sum(lengths_k))
    how: Given = {"causal": causal, "scale": SCALE, "cu_seqlens_q": bounds(lengths_q), "cu_seqlens_k": bounds(lengths_k)}  # fmt: skip
    out, lse = attention.forward(q, k, v, backend=name, out_dtype=torch.float32, **how)
    wide_q, wide_k, wide_v = (x.float() for x in (q, k, v))
    exact, exact_lse = attention.forward(wide_q, wide_k, wide_v, backend="reference", **how)
    assert out.dtype == torch.float32
    close(out, exact)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-3)
    wanted = attention.backward(dout.float(), wide_q, wide_k, wide_v, exact, exact_lse, backend="reference", **how)
    made = attention.backward(dout, q, k, v, out, lse, backend=name, grad_dtype=torch.float32, **how)
    for one, other in zip(made, wanted, strict=True):
        assert one.dtype == torch.float32
        close(one, other)


def check_merged(name: str) -> None:
    """Keys in two parts, each one's backward with the out and lse of both: the gradients of all keys at once."""
    dout, q, k, v = inputs(12, 30)
    cu: Given = {"cu_seqlens_q": [0, 5, 12]}
    # the queries of the last segment see the first part alone
    parts = ((slice(0, 18), [0, 11, 18]), (slice(18, 30), [0, 12, 12]))
    how: Given = {"causal": False, "scale": SCALE, "backend": name}
    pairs = [attention.forward(q, k[at], v[at], cu_seqlens_k=c, out_dtype=torch.float32, **cu, **how) for at, c in parts]  # fmt: skip
    out, lse = attention.merge(*pairs[0], *pairs[1])
    order = [*range(11), *range(18, 30), *range(11, 18)]
    how["backend"], all_cu = "reference", {**cu, "cu_seqlens_k": [0, 23, 30]}
    wide_q, wide_k, wide_v = (x.float() for x in (q, k[order], v[order]))
    exact, exact_lse = attention.forward(wide_q, wide_k, wide_v, **how, **all_cu)
    close(out, exact)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-3)
    wanted = attention.backward(dout.float(), wide_q, wide_k, wide_v, exact, exact_lse, **how, **all_cu)
    how |= {"backend": name, "grad_dtype": torch.float32}
    dq, dk, dv = torch.zeros(q.shape), torch.zeros(k.shape), torch.zeros(v.shape)
    for at, c in parts:
        # lse may be of a wider sum
        grads = attention.backward(dout, q, k[at], v[at], out, lse.double(), cu_seqlens_k=c, **cu, **how)
        dq += grads[0]
        dk[at], dv[at] = grads[1], grads[2]
    for one, other in zip((dq, dk[order], dv[order]), wanted, strict=True):
        close(one, other)


def close(made: Tensor, want: Tensor) -> None:
    """Some fp16 roundings, 2^-11 of the largest entries."""
    assert torch.isfinite(made).all()
    assert (made - want).abs().max() <= 2**-8 * want.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("standin", STANDINS)
def test_values_and_gradients(standin: str, segments: str, install: Install) -> None:
    check_alone(install(*STANDINS[standin]), segments)


@pytest.mark.parametrize("standin", STANDINS)
def test_merged_out_and_lse(standin: str, install: Install) -> None:
    check_merged(install(*STANDINS[standin]))


def twisted(given: str) -> tuple[Any, Any]:
    """The stand-in of FlashAttention-4, doing one thing another way than the real one."""

    def its_forward(**told: Any) -> Any:
        if given == "scale":
            told["softmax_scale"] = 1 / math.sqrt(told["q"].shape[-1])
        out, lse, *rest = fa4_forward(**told)
        assert lse is not None
        if given == "base 2":
            lse = lse / math.log(2)
        if given == "lse [T, H]":
            lse = lse.t().contiguous().view(lse.shape)
        return out, lse, *rest

    def its_backward(**told: Any) -> Any:
        if given == "own out":
            own = {name: told[name] for name in ("q", "k", "v", "softmax_scale", "causal", *attention_flash.LENGTHS)}
            told["out"] = fa4_forward(**own)[0]
        if given == "dk and dv":
            told["dk"], told["dv"] = told["dv"], told["dk"]
        return fa4_backward(**told)

    for function, real in ((its_forward, fa4_forward), (its_backward, fa4_backward)):
        function.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    return its_forward, its_backward


@pytest.mark.parametrize("given", ["scale", "base 2", "lse [T, H]", "own out", "dk and dv"])
def test_a_kernel_of_another_kind_would_be_noticed(given: str, install: Install) -> None:
    name = install("fa4", *twisted(given))
    with pytest.raises(AssertionError):  # noqa: PT012
        check_alone(name, "ragged with an empty one")
        check_merged(name)
    check_merged(install("fa4", *twisted("nothing")))


@pytest.mark.parametrize("standin", STANDINS)
def test_deterministic_is_asked_for(standin: str, install: Install) -> None:
    name = install(*STANDINS[standin])
    dout, q, k, v = inputs(6, 6)
    out, lse = attention.forward(q, k, v, causal=True, backend=name)
    for wanted in (False, True):
        how: Given = {"causal": True, "deterministic": wanted, "backend": name}
        if wanted and standin == "fa3, first release":
            with pytest.raises(ValueError, match=r"pays no heed to it.*use 'cpu'"):
                attention.backward(dout, q, k, v, out, lse, **how)
            continue
        attention.backward(dout, q, k, v, out, lse, **how)
        assert SEEN[-1]["deterministic"] is wanted


class OnAGpu:
    """As much of a CUDA tensor as the choice reads."""

    is_cuda = True
    device = torch.device("cuda:0")

    def __init__(self, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype, self.shape = dtype, torch.Size([12, 4, width])


@pytest.mark.parametrize(
    "name, width, capability, said",
    [
        ("flash-attn", 128, (8, 6), None),
        ("flash-attn", 128, (7, 5), r"capability \(7, 5\) is below"),
        ("flash-attn", 264, (9, 0), "up to 256"),
        ("fa3", 256, (9, 0), None),
        ("fa3", 128, (8, 0), r"no kernels for compute capability \(8, 0\)"),
        ("fa3", 128, (10, 0), r"no kernels for compute capability \(10, 0\)"),
        ("fa4", 192, (9, 0), None),
        ("fa4", 128, (8, 9), r"no kernels for compute capability \(8, 9\)"),
        ("fa4", 192, (10, 0), r"head dimension of 192 on compute capability \(10, 0\)"),
        ("fa4", 256, (10, 0), None),
        ("fa4", 256, (12, 0), r"head dimension of 256 on compute capability \(12, 0\)"),
    ],
)
def test_what_a_package_takes(
    name: str, width: int, capability: tuple[int, int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (attention_cuda, attention_flash):
        monkeypatch.setattr(module, "capability", lambda device: capability)
    monkeypatch.setattr(attention_flash, "_load", lambda name: ((), None))
    found = attention_choice.unsuited(name, OnAGpu(width))  # type: ignore[arg-type]
    assert found is None if said is None else re.search(said, str(found)), found
    assert "not one of bfloat16" in str(attention_choice.unsuited(name, OnAGpu(64, torch.float32)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", attention_flash.PACKAGES)
def test_a_package_that_is_not_there_is_named(name: str, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(name, None, None)
    monkeypatch.setitem(sys.modules, attention_flash.PACKAGES[name].module, None)
    _, q, k, v = inputs(6, 6)
    said = f"{attention_flash.PACKAGES[name].distribution} can't be imported .*; use 'cpu'"
    with pytest.raises(ValueError, match=said):
        attention.forward(q, k, v, causal=True, backend=name)


def another(**parameters: Any) -> Any:
    """A forward as FlashAttention-4's, with parameters left out (None) or added."""

    def function(**told: Any) -> Any:
        raise AssertionError("it must not be called")

    known = [p for p in inspect.signature(fa4_forward).parameters.values() if p.name not in parameters]
    added = [p for p in parameters.values() if p is not None]
    function.__signature__ = inspect.Signature([*added, *known])  # type: ignore[attr-defined]
    return function


def test_another_release_is_refused(install: Install) -> None:
    _, q, k, v = inputs(6, 6)
    needed = inspect.Parameter("workspace", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for its_forward, said in (
        (None, "it has no _flash_attn_fwd"),
        (another(return_lse=None), "its _flash_attn_fwd takes no return_lse"),
        (another(workspace=needed), "its _flash_attn_fwd needs workspace"),
    ):
        install("fa4", its_forward, fa4_backward)
        with pytest.raises(ValueError, match=f"another than the one known here: {said}"):
            attention.forward(q, k, v, causal=True, backend="fa4")


def test_no_deterministic_backward_where_there_is_none(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fa3", fa3_2026_forward, fa3_2026_backward)
    assert "up to a head dimension of 192" in str(attention_flash.unordered("fa3", torch.empty(1, 1, 256)))
    assert attention_flash.unordered("fa3", torch.empty(1, 1, 192)) is None
    assert attention_flash.unordered("fa4", torch.empty(1, 1, 64)) is None
    monkeypatch.setattr(attention_flash, "capability", lambda device: (12, 0))
    assert "no deterministic backward" in str(attention_flash.unordered("fa4", torch.empty(1, 1, 64)))


def test_auto_takes_them_by_measurement_alone(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("fa3", fa3_2026_forward, fa3_2026_backward)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    q: Any = OnAGpu(128)
    assert attention_choice.choose("auto", "backward", q, 1) == "flash"
    monkeypatch.setitem(attention_choice.MEASURED, "GPU X", {"forward": ("fa4", "fa3"), "backward": ("fa3", "flash")})
    assert [attention_choice.choose("auto", stage, q, 1) for stage in ("forward", "backward")] == ["fa3", "fa3"]
    assert attention_choice.choose("auto", "backward", q, 1, deterministic=True) == "fa3"


@pytest.mark.parametrize("standin", ["flash-attn", "fa3", "fa4"])
def test_the_real_functions_have_the_parameters_of_the_standins(standin: str) -> None:
    name, *ours = STANDINS[standin]
    package = attention_flash.PACKAGES[name]
    module = pytest.importorskip(package.module, reason=f"{package.distribution} can't be imported", exc_type=ImportError)  # fmt: skip
    for function, own in zip(package.functions, ours, strict=True):
        real, known = (list(attention_flash._parameters(f)) for f in (getattr(module, function), own))
        assert real == known
