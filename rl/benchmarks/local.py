"""A model directory, asked in this process with the generator of training.

Each sample's random stream hangs on the seed and on its question's place among all, so that what a killed evaluation had
not yet got comes out as it would have. It gives up many GPUs: serve the model and give its URL.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...engine import generate, load_tokenizer
from ...engine.generate import Completion
from ...engine.model import ModelConfig, read_config
from ..policy import Policy, model_source
from ..seeds import derive
from .endpoint import OnResponse, Pending
from .questions import Question
from .results import Response
from .settings import EvaluationConfig

TOGETHER = 64
"""Questions handed to the generator at a time: it batches within them, and their tokens are let go after."""

_PIECES, _PIECE_BYTES = 256, 1 << 14


class LocalModel:
    """Weights are loaded by `ask`: what is wrong with the questions shows before."""

    def __init__(self, config: EvaluationConfig) -> None:
        self.config = config
        local = config.local
        self._model = ModelConfig(
            config.model, dtype=local.dtype, device=local.device, yarn=local.yarn, rope_scaling=local.rope_scaling,
            trust_remote_code=local.trust_remote_code,
        )  # fmt: skip
        self.source = model_source(self._model)
        trust = config.local.trust_remote_code
        self.tokenizer = load_tokenizer(config.tokenizer or self.source, trust_remote_code=trust)

    def identity(self) -> dict[str, Any]:
        """What tells this model from another: its files, and how they are run."""
        folder = Path(self.source)
        config = folder / "config.json"
        weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        return {
            "kind": "directory", "name": self.config.model, "min_p and penalties": "off", "dtype": self.config.local.dtype, "yarn": self.config.local.yarn,
            "rope_scaling": None if self.config.local.rope_scaling is None else vars(self.config.local.rope_scaling),
            "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
            "weights": {file.name: _weights_sha256(file) for file in weights},
        }  # fmt: skip

    def check(self, questions: Sequence[Question]) -> None:
        """Raises ValueError if the model's positions end before the longest prompt with its answer does."""
        need = max(len(question.ids) for question in questions) + self.config.max_output
        m = self._model
        made = read_config(self.source, yarn=m.yarn, rope_scaling=m.rope_scaling, trust_remote_code=m.trust_remote_code)
        window = getattr(made.get_text_config(), "max_position_embeddings", None)
        if window is not None and need > window:
            raise ValueError(
                f"the longest prompt with its answer takes {need} tokens, but {self.config.model} has positions for {window}: "
                f"lower --max-input or --max-output, or stretch them (--local.yarn {-(-need // window)}.0)"
            )

    def ask(self, pending: Sequence[Pending], places: Sequence[int], count: int, on_response: OnResponse) -> None:
        """Hands every wanted sample in as it ends.

        Args:
            places: of the pending questions among all `count`, which their random streams hang on.
        """
        policy = Policy(self._model, self.config.generator())
        nothing = torch.zeros(1, dtype=torch.long)
        for start in range(0, len(pending), TOGETHER):
            share = places[start : start + TOGETHER]
            wanted = dict(zip(share, pending[start : start + TOGETHER], strict=True))
            prompts = [
                torch.from_numpy(wanted[i].question.ids).long() if i in wanted else nothing for i in range(count)
            ]

            def ended(place: int, sample: int, completion: Completion, wanted: dict[int, Pending] = wanted) -> None:
                one = wanted[place]
                if sample in one.samples:  # the others are kept from before
                    text = policy.text(completion)
                    made = Response(*one.question.key, sample, text, completion.finish_reason, len(completion.ids))
                    on_response(made)

            with policy.precision():
                generate(
                    policy.model, prompts, self.config.samples, self.config.sampling(), stop_ids=policy.stop_ids,
                    seed=derive(self.config.seed, "eval"), batch_tokens=policy.generator.batch_tokens, on_done=ended,
                    share=share,
                )  # fmt: skip


def _weights_sha256(file: Path) -> str:
    """Of pieces spread evenly over a file, and its size: tells fine-tunings apart without reading 60 GB.

    Not of its beginning alone: that is the embedding as a rule, which adapters leave as it was.
    """
    size, digest = file.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with file.open("rb") as opened:
        for piece in range(_PIECES):
            opened.seek(size * piece // _PIECES)
            digest.update(opened.read(_PIECE_BYTES))
    return digest.hexdigest()
