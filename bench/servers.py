"""vLLM's server for `rollout`: it is started, asked and brought new weights by the client that training uses.

`served` samples a group in one request, with vLLM's prefix cache, from which its members take the prompt, and without. The
server is as training has it: of the same dtype, where there is no GPU without compiled graphs, and there computing on all
cores but one, which vLLM keeps for its scheduler: on few cores that costs it much. `pushes` hands weights over to it.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longreach.engine import Sampling
from longreach.engine.generate import GeneratorConfig
from longreach.engine.model import ModelConfig

from .case import Case, Missing
from .generators import Sample
from .peers import need
from .timing import Task

START_S = 600.0
WAYS: dict[str, dict[str, Any]] = {
    "longreach, safetensors": {},
    "longreach, safetensors, unchecked": {"probe": False, "checksum_gb": 0.0},
}
"""Of handing weights over, with their settings of [generator.sync]: as in training, with a probe and checksums; or without."""


def served(folder: Path, case: Case, stack: ExitStack, *, python: str, cached: bool) -> Sample:
    """Raises Missing: no environment for vLLM, or none for its client."""
    generator = start(folder, case, stack, python, () if cached else ("--no-enable-prefix-caching",))
    prompts, rows = need("longreach.rl.prompts"), need("longreach.rl.rows")
    example = rows.Example(id="bench", benchmark="bench", answers=())

    def sample(prompt: Tensor, g: int, r: int) -> int:
        asked = [prompts.Prompt(example, tuple(prompt.tolist()))]
        made = generator.sample(asked, g, Sampling(r, 1.0), 0, lambda *_: None)
        return sum(len(one.ids) for group in made for one in group)

    return sample


def start(folder: Path, case: Case, stack: ExitStack, python: str, arguments: tuple[str, ...] = ()) -> Any:
    """A started `VllmGenerator` of the folder's model, with room for a whole group's keys and values."""
    client, serving = need("longreach.rl.serving.client"), need("longreach.rl.serving.config")
    command = need("longreach.rl.serving.command")
    policy = need("longreach.rl.policy").Policy(
        ModelConfig(str(folder), dtype=case.dtype, device=case.device), GeneratorConfig()
    )
    policy.stop_ids = []
    p, g, r = (case.dims[name] for name in "PGR")
    room = g * (p + r) * command.cache_bytes(policy.model.config, case.dtype) / command.GIB
    config = serving.ServingConfig(
        kind="vllm", python=python, args=arguments, cache_gib=1.0 + room, start_timeout_s=START_S, deadline_s=START_S,
        tries=1, restarts=0, environment={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        config.interpreter()
    except ValueError as error:
        raise Missing(str(error)) from error
    made = client.VllmGenerator(policy, config, folder / f"server-{'-'.join(arguments) or 'default'}")
    stack.callback(made.close)
    made.start(p + r)
    return made


def pushes(folder: Path, case: Case, stack: ExitStack, python: str) -> dict[str, Task]:
    """By way: hand-overs of ever new weights, all to one server."""
    generator = start(folder, case, stack, python)
    kinds, settings = need("longreach.rl.serving.sync_kinds"), need("longreach.rl.serving.sync_config")
    policy, urls = generator.policy, generator.servers

    def task(way: str, home: Path) -> Task:
        config = settings.SyncConfig(kind="safetensors", **WAYS[way])
        sync = kinds.weight_sync(policy, urls, str(folder), "bench", config, home)

        def change() -> None:
            sync.sums.forget(urls[0])  # the other way has been there in the meantime
            policy.version += 1
            with torch.no_grad():
                for weight in policy.model.parameters():
                    weight.mul_(1 + 2.0**-7)

        return Task(lambda _: sync.push(policy, policy.version).bytes, change)

    return {way: task(way, folder / f"handover-{number}") for number, way in enumerate(WAYS)}
