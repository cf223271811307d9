"""A shared prompt changes nothing: against one sequence per completion through transformers' own attention, in fp64.

Loss and every parameter gradient, for the packed row and for three phases; and mutants, wrong in ways that a rewrite
could be wrong in, which the same comparison must tell from the true path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from longreach.engine import Group, completion_policy_loss, three_phase
from longreach.engine import attention as engine_attention
from longreach.engine.attention import Layout, SharedPrefix
from longreach.engine.completions import decode, model_head
from longreach.engine.packing import PackedRow, one_row
from longreach.kernels import linear_policy_loss

FAMILIES = ["llama", "qwen2", "qwen3"]

CASES: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "ragged, one empty, one of a token": [(9, (4, 0, 6, 1))],
    "completions that outweigh it": [(4, (6, 0, 9, 1, 5))],
    "one completion": [(7, (5,))],
    "a prompt of one token": [(1, (3, 2))],
    "a prompt of one token, outweighed": [(1, (3, 2, 0, 2))],
    "two groups": [(6, (3, 1)), (1, (4,))],
    "three groups": [(5, (2, 4)), (8, (0, 3, 3)), (2, (1,))],
}
"""Prompt and completion lengths of the groups of one row."""

THREE_PHASES = {"completions that outweigh it": (19, 24), "a prompt of one token, outweighed": (6, 7)}
"""Budgets that let one long completion in at a time, or several."""

CLEAN, UNTOUCHED, NOTICED = 1e-12, 1e-6, 1e-3
"""Relative to a gradient's largest entry. fp64 leaves about 1e-14; transformers' own norms round to fp32 in between; a
fault is as large as what it leaves out."""


class Norm(nn.Module):
    """RMSNorm as transformers writes it, without the cast to fp32."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def clean(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every RMSNorm instance replaced by one that computes in fp64; parameters and names stay."""
    norms = [(name, m) for name, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(norms) >= 5
    for name, norm in norms:
        model.set_submodule(name, Norm(norm.weight, norm.variance_epsilon))  # type: ignore[arg-type]
    return model


def untouched(model: PreTrainedModel) -> PreTrainedModel:
    return model


class Result(NamedTuple):
    loss: float
    gradients: dict[str, Tensor]


class Inputs(NamedTuple):
    """One GRPO update whose old log-probs are far enough off for ratios to be clipped on both sides."""

    groups: list[Group]
    old: Tensor
    advantages: Tensor

    @property
    def sequences(self) -> int:
        return sum(len(g.completions) for g in self.groups)

    @property
    def lengths(self) -> list[int]:
        return [len(c) for g in self.groups for c in g.completions]


def own_logprobs(model: PreTrainedModel, groups: list[Group]) -> list[Tensor]:
    """Each completion as a sequence of its own through transformers' model, attention and logits."""
    made = []
    for prompt, completion in ((g.prompt_ids, c) for g in groups for c in g.completions):
        ids = torch.cat([prompt, completion])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        made.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return made


def result(model: PreTrainedModel, loss: Tensor) -> Result:
    loss.backward()
    return Result(loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def dense(model: PreTrainedModel, inputs: Inputs) -> Result:
    """The update written out over the unshared sequences."""
    terms = []
    olds, advantages = inputs.old.split(inputs.lengths), inputs.advantages.split(inputs.lengths)
    for logp, old, advantage in zip(own_logprobs(model, inputs.groups), olds, advantages, strict=True):
        ratio = (logp - old).exp()
        token = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        terms.append(token.sum() / max(1, len(token)))
    return result(model, torch.stack(terms).sum() / inputs.sequences)


def ours(model: PreTrainedModel, inputs: Inputs, **options: Any) -> Result:
    made = completion_policy_loss(
        model, inputs.groups, inputs.old, inputs.advantages, kind="grpo", normalizer=inputs.sequences, **options
    )
    return result(model, made.loss)


def difference(made: Result, exact: Result) -> float:
    """The largest relative difference of the loss and of any parameter's gradient."""
    assert made.gradients.keys() == exact.gradients.keys() and len(exact.gradients) > 10
    found = [abs(made.loss - exact.loss) / abs(exact.loss)]
    for name, wanted in exact.gradients.items():
        assert wanted.abs().max() > 0, name
        found.append(float((made.gradients[name] - wanted).abs().max() / wanted.abs().max()))
    return max(found)


Make = Callable[..., Any]


@pytest.fixture
def make_inputs(random_groups: Callable[..., list[Group]], plain: Make) -> Callable[..., Inputs]:
    def make(case: str, name: str = "qwen3") -> Inputs:
        groups, draw = random_groups(CASES[case]), torch.Generator().manual_seed(1)
        with torch.no_grad():
            logp = torch.cat(own_logprobs(plain(name, torch.float64), groups))
        old, advantages = (torch.randn(len(logp), generator=draw, dtype=torch.float64) for _ in range(2))
        return Inputs(groups, logp + 0.3 * old, advantages)

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_every_gradient_are_those_of_the_dense_path(
    name: str, case: str, load: Make, plain: Make, make_inputs: Callable[..., Inputs]
) -> None:
    inputs = make_inputs(case, name)
    for change, bound in ((clean, CLEAN), (untouched, UNTOUCHED)):
        exact = dense(change(plain(name, torch.float64)), inputs)
        shared = ours(change(load(name, dtype=torch.float64)), inputs)
        assert difference(shared, exact) < bound


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", THREE_PHASES)
def test_three_phases_are_as_exact(
    name: str, case: str, load: Make, plain: Make, make_inputs: Callable[..., Inputs]
) -> None:
    inputs = make_inputs(case, name)
    for change, bound in ((clean, CLEAN), (untouched, UNTOUCHED)):
        exact = dense(change(plain(name, torch.float64)), inputs)
        for budget in THREE_PHASES[case]:
            model = change(load(name, dtype=torch.float64))
            asked: list[int] = []
            nn.Module.register_forward_pre_hook(
                model.get_decoder(),
                lambda _, args, given, asked=asked: asked.append(given["input_ids"].numel()),
                with_kwargs=True,
            )
            made = ours(model, inputs, budget=budget)
            assert max(asked) < inputs.groups[0].tokens  # no row held all of it
            assert difference(made, exact) < bound


def test_the_unshared_path_is_the_dense_path(load: Make, plain: Make, make_inputs: Callable[..., Inputs]) -> None:
    inputs = make_inputs("three groups")
    exact = dense(clean(plain("qwen3", torch.float64)), inputs)
    unshared = ours(clean(load("qwen3", dtype=torch.float64)), inputs, shared_prefix=False)
    assert difference(unshared, exact) < CLEAN


class Shifted(PackedRow):
    def position_ids(self) -> Tensor:
        return super().position_ids() + (torch.arange(self.tokens) >= self.prompt_tokens)


class RunningOn(PackedRow):
    def position_ids(self) -> Tensor:
        return torch.arange(self.tokens)


class Swapped(PackedRow):
    """The row's first two completions stand in each other's place."""

    def input_ids(self) -> Tensor:
        ids, P, a, b = super().input_ids(), self.prompt_tokens, *self.completion_lengths[:2]
        return torch.cat([ids[:P], ids[P + a : P + a + b], ids[P : P + a], ids[P + a + b :]])


class PromptsSwapped(PackedRow):
    """The first two prompts stand in each other's place."""

    def input_ids(self) -> Tensor:
        ids, a, b = super().input_ids(), *self.prompt_lengths[:2]
        return torch.cat([ids[a : a + b], ids[:a], ids[a + b :]])


class Late(PackedRow):
    """Each token predicts itself."""

    def loss_rows(self) -> Tensor:
        return super().loss_rows() + 1


class Neighbour(PackedRow):
    """A completion's first token is predicted by the token before it in the row."""

    def loss_rows(self) -> Tensor:
        starts = [self.prompt_tokens + int(c) for c in self.cu_completions[:-1]]
        return torch.cat([torch.arange(a - 1, a - 1 + n) for a, n in zip(starts, self.completion_lengths, strict=True)])


MERGE = "out_c, lse_c = attention.merge(out_x, lse_x, out_c, lse_c)"
IN_ATTENTION: dict[str, tuple[str, str]] = {
    "nothing is changed": (MERGE, MERGE),
    "the merge is dropped": (MERGE, "out_c, lse_c = out_c, lse_c"),
    "a completion sees its prompt alone": (MERGE, "out_c, lse_c = out_x, lse_x"),
    "the prompt is counted twice": (MERGE, f"{MERGE}; {MERGE}"),
    "completions of a group see each other": (
        "call(True, row.cu_completions, row.cu_completions)", "call(True, row.cu_queries, row.cu_queries)",
    ),
    "the backward has the lse of a part": ("torch.cat([lse, lse_c], dim=-1)", "torch.cat([lse, lse_x], dim=-1)"),
    "the prompt's keys get no gradient from completions": ("dk.add_(dk_x)", "dk"),
    "the prompt's values get theirs for one completion of all": ("dv.add_(dv_x)", "dv.add_(dv_x, alpha=1 / 3)"),
    "the prompt's keys get theirs G times": ("dk.add_(dk_x)", "dk.add_(dk_x, alpha=3)"),
    "queries get no gradient from the prompt": ("dq_x.add_(dq_c)", "dq_c"),
}  # fmt: skip
"""Texts of the layout's code and what they become; a backward's mutants leave the loss as it is."""

IN_THREE_PHASES: dict[str, tuple[str, str]] = {
    "nothing is changed": ("total.add_(part)", "total.add_(part)"),
    "the last piece's gradient replaces the others": ("total.add_(part)", "total.copy_(part)"),
    "the merge is dropped": ("attention.merge(out_x, lse_x, out_c, lse_c)", "(out_c, lse_c)"),
    "the prompt's last token gets no gradient": ("roots = [(last, dlast)]", "roots = []"),
    "positions start again at 0": ("row.position_ids()[P:]", "row.position_ids()[P:] - P"),
    "completions of a piece see each other": (', "cu_seqlens_q": self.cu_completions}', "}"),
    "parameters get the last piece's gradient": ("else total + part", "else part"),
}  # fmt: skip


def edited(module: ModuleType, text: str, becomes: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A copy of the module with one text replaced; the product itself is left alone."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8").partition("AttentionInterface.register(")[0]
    if "cu_seqlens_q" in text:  # both sides of the call
        source = source.replace('        own["cu_seqlens_k"] = self.cu_completions\n', "")
    assert source.count(text) == 1, f"{module.__name__} has {source.count(text)} times: {text}"
    copy = ModuleType("longreach.engine.edited")
    copy.__package__ = "longreach.engine"
    monkeypatch.setitem(sys.modules, copy.__name__, copy)
    exec(compile(source.replace(text, becomes), str(module.__file__), "exec"), copy.__dict__)
    return copy


def loss_of(model: PreTrainedModel, inputs: Inputs, hidden_ND: Tensor, targets_N: Tensor) -> Result:
    sequence_ids = torch.arange(inputs.sequences).repeat_interleave(torch.tensor(inputs.lengths))
    made = linear_policy_loss(
        hidden_ND, model_head(model).weight_VD, targets_N, inputs.old, inputs.advantages, sequence_ids,
        kind="grpo", normalizer=inputs.sequences,
    )  # fmt: skip
    return result(model, made.loss)


def of_row(model: PreTrainedModel, inputs: Inputs, row: PackedRow, layout: Layout) -> Result:
    hidden = decode(model, row.input_ids(), row.position_ids(), layout)
    return loss_of(model, inputs, hidden[row.loss_rows()], row.targets())


@pytest.fixture(scope="module")
def known() -> dict[str, Result]:
    """Results of the dense path that several mutants are held against."""
    return {}


@pytest.fixture
def mutant_difference(
    load: Make, plain: Make, make_inputs: Callable[..., Inputs], known: dict[str, Result]
) -> Callable[..., float]:
    """mutant_difference(case, run): of `run(model, inputs)` from the dense path."""

    def make(case: str, run: Callable[[PreTrainedModel, Inputs], Result]) -> float:
        inputs = make_inputs(case)
        if case not in known:
            known[case] = dense(clean(plain("qwen3", torch.float64)), inputs)
        return difference(run(clean(load("qwen3", dtype=torch.float64, verify=False)), inputs), known[case])

    return make


@pytest.mark.parametrize("kind", [PackedRow, Shifted, RunningOn, Swapped, PromptsSwapped, Late, Neighbour])
def test_a_row_laid_out_wrongly_is_noticed(kind: type[PackedRow], mutant_difference: Callable[..., float]) -> None:
    def run(model: PreTrainedModel, inputs: Inputs) -> Result:
        true = one_row(inputs.groups)
        row = kind(true.groups, true.members)
        return of_row(model, inputs, row, SharedPrefix(row))

    found = mutant_difference("three groups", run)
    assert found < CLEAN if kind is PackedRow else found > NOTICED


@pytest.mark.parametrize("fault", IN_ATTENTION)
def test_a_fault_in_the_three_calls_is_noticed(
    fault: str, mutant_difference: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = edited(engine_attention, *IN_ATTENTION[fault], monkeypatch)

    def run(model: PreTrainedModel, inputs: Inputs) -> Result:
        row = one_row(inputs.groups)
        return of_row(model, inputs, row, changed.SharedPrefix(row))

    found = mutant_difference("three groups", run)
    assert found < CLEAN if fault == "nothing is changed" else found > NOTICED


@pytest.mark.parametrize("fault", IN_THREE_PHASES)
def test_a_fault_in_three_phases_is_noticed(
    fault: str, mutant_difference: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = edited(three_phase, *IN_THREE_PHASES[fault], monkeypatch)

    def run(model: PreTrainedModel, inputs: Inputs) -> Result:
        (group,), (row,) = inputs.groups, [one_row(inputs.groups)]
        parameters = list(model.get_decoder().parameters())
        pieces = [[0, 1, 4], [2], [3]]
        hidden = changed.three_phases(partial(decode, model), parameters, group, pieces, "auto")
        return loss_of(model, inputs, hidden[row.loss_rows() - (row.prompt_tokens - 1)], row.targets())

    found = mutant_difference("completions that outweigh it", run)
    assert found < CLEAN if fault == "nothing is changed" else found > NOTICED
