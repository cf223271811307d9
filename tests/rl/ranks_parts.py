"""One of three ranks of tests/rl/test_ranks.py: FOLDER. What `Ranks` and the reward do between ranks; results in FOLDER/RANK.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from longreach.engine.launch import join
from longreach.engine.mesh import ParallelConfig
from longreach.kernels import Mean
from longreach.rl.judge import Case, Judge
from longreach.rl.ranks import Ranks
from longreach.rl.rewards import Reward, RewardConfig
from longreach.rl.rows import Example


class CountingJudge(Judge):
    """Says yes to predictions with an even number; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def verdicts(self, cases: Sequence[Case]) -> list[float | None]:
        self.asked += [case.prediction for case in cases]
        return [None if case.prediction.endswith("5") else float(case.prediction[-1] in "02468") for case in cases]

    def metrics(self) -> dict[str, float]:
        return {"judge/calls": float(len(self.asked))}


def main(folder: Path) -> None:
    calls: list[int] = []

    def batch_relative(completions: Sequence[str], **_: Any) -> list[float]:
        """Sees the whole batch, or its values would differ."""
        calls.append(len(completions))
        return [i / len(completions) for i in range(len(completions))]

    with join() as job:
        ranks = Ranks(job, job.connect(ParallelConfig(timeout_s=60.0), torch.device("cpu")))
        judge = CountingJudge()
        reward = Reward(RewardConfig(function="unused:f"), batch_relative, judge, ranks)
        texts = [f"The answer is {i % 8}." for i in range(12)]
        examples = [Example(f"e{i}", "x", ("99",), question="How many?") for i in range(len(texts))]
        scored = reward.score(examples, texts, texts, [[1]] * len(texts), ["stop"] * len(texts))
        rows = ranks.rows([3, 9, 1, 7])
        mine = {i: torch.full((2, i + 1), float(i)) for i in rows if i is not None}
        means = {"loss": Mean(torch.tensor(2.0 + job.rank), torch.tensor(1.0))} if job.rank else {}
        (folder / f"{job.rank}.json").write_text(
            json.dumps(
                {
                    "rewards": [one.reward for one in scored], "parts": [one.parts for one in scored], "calls": calls,
                    "asked": judge.asked, "metrics": reward.metrics(), "rows": rows,
                    "share": ranks.share([5.0, 1.0, 1.0, 1.0, 3.0]),
                    "merged": [x.tolist() for x in ranks.merge_rows(mine, [1, 2, 3, 4], torch.empty(2, 0))],
                    "total": ranks.total(means)["loss"].value, "first": ranks.first(lambda: f"rank {job.rank}"),
                    "any": [ranks.any(job.rank == 2), ranks.any(False)], "every": ranks.every(job.rank),
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
