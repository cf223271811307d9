from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from longreach.engine import Completion, Group, Sampling, completion_logprobs, generate
from longreach.engine.decoding import PrefixCache

generator = sys.modules[generate.__module__]  # the package's attribute of that name is the function
LENGTHS = (1, 12, 5, 12, 9, 3)
GREEDY = Sampling(10, temperature=0.0)


def prompts_of(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n,), generator=draw) for n in lengths]


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.ids for completion in group] for group in groups]


def their_greedy(model: Any, prompt: Tensor, stop: list[int]) -> tuple[int, ...]:
    made = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=GREEDY.max_completion,
        do_sample=False, eos_token_id=stop or None, pad_token_id=0,
    )  # fmt: skip
    return tuple(made[0, len(prompt) :].tolist())


@pytest.mark.parametrize("batch_tokens", [32, 70, 1000])
def test_greedy_is_transformers_greedy_token_for_token(
    batch_tokens: int, family: str, load: Callable[..., Any], plain: Callable[..., Any]
) -> None:
    model, theirs, prompts = load(family), plain(family), prompts_of()
    free = [their_greedy(theirs, prompt, []) for prompt in prompts]
    assert len(set(free)) > 3
    stop = [free[1][3], free[4][0]]  # tokens that do come, in the middle and at the start
    wanted = [their_greedy(theirs, prompt, stop) for prompt in prompts]
    made = generate(model, prompts, 2, GREEDY, stop_ids=stop, seed=0, batch_tokens=batch_tokens)
    assert ids_of(made) == [[w, w] for w in wanted]
    for group in made:
        for completion in group:
            ended = completion.ids[-1] in stop
            assert completion.finish_reason == ("stop" if ended else "length")
            assert ended or len(completion.ids) == GREEDY.max_completion
            assert not any(token in stop for token in completion.ids[:-1])
    assert {c.finish_reason for group in made for c in group} == {"stop", "length"}


def test_a_stop_token_as_the_last_allowed_token_is_a_stop(load: Callable[..., Any]) -> None:
    model, prompts = load("llama"), prompts_of((5,))
    ((free,),) = generate(model, prompts, 1, GREEDY, stop_ids=[], seed=0)
    last = next(i for i, token in enumerate(free.ids) if token not in free.ids[:i] and i)
    short = Sampling(last + 1, temperature=0.0)
    ((made,),) = generate(model, prompts, 1, short, stop_ids=[free.ids[last]], seed=0)
    assert (made.ids, made.finish_reason) == (free.ids[: last + 1], "stop")
    ((cut,),) = generate(model, prompts, 1, short, stop_ids=[], seed=0)
    assert (cut.ids, cut.finish_reason) == (free.ids[: last + 1], "length")


