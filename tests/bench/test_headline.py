"""The headline: dense and shared are one update, the estimate says that it is one, and the table and picture are the rows'."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as bench
from bench import curve, headline, ops, results
from bench.case import Case, Contender, Gap

pytest.importorskip("peft", reason="peft isn't installed")

DIMS = {"P": 9, "G": 3, "R": 4, "layers": 2, "D": 64, "V": 50, "rank": 3}
CASE = Case("headline", DIMS, "float32", "cpu")
Row = dict[str, Any]


def an_update() -> headline.Update:
    torch.manual_seed(1)
    model: Any = headline.make_model(CASE).double()
    prompt, completions = torch.randint(50, (9,)), [torch.randint(50, (r,)) for r in (4, 1, 3)]
    return headline.Update(model, headline.Group(prompt, completions), torch.tensor([1.0, -0.5, 2.0]).double())


def test_the_completions_updates_add_up_to_the_shared_one() -> None:
    """Loss and every adapter's gradient: `parts` times one completion is an estimate of time, not of another update."""
    update = an_update()
    shared, dense = update.shared(), update.dense()
    assert len(shared) == len(dense) == len(update.adapters) == 2 * 7 * 2
    for name, one, other in zip(update.adapters, shared, dense, strict=True):
        assert one.norm() > 0, name
        assert (one - other).norm() <= 1e-6 * one.norm(), name  # transformers' norms are fp32
    whole = update.loss(update.group, update.advantages, shared=True)
    parts = [
        update.loss(headline.Group(update.group.prompt_ids, [c]), update.advantages[i : i + 1], shared=False)
        for i, c in enumerate(update.group.completions)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-6, atol=1e-9)
    assert abs(float(whole.detach())) > 0.1
    assert (update.dense()[0] - update.completion(0)[0]).norm() > 0.1 * update.dense()[0].norm()


def test_layers_are_computed_again_in_the_backward() -> None:
    update, calls = an_update(), [0]
    decoder: Any = update.model.get_decoder()
    decoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    update.shared()
    assert calls == [2]


