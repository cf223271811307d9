from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longreach.engine import Group, completion_hidden, completion_logprobs
from longreach.engine.completions import Head, model_head
from longreach.kernels import linear_logprob

# one group, groups of one, prompts of one token, empty completions
SHAPES = [(9, (4, 0, 6)), (1, (3,)), (5, (2, 2, 2, 1))]
VALUES = {torch.float32: 5e-4, torch.float64: 1e-10}
GRADIENTS = {torch.float32: 2e-3, torch.float64: 2e-6}
"""Relative to the largest entry. transformers' norms round to fp32 in fp64 models too, once for all completions of a
shared prompt and once for each of an unshared one."""

Gradients = dict[str, Tensor]


def own_logprobs(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """From the logits of the whole model, one sequence per completion."""
    parts = []
    for group in groups:
        for completion in group.completions:
            ids = torch.cat([group.prompt_ids, completion])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
            parts.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(parts)


def gradients(model: PreTrainedModel, logp: Tensor) -> Gradients:
    """Of a sum that weighs every token differently, so that a swapped row shows."""
    weights = torch.linspace(-1, 2, len(logp), dtype=logp.dtype)
    (logp * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: Gradients, theirs: Gradients, tolerance: float) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, wanted in theirs.items():
        assert wanted.abs().max() > 0
        torch.testing.assert_close(ours[name], wanted, rtol=0, atol=tolerance * float(wanted.abs().max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_values_and_gradients_are_those_of_one_sequence_per_completion(
    dtype: torch.dtype,
    shared_prefix: bool,
    family: str,
    load: Callable[..., Any],
    plain: Callable[..., Any],
    random_groups: Callable[..., list[Group]],
) -> None:
    groups, ours, theirs = random_groups(SHAPES), load(family, dtype=dtype), plain(family, dtype)
    made, wanted = completion_logprobs(ours, groups, shared_prefix=shared_prefix).logp, own_logprobs(theirs, groups)
    assert wanted.std() > 1  # the models are far from uniform, so a wrong mask or position can't hide
    torch.testing.assert_close(made, wanted, rtol=0, atol=VALUES[dtype])
    assert_close(gradients(ours, made), gradients(theirs, wanted), GRADIENTS[dtype])


def test_temperature_entropy_and_backend_reach_the_kernels(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    model, groups = load("qwen3"), random_groups(SHAPES)
    hidden, targets = completion_hidden(model, groups)
    made, head = completion_logprobs(model, groups, temperature=0.7), model_head(model)
    for got, wanted in zip(made, linear_logprob(hidden, head.weight_VD, targets, temperature=0.7), strict=True):
        assert torch.equal(got, wanted)
    assert not torch.allclose(made.logp, completion_logprobs(model, groups).logp)
    blockwise, _ = completion_hidden(model, groups, backend="blockwise")
    torch.testing.assert_close(blockwise, hidden, rtol=0, atol=1e-5)
    assert not torch.equal(blockwise, hidden)


def test_groups_of_one_row_do_not_see_each_other(
    family: str, load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    model = load(family)
    first, second = random_groups([(9, (4, 3)), (9, (4, 3))])
    (other,) = random_groups([(9, (4, 3))], seed=1)
    with torch.no_grad():
        before = completion_logprobs(model, [first, second]).logp
        after = completion_logprobs(model, [first, other]).logp
    assert torch.equal(before[:7], after[:7])
    assert not torch.isclose(before[7:], after[7:]).any()


def test_completions_of_one_group_do_not_see_each_other(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    model, (group,) = load("qwen3"), random_groups([(9, (5, 5, 5))])
    changed = Group(group.prompt_ids, [group.completions[0], group.completions[2], group.completions[2]])
    with torch.no_grad():
        before, after = (completion_logprobs(model, [g]).logp for g in (group, changed))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[10:], after[10:])
    assert not torch.isclose(before[5:10], after[5:10]).any()


def test_gradient_checkpointing_gives_the_same_gradients(
    family: str, load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    found, calls = [], []
    for checkpointing in (False, True):
        model = load(family, gradient_checkpointing=checkpointing)
        passes = []
        model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        found.append(gradients(model, completion_logprobs(model, random_groups(SHAPES)).logp))
        calls.append(len(passes))
    assert calls == [1, 2]  # computed again in the backward
    assert_close(found[1], found[0], 1e-7)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_groups_without_completion_tokens_give_no_rows(
    shared_prefix: bool, load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    model = load("qwen3")
    made = completion_logprobs(model, random_groups([(4, ()), (3, (0,))]), shared_prefix=shared_prefix)
    assert made.logp.shape == made.entropy.shape == (0,)
    made.logp.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_an_empty_group_beside_others_changes_nothing(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    model, groups = load("qwen3"), random_groups([(4, (3, 2)), (6, ())])
    with torch.no_grad():
        with_it, without = (completion_logprobs(model, g).logp for g in (groups, groups[:1]))
    assert torch.equal(with_it, without)


def test_bad_calls_say_what_is_wrong(load: Callable[..., Any]) -> None:
    model = load("qwen3")
    with pytest.raises(ValueError, match="no groups"):
        completion_logprobs(model, [])
    with pytest.raises(ValueError, match="no groups"):
        completion_hidden(model, [])


def test_autocast_leaves_the_head_in_full_precision(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    model, groups = load("qwen3"), random_groups(SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, targets = completion_hidden(model, groups)
        made = completion_logprobs(model, groups).logp
    wanted = linear_logprob(hidden, model_head(model).weight_VD, targets).logp
    assert made.dtype == torch.float32 and torch.equal(made, wanted)
    full = completion_logprobs(model, groups).logp
    assert 1e-3 < (made - full).abs().max() < 1  # the layers did compute in bfloat16


def test_autocast_gradients_stay_near_those_of_fp32(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    found = []
    for enabled in (False, True):
        model = load("llama")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logp = completion_logprobs(model, random_groups(SHAPES)).logp
        found.append(torch.cat([g.flatten() for g in gradients(model, logp).values()]))
    assert found[1].dtype == torch.float32
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.99


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_are_those_that_the_trainer_sees(dtype: torch.dtype, softcap: float | None, bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((7, 32), (9001, 32), (9001,))  # a vocabulary of more than one tile
    hidden, weight, offset = (torch.randn(s, generator=draw).to(dtype) for s in shapes)
    head = Head(weight, offset if bias else None, softcap)
    targets = torch.randint(9001, (7,), generator=draw)
    wanted = linear_logprob(hidden, weight, targets, bias=head.bias, softcap=softcap)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head.logits(hidden)
    assert logits.dtype == wanted.logp.dtype
    torch.testing.assert_close(logits.logsumexp(-1), wanted.lse, rtol=0, atol=2e-5)
    logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logp, wanted.logp, rtol=0, atol=2e-5)


def test_a_head_that_is_not_one_linear_layer_is_refused(load: Callable[..., Any]) -> None:
    model = load("llama")
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ValueError, match="head of LlamaForCausalLM is a Sequential"):
        model_head(model)


def test_nothing_grows_with_the_square_of_the_prompt(
    load: Callable[..., Any], random_groups: Callable[..., list[Group]], largest_tensor
) -> None:
    model, groups = load("qwen3"), random_groups([(2500, (20, 20))])
    with largest_tensor:
        completion_logprobs(model, groups).logp.sum().backward()
    # the widest activation has 64 entries a token; a mask would have 2540 a token
    assert largest_tensor.elements <= 2540 * 64, largest_tensor.operator


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_on_the_cpu(
    dtype: torch.dtype, load: Callable[..., Any], random_groups: Callable[..., list[Group]]
) -> None:
    groups = random_groups(SHAPES)
    with torch.no_grad():
        wanted = completion_logprobs(load("qwen3"), groups).logp
        made = completion_logprobs(load("qwen3", dtype=dtype, device="cuda"), groups).logp
    assert made.is_cuda and made.dtype == torch.float32
    torch.testing.assert_close(made.cpu(), wanted, rtol=0, atol=1e-3 if dtype == torch.float32 else 0.5)
