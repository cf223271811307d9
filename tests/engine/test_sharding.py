"""Sharded and copied weights: gradients, norms, updates, samples and states are those of one process; what is gathered, and how often.

One spawn of two ranks runs every case (`sharding_rank.py`): each rank computes half of the groups in two micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharding_rank.py")
LAYERS = 3
CASES = ("tied", "untied", "copied", "autocast", "bf16-lora")
EXACT = 3e-6
"""fp32, relative to a gradient's largest entry: sums of about a hundred terms in another order."""
HALF = 2.0**-6
"""Where bfloat16 computes: each of four products of micro-batches is rounded (2^-9), and rows of other length round elsewhere."""
TOLERANCES = {"autocast": HALF, "bf16-lora": HALF}


@pytest.fixture(scope="module")
def ranks(start_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharding")
    started = start_ranks(2, SCRIPT, folder)
    assert [rank.wait(120.0) for rank in started] == [0, 0], "\n".join(rank.err.read_text()[-3000:] for rank in started)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def worst(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, str]:
    return max((((a - b).abs().max() / b.abs().max()).item(), name) for name, (a, b) in pairs.items())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_sums_over_ranks(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        made = rank[case]
        assert made["without"] == []
        error, name = worst(made["gradients"])
        assert error < TOLERANCES.get(case, EXACT), name
        assert all(a.dtype == b.dtype for a, b in made["gradients"].values())


@pytest.mark.parametrize("case", CASES)
def test_the_norm_is_global_and_the_update_that_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    norms = [rank[case]["norms"] for rank in ranks]
    assert norms[0][0] == norms[1][0], "all ranks scale alike"
    assert norms[0][0] == pytest.approx(norms[0][1], rel=TOLERANCES.get(case, EXACT))
    assert norms[0][0] > 0.5, "else nothing is clipped"
    # AdamW's first update is the learning rate times a sign, wherever the gradient is larger than its rounding
    for ours, theirs in ranks[0][case]["update"].values():
        moved = (ours - theirs).abs() > 1e-5
        assert moved.float().mean() < (0.05 if case in TOLERANCES else 0.002)


@pytest.mark.parametrize("case", ["tied", "untied", "autocast", "bf16-lora"])
def test_a_unit_is_gathered_once_each_way_and_the_head_once(ranks: list[dict[str, Any]], case: str) -> None:
    """Two micro-batches: each layer for the forward and again for the backward (the last one stays), the rest once."""
    assert ranks[0][case]["sharded"] > 0
    assert ranks[0][case]["gathers"] <= 2 * (2 * LAYERS + 1)
    trained_units = LAYERS if case == "bf16-lora" else LAYERS + 1
    assert ranks[0][case]["scatters"] == 2 * trained_units


def test_averages_that_know_no_shards_are_refused(ranks: list[dict[str, Any]]) -> None:
    assert "sharded over ranks" in ranks[0]["tied"]["refusal"]
    assert "sharded over ranks" not in ranks[0]["copied"]["refusal"]


def test_copied_weights_are_not_sharded(ranks: list[dict[str, Any]]) -> None:
    assert (ranks[0]["copied"]["sharded"], ranks[0]["copied"]["gathers"]) == (0, 0)


@pytest.mark.parametrize("case", ["tied", "untied", "copied"])
def test_each_rank_generates_its_share_of_what_one_process_generates(ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        ours, theirs = rank[case]["drawn"], rank[case]["alone"]
        assert [[c.ids for c in group] for group in ours] == [[c.ids for c in group] for group in theirs]
    assert [len(rank[case]["drawn"]) for rank in ranks] == [3, 1]


@pytest.mark.parametrize("case", CASES)
def test_states_cross_files_and_one_rank_keeps_the_weights(ranks: list[dict[str, Any]], case: str) -> None:
    assert all(rank[case]["restored"] for rank in ranks)
    assert ranks[1][case]["state"] == {}
    state = ranks[0][case]["state"]
    if case == "tied":
        assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    for name, (ours, _) in ranks[0][case]["update"].items():
        assert torch.equal(state[name], ours)
