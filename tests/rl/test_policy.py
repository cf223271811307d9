"""The policy: where its model comes from, and text to tokens and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.engine import Completion, Group
from longreach.engine.model import ModelConfig
from longreach.engine.rope import RopeScaling
from longreach.rl.policy import Policy, model_source
from longreach.rl.state import save_plain


def test_a_shipped_model_is_found_by_name_and_a_path_is_left_alone() -> None:
    assert Path(model_source(ModelConfig("shipped:demo-base"))).name == "demo-base"
    assert model_source(ModelConfig("some/where")) == "some/where"


@pytest.mark.parametrize("name", ["demo-bas", "", "..", "../recipes"])
def test_an_unknown_shipped_model_is_named_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"no such model comes with the package; (did you mean|known:) .*demo-base"):
        model_source(ModelConfig(f"shipped:{name}"))


def test_a_response_ends_with_the_token_that_ends_a_completion(policy: Policy) -> None:
    ids = policy.response_ids("Therefore, the answer is 12.")
    assert ids[-1] == policy.tokenizer.eos_token_id
    assert int(ids[-1]) in policy.stop_ids
    assert policy.tokenizer.eos_token_id not in ids[:-1].tolist()
    completion = Completion(tuple(ids.tolist()), (0.0,) * len(ids), (0.0,) * len(ids), "stop")
    assert policy.text(completion) == "Therefore, the answer is 12.", "the stop token is no text"


def test_autocast_computes_in_bfloat16_on_fp32_weights(make_policy: Callable[..., Policy]) -> None:
    groups = [Group(torch.arange(10, 20), [torch.arange(30, 40)])]
    plain, mixed = make_policy(), make_policy(autocast=True)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    exact, rounded = plain.logprobs(groups, 1.0).logp, mixed.logprobs(groups, 1.0).logp
    assert rounded.dtype == torch.float32
    error = (exact - rounded).abs().max().item()
    assert 1e-4 < error < 0.5, f"bfloat16 has 8 bits, and the error is {error}"


def test_temperature_sharpens_log_probs(policy: Policy) -> None:
    groups = [Group(torch.arange(10, 20), [torch.arange(30, 40)])]
    hot, cold = policy.logprobs(groups, 2.0), policy.logprobs(groups, 0.5)
    assert bool((hot.entropy > cold.entropy).all())


@pytest.mark.parametrize(
    "options", [{"yarn": 2.0}, {"rope_scaling": RopeScaling("linear", 2.0)}], ids=["yarn", "linear"]
)
def test_a_checkpoint_is_stretched_once(
    options: dict[str, Any], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """What a resumed run loads, with the recipe that stretched the model it began with."""
    policy = make_policy(**options)
    save_plain(policy, tmp_path)
    resumed = Policy(policy.config, policy.generator, tmp_path)
    assert resumed.model.config.max_position_embeddings == 2048
    groups = [Group(torch.arange(10, 70), [torch.arange(100, 120)])]
    wanted = policy.logprobs(groups, 1.0).logp
    torch.testing.assert_close(resumed.logprobs(groups, 1.0).logp, wanted, rtol=0, atol=1e-5)
    assert (make_policy().logprobs(groups, 1.0).logp - wanted).abs().max() > 1e-2
