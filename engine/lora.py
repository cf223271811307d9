"""Low-rank adapters through peft, injected into the model in place so that its class and attention stay its own."""

from __future__ import annotations

from collections.abc import Mapping

import peft
import torch
from peft.tuners.lora import Linear
from torch import Tensor
from transformers import PreTrainedModel

from .model import LoraConfig


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Freezes the model and adds fp32 adapters to the linear layers named in `config.targets`.

    Raises:
        ValueError: no layer has one of these names, or the head that is named is tied to the embeddings.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = sorted(set(config.targets) - names)
    if unknown:
        raise ValueError(
            f"lora.targets: no linear layer is called {', '.join(unknown)}; there are {', '.join(sorted(names))}"
        )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", ())
    if tied and any(name.rpartition(".")[2] in config.targets for name, m in model.named_modules() if m is head):
        raise ValueError(
            "lora.targets names the head, whose weight is the embeddings' too: merging would change those, or be lost "
            "when the model is loaded again. Leave it out, or untie the weights"
        )
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (a float is scaled by alike)
            target_modules=list(config.targets),
            bias="none",
        ),
        model,
    )
    for name, parameter in model.named_parameters():
        adapter = ".lora_" in name
        parameter.requires_grad_(adapter)
        if adapter:  # peft makes them in the base's dtype, and bfloat16 would round small updates away
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


@torch.no_grad()
def merged_state(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's state out of the model's own (whole tensors): adapters added into copies of their base weights."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".lora_" in key:
            continue
        name = key.removesuffix(".base_layer.weight")
        if name != key and name in layers:
            for adapter in layers[name].active_adapters:
                up, down = (state[f"{name}.lora_{part}.{adapter}.weight"] for part in "BA")
                delta = (up @ down) * layers[name].scaling[adapter]
                tensor = (tensor.to(delta.dtype) + delta).to(tensor.dtype).cpu()
        plain[key.replace(".base_layer.", ".")] = tensor
    return plain
