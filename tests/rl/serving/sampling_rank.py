"""One rank of test_client.py: MODEL URL OUT. Samples from a server with the others, and fails with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from longreach.engine import Sampling
from longreach.engine.launch import join
from longreach.engine.mesh import ParallelConfig
from longreach.engine.model import ModelConfig, pick_device
from longreach.rl.data import Example
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.ranks import Ranks
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.config import ServingConfig
from longreach.rl.serving.http import ServerError

model, url, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
with join() as job:
    ranks = Ranks(job, job.connect(ParallelConfig(), pick_device("cpu")))
    config, handed, told = ServingConfig(kind="vllm", urls=(url,), tries=1), [], []
    policy = Policy(ModelConfig(model, device="cpu"), config, ranks=ranks)
    policy.served = VllmGenerator(policy, config, out, hand_over=lambda p, urls: handed.append([p.version, list(urls)]))
    policy.served.start(100)
    policy.version = 3
    prompts = [Prompt(Example(f"p{n}", "b", ("x",), text=""), tuple(range(10, 10 + n))) for n in (9, 30, 12)]
    made = policy.sample(prompts, 2, Sampling(4), 1, lambda p, i, _c: told.append([p, i]))
    try:
        policy.sample([Prompt(prompts[0].example, tuple(range(10, 23)))], 2, Sampling(4), 1)
        failed = ""
    except ServerError as error:
        failed = str(error)
    (out / f"{ranks.rank}.json").write_text(
        json.dumps({
            "made": [[c.ids for c in group] for group in made], "told": sorted(told), "handed": handed, "failed": failed,
            "metrics": policy.generation_metrics(),
        })
    )  # fmt: skip
    policy.served.close()
