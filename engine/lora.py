"""Low-rank adapters through peft, injected into the model in place so that its class and attention stay its own."""

from __future__ import annotations

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from .model import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes the model and adds fp32 adapters to the linear layers named in `config.targets`.

    Raises:
        ValueError: no layer has one of these names (raised by peft, which lists them).
    """
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), bias="none"), model
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@torch.no_grad()
def merged_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The plain model's state: adapters added into copies of their base weights, the model itself left alone."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if ".lora_" in key:
            continue
        if key.endswith(".base_layer.weight"):
            owner = layers[key.removesuffix(".base_layer.weight")]
            delta = sum(owner.get_delta_weight(adapter) for adapter in owner.active_adapters)  # pyright: ignore[reportCallIssue]
            tensor = (tensor.float() + delta).to(tensor.dtype)
        state[key.replace(".base_layer.", ".")] = tensor
    return state
