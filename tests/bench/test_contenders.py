"""Every contender of every op does the case it is measured on: its values and gradients agree with fp64.

torch.compile is left out for its minutes; peers that aren't installed are gaps. The bench tells the same errors in
every row.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import exact, ops
from bench.case import Case, Contender, Gap

SMALL = {
    "linear_logprob": {"N": 16, "D": 8, "V": 50},
    "linear_policy_loss": {"N": 16, "D": 8, "V": 50},
    "policy_loss": {"N": 32, "sequences": 4},
    "attention": {"T": 24, "S": 24, "H": 4, "K": 2, "E": 8, "causal": 1},
    "step": {"P": 12, "G": 3, "R": 5, "layers": 1, "D": 64, "V": 40},
    "train_step": {"P": 12, "G": 3, "R": 5, "layers": 1, "D": 128, "V": 40},
    "headline": {"P": 12, "G": 3, "R": 5, "layers": 1, "D": 64, "V": 40, "rank": 3},
}
ALLOWED = {"torch", "numpy", "transformers", "longreach", "bench"}


def tiny(name: str, **changes: int) -> Any:
    return ops.load_op(name).problem(Case(name, {**SMALL[name], **changes}, "float32", "cpu"))


@pytest.mark.parametrize("name", ops.NAMES)
def test_contenders_agree_with_fp64(name: str) -> None:
    problem = tiny(name)
    truth = problem.exact()
    ours = 0
    for contender in problem.contenders:
        if isinstance(contender, Gap) or "compile" in contender.name or "Liger" in contender.name:
            continue
        assert isinstance(contender, Contender)
        with torch.no_grad():
            assert exact.value_error(contender.forward(), truth) < 1e-4, contender.name
        gradients = dict(zip(problem.gradients, contender.backward(contender.train()), strict=True))
        assert truth.gradients, name
        for label, gradient in truth.gradients.items():
            found = gradients[label]
            assert found is not None
            assert gradient.norm() > 0
            assert exact.relative_error(found, gradient) < 1e-4, (contender.name, label)
        ours += contender.ours
    assert ours


def test_attention_on_a_longer_prompt() -> None:
    problem = tiny("attention", T=8, causal=0)
    truth = problem.exact()
    assert problem.flops["forward"] == 4 * 4 * 8 * 8 * 24
    for contender in problem.contenders:
        if isinstance(contender, Contender):
            assert exact.value_error(contender.forward(), truth) < 1e-4


def test_a_missing_peer_has_a_name_and_a_reason() -> None:
    gaps = [item for item in tiny("linear_logprob").contenders if isinstance(item, Gap)]
    needed = {"longreach, triton", "Liger, fused linear CE", "cut-cross-entropy", "QuACK, chunked"}
    assert needed <= {gap.name for gap in gaps}
    assert all(gap.reason for gap in gaps)


def test_work_of_a_step_is_that_of_the_shared_prefix() -> None:
    """Twice the completions cost less than twice the whole: the prompt is counted once."""
    one, two = tiny("step", P=60, G=2).flops["both"], tiny("step", P=60, G=4).flops["both"]
    assert one < two < 1.5 * one


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ops.NAMES)
def test_cases_on_every_device(name: str, device: str) -> None:
    op = ops.load_op(name)
    for shapes in ops.SHAPES:
        cases = ops.cases(op, name, device, shapes)
        assert len(cases) == len(op.SIZES[device][shapes]) * len(op.DTYPES[device])
        assert len({case.label + case.dtype for case in cases}) == len(cases)
    assert ops.cases(op, name, device, "small")


def test_unknown_names_are_told() -> None:
    with pytest.raises(ValueError, match="did you mean 'linear_logprob'"):
        ops.load_op("linear_logprobs")
    with pytest.raises(ValueError, match="not in bfloat16"):
        ops.cases(ops.load_op("policy_loss"), "policy_loss", "cpu", "small", ["bfloat16"])


def test_bench_knows_kernels_and_engine_only(root: Path) -> None:
    """What it imports at the top of a module is there on any GPU machine; rl/ never."""
    for path in sorted((root / "bench").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in named if name.startswith(("longreach.rl", "rl"))], path
        for node in tree.body:
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                tops = {str(node.module).split(".")[0]}
            else:
                continue
            assert tops <= ALLOWED | set(__import__("sys").stdlib_module_names), (path, tops)
