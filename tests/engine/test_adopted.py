"""A model that another program loaded: checked, given our attention, and its own back for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from longreach.engine import Adopted, Group, base_model, completion_logprobs
from longreach.engine.attention import NAME

Make = Callable[..., Any]
GROUP = Group(torch.tensor([1, 2, 3]), [torch.tensor([4, 5]), torch.tensor([6])])


def make(**changes: Any) -> Any:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    config = Qwen3Config(**{"vocab_size": 40, "num_key_value_heads": 2, **shape, "pad_token_id": 0, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def test_our_attention_and_its_own_again() -> None:
    model = make()
    ids = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    wanted = model(ids, attention_mask=mask).logits
    adopted = Adopted(model)
    assert adopted.model is model and model.config._attn_implementation == NAME
    assert len(completion_logprobs(model, [GROUP]).logp) == 3
    with pytest.raises(ValueError, match="mask"):
        model(ids, attention_mask=mask)
    with adopted.released():
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted)
    with pytest.raises(KeyError), adopted.released():
        raise KeyError
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attention_dropout": 0.1}, "attention dropout"),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "sliding_attention"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_left_alone(changes: dict[str, Any], said: str) -> None:
    model = make(**changes)
    with pytest.raises(ValueError, match=said):
        Adopted(model)
    assert model.config._attn_implementation == "sdpa"


def test_another_computation_is_noticed_where_weights_are_there() -> None:
    model = make()
    model.model.norm.register_forward_hook(lambda module, args, output: output * 3 * model.training + output)
    with pytest.raises(ValueError, match="differ"):
        Adopted(model.train())
    assert model.config._attn_implementation == "sdpa"
    with torch.device("meta"):
        empty = make()
    assert Adopted(empty, verify=False).model is empty


def test_adapters_live_inside_the_model() -> None:
    peft = pytest.importorskip("peft")
    plain = make()
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adopted = Adopted(wrapped)
    assert adopted.model is base_model(wrapped) is plain and base_model(plain) is plain
    completion_logprobs(adopted.model, [GROUP]).logp.sum().backward()
    gradients = [p.grad for name, p in wrapped.named_parameters() if "lora_" in name]
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients)
