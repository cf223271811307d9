"""The section [generator]: each key does something, and what can't be is refused with the way out."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.engine.rope import RopeScaling
from longreach.rl.config import build
from longreach.rl.policy import Policy
from longreach.rl.recipe import Recipe, load_recipe
from longreach.rl.serving.command import cache_bytes, server_command, server_settings
from longreach.rl.serving.config import ServingConfig

Make = Callable[..., Any]


def after(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


COMMAND: dict[str, tuple[Any, str, str]] = {
    "dtype": ("bfloat16", "--dtype", "bfloat16"),
    "max_model_len": (900, "--max-model-len", "900"),
    "cache_gib": (2.5, "--kv-cache-memory-bytes", str(int(2.5 * 2**30))),
    "seeded": (True, "--max-num-batched-tokens", "8192"),
    "args": (("--max-num-seqs", "7"), "--max-num-seqs", "7"),
}


@pytest.mark.parametrize("key", COMMAND)
def test_keys_of_the_command(key: str, policy: Policy) -> None:
    value, flag, text = COMMAND[key]
    plain = server_command(policy, ServingConfig(), 100)
    changed = server_command(policy, ServingConfig(**{key: value}), 100)
    assert after(changed, flag) == text
    assert flag not in plain or after(plain, flag) != text


def test_the_command_is_the_policys(policy: Policy, make_policy: Make) -> None:
    command = server_command(policy, ServingConfig(), 100)
    assert after(command, "--model") == policy.config.path
    assert after(command, "--dtype") == "float32" and after(command, "--max-model-len") == "100"
    assert after(command, "--kv-cache-memory-bytes") == str(2**30)
    assert after(command, "--logprobs-mode") == "processed_logprobs"
    assert {"--enforce-eager", "--enable-chunked-prefill", "--enable-prefix-caching", "--enable-scale-out"} <= set(
        command
    )
    assert "--trust-remote-code" not in command and "--hf-overrides" not in command
    assert after(server_command(make_policy(autocast=True), ServingConfig(), 100), "--dtype") == "bfloat16"
    assert "--trust-remote-code" in server_command(make_policy(trust_remote_code=True), ServingConfig(), 100)
    stretched = server_command(make_policy(rope_scaling=RopeScaling("yarn", 2.0)), ServingConfig(), 100)
    assert '"max_position_embeddings": 2048' in after(stretched, "--hf-overrides")
    assert '"factor": 2.0' in after(stretched, "--hf-overrides")
    assert "--enforce-eager" not in server_command(policy, ServingConfig(eager=False), 100)


def test_the_cache_without_a_gpu_holds_two_of_the_longest(policy: Policy) -> None:
    """Two layers, two heads of 8 numbers of 4 bytes, keys and values: 256 bytes a token."""
    assert cache_bytes(policy.model.config, "float32") == 256
    length = 2**22
    assert int(after(server_command(policy, ServingConfig(), length), "--kv-cache-memory-bytes")) == 2 * length * 256


def test_a_precision_that_vllm_lacks_is_refused(make_policy: Make) -> None:
    policy = make_policy(dtype="float64")
    with pytest.raises(ValueError, match=r"can't compute in model\.dtype = 'float64': set generator\.dtype"):
        server_command(policy, ServingConfig(), 100)
    assert after(server_command(policy, ServingConfig(dtype="float32"), 100), "--dtype") == "float32"


def test_environments_of_servers() -> None:
    config = ServingConfig(servers=2, devices=("0,1", "2,3"), environment={"VLLM_LOGGING_LEVEL": "ERROR"})
    assert server_settings(config, 1) == {
        "VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": "2,3", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    assert server_settings(ServingConfig(), 0) == {"VLLM_SERVER_DEV_MODE": "1"}


def test_the_interpreter_is_that_of_make_vllm_or_the_named_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ServingConfig(python=sys.executable).interpreter() == Path(sys.executable)
    with pytest.raises(ValueError, match=r"there is no /nowhere, .*name vLLM's interpreter there"):
        ServingConfig(python="/nowhere").interpreter()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(ValueError, match=r"\.venv-vllm/bin/python, which would run vLLM: run make vllm"):
        ServingConfig().interpreter()
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm" / "bin" / "python").touch()
    assert ServingConfig().interpreter() == tmp_path / ".venv-vllm" / "bin" / "python"


ELSEWHERE = {
    "batch_tokens": "test_options.py",
    "kind": "test_session.py",
    "sync": "test_sync.py",
    "urls": "test_client.py",
    "servers": "test_session.py",
    "port": "test_session.py",
    "python": "above",
    "eager": "above",
    "devices": "above",
    "environment": "above",
    "concurrency": "test_client.py",
    "deadline_s": "test_client.py",
    "tries": "test_client.py",
    "start_timeout_s": "test_client.py",
    "restarts": "test_asking.py",
}
"""Keys whose effect is shown there."""


def test_every_key_has_a_row() -> None:
    assert set(COMMAND) | set(ELSEWHERE) == {field.name for field in dataclasses.fields(ServingConfig)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "vlm"}, "did you mean 'vllm'"),
    "dtype": ({"dtype": "bf16"}, "'bf16' is not known"),
    "no address": ({"urls": ["localhost:8000"]}, "write http://HOST:PORT"),
    "a path": ({"urls": ["http://a:1/v1"]}, "write http://HOST:PORT"),
    "twice": ({"urls": ["http://a:1", "http://a:1"]}, "twice"),
    "urls and args": ({"urls": ["http://a:1"], "args": ["--x"]}, r"generator\.args is for servers that are started"),
    "urls and port": ({"urls": ["http://a:1"], "port": 8000}, r"generator\.port is for servers that are started"),
    "servers": ({"servers": 0}, "servers must be at least 1"),
    "concurrency": ({"concurrency": 0}, "concurrency must be at least 1"),
    "tries": ({"tries": 0}, "tries must be at least 1"),
    "restarts": ({"restarts": -1}, "restarts must be 0 or more"),
    "max_model_len": ({"max_model_len": -1}, "max_model_len must be 0 or more"),
    "cache_gib": ({"cache_gib": -1.0}, "cache_gib must be 0 or more"),
    "deadline": ({"deadline_s": 0.0}, "deadline_s must be a positive"),
    "start": ({"start_timeout_s": -1.0}, "start_timeout_s must be a positive"),
    "port": ({"port": 65535, "servers": 3}, "a port with 2 above it"),
    "devices": ({"servers": 2, "devices": ["0"]}, "1 entries for 2 servers"),
    "variable": ({"environment": {"A-B": "1"}}, "'A-B' is no name of a variable"),
    "batch_tokens": ({"batch_tokens": 0}, "batch_tokens must be positive"),
}


@pytest.mark.parametrize("values, told", REFUSED.values(), ids=REFUSED)
def test_what_cant_be_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build(ServingConfig, values, "generator")


def test_a_group_need_not_fit_the_local_generator_when_servers_generate() -> None:
    small = ("generator.batch_tokens", "100")
    with pytest.raises(ValueError, match="can't hold one group"):
        load_recipe("demo", [small])
    assert load_recipe("demo", [small, ("generator.kind", "vllm")]).generator.kind == "vllm"


def test_the_window_is_the_longest_sequence_that_is_generated(make_recipe: Make) -> None:
    recipe: Recipe = make_recipe(
        phases__0__upper=50, phases__0__max_completion=6, phases__1__upper=90, phases__1__max_completion=40
    )
    assert recipe.served_window() == 130
    assert recipe.served_window(evaluated=200) == 206
    recipe = make_recipe(
        phases__0__upper=89, phases__1__upper=90, phases__0__max_completion=60, phases__1__max_completion=6
    )
    assert recipe.served_window() == 149
    recipe = make_recipe(
        phases__0__upper=89, phases__1__upper=90, phases__0__max_completion=6, phases__1__max_completion=60
    )
    assert recipe.served_window() == 150, "the difficulty pass takes the next phase's limit, on this one's prompts"
