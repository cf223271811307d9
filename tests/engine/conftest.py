"""Tiny models of several families, built from their configs, whose attention and logits are far from uniform."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longreach.engine import Group, load_model

VOCAB = 61

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None, "num_key_value_heads": 1}),
}


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(family, **changes of its config) -> folder of a random model."""

    def make(name: str, config_class: str | None = None, **changes: Any) -> Path:
        known, own = FAMILIES.get(name, (config_class, {}))
        small = {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
            "initializer_range": 0.25, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip
        config = getattr(transformers, str(known))(**{**small, **own, **changes})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        # fresh norms and biases are ones and zeros, which would hide whether they are applied at all
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folders(build: Callable[..., Path]) -> dict[str, Path]:
    """One model of each family; tests read them and never write to them."""
    return {name: build(name) for name in FAMILIES}


@pytest.fixture
def load(folders: dict[str, Path]) -> Callable[..., transformers.PreTrainedModel]:
    """load(family, **options of load_model), on the CPU in fp32 unless told otherwise."""

    def make(name: str, **options: Any) -> transformers.PreTrainedModel:
        return load_model(folders[name], **{"dtype": torch.float32, "device": "cpu", **options})

    return make


@pytest.fixture
def plain(folders: dict[str, Path]) -> Callable[..., transformers.PreTrainedModel]:
    """plain(family, dtype): the same model as transformers alone runs it (its eager attention has an fp32 softmax)."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
        return transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype, attn_implementation="sdpa")

    return make


@pytest.fixture
def random_groups() -> Callable[..., list[Group]]:
    """random_groups(((prompt length, (completion lengths)), ...), seed) -> groups of random tokens."""

    def make(shapes: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> list[Group]:
        draw = torch.Generator().manual_seed(seed)

        def tokens(n: int) -> Tensor:
            return torch.randint(VOCAB, (n,), generator=draw)

        return [Group(tokens(prompt), [tokens(n) for n in lengths]) for prompt, lengths in shapes]

    return make


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.elements:
                self.elements, self.operator = leaf.numel(), str(func)
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()


class _Nothing:
    """A stream or an event on a device that does everything at once."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: _Nothing()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao's module sees a torch whose `cuda` is the CPU, without pinned memory."""
    pytest.importorskip("torchao")
    calm = types.ModuleType("torch")
    calm.__dict__.update(vars(torch))
    streams = types.SimpleNamespace(Stream=_Nothing, current_stream=_Nothing, stream=lambda _: _Nothing())
    calm.cuda = streams  # type: ignore[attr-defined]
    calm.empty_like = lambda x, device=None, pin_memory=False: torch.empty_like(x)  # type: ignore[attr-defined]
    monkeypatch.setattr("torchao.optim.cpu_offload.torch", calm)
    monkeypatch.setattr("torchao.optim.cpu_offload.get_available_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
