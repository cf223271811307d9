from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from longreach.engine import Group
from longreach.engine.attention import SharedPrefix, _attention
from longreach.engine.packing import PackedRow, one_row

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3

# prompts of 1 and more, groups of one, an empty completion, a group without completions
SHAPES = [(5, (3, 0, 4)), (1, (2,)), (4, ()), (7, (1, 1))]


def visible(row: PackedRow) -> Tensor:
    """[T, T] bool, by the definition: own prompt and own completion, nothing after itself."""
    owner = [(g, -1) for g, group in enumerate(row.groups) for _ in group.prompt_ids]
    owner += [(g, c) for g, group in enumerate(row.groups) for c, ids in enumerate(group.completions) for _ in ids]
    at = range(row.tokens)
    return torch.tensor([[k <= q and owner[k] in (owner[q], (owner[q][0], -1)) for k in at] for q in at])


def naive(row: PackedRow, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * SCALE
    weights = scores.masked_fill(~visible(row), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v)


def inputs(row: PackedRow, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(row.tokens, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).mul_(2).to(dtype) for shape in shapes]


def with_gradients(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("backend", ["auto", "blockwise", "reference"])
@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[:1], [(3, ())]], ids=["groups", "one", "prompt alone"])
def test_shared_prefix_is_attention_under_its_mask(
    backend: str, shapes: list, random_groups: Callable[..., list[Group]]
) -> None:
    row = one_row(random_groups(shapes))
    q, k, v, dout = inputs(row, torch.float64)
    ours = with_gradients(lambda q, k, v: SharedPrefix(row, backend).attend(0, q, k, v, SCALE), q, k, v, dout)
    exact = with_gradients(lambda *x: naive(row, *x), q, k, v, dout)
    assert len(ours) == 4
    for got, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_in_bfloat16_the_error_is_rounding_alone(random_groups: Callable[..., list[Group]]) -> None:
    row = one_row(random_groups(SHAPES))
    given = inputs(row, torch.bfloat16)
    ours = with_gradients(lambda q, k, v: SharedPrefix(row).attend(0, q, k, v, SCALE), *given)
    exact = with_gradients(lambda *x: naive(row, *x), *(x.double() for x in given))
    for got, wanted in zip(ours, exact, strict=True):
        assert got.dtype == torch.bfloat16
        # out and probabilities are each rounded once (2^-8) before they enter a gradient
        assert (got.double() - wanted).abs().max() <= 2 * 2**-8 * wanted.abs().max()
    # completions are merged from two parts before they are rounded: half a unit in the last place, and fp32's error
    merged, exactly = ours[0][row.prompt_tokens :].double(), exact[0][row.prompt_tokens :]
    assert ((merged - exactly).abs() <= 2**-8 * exactly.abs() + 1e-5).all()


@pytest.mark.parametrize("backend", ["auto", "blockwise"])
def test_autocast_changes_nothing_inside_attention(backend: str, random_groups: Callable[..., list[Group]]) -> None:
    row = one_row(random_groups(SHAPES))
    q, k, v, dout = inputs(row, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        layer = nn.Module()
        layer.layer_idx = 0  # type: ignore[assignment]
        return _attention(layer, q, k, v, None, scaling=SCALE, layout=SharedPrefix(row, backend))[0][0]

    outside = with_gradients(attend, q, k, v, dout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(attend, q, k, v, dout)
    for got, wanted in zip(inside, outside, strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sliding_window"])
def test_what_changes_the_scores_is_refused(name: str) -> None:
    x = torch.zeros(1, 1, 2, 4)
    off: dict[str, Any] = {name: None}
    _attention(nn.Module(), x, x, x, None, **off)
    with pytest.raises(ValueError, match=f"attends with {name}"):
        _attention(nn.Module(), x, x, x, None, **{**off, name: 30})


def test_dropout_is_refused() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        _attention(nn.Module(), x, x, x, None, dropout=0.1)


IDS = torch.arange(12).view(2, 6) % 7


def test_a_plain_call_is_the_model_itself(family: str, load: Callable[..., Any], plain: Callable[..., Any]) -> None:
    ours, theirs = load(family)(input_ids=IDS).logits, plain(family)(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    masked = load(family)(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert torch.equal(masked, ours)


def test_transformers_generate_by_hand_works(load: Callable[..., Any], plain: Callable[..., Any]) -> None:
    ours, theirs = (m("qwen3").generate(IDS, max_new_tokens=6, do_sample=False) for m in (load, plain))
    assert torch.equal(ours, theirs)


def test_whatever_needs_a_mask_is_refused(load: Callable[..., Any]) -> None:
    model = load("llama")
    padded = torch.ones_like(IDS)
    padded[1, :2] = 0
    refused = pytest.raises(ValueError, match="needs an attention mask")
    with refused:
        model(input_ids=IDS, attention_mask=padded)
    with refused:  # two sequences of three tokens packed into each row
        model(input_ids=IDS, position_ids=torch.arange(3).repeat(2)[None].expand(2, -1), use_cache=False)
    with refused:
        model(input_ids=IDS, attention_mask=torch.zeros(2, 1, 6, 6))
    with pytest.raises(ValueError, match=r"attention mask|cached sequence"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static")
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match=r"attention mask|cached sequence"):  # it would see empty slots
        model(input_ids=IDS[:, :1], past_key_values=cache)


def test_several_tokens_on_a_cache_are_refused(load: Callable[..., Any]) -> None:
    model = load("llama")
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="6 new tokens on a cache of 6"):
        model(input_ids=IDS, past_key_values=cache)
