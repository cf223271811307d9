"""Servers to generate with: one that plays vLLM by hand and misbehaves on request, and a real one where there is an environment for it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from longreach.engine import Sampling, load_tokenizer
from longreach.engine.generate import GeneratorConfig
from longreach.engine.model import ModelConfig
from longreach.rl.policy import Policy
from longreach.rl.prompts import Prompt
from longreach.rl.serving.client import VllmGenerator
from longreach.rl.serving.config import ServingConfig

Make = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[3]


def completion(index: int, ids: list[int], reason: str = "length", logprob: float = -1.5) -> dict[str, Any]:
    """A choice of /inference/v1/generate, with what a reader of it needs."""
    content = [{"token_id": i, "logprob": logprob, "rank": 1, "top_logprobs": []} for i in ids]
    return {"index": index, "token_ids": ids, "finish_reason": reason, "logprobs": {"content": content}}


class FakeVllm:
    """The interfaces that the client asks, on a `judge_server.Server`. `generate(n, body)` answers the n-th group's request
    with choices, or with a reply of the server's own kind. The first `deaf` aborts are refused."""

    def __init__(self, server: Any, window: int = 4096) -> None:
        self.server, self.window, self.healthy, self.version = server, window, True, "default"
        self.orders: list[dict[str, Any]] = []
        self.generate: Callable[[int, dict[str, Any]], Any] = lambda _n, body: self.well(body)
        self.probe = 0.0
        self.aborts: list[list[str]] = []
        self.deaf = 0
        server.respond = self.respond
        self.url: str = server.url.removesuffix("/v1")

    def well(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A group as ordered: the tokens tell 8 times the prompt's length (no stop token) and the place in the group."""
        asked = body["sampling_params"]
        return [
            completion(i, [8 * len(body["token_ids"]), *[20 + i] * (asked["max_tokens"] - 1)])
            for i in range(asked["n"])
        ]

    def stopped(self, body: dict[str, Any], seconds: float = 20.0) -> bool:
        """Waits until this order is aborted."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if any(f"generate-tokens-{body['request_id']}" in ids for ids in self.aborts[self.deaf :]):
                return True
            time.sleep(0.01)
        return False

    def respond(self, number: int, body: dict[str, Any]) -> Any:
        path, http = self.server.paths[number], self.server.http
        if path == "/health":
            return http(200 if self.healthy else 503)
        if path == "/v1/models":
            return http(200, json.dumps({"data": [{"id": "m", "max_model_len": self.window}]}))
        if path == "/weight_info":
            return http(200, json.dumps({"weight_version": self.version}))
        if path == "/inference/v1/abort_requests":
            self.aborts.append(body["request_ids"])
            return http(200 if len(self.aborts) > self.deaf else 500)
        assert path == "/inference/v1/generate"
        if body["sampling_params"]["top_k"] == 1:
            return http(200, json.dumps({"choices": [completion(0, [5], logprob=self.probe)]}))
        with self.server.lock:
            self.orders.append(body)
            number = len(self.orders) - 1
        made = self.generate(number, body)
        return http(200, json.dumps({"choices": made})) if isinstance(made, list) else made


@pytest.fixture
def fake(server: Any) -> FakeVllm:
    return FakeVllm(server)


@pytest.fixture
def make_generator(policy: Policy, tmp_path: Path) -> Iterator[Make]:
    """A started generator of servers that run: `make_generator(url, ..., window=, **[generator])`; closed after the test."""
    made: list[VllmGenerator] = []

    def make(*urls: str, window: int = 100, hand_over: Any = None, **config: Any) -> VllmGenerator:
        one = VllmGenerator(policy, ServingConfig(kind="vllm", urls=urls, **config), tmp_path, hand_over=hand_over)
        made.append(one)
        one.start(window)
        return one

    yield make
    for one in made:
        one.close()


@pytest.fixture
def draw(make_prompts: Make) -> Make:
    """`draw(generator, lengths, ...)`: completions, and what `on_done` was told, in order."""

    def ask(
        generator: VllmGenerator, *lengths: int, size: int = 2, sampling: Sampling | None = None, seed: int = 3
    ) -> Any:
        told: list[tuple[int, int]] = []
        prompts: list[Prompt] = make_prompts(*lengths)
        made = generator.sample(prompts, size, sampling or Sampling(4), seed, lambda p, i, _c: told.append((p, i)))
        return made, told

    return ask


@pytest.fixture(scope="session")
def served_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """A tiny Qwen3 whose heads are as wide as vLLM's attention on the CPU needs them: 32; one token in eight is a stop token."""
    folder, tokenizer = tmp_path_factory.mktemp("served"), load_tokenizer(ROOT / "rl" / "assets" / "demo-base")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(eos, int) and isinstance(pad, int)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.1,
        eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [eos, *range(7, len(tokenizer), 8)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Policy(ModelConfig(str(folder), device="cpu"), GeneratorConfig())
