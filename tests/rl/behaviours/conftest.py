"""A run folder with hand-made responses, whose reasoning grows step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name = "hand-made"
[model]
path = "none"
[data]
train = "{folder}/train.jsonl"
eval = ["{folder}/eval.jsonl"]
[[phases]]
upper = 100
max_completion = 10
steps = 3
learning_rate = 1e-4
[rl]
micro_batch_tokens = 1000
[reward]
rule = true
"""
SAID = (
    "First, I need to find the year.", "According to the text, it was 1998.", "Wait, that is the second edition.",
    "Let me verify the year.", "It says “the plant in Lyon was closed”.", "Wait, no.", "Let me check the sum.",
)  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def reasoning(step: int, prompt: int, sample: int) -> str:
    """A response that shows more with every step, and other things from sample to sample."""
    words = [SAID[(prompt + k) % len(SAID)] for k in range(step + sample)]
    return f"<think>{' '.join(words)} So {prompt}.</think>Therefore, the answer is {prompt}. Wait, let me verify."


def build_run(run: Path, steps: int = 3, prompts: int = 4, samples: int = 2) -> Path:
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(RECIPE.format(folder=run))
    for role in ("train", "eval"):
        rows = [
            {"id": f"{role}-{p}", "context": "In 1998 the plant  in Lyon was closed.", "question": "When?", "answers": ["1998"], "benchmark": "b"}
            for p in range(prompts)
        ]  # fmt: skip
        write_lines(run / f"{role}.jsonl", rows)
    for step in range(1, steps + 1):
        rows = [
            {
                "step": step, "stage": "phase1", "prompt_id": f"train-{p}", "benchmark": "b", "reward": (step + p + s) % 3 / 2,
                "completion": reasoning(step, p, s), "completion_ids": [1], "logprobs": [0.0],
            }
            for p in range(prompts) for s in range(samples)
        ]  # fmt: skip
        write_lines(run / "rollouts" / "phase1" / f"{step:06d}.jsonl", rows)
    for stage, step in (("base", 0), ("phase1", steps)):
        rows = [
            {
                "prompt_id": f"eval-{p}", "benchmark": "b", "completions": [reasoning(step, p, s) for s in range(samples)],
                "scores": [1.0, None][:samples], "question": "When?", "answers": ["1998"], "prompt_length": 5,
            }
            for p in range(prompts)
        ]  # fmt: skip
        write_lines(run / "evals" / f"{stage}.completions.jsonl", rows)
        (run / "evals" / f"{stage}.json").write_text(
            json.dumps({"stage": stage, "step": step, "k": samples, "buckets": []})
        )
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "run")
