"""Positions stretched for prompts longer than a model was trained on: transformers' YaRN, llama3 and linear scalings.

Written into the model's configuration before it is loaded, so that trainer, generator and evaluation turn positions alike,
and into each saved config.json, where `from_pretrained` and vLLM read it. What it computes, YaRN's temperature (0.1 ln s + 1
on cos and sin) included, is transformers' own. `dynamic` and `longrope`, which stretch by the length of each call, are refused
in `support`: completions of a packed row would get each other's positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig

_OPTIONS: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "linear": (),
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Llama 3.1's; transformers wants them written out."""


@dataclass(frozen=True)
class RopeScaling:
    """`factor` times the `original` positions (None: those that the model's config names).

    Qwen3's config names 40,960 positions, of which 8,192 are for the answer; its authors stretch from `original = 32768`.
    The other keys are transformers' own, for the kind that has them; None is its default.
    """

    kind: str
    factor: float
    original: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _OPTIONS:
            raise ValueError(f"model.rope_scaling.kind is {self.kind!r}: it must be one of {', '.join(_OPTIONS)}")
        if not 1.0 < self.factor < math.inf:
            raise ValueError(f"model.rope_scaling.factor must be a factor above 1, not {self.factor}")
        if self.original is not None and self.original < 1:
            raise ValueError(f"model.rope_scaling.original must be a number of positions, not {self.original}")
        for name, value in self._given().items():
            if name not in _OPTIONS[self.kind]:
                raise ValueError(f"model.rope_scaling.{name} does nothing with kind = {self.kind!r}: leave it out")
            if not 0.0 < value < math.inf:
                raise ValueError(f"model.rope_scaling.{name} must be a positive number, not {value}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            parts = {"beta_slow": 1.0, "beta_fast": 32.0, **_LLAMA3, **self._given()}
            if not parts[low] < parts[high]:
                raise ValueError(f"model.rope_scaling.{low} = {parts[low]} must be below {high} = {parts[high]}")

    def _given(self) -> dict[str, float]:
        names = {name for names in _OPTIONS.values() for name in names}
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}

    def apply(self, config: PreTrainedConfig, path: str | Path) -> None:
        """Writes it into the configuration, with the longer window.

        Raises:
            ValueError: the model's positions are stretched already, or it has none that turn.
        """
        text = config.get_text_config()
        rope = dict(getattr(text, "rope_parameters", None) or {})
        if not rope or any(isinstance(part, dict) for part in rope.values()):
            what = "has no rotary positions" if not rope else "turns the positions of its layers in several ways"
            raise ValueError(f"{path} {what}, which can't be stretched: leave model.yarn and model.rope_scaling out")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"{path} already stretches its positions (rope_type {rope['rope_type']!r}, window "
                f"{text.max_position_embeddings}): leave model.yarn and model.rope_scaling out"
            )
        original = self.original or text.max_position_embeddings
        rope.update(rope_type=self.kind, factor=self.factor)
        if self.kind != "linear":
            rope.update(original_max_position_embeddings=original)
        rope.update({**(_LLAMA3 if self.kind == "llama3" else {}), **self._given()})
        text.rope_parameters = rope
        text.max_position_embeddings = int(original * self.factor)
