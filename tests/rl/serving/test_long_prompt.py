"""A prompt of many chunks through vLLM itself: the completions' log-probs are the policy's own, at the far end of the window too.

16K tokens here, for the time it takes; the published phases' 120K were put through the same lines by hand (LOG.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Group, Sampling
from longreach.engine.generate import GeneratorConfig
from longreach.engine.model import ModelConfig
from longreach.rl.policy import Policy
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.config import ServingConfig

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT, SIZE, TOKENS = 16_384, 4, 16
CHUNK = 2048
ROUNDING = 1e-4
"""Of fp32 sums in another order."""


@pytest.fixture(scope="module")
def policy(served_policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(served_policy.config.path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = PROMPT + TOKENS
    (folder / "config.json").write_text(json.dumps(config))
    return Policy(ModelConfig(str(folder), device="cpu"), GeneratorConfig())


@pytest.fixture(scope="module")
def generator(policy: Policy, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmGenerator]:
    config = ServingConfig(
        kind="vllm", python=str(vllm_python), args=("--max-num-batched-tokens", str(CHUNK)),
        environment={"HF_HUB_OFFLINE": "1"}, start_timeout_s=240.0, deadline_s=600.0,
    )  # fmt: skip
    made = VllmGenerator(policy, config, tmp_path_factory.mktemp("servers"))
    try:
        made.start(PROMPT + TOKENS)
        yield made
    finally:
        made.close()


def test_a_prompt_that_fills_the_window(
    policy: Policy, generator: VllmGenerator, make_prompts: Callable[..., Any], record_property: Callable[..., None]
) -> None:
    [prompt] = make_prompts(PROMPT)
    [made] = generator.sample([prompt], SIZE, Sampling(TOKENS), 0, lambda *_: None)
    sampled = torch.tensor([x for completion in made for x in completion.logprobs], dtype=torch.float64)

    def off(begin: int) -> float:
        """From the policy's own, where it sees the prompt from there on."""
        group = Group(torch.tensor(prompt.ids[begin:]), [torch.tensor(completion.ids) for completion in made])
        with torch.no_grad():
            return float((policy.logprobs([group], 1.0).logp.double() - sampled).abs().max())

    error, without = off(0), off(CHUNK)
    record_property(
        "table", f"{PROMPT} tokens: largest difference {error:.1e}; without their first chunk {without:.1e}"
    )
    assert error < ROUNDING < without / 10, "a chunk that was lost would show"
