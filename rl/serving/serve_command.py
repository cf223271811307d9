"""`longreach serve RECIPE`: servers for a trainer on another machine, as training starts its own, until Ctrl-C.

    longreach serve RECIPE --host ADDRESS --port 8000 --generator.args=--tensor-parallel-size,8
    longreach train RECIPE --generator vllm --generator.urls http://ADDRESS:8000

`generator.servers` of them, on this machine's GPUs (`generator.devices`) and on neighbouring ports, each with the recipe's model
and all that its trainer's requests rely on; no weight is loaded here. One that dies is started again, `generator.restarts` times:
the trainer sees that it is fresh and brings it the policy's weights. Through files (`generator.sync.folder`) those come from a
folder that both machines see under one name. Whoever reaches a server can change its weights: an address of a network of
one's own, never a public one.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...engine.launch import Job
from ...engine.model import ModelConfig, load_tokenizer, pick_device, read_config
from ..console import Console
from ..policy import model_source
from ..recipe import Recipe, load_recipe, shipped
from ..sources import read_prompts
from .command import lora_rank, server_command, server_settings
from .config import ServingConfig
from .http import ServerError
from .server import HOST, Server

PORT = 8000
EVERYWHERE = "0.0.0.0"
_LOOK_S = 0.5


@dataclass(frozen=True)
class Shape:
    """A model as its server's command needs it, without weights."""

    config: PreTrainedConfig
    device: torch.device


@dataclass(frozen=True)
class Unloaded:
    """What a policy would say of its model."""

    config: ModelConfig
    model: Shape


def add_serve(commands: Any) -> None:
    """Adds the command to the parser of `longreach`."""
    command = commands.add_parser(
        "serve", help="start a recipe's vLLM servers for a trainer on another machine", allow_abbrev=False,
        epilog="Any recipe key can be given as --section.key VALUE.",
    )  # fmt: skip
    command.add_argument("recipe", help=f"a .toml file or one of: {', '.join(shipped())}")
    command.add_argument("--host", default=HOST, metavar="ADDRESS", help=f"where to listen (default: {HOST}, this machine alone)")  # fmt: skip
    command.add_argument("--port", type=int, default=PORT, metavar="N", help=f"of the first server (default: {PORT})")
    command.add_argument("--run-dir", type=Path, help="the trainer's run folder (default: runs/NAME): logs go to DIR-servers beside it")  # fmt: skip
    command.add_argument("--dry-run", action="store_true", help="print the servers' commands, then stop")
    command.set_defaults(run=run_serve)


def run_serve(known: argparse.Namespace, overrides: Sequence[tuple[str, str]], console: Console, job: Job) -> int:
    """Serves until it is interrupted; the exit status."""
    recipe = load_recipe(known.recipe, [("generator.kind", "vllm"), *overrides])
    config = replace(recipe.generator, urls=(), port=known.port)
    _refuse(config, known.host, job)
    command, settings = commands_of(recipe, config, console)
    if known.dry_run:
        for port, own in enumerate(settings, config.port):
            shown = ["env", *(f"{name}={value}" for name, value in own.items()), str(config.interpreter()), *command]
            console.say(shlex.join([*shown, "--host", known.host, "--port", str(port)]))
        return 0
    run_dir = known.run_dir or Path("runs") / recipe.name
    home = run_dir.with_name(f"{run_dir.name}-servers")  # the trainer claims its folder empty
    servers = [
        Server(
            config.interpreter(), command, log=home / f"{socket.gethostname()}-{port}.log", port=port, settings=own, host=known.host
        )
        for port, own in enumerate(settings, config.port)
    ]  # fmt: skip
    ends = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the polite end of batch systems, as Ctrl-C
    try:
        supervise(servers, config, console.say, _told(servers, known.host))
    except KeyboardInterrupt:
        console.say("servers are stopped")
    finally:
        signal.signal(signal.SIGTERM, ends)
        for server in servers:
            server.leave()
        for server in servers:
            server.stop()
    return 0


def commands_of(recipe: Recipe, config: ServingConfig, console: Console) -> tuple[list[str], list[dict[str, str]]]:
    """What follows the interpreter, and each server's variables: the same that training would start."""
    model, source = recipe.model, model_source(recipe.model)
    shape = read_config(
        source, yarn=model.yarn, rope_scaling=model.rope_scaling, trust_remote_code=model.trust_remote_code
    )
    tokenizer = load_tokenizer(source, trust_remote_code=model.trust_remote_code)
    evaluated = max((len(prompt.ids) for prompt in read_prompts(recipe, tokenizer, None, console).eval), default=0)
    window = recipe.served_window(evaluated)
    policy = Unloaded(model, Shape(shape, pick_device(model.device)))
    settings = [server_settings(config, index, lora_rank(policy)) for index in range(config.servers)]
    return server_command(policy, config, window), settings


def supervise(
    servers: Sequence[Server], config: ServingConfig, say: Callable[[str], object], told: Mapping[str, str]
) -> None:
    """Starts them, and again those that die.

    Raises:
        ServerError: one doesn't come up, or has died too often.
    """
    left = dict.fromkeys((server.url for server in servers), config.restarts)
    for server in servers:
        say(f"starting vLLM at {server.url} (log: {server.log})")
        server.start()
    for server in servers:
        asyncio.run(server.ready(config.start_timeout_s))
    say(f"ready: train with --generator vllm --generator.urls {','.join(told.values())}")
    while True:
        time.sleep(_LOOK_S)
        for server in servers:
            if server.alive:
                continue
            if not left[server.url]:
                raise ServerError(
                    server.url,
                    f"the server has died, and was started again {config.restarts} times (generator.restarts): {server.tail()}",
                )
            left[server.url] -= 1
            say(f"{told[server.url]} has died and is started again ({left[server.url]} more times)")
            server.start()
            asyncio.run(server.ready(config.start_timeout_s))
            say(f"{told[server.url]} is ready again")


def _refuse(config: ServingConfig, host: str, job: Job) -> None:
    if job.size > 1:
        raise ValueError("serve starts all servers of a machine itself: run it once there, without torchrun")
    if config.port < 1:
        raise ValueError(f"--port must be above 0, so that trainers know it, not {config.port}")
    if config.sync.kind == "ipc" and host != HOST:
        raise ValueError(
            f"generator.sync.kind = 'ipc' hands over pickled handles within one machine, and --host {host} is open to others: "
            "take nccl or safetensors"
        )


def _told(servers: Sequence[Server], host: str) -> dict[str, str]:
    """Each server's address as others say it."""
    name = socket.gethostname() if host == EVERYWHERE else host
    return {server.url: f"http://{name}:{server.port}" for server in servers}
