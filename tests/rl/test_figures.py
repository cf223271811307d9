"""The accuracy picture: every measured bucket is drawn at its height, on the whole scale, and nothing else is."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longreach.rl.figures import accuracy_figure, bucket_labels, stage_label

HEIGHTS = {"base": [0.05, 0.04], "sft": [0.6, 0.3], "phase1": [0.8, 0.45], "phase2": [0.9, None]}


def summary(chance: float | None = 0.06) -> dict[str, Any]:
    stages = [
        {
            "name": name,
            "buckets": [
                {"upper": upper, "accuracy": height, "stderr": 0.02, "n": 40}
                for upper, height in zip((256, 512), heights, strict=True)
            ],
        }
        for name, heights in HEIGHTS.items()
    ]
    return {"chance": chance, "stages": stages}


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, content: dict[str, Any]) -> Axes:
    """The axes of the figure that was saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        saved.append(figure)
        original(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert accuracy_figure(content, path) == path
    return saved[0].axes[0]


def test_bars_stand_at_the_measured_heights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axes = drawn(monkeypatch, tmp_path / "a.png", summary())
    bars = sorted(patch.get_height() for patch in axes.patches)  # pyright: ignore[reportAttributeAccessIssue]
    assert bars == sorted(height for heights in HEIGHTS.values() for height in heights if height is not None)
    assert axes.get_ylim()[0] == 0.0
    assert axes.get_ylim()[1] >= 1.0
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["1–256\nn = 40", "257–512\nn = 40"]
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["base model", "after SFT", "after phase 1", "after phase 2", "chance 0.06"]


def test_no_chance_no_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axes = drawn(monkeypatch, tmp_path / "a.png", summary(chance=None))
    legend = axes.get_legend()
    assert legend is not None
    assert not any("chance" in text.get_text() for text in legend.get_texts())


def test_png_is_twice_900_wide_and_repeatable(tmp_path: Path) -> None:
    first = accuracy_figure(summary(), tmp_path / "a.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", first[16:24]) == (1800, 920)
    assert accuracy_figure(summary(), tmp_path / "b.png").read_bytes() == first


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        accuracy_figure({"chance": 0.1, "stages": []}, tmp_path / "a.png")


def test_labels() -> None:
    assert bucket_labels([20_000, 60_000, None]) == ["1–20,000", "20,001–60,000", "> 60,000"]
    assert [stage_label(name) for name in ("phase10", "phased", "sft")] == ["after phase 10", "phased", "after SFT"]
