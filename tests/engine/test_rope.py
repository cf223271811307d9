"""Stretched positions: transformers' own numbers, alike in training and generation, and kept by a saved model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from longreach.engine import Group, Sampling, completion_logprobs, generate, load_model
from longreach.engine.model import ModelConfig, read_config
from longreach.engine.rope import RopeScaling

Groups = Callable[..., list[Group]]
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, tuple[RopeScaling, dict[str, Any], int]] = {
    "yarn": (
        RopeScaling("yarn", 4.0),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512,
    ),
    "yarn, as Qwen3's authors": (
        RopeScaling("yarn", 4.0, original=96),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 96}, 384,
    ),
    "yarn, with everything": (
        RopeScaling("yarn", 2.5, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0),
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 128, "attention_factor": 1.3,
         "beta_fast": 16.0, "beta_slow": 2.0}, 320,
    ),
    "linear": (RopeScaling("linear", 3.0), {"rope_type": "linear", "factor": 3.0}, 384),
    "llama3": (RopeScaling("llama3", 4.0), {**LLAMA3, "original_max_position_embeddings": 128}, 512),
    "llama3, other bounds": (
        RopeScaling("llama3", 4.0, low_freq_factor=2.0, high_freq_factor=3.0),
        {**LLAMA3, "original_max_position_embeddings": 128, "low_freq_factor": 2.0, "high_freq_factor": 3.0}, 512,
    ),
}  # fmt: skip


def of_transformers(model: PreTrainedModel, groups: list[Group]) -> Tensor:
    """Log-probs by the plain model, one completion after the other."""
    found = []
    for group in groups:
        for completion in group.completions:
            ids = torch.cat([group.prompt_ids, completion])
            logits = model(input_ids=ids[None]).logits[0, len(group.prompt_ids) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, completion[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_transformers_own_and_a_saved_model_keeps_them(
    kind: str, folders: dict[str, Path], random_groups: Groups, tmp_path: Path
) -> None:
    scaling, written, window = KINDS[kind]
    folder, groups = folders["llama"], random_groups([(150, (20, 31))])  # past the 128 that the model has
    assert read_config(folder, rope_scaling=scaling).max_position_embeddings == window
    model = load_model(folder, dtype=torch.float64, device="cpu", rope_scaling=scaling)
    rope = {**read_config(folder).rope_parameters, **written}
    plain = AutoModelForCausalLM.from_pretrained(
        folder, rope_parameters=rope, max_position_embeddings=window, dtype=torch.float64, attn_implementation="eager"
    )
    wanted = of_transformers(plain, groups)
    torch.testing.assert_close(completion_logprobs(model, groups).logp, wanted, rtol=0, atol=1e-4)
    unstretched = load_model(folder, dtype=torch.float64, device="cpu")
    assert (completion_logprobs(unstretched, groups).logp - wanted).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["max_position_embeddings"] == window
    assert {name: saved["rope_parameters"][name] for name in written} == written
    again = load_model(tmp_path, dtype=torch.float64, device="cpu")
    found = [completion_logprobs(m, groups).logp for m in (again, model)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    torch.testing.assert_close(of_transformers(alone, groups), wanted, rtol=0, atol=1e-12)


@torch.no_grad()
def test_yarns_temperature_is_the_papers(folders: dict[str, Path]) -> None:
    model: Any = load_model(folders["llama"], dtype=torch.float32, device="cpu", yarn=4.0)
    cos, sin = model.get_decoder().rotary_emb(torch.zeros(1, 1, 1), torch.arange(9)[None])
    size = (cos.square() + sin.square()).sqrt()
    torch.testing.assert_close(size, torch.full_like(size, 0.1 * math.log(4.0) + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_turns_positions_as_training_does(
    kind: str, folders: dict[str, Path], random_groups: Groups
) -> None:
    scaling, _, _ = KINDS[kind]
    model = load_model(folders["qwen3"], dtype=torch.float32, device="cpu", rope_scaling=scaling)
    [group] = random_groups([(150, ())])
    [made] = generate(model, [group.prompt_ids], 2, Sampling(12), stop_ids=(), seed=0, batch_tokens=400)
    told = torch.tensor([x for completion in made for x in completion.logprobs])
    with torch.no_grad():
        found = completion_logprobs(model, [Group(group.prompt_ids, [torch.tensor(c.ids) for c in made])]).logp
    torch.testing.assert_close(found, told, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "dynamic"}, "kind is 'dynamic': it must be one of yarn, llama3, linear"),
        ({"factor": 1.0}, "factor must be a factor above 1"),
        ({"factor": math.nan}, "factor must be a factor above 1"),
        ({"original": 0}, "original must be a number of positions"),
        ({"low_freq_factor": 1.0}, "low_freq_factor does nothing with kind = 'yarn'"),
        ({"kind": "linear", "beta_fast": 3.0}, "beta_fast does nothing with kind = 'linear'"),
        ({"attention_factor": -1.0}, "attention_factor must be a positive number"),
        ({"beta_slow": 40.0}, r"beta_slow = 40.0 must be below beta_fast = 32.0"),
        ({"kind": "llama3", "high_freq_factor": 0.5}, "low_freq_factor = 1.0 must be below high_freq_factor = 0.5"),
    ],
)
def test_scalings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**{"kind": "yarn", "factor": 4.0, **options})


def test_positions_are_stretched_once(build: Callable[..., Path], folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="both stretch the positions"):
        ModelConfig("x", yarn=2.0, rope_scaling=RopeScaling("linear", 2.0))
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    stretched = build("llama", rope_parameters=rope)
    with pytest.raises(ValueError, match=r"already stretches its positions \(rope_type 'linear', window 128\)"):
        load_model(stretched, rope_scaling=RopeScaling("yarn", 2.0))
    learned = build("gpt2", "GPT2Config", n_positions=128)
    with pytest.raises(ValueError, match="has no rotary positions"):
        read_config(learned, yarn=2.0)
