"""The entropy rules by hand: values small enough to be counted out, and the state machines step by step."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from longreach.rl.entropy import (
    AdaptiveEntropy,
    Aepo,
    EntropyControl,
    Masks,
    NegativeClip,
    adapted,
    aepo_masks,
    batch_entropy,
    spared,
    top_threshold,
)


def rows(*values: list[float]) -> list[Tensor]:
    return [torch.tensor(row) for row in values]


@pytest.mark.parametrize(
    "share, threshold",
    [(1.0, -math.inf), (0.99, 0.1), (0.75, 0.3), (0.5, 0.6), (0.3, 0.8), (0.2, 0.9), (0.1, 1.0), (0.01, 1.0)],
)
def test_the_top_share_of_ten_tokens_begins_at(share: float, threshold: float) -> None:
    """Entropies 0, 0.1 .. 1 but 0.4, shuffled: the (1 - share) quantile lies at 9 (1 - share) of 0..9, rounded up."""
    entropy = torch.tensor([0.8, 0.1, 1.0, 0.3, 0.0, 0.5, 0.9, 0.2, 0.7, 0.6])
    assert top_threshold(entropy, share) == pytest.approx(threshold)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
def test_the_top_share_is_that_of_an_interpolated_quantile(count: int) -> None:
    """As TRL selects: at or above torch's linearly interpolated quantile. Ties (one decimal) included."""
    draw = torch.Generator().manual_seed(count)
    for decimals in (1, 6):
        entropy = torch.rand(count, generator=draw).round(decimals=decimals).double()
        for share in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9):
            expected = entropy >= entropy.quantile(1 - share) - 1e-12
            assert torch.equal(entropy.float() >= top_threshold(entropy, share), expected), (decimals, share)


def test_the_top_share_of_nothing_is_everything() -> None:
    assert top_threshold(torch.zeros(0), 0.2) == -math.inf
    assert Masks(top=0.2).kept([], []) == []
    (kept,) = Masks(top=0.2, clip=NegativeClip("sequence", 0.0), negatives=True).kept([torch.zeros(0)], [-1.0])
    assert kept.shape == (0,)


def test_equal_entropies_are_all_at_the_threshold() -> None:
    (kept,) = Masks(top=0.2).kept([torch.full((5,), 0.3)], [1.0])
    assert kept.all()


def test_the_threshold_is_over_all_completions_of_the_update_whatever_their_advantage() -> None:
    entropies = rows([0.9, 0.1], [0.8, 0.7, 0.2], [0.3])
    for advantages in ([1.0, -1.0, 0.0], [-1.0, 1.0, -1.0]):
        kept = Masks(top=0.4).kept(entropies, advantages)  # 0.6 x 5 = 3: the fourth lowest, 0.7
        assert [k.tolist() for k in kept] == [[True, False], [True, True, False], [False]]


@pytest.mark.parametrize("level, expected", [("token", [False, True, False, True]), ("sequence", [True] * 4)])
def test_negative_clip_spares_what_lies_above_its_threshold(level: str, expected: list[bool]) -> None:
    """Mean 0.525, threshold 0.5; 0.5 itself isn't above it."""
    entropy = torch.tensor([0.1, 0.6, 0.5, 0.9])
    rule = NegativeClip(level, 0.5)
    assert spared(entropy, -0.1, rule).tolist() == expected
    for advantage in (0.0, 0.1):
        assert not spared(entropy, advantage, rule).any()
    calm = torch.tensor([0.1, 0.6, 0.5, 0.79])  # mean 0.4975
    assert spared(calm, -0.1, rule).tolist() == [level == "token" and e > 0.5 for e in calm.tolist()]


def test_the_batch_entropy_is_the_mean_of_the_completions_means() -> None:
    """(0.2 + 0.6) / 2: of tokens it would be 0.3. An empty completion is none."""
    assert batch_entropy(rows([0.1, 0.2, 0.3], [0.6], [])) == pytest.approx(0.4)
    assert math.isnan(batch_entropy([]))


def test_aepo_masks_from_the_upper_bound_down_to_the_lower_one() -> None:
    rule, masking, course = Aepo(low=0.2, high=0.4), False, []
    for entropy in (0.3, 0.4, 0.41, 0.3, 0.2, 0.19, 0.3, 0.4, 0.5, math.nan, 0.1, math.nan):
        masking = aepo_masks(masking, entropy, rule)
        course.append(masking)
    assert course == [False, False, True, True, True, False, False, False, True, True, False, False]


def test_aepo_takes_negative_completions_whole_and_leaves_the_others() -> None:
    entropies = rows([0.1, 0.9], [0.1, 0.9], [0.5])
    kept = Masks(negatives=True).kept(entropies, [-0.5, 0.5, 0.0])
    assert [k.tolist() for k in kept] == [[False, False], [True, True], [True]]
    assert all(k.all() for k in Masks().kept(entropies, [-0.5, 0.5, 0.0]))


def test_the_rules_together_keep_what_each_keeps() -> None:
    """Threshold 0.5 from the top half; above 0.8 clipped where the advantage is negative."""
    masks = Masks(top=0.5, clip=NegativeClip("token", 0.8))
    kept = masks.kept(rows([0.9, 0.5, 0.1], [0.9, 0.2, 0.3]), [-1.0, 1.0])
    assert [k.tolist() for k in kept] == [[False, True, False], [True, False, False]]


def test_the_adaptive_weight_moves_by_delta_within_its_bounds() -> None:
    rule = AdaptiveEntropy(target=0.5, delta=0.1, min=0.05, max=0.25)
    course = [weight := 0.1]
    for entropy in (0.5, 0.4, 0.3, 0.6, 0.6, 0.51, 0.5):
        course.append(weight := adapted(weight, entropy, rule))
    assert course == pytest.approx([0.1, 0.2, 0.25, 0.25, 0.15, 0.05, 0.05, 0.15])


def test_the_bonus_is_given_only_while_the_last_entropy_was_at_or_below_the_target() -> None:
    control = EntropyControl(0.1, AdaptiveEntropy(target=0.5, delta=0.1))
    given = [control.weight]
    for entropy in (0.4, 0.6, math.nan, 0.5):
        control.observe(entropy)
        given.append(control.weight)
    assert given == pytest.approx([0.1, 0.2, 0.0, 0.0, 0.2]), "the weight fell to 0.1 behind the gate, and rose again"


def test_without_rules_nothing_moves() -> None:
    control = EntropyControl(0.1)
    for entropy in (0.0, 9.0):
        assert not control.begin(entropy)
        control.observe(entropy)
    assert control.weight == 0.1


def test_the_state_goes_through_json_and_goes_on_the_same() -> None:
    """Killed after any number of updates; thirds are not exact in decimals."""
    adaptive, aepo = AdaptiveEntropy(target=0.5, delta=1 / 3), Aepo(0.3, 0.6)
    entropies = (0.45, 0.7, 0.5, 0.4, 0.65, 0.29, 0.5)

    def course(control: EntropyControl, part: tuple[float, ...]) -> list[tuple[bool, float]]:
        made = []
        for entropy in part:
            made.append((control.begin(entropy), control.weight))
            control.observe(entropy)
        return made

    whole = course(EntropyControl(0.1, adaptive, aepo), entropies)
    assert len(set(whole)) > 4
    for cut in range(len(entropies)):
        first, second = EntropyControl(0.1, adaptive, aepo), EntropyControl(0.1, adaptive, aepo)
        before = course(first, entropies[:cut])
        second.load(json.loads(json.dumps(first.state())))
        assert before + course(second, entropies[cut:]) == whole
