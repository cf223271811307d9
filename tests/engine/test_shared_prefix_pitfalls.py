"""The thirteen ways in which training on a shared prompt is known to go wrong, one test each, by number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from longreach.engine import (
    Group,
    completion_hidden,
    completion_logprobs,
    completion_policy_loss,
    load_model,
    pack_groups,
)
from longreach.engine.attention import SharedPrefix
from longreach.engine.model import read_config
from longreach.engine.packing import one_row
from longreach.engine.sequences import group_sequences

Make = Callable[..., Any]
MakeGroups = Callable[..., list[Group]]

SHAPES = [(9, (4, 0, 6)), (1, (3,)), (5, (2, 2, 2, 1))]
EXACT = 1e-6
"""Relative to the largest entry, in fp64: transformers' norms round to fp32 in between."""


def own_logprobs(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Each completion as a sequence of its own through transformers' own model."""
    parts = []
    for prompt, completion in ((g.prompt_ids, c) for g in groups for c in g.completions):
        ids = torch.cat([prompt, completion])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(parts)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(made: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert made.keys() == wanted.keys() and len(wanted) > 10
    for name, exact in wanted.items():
        assert exact.abs().max() > 0, name
        assert (made[name] - exact).abs().max() <= bound * exact.abs().max(), name


def weighed(logp: Tensor) -> Tensor:
    """A sum that weighs every token differently."""
    return (logp * torch.linspace(-1, 2, len(logp), dtype=logp.dtype)).sum()


def count_forwards(module: nn.Module) -> list[int]:
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    return seen


def test_01_the_last_prompt_token_has_a_target_in_every_completion(load: Make, random_groups: MakeGroups) -> None:
    model, (group,) = load("qwen3", dtype=torch.float64), random_groups([(9, (4, 0, 6, 1))])
    states: list[Tensor] = []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        states.append(output.last_hidden_state)

    model.get_decoder().register_forward_hook(keep)
    hidden, targets = completion_hidden(model, [group])
    firsts = [0, 4, 10]
    assert targets[firsts].tolist() == [int(c[0]) for c in group.completions if len(c)]
    assert all(torch.equal(hidden[i], hidden[0]) for i in firsts)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (hidden * weights).sum().backward()
    assert states[0].grad is not None
    torch.testing.assert_close(states[0].grad[0, 8], weights[firsts].sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("yarn", [None, 4.0])
def test_02_positions_restart_at_the_prompts_length_past_the_original_window_too(
    yarn: float | None, build: Callable[..., Path], random_groups: MakeGroups
) -> None:
    folder, groups = build("llama", max_position_embeddings=16), random_groups([(13, (9, 20)), (30, (2,))])
    rows = one_row(groups).position_ids().tolist()
    assert rows[43:] == [*range(13, 22), *range(13, 33), *range(30, 32)]
    model = load_model(folder, dtype=torch.float64, device="cpu", yarn=yarn)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=read_config(folder, yarn=yarn), dtype=torch.float64, attn_implementation="sdpa"
    )
    with torch.no_grad():
        made, wanted = completion_logprobs(model, groups).logp, own_logprobs(plain, groups)
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("budget", [15, 18, 24, 32])
def test_03_a_split_or_shuffled_batch_has_the_gradient_of_the_whole(
    budget: int, load: Make, random_groups: MakeGroups
) -> None:
    model, groups = load("qwen3", dtype=torch.float64), random_groups(SHAPES)
    lengths = [len(c) for g in groups for c in g.completions]
    advantages = torch.randn(len(lengths), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantages[3] = 0.0  # the only completion of its group
    places = {
        (g, c): i
        for i, (g, c) in enumerate((g, c) for g, one in enumerate(groups) for c in range(len(one.completions)))
    }

    def backward(part: list[Group], members: list[int]) -> float:
        per_token = advantages[members].repeat_interleave(torch.tensor([lengths[i] for i in members]))
        made = completion_policy_loss(model, part, None, per_token, kind="grpo", normalizer=len(lengths))
        made.loss.backward()
        return made.loss.item()

    whole = backward(groups, list(range(len(lengths))))
    wanted = gradients(model)
    rows = pack_groups(groups, budget)
    assert len(rows) > 1
    total = sum(backward(list(row.groups), [places[m] for m in row.members]) for row in rows)
    assert total == pytest.approx(whole, rel=1e-6)
    assert_close(gradients(model), wanted, EXACT)
    kept = [i for i in range(len(lengths)) if i != 3]  # what has no advantage may be dropped, and the count stays
    assert backward([groups[0], groups[2]], kept) == pytest.approx(whole, rel=1e-6)
    assert_close(gradients(model), wanted, EXACT)


def test_04_old_new_and_reference_log_probs_take_the_same_path(load: Make, random_groups: MakeGroups) -> None:
    model, groups = load("qwen3"), random_groups(SHAPES)
    with torch.no_grad():
        old = completion_logprobs(model, groups).logp
    new = completion_logprobs(model, groups).logp
    assert new.requires_grad and torch.equal(old, new)
    recomputed = completion_logprobs(load("qwen3", gradient_checkpointing=True), groups).logp
    assert torch.equal(old, recomputed)
    made = completion_policy_loss(model, groups, old, torch.ones_like(old), kind="grpo", normalizer=1.0)
    assert made.metrics["ratio/mean"].value == 1.0
    with torch.no_grad():  # a completion beside others than before: rounding, not a nat
        alone = completion_logprobs(model, [Group(groups[2].prompt_ids, groups[2].completions[1:2])]).logp
    torch.testing.assert_close(alone, old[15:17], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind, counted", [("grpo", 8), ("dapo", 20), ("dr_grpo", 8 * 6)])
def test_05_prompt_tokens_count_neither_once_nor_g_times(
    kind: str, counted: int, load: Make, random_groups: MakeGroups
) -> None:
    """Advantages of one on policy: the loss is minus the share of tokens that its normalizer should count."""
    model, groups = load("qwen3"), random_groups(SHAPES)
    wanted = {"grpo": -7 / 8, "dapo": -1.0, "dr_grpo": -20 / 48}[kind]  # one of eight completions is empty
    for shared_prefix in (True, False):
        made = completion_policy_loss(
            model, groups, None, torch.ones(20), kind=kind, normalizer=counted, shared_prefix=shared_prefix
        )
        assert made.loss.item() == pytest.approx(wanted, rel=1e-6)


def test_06_experts_see_a_shared_prompt_once_and_the_numbers_are_the_dense_ones(
    build: Callable[..., Path], random_groups: MakeGroups
) -> None:
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    folder, groups = build("qwen3 moe", "Qwen3MoeConfig", **moe), random_groups(SHAPES)
    model = load_model(folder, dtype=torch.float32, device="cpu")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    routed: list[int] = []
    model.get_submodule("model.layers.0.mlp.gate").register_forward_hook(
        lambda _, args, out: routed.append(args[0].shape[0])
    )
    made, wanted = completion_logprobs(model, groups).logp, own_logprobs(plain, groups)
    assert routed == [9 + 1 + 5 + 20]
    torch.testing.assert_close(made, wanted, rtol=0, atol=5e-4)  # experts have no fp64 on every platform
    weighed(made).backward()
    weighed(wanted).backward()
    assert_close(gradients(model), gradients(plain), 2e-3)


STATES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a convolution": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "conv"),
    "a recurrence": ("RecurrentGemmaConfig", {"lru_width": 32, "head_dim": 8, "attention_window_size": 16}, "linear_attention"),
    "a gated delta net": (
        "Qwen3NextConfig",
        {
            "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
        },
        "linear_attention",
    ),
    "a state space beside attention": (
        "JambaConfig", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 4,
                        "mamba_expand": 1, "mamba_dt_rank": 4}, "linear_attention",
    ),
    "a state space within attention's layer": (
        "FalconH1Config", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "head_dim": 8},
        "hybrid",
    ),
    "a window": ("MistralConfig", {"sliding_window": 4}, "a sliding window of 4"),
    "a chunk": ("Llama4TextConfig", {"attention_chunk_size": 8, "head_dim": 8, "num_local_experts": 1}, "chunked_attention"),
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_07_what_carries_a_state_or_cuts_the_prompt_off_is_refused(what: str, build: Callable[..., Path]) -> None:
    config_class, changes, reason = STATES[what]
    with pytest.raises(ValueError, match=rf"aren't full attention \({reason}"):
        load_model(build(what, config_class, **changes), dtype=torch.float32, device="cpu")


def test_08_training_mode_draws_nothing(load: Make, random_groups: MakeGroups) -> None:
    model, groups = load("qwen3"), random_groups(SHAPES)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = (completion_logprobs(model.train(), groups).logp for _ in range(2))
        evaluated = completion_logprobs(model.eval(), groups).logp
    assert torch.equal(first, second) and torch.equal(first, evaluated)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("budget", [None, 2600])
def test_09_nothing_has_the_size_of_a_mask(
    budget: int | None, load: Make, random_groups: MakeGroups, largest_tensor: Any
) -> None:
    model, groups = load("qwen3"), random_groups([(900, (340, 340, 340, 340, 340, 340))])
    with largest_tensor:
        completion_logprobs(model, groups, budget=budget).logp.sum().backward()
    # the widest activation has 64 entries a token; a mask of the prompt alone would have 900 a token
    assert largest_tensor.elements <= 2940 * 64, largest_tensor.operator


def test_10_the_prompts_gradient_is_summed_in_fp32(random_groups: MakeGroups) -> None:
    """256 completions add to each prompt key's gradient; it is rounded once, as if there were one."""
    row = one_row(random_groups([(4, [2] * 256)]))
    draw = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(row.tokens, h, 8, generator=draw).bfloat16() for h in (4, 2, 2, 4))
    dout = dout.abs()  # gradients that add up, rather than cancel

    def value_gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in (q, k, v)]
        SharedPrefix(row, backend).attend(0, *leaves, 0.3).backward(dout.to(dtype))  # type: ignore[misc]
        assert leaves[2].grad is not None
        return leaves[2].grad[:4].double()

    exact = value_gradient(torch.float64, "reference")
    made = value_gradient(torch.bfloat16, "auto")
    error = ((made - exact).abs() / exact.abs()).max()
    total = torch.zeros_like(exact, dtype=torch.bfloat16)
    for c in range(256):  # what this guards against: G sums, each rounded
        alone = attention_of(row, q, k, v, dout, c)
        total += alone
    careless = ((total.double() - exact).abs() / exact.abs()).max()
    assert error <= 2 * 2**-8 < 4 * 2**-8 < careless


