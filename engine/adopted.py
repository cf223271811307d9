"""A model that another program has loaded and owns (TRL, verl), with our attention in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from .attention import NAME
from .support import refuse_config, refuse_model, verify_model


class Adopted:
    """Puts our attention into a model, a peft one too, in place.

    Args:
        verify: compare log-probs with the model's own on a few tokens; not where its weights aren't there yet.

    Raises:
        ValueError: a feature that our attention can't honour, or log-probs that differ (`support`).
    """

    def __init__(self, model: Any, *, verify: bool = True) -> None:
        self.model = base_model(model)
        before = self.model.config._attn_implementation
        assert before is not None  # transformers has picked one by now
        self.before: str = before
        refuse_config(self.model.config, type(self.model).__name__)
        refuse_model(self.model, type(self.model).__name__)
        self.model.set_attn_implementation(NAME)
        if not verify:
            return
        try:
            verify_model(self.model)
        except ValueError:
            self.model.set_attn_implementation(before)
            raise

    @contextmanager
    def released(self) -> Iterator[None]:
        """The attention that it came with, for what needs a mask: generation from a padded batch."""
        self.model.set_attn_implementation(self.before)
        try:
            yield
        finally:
            self.model.set_attn_implementation(NAME)


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model; peft's adapters live inside it."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
