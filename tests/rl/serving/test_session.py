"""What a recipe asks for is there for as long as a run needs it; and the trainer never imports vLLM."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.rl import cli
from longreach.rl.config import dump
from longreach.rl.policy import Policy
from longreach.rl.recipe import Recipe, to_toml
from longreach.rl.serving import client
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.config import ServingConfig
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.session import generating
from longreach.rl.train import train

Make = Callable[..., Any]


def test_kind_says_who_generates_and_servers_are_let_go_afterwards(
    make_recipe: Make, policy: Policy, fake: Any, tmp_path: Path, make_prompts: Make
) -> None:
    recipe: Recipe = make_recipe(generator__kind="vllm", generator__urls=[fake.url])
    with generating(policy, recipe, 50, home=tmp_path):
        assert isinstance(policy.served, VllmGenerator)
        assert len(policy.sample(make_prompts(9), 2, recipe.phases[0].sampling(), 0)[0]) == 2
        assert policy.generation_metrics()["rollout/requeued"] == 0
        used = policy.served
    assert policy.served is None and used.servers == []
    assert len(fake.orders) == 1
    with generating(policy, make_recipe(), 50, home=tmp_path):
        assert policy.served is None
        policy.sample(make_prompts(9), 2, recipe.phases[0].sampling(), 0)
    assert len(fake.orders) == 1


def test_evaluation_asks_the_servers(make_recipe: Make, fake: Any, tmp_path: Path, data_dir: Path) -> None:
    recipe_file = tmp_path / "r.toml"
    recipe_file.write_text(to_toml(dump(make_recipe(generator__urls=[fake.url]))))
    assert cli.main(["eval", str(recipe_file), "--generator", "vllm"]) == 0
    assert len(fake.orders) == 6, "--generator is short for --generator.kind"


def test_training_stops_before_it_samples_from_old_weights(
    make_recipe: Make, fake: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that takes requests and no weights."""
    recipe: Recipe = make_recipe(generator__kind="vllm", generator__urls=[fake.url], sft=None)
    with pytest.raises(ServerError, match=r"/weight_info|/server_info|/update_weight_version"):
        train(recipe, tmp_path / "run")
    asked = {order["sampling_params"]["max_tokens"] for order in fake.orders}
    assert asked == {6} and len(fake.orders) == 6 + 2, "the base model's evaluation, and the first step"


def test_each_server_has_a_port_and_a_log(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that die at once: the message is the death's, and what was begun is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(client, "server_command", lambda *_: ["-c", "import sys; print(sys.argv); sys.exit(1)"])
    config = ServingConfig(kind="vllm", servers=2, port=port, python=sys.executable)
    generator = VllmGenerator(policy, config, tmp_path)
    with pytest.raises(ServerError, match="died while it started"):
        generator.start(50)
    assert generator.servers == [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    generator.close()
    logs = sorted(path.name for path in tmp_path.iterdir())
    assert logs == ["vllm-0.log", "vllm-1.log"]
    assert f"'--port', '{port + 1}'" in (tmp_path / "vllm-1.log").read_text()


def test_a_length_that_cant_hold_the_recipe_is_refused_before_a_server_starts(policy: Policy, tmp_path: Path) -> None:
    generator = VllmGenerator(policy, ServingConfig(kind="vllm", max_model_len=99, python=sys.executable), tmp_path)
    with pytest.raises(ValueError, match=r"max_model_len = 99 can't hold .* \(100 tokens\): raise it, or set 0"):
        generator.start(100)
    assert list(tmp_path.iterdir()) == []


def test_no_module_of_ours_imports_vllm(root: Path) -> None:
    """It pins a torch of its own: the trainer and it are two environments."""
    files = [path for folder in ("kernels", "engine", "rl") for path in (root / folder).rglob("*.py")]
    assert len(files) > 100
    found = [path for path in files if re.search(r"^\s*(import|from)\s+vllm\b", path.read_text(encoding="utf-8"), re.M)]
    assert found == []