def attention_of(row: Any, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, completion: int) -> Tensor:
    """The gradient of the prompt's values from one completion, and from the prompt itself with the first."""
    P, at = row.prompt_tokens, slice(row.prompt_tokens + 2 * completion, row.prompt_tokens + 2 * completion + 2)
    keys = torch.cat([k[:P], k[at]]).requires_grad_()
    values = torch.cat([v[:P], v[at]]).requires_grad_()
    queries = torch.cat([q[:P], q[at]])
    weights = dout.clone()[[*range(P), *range(at.start, at.stop)]]
    weights[:P] *= float(completion == 0)
    both = torch.cat([row.groups[0].prompt_ids, row.groups[0].completions[completion]])
    alone = one_row([Group(both, ())])
    SharedPrefix(alone).attend(0, queries, keys, values, 0.3).backward(weights)
    assert values.grad is not None
    return values.grad[:P]


def test_11_prompts_of_a_group_that_differ_are_an_error() -> None:
    """A template or a truncation that ran once for each sequence."""
    prompt, other, end = torch.arange(9), torch.tensor([0, 1, 2, 3, 4, 7, 6, 7, 8]), torch.tensor([5, 5])
    same = [torch.cat([prompt, end]), torch.cat([prompt, end[:1]])]
    (group,) = group_sequences(same, [9, 9], [0, 0])
    assert [len(c) for c in group.completions] == [2, 1]
    with pytest.raises(ValueError, match=r"sequences 0 and 1 are one group, but their prompts differ from token 5 on"):
        group_sequences([same[0], torch.cat([other, end])], [9, 9], [0, 0])
    with pytest.raises(ValueError, match=r"differ in length, 9 and 8 tokens"):
        group_sequences([same[0], same[1][:9]], [9, 8], [0, 0])