def test_adapters_are_on_every_linear_layer_but_the_head() -> None:
    update = an_update()
    named = {name for name, m in update.model.named_modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A")}
    assert len(named) == 2 * 7
    assert {len(p) for name, p in update.adapters.items() if "lora_A" in name} == {DIMS["rank"]}
    assert not any(p.requires_grad for name, p in update.model.named_parameters() if "lora_" not in name)
    wide = [(m.in_features, m.out_features) for n, m in update.model.named_modules() if n in named and ".0." in n]
    assert sorted(wide) == sorted(headline.linear_shapes(DIMS, 32))


@pytest.mark.parametrize("changes", [{}, {"G": 1}, {"P": 1}, {"R": 1}, {"rank": 1}])
def test_flop_model(changes: dict[str, int]) -> None:
    """Every product and every pair of query and key by itself."""
    dims = {**DIMS, **changes}
    P, G, R, D = (dims[name] for name in ("P", "G", "R", "D"))
    model: Any = headline.make_model(Case("headline", dims, "float32", "cpu"))
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    for shared in (True, False):
        lengths = [(0, P), *[(P, R)] * G] if shared else [(0, P + R)] * G
        tokens = sum(own for _, own in lengths)
        pairs = sum(seen + i + 1 for seen, own in lengths for i in range(own))
        wanted = 4.0 * G * R * D * dims["V"] + 3.5 * 4 * D * dims["layers"] * pairs
        for layer in layers:
            wanted += 4 * tokens * layer.base_layer.weight.numel()
            wanted += 6 * tokens * sum(p.numel() for name, p in layer.named_parameters() if "lora_" in name)
        assert headline.flops(dims, 32, shared=shared) == wanted


def test_the_gpus_model_has_the_shape_of_8b() -> None:
    dims = ops.cases(headline, "headline", "cuda", "default")[0].dims
    per_layer = sum(a * b for a, b in headline.linear_shapes(dims, 128))
    assert dims["layers"] * per_layer == pytest.approx(6.95e9, rel=0.01)
    assert headline.linear_shapes(dims, 128)[1] == (4096, 8 * 128)


def test_a_small_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself; the same again measures nothing; the module prints the table and draws from the file."""
    path = tmp_path / "rows.json"
    command = ["headline", "--device", "cpu", "--shapes", "small", "--out", str(path), "--commit", "c"]
    assert bench.main(command) == 0
    rows = {row["contender"]: row for row in results.load(path)}
    shared, dense = rows[headline.SHARED], rows[headline.DENSE]
    assert (shared["parts"], shared["estimated"], dense["parts"], dense["estimated"]) == (1, False, 4, True)
    assert shared["median_s"] == shared["part_s"] and dense["median_s"] == 4 * dense["part_s"]
    for row in rows.values():
        assert row["rounds"] == 1 and row["peak_mib"] > 0
        assert row["tokens_per_s"] == pytest.approx((64 + 4 * 8) / row["median_s"])
    assert max(shared["gradient_errors"].values()) < 1e-4
    assert "gradient_errors" not in dense  # a part's gradients are not the group's
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert bench.main(command) == 0
    assert "0 rows written" in capsys.readouterr().out
    assert headline.main([str(path), "--plot", str(tmp_path / "curve.svg")]) == 0
    printed = capsys.readouterr().out
    assert "dense / shared" in printed and "P=64" in printed
    picture = (tmp_path / "curve.svg").read_text()
    assert "<svg" in picture


def test_without_peft_both_are_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    problem = headline.problem(CASE)
    assert [gap.name for gap in problem.contenders] == [headline.SHARED, headline.DENSE]
    assert all(isinstance(gap, Gap) and "peft can't be imported" in gap.reason for gap in problem.contenders)


def test_weights_that_do_not_fit_are_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(headline.AutoModelForCausalLM, "from_config", full)
    (first, _) = headline.problem(CASE).contenders
    assert (
        isinstance(first, Gap) and first.reason == "the weights alone don't fit: CUDA out of memory. Tried to allocate"
    )


def test_what_a_run_and_its_warm_up_compute() -> None:
    """Dense is one completion of the G; the warm-up is as little as 512 tokens and 64 a completion."""
    lengths: list[int] = []
    problem = headline.problem(Case("headline", {**DIMS, "P": 700, "R": 80}, "float32", "cpu"))
    (shared, dense) = problem.contenders
    assert isinstance(shared, Contender) and isinstance(dense, Contender)
    update = shared.part.__self__  # type: ignore[union-attr]
    update.model.get_input_embeddings().register_forward_hook(lambda m, args, out: lengths.append(args[0].numel()))
    for contender in (shared, dense):
        assert contender.part is not None
        contender.warm_up()
        contender.part()
    assert lengths == [512 + 3 * 64, 700 + 3 * 80, 512 + 64, 700 + 80]


@pytest.fixture
def measured(row: Callable[..., Row]) -> list[Row]:
    about: Row = {"op": "headline", "threads": None, "device": "GPU X", "held_mib": 16000.0}
    rows: list[Row] = []
    for P, shared, dense in ((1 << 15, 10.0, 5.0), (1 << 14, 4.0, 1.0)):
        dims = {**headline.EIGHT_B, "P": P}
        told = {"tokens_per_s": 2000.0, "peak_mib": 20000.0, **about, "dims": dims}
        rows.append(row(**told, contender=headline.SHARED, median_s=shared, parts=1, part_s=shared))
        rows.append(row(**told, contender=headline.DENSE, median_s=8 * dense, parts=8, part_s=dense))
    return rows


def test_table_of_rows(measured: list[Row], row: Callable[..., Row]) -> None:
    (short, long) = headline.pairs([*measured, row()])["GPU X"]
    dims = measured[0]["dims"]
    model = headline.flops(dims, 128, shared=False) / headline.flops(dims, 128, shared=True)
    assert headline.line(*long)[1:] == ["10", "40", "5", "4.00", f"{model:.2f}", "2000", "37.7", "37.7"]
    assert headline.line(*short)[1:5] == ["4", "8", "1", "2.00"]
    measured[3]["status"] = "gap"
    (short, _) = headline.pairs(measured)["GPU X"]
    assert headline.line(*short)[1:5] == ["4", "", "", ""] and headline.line(*short)[-1] == ""
    measured[0]["status"] = "gap"  # without the shared row there is nothing to compare
    assert [shared["dims"]["P"] for shared, _ in headline.pairs(measured)["GPU X"]] == [1 << 14]


def test_the_picture_shows_what_the_rows_say(measured: list[Row], tmp_path: Path, capsys: Any) -> None:
    found = headline.pairs(measured)
    svg = curve.draw(found, tmp_path / "curve.svg").read_text()
    for said in ("GPU X", "one completion, times 8", "4.0x", "2.0x", "16K", "32K", "peak GB"):
        assert said in svg, said
    assert headline.draw([measured[1]], tmp_path / "bars.svg").read_text().count("<svg") == 1  # dense alone: bars
    with pytest.raises(ValueError, match=r"bench/gpu\.sh headline first"):
        curve.draw({}, tmp_path / "none.svg")
    assert headline.main([str(tmp_path / "no-rows.json"), "--plot", str(tmp_path / "none.svg")]) == 2
    assert "no picture" in capsys.readouterr().err
    assert not (tmp_path / "none.svg").exists()
