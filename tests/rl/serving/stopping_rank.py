"""One rank of test_stopping.py: MODEL URL OUT. Samples three groups with the others and doesn't wait for one."""

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

model, url, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
with join() as job:
    ranks = Ranks(job, job.connect(ParallelConfig(), pick_device("cpu")))
    config, told = ServingConfig(kind="vllm", urls=(url,)), []
    policy = Policy(ModelConfig(model, device="cpu"), config, ranks=ranks)
    served = VllmGenerator(policy, config, out)
    served.start(100)
    prompts = [Prompt(Example(f"p{n}", "b", ("x",), text=""), tuple(range(10, 10 + n))) for n in (9, 30, 12)]
    made = served.sample_most(prompts, (), 1, 2, Sampling(4), 1, lambda p, i, _c: told.append([p, i]))
    text = {"made": [[c.ids for c in group] for group in made], "told": sorted(told)}
    (out / f"{ranks.rank}.json").write_text(json.dumps(text))
    served.close()