def test_12_what_is_computed_again_sees_its_own_row(load: Make, random_groups: MakeGroups) -> None:
    """Two rows of equal length under checkpointing, both forward before either goes back."""
    rows = [random_groups([(9, (4, 6))], seed=1), random_groups([(5, (6, 8))], seed=2)]
    model, wanted = load("qwen3"), []
    for row in rows:
        weighed(completion_logprobs(model, row).logp).backward()
        wanted.append(gradients(model))
    model = load("qwen3", gradient_checkpointing=True)
    losses = [weighed(completion_logprobs(model, row).logp) for row in rows]
    for loss, exact in zip(losses, wanted, strict=True):
        loss.backward()
        assert_close(gradients(model), exact, 1e-7)


@pytest.mark.parametrize(
    "options, forwards", [({}, [29]), ({"shared_prefix": False}, [45]), ({"budget": 26}, [4, 15, 10, 15, 10])]
)
def test_13_how_often_a_groups_weights_are_passed(
    options: dict[str, Any], forwards: list[int], load: Make, random_groups: MakeGroups
) -> None:
    """Sharded weights are gathered for each pass: a packed row needs one a group, three phases one and two a piece."""
    model, groups = load("qwen3"), random_groups([(4, (6, 0, 9, 5, 5))])
    seen = count_forwards(model.get_decoder().layers[0].mlp)
    weighed(completion_logprobs(model, groups, **options).logp).backward()
    assert seen == forwards