@pytest.mark.parametrize("budget", [40, 45, 80, 1000])
def test_batches_hold_every_prompt_once_and_keep_the_budget(budget: int) -> None:
    lengths = [7, 30, 1, 12, 12, 9, 20, 2]
    batches = generator._batches(lengths, 10, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    costs = [len(batch) * (max(lengths[i] for i in batch) + 10) for batch in batches]
    assert max(costs) <= budget
    assert len(batches) == {40: 6, 45: 5, 80: 3, 1000: 1}[budget]


SAMPLING = Sampling(12, temperature=1.3, top_k=20, top_p=0.9)
STOP = [3, 4, 5, 6, 7, 8]


def test_dropping_finished_prompts_changes_no_completion(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = load("qwen3"), []
    keep = PrefixCache.keep
    monkeypatch.setattr(PrefixCache, "keep", lambda cache, at: (kept.append(len(at)), keep(cache, at)))
    stop = list(range(20))
    with_it = generate(model, prompts_of(), 2, SAMPLING, stop_ids=stop, seed=1)
    assert len(kept) > 1 and kept[-1] < len(LENGTHS) / 2
    monkeypatch.setattr(generator, "_compact", lambda batch, cache, tokens, G: tokens)
    without = generate(model, prompts_of(), 2, SAMPLING, stop_ids=stop, seed=1)
    assert ids_of(with_it) == ids_of(without)
    assert len({len(c.ids) for group in with_it for c in group}) > 3


def test_batching_changes_no_completion(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = load("qwen3"), prompts_of()
    together = generate(model, prompts, 2, SAMPLING, stop_ids=STOP, seed=1)
    assert ids_of(generate(model, prompts, 2, SAMPLING, stop_ids=STOP, seed=1, batch_tokens=36)) == ids_of(together)
    monkeypatch.setattr(generator, "PREFILL_TOKENS", 13)
    monkeypatch.setattr(generator, "LOGITS_BYTES", 8 * 61 * 5)
    assert ids_of(generate(model, prompts, 2, SAMPLING, stop_ids=STOP, seed=1)) == ids_of(together)


def test_a_seed_names_its_completions(load: Callable[..., Any]) -> None:
    model, prompts = load("qwen3"), prompts_of()

    def sampled(seed: int, prompts: list[Tensor], **changes: int) -> list[list[Completion]]:
        sampling = Sampling(**{"max_completion": 8, **changes})
        return generate(model, prompts, 3, sampling, stop_ids=[], seed=seed)

    first = sampled(7, prompts)
    assert sampled(7, prompts) == first  # log-probs too, bit for bit
    assert all(a != b for a, b in zip(ids_of(sampled(8, prompts)), ids_of(first), strict=True))
    assert len({c.ids for group in first for c in group}) == 3 * len(prompts)
    # a larger limit goes on where a smaller one stopped, and later prompts don't touch earlier ones
    longer = sampled(7, prompts[:4], max_completion=11)
    assert [[ids[:8] for ids in group] for group in ids_of(longer)] == ids_of(first)[:4]
    # equal prompts in one call are not given equal completions
    twice = ids_of(sampled(7, [prompts[1], prompts[1]]))
    assert twice[0] != twice[1]


def test_it_leaves_the_global_random_state_alone(load: Callable[..., Any]) -> None:
    model, before = load("llama"), torch.get_rng_state()
    generate(model, prompts_of(), 2, SAMPLING, stop_ids=[], seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("budget", [1 << 20, 60])
def test_each_completion_is_handed_out_once_as_it_ends(budget: int, load: Callable[..., Any]) -> None:
    """With its prompt and place, in one batch and in several, and before what ends after it."""
    model = load("qwen3")
    steps, seen = [0], list[tuple[int, int, Completion, int]]()
    model.get_decoder().register_forward_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    made = generate(
        model, prompts_of(), 3, Sampling(9), stop_ids=list(range(0, 64, 5)), seed=2, batch_tokens=budget,
        on_done=lambda prompt, place, completion: seen.append((prompt, place, completion, steps[0])),
    )  # fmt: skip
    assert len(seen) == len({(prompt, place) for prompt, place, _, _ in seen}) == 3 * len(made)
    assert all(made[prompt][place] == completion for prompt, place, completion, _ in seen)
    assert seen[0][3] < seen[-1][3] == steps[0], "not all at the end"
    assert {completion.finish_reason for _, _, completion, _ in seen} == {"stop", "length"}


def reported(made: list[list[Completion]]) -> Tensor:
    pairs = [zip(c.logprobs, c.kept_logmass, strict=True) for group in made for c in group]
    return torch.tensor([logp + mass for pair in pairs for logp, mass in pair])


def trained_on(
    model: PreTrainedModel, prompts: list[Tensor], made: list[list[Completion]], temperature: float
) -> Tensor:
    groups = [Group(p, [torch.tensor(c.ids) for c in g]) for p, g in zip(prompts, made, strict=True)]
    with torch.no_grad():
        return completion_logprobs(model, groups, temperature=temperature).logp


@pytest.mark.parametrize(
    "sampling",
    [Sampling(9), Sampling(9, temperature=0.6, top_p=0.8), Sampling(9, temperature=1.6, top_k=7)],
    ids=str,
)
def test_logprobs_with_the_kept_mass_are_the_trainers(
    sampling: Sampling, family: str, load: Callable[..., Any]
) -> None:
    model, prompts = load(family), prompts_of()
    made = generate(model, prompts, 3, sampling, stop_ids=STOP, seed=2)
    wanted = trained_on(model, prompts, made, sampling.temperature)
    torch.testing.assert_close(reported(made), wanted, rtol=0, atol=5e-4)
    masses = torch.tensor([m for group in made for c in group for m in c.kept_logmass])
    assert (masses == 0).all() if sampling == Sampling(9) else (masses < 0).any()


def test_logprobs_agree_under_autocast_and_in_bfloat16(
    load: Callable[..., Any],
) -> None:
    """Generator and trainer round at different places; the mean difference is what importance ratios suffer from."""
    prompts, sampling = prompts_of((12,) * 8), Sampling(12, temperature=0.7)
    wide, half = load("qwen3"), load("qwen3", dtype=torch.bfloat16)
    for model, autocast in ((wide, True), (half, False)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            made = generate(model, prompts, 4, sampling, stop_ids=[], seed=3)
            wanted = trained_on(model, prompts, made, sampling.temperature)
        assert (reported(made) - wanted).abs().mean() < BF16_BOUND


BF16_BOUND = 0.05


def test_the_models_mode_comes_back_even_after_an_error(load: Callable[..., Any]) -> None:
    model, modes = load("llama"), []
    model.get_decoder().register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for mode in (True, False):
        model.train(mode)
        generate(model, prompts_of((3,)), 1, GREEDY, stop_ids=[], seed=0)
        assert model.training is mode
        with pytest.raises(IndexError):  # a token outside the vocabulary
            generate(model, [torch.tensor([61])], 1, GREEDY, stop_ids=[], seed=0)
        assert model.training is mode and model.get_decoder().training is mode
    assert not any(modes)


def test_bad_calls_say_what_is_wrong(load: Callable[..., Any]) -> None:
    model = load("llama")
    with pytest.raises(ValueError, match=r"prompt 1 of 12 tokens .*\(20 tokens at most\) is over batch_tokens = 31"):
        generate(model, prompts_of(), 2, GREEDY, stop_ids=[], seed=0, batch_tokens=31)
    with pytest.raises(ValueError, match="group_size must be at least 1, not 0"):
        generate(model, prompts_of(), 0, GREEDY, stop_ids=[], seed=0)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        generate(model, [torch.tensor([], dtype=torch.long)], 1, GREEDY, stop_ids=[], seed=0)
    with pytest.raises(ValueError, match=r"generator\.batch_tokens must be positive"):
        generator.GeneratorConfig(batch_tokens=0)
    assert generate(model, [], 2, GREEDY, stop_ids=[], seed=0) == []


def test_nothing_grows_with_the_square_of_the_prompt(load: Callable[..., Any], largest_tensor) -> None:
    model = load("qwen3")
    with largest_tensor:
        generate(model, prompts_of((2500,)), 2, Sampling(3, temperature=0.0), stop_ids=[], seed=0)
    # the widest activation has 64 entries a token; a mask would have 2500 a token
    assert largest_tensor.elements <= 2500 * 64, largest_tensor.operator


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_as_the_trainer_there(dtype: torch.dtype, load: Callable[..., Any]) -> None:
    model, prompts = load("qwen3", dtype=dtype, device="cuda"), prompts_of()
    made = generate(model, prompts, 3, SAMPLING, stop_ids=STOP, seed=2)
    wanted = trained_on(model, prompts, made, SAMPLING.temperature).cpu()
    assert (reported(made) - wanted).abs().mean() < (1e-4 if dtype == torch.float32 else BF16_BOUND)
