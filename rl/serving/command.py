"""How vLLM is called for a policy: its model as the trainer computes it, and what our requests rely on.

`python -m vllm.entrypoints.openai.api_server`, since the CPU build's own `vllm serve` looks for a distribution of another name.
vLLM is a program here, never an import: its environment pins another torch.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig

from ...engine.model import ModelConfig
from ..policy import model_source
from .config import ServingConfig
from .sync_config import server_needs

GIB = 1 << 30
_BATCHED_TOKENS = 8192
"""Of prompts in one forward, where each must be whole."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Served(Protocol):
    """Of a policy, what its servers are started by: nothing of its weights."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def model(self) -> Described: ...


class Described(Protocol):
    """Of a model: its configuration, and where it computes."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...


def server_command(policy: Served, config: ServingConfig, window: int) -> list[str]:
    """The arguments after the interpreter, for sequences of `window` tokens."""
    length = config.max_model_len or window
    dtype = config.dtype or computed_in(policy.config)
    source = model_source(policy.config)
    without_gpu = policy.model.device.type == "cpu"
    command = [
        "-P", "-W", "ignore::DeprecationWarning",  # -P: a folder named kernels where we stand is no package of vLLM's
        "-m", "vllm.entrypoints.openai.api_server",
        "--model", source, "--served-model-name", source, "--dtype", dtype, "--max-model-len", str(length),
        # what requests rely on: token ids in and out, log-probs of the distribution sampled from, nothing of
        # generation_config.json that wasn't asked for, one prefill for a group
        "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--enable-prefix-caching",
    ]  # fmt: skip
    if seeded(policy, config) and without_gpu:  # a chunk takes back a draw, which a generator of the CPU can't
        command += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(length, _BATCHED_TOKENS))]
    else:
        command += ["--enable-chunked-prefill"]
    if config.eager if config.eager is not None else without_gpu:
        command += ["--enforce-eager"]
    if config.cache_gib or without_gpu:
        size = int(config.cache_gib * GIB) or max(GIB, 2 * length * cache_bytes(policy.model.config, dtype))
        command += ["--kv-cache-memory-bytes", str(size)]
    if policy.config.trust_remote_code:
        command += ["--trust-remote-code"]
    if stretched := _stretched(policy):
        command += ["--hf-overrides", json.dumps(stretched)]
    needs = server_needs(config.sync, lora_rank(policy))
    return [*command, *needs.arguments, *config.args]


def lora_rank(policy: Served) -> int:
    """Of the policy's adapters; 0 for none."""
    return 0 if policy.config.lora is None else policy.config.lora.rank


def seeded(policy: Served, config: ServingConfig) -> bool:
    """Whether each prompt has a random stream of its own."""
    return policy.model.device.type != "cpu" if config.seeded is None else config.seeded


def server_settings(config: ServingConfig, index: int, lora_rank: int = 0) -> dict[str, str]:
    """Variables of one server's environment. The mode adds the interfaces that take new weights."""
    devices = {"CUDA_VISIBLE_DEVICES": config.devices[index]} if config.devices else {}
    return {**server_needs(config.sync, lora_rank).environment, **devices, **config.environment}


def computed_in(model: ModelConfig) -> str:
    """The precision of the trainer's own forward, which the generator's should be.

    Raises:
        ValueError: vLLM has no such precision.
    """
    dtype = "bfloat16" if model.autocast else model.dtype
    if dtype not in _BYTES:
        raise ValueError(
            f"vLLM can't compute in model.dtype = {dtype!r}: set generator.dtype to one of {', '.join(_BYTES)}"
        )
    return dtype


def cache_bytes(model: PreTrainedConfig, dtype: str) -> int:
    """Keys and values of one token."""
    text = model.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * _BYTES[dtype]


def _stretched(policy: Served) -> dict[str, Any]:
    """What [model] changed of the positions: the files on disk don't have it."""
    if policy.config.yarn is None and policy.config.rope_scaling is None:
        return {}
    text = policy.model.config.get_text_config()
    return {"rope_parameters": text.rope_parameters, "max_position_embeddings": text.max_position_embeddings}
