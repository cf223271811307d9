"""A recipe's servers in the planner's words: how many, over how many GPUs each, and whose GPUs those are.

They have GPUs of their own where [generator] says which (`devices`) or where servers run already (`urls`), unless the weights'
way says that they share the trainer's (`sync.sleep`, `sync.kind = "ipc"`). What a server spreads over is in `generator.args`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.planner_memory import Servers
from .recipe import Recipe
from .serving.command import GIB, computed_in
from .serving.config import ServingConfig

TENSOR = ("--tensor-parallel-size", "-tp")
PIPELINE = ("--pipeline-parallel-size", "-pp")
REPLICAS = ("--data-parallel-size", "-dp")
UTILIZATION = ("--gpu-memory-utilization",)


def servers_of(recipe: Recipe, serve: int = 0) -> Servers | None:
    """None where the trainer's own model generates.

    Args:
        serve: GPUs of each server where its arguments don't say, as of one that runs already; 0: one.

    Raises:
        ValueError: arguments, devices and `serve` contradict each other, or aren't numbers.
    """
    config = recipe.generator
    if config.kind == "local":
        return None
    tensor = int(_number(config, TENSOR, 0) * _number(config, PIPELINE, 1)) or max(1, serve)
    replicas = int(_number(config, REPLICAS, 1))
    if serve and serve != tensor:
        raise ValueError(f"--serve {serve}, but generator.args spreads a server over {tensor} GPUs: leave --serve out")
    for entry in config.devices:
        if len(entry.split(",")) != tensor * replicas:
            raise ValueError(
                f"generator.devices gives a server {entry!r}, and generator.args spreads it over {tensor * replicas} GPUs "
                "(--tensor-parallel-size, --data-parallel-size): let them agree"
            )
    shared = config.sync.sleep > 0 or config.sync.kind == "ipc" or not (config.urls or config.devices)
    way = config.sync.kind
    if way == "auto":
        way = "safetensors" if recipe.model.lora is None or config.sync.sleep == 2 else "lora"
    return Servers(
        count=len(config.urls) or config.servers,
        tensor=tensor,
        replicas=replicas,
        apart=not shared,
        dtype=config.dtype or computed_in(recipe.model),
        utilization=_number(config, UTILIZATION, 0.9),
        cache=config.cache_gib * GIB,
        concurrency=config.concurrency,
        window=config.max_model_len or recipe.served_window(),
        sync=way,
        sleep=config.sync.sleep,
        staleness=recipe.rl.staleness,
    )


def _number(config: ServingConfig, names: Sequence[str], default: float) -> float:
    """Of the last `NAME VALUE` or `NAME=VALUE` in the arguments."""
    found = default
    for place, word in enumerate(config.args):
        name, equals, value = word.partition("=")
        if name not in names:
            continue
        text = value if equals else "".join(config.args[place + 1 : place + 2])
        try:
            found = float(text)
        except ValueError:
            raise ValueError(f"generator.args: {name} needs a number, not {text!r}") from None
        if not found > 0:
            raise ValueError(f"generator.args: {name} must be positive, not {text}")
    return found
