"""The sampler: epochs without repeats, fair shares, returned prompts first, and a state that holds it whole."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from longreach.rl.sampler import PromptSampler

MEMBERS = [2, 3, 5, 7, 11, 13, 17]
TASKS = {i: "a" if i < 10 else "b" for i in MEMBERS}  # four of a, three of b


def sampler(*, seed: int = 0, balanced: bool = False, members: list[int] | None = None) -> PromptSampler:
    return PromptSampler(MEMBERS if members is None else members, TASKS, seed=seed, balanced=balanced)


def test_each_epoch_holds_every_prompt_once_in_an_order_of_its_own() -> None:
    drawn = sampler().take(5 * len(MEMBERS))
    epochs = [drawn[i : i + len(MEMBERS)] for i in range(0, len(drawn), len(MEMBERS))]
    assert all(sorted(epoch) == MEMBERS for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_draws_do_not_depend_on_how_they_are_cut_into_batches() -> None:
    one, other = sampler(), sampler()
    assert [*one.take(3), *one.take(9), *one.take(1)] == other.take(13)


def test_the_seed_decides() -> None:
    assert sampler().take(20) == sampler().take(20)
    assert sampler().take(20) != sampler(seed=1).take(20)


def test_balanced_batches_draw_the_same_share_from_each_task() -> None:
    made = sampler(balanced=True)
    batches = [made.take(4) for _ in range(6)]
    assert all(Counter(TASKS[i] for i in batch) == {"a": 2, "b": 2} for batch in batches)
    drawn = [i for batch in batches for i in batch]
    of_b = [i for i in drawn if TASKS[i] == "b"]
    assert all(sorted(of_b[k : k + 3]) == [11, 13, 17] for k in range(0, 12, 3)), "each task has epochs of its own"


def test_balance_holds_over_batches_that_tasks_do_not_divide() -> None:
    made = sampler(balanced=True)
    drawn = Counter(TASKS[i] for _ in range(4) for i in made.take(3))
    assert drawn == {"a": 6, "b": 6}


def test_without_balance_shares_are_those_of_the_data() -> None:
    assert Counter(TASKS[i] for i in sampler().take(21)) == {"a": 12, "b": 9}


def test_returned_prompts_come_first_and_once() -> None:
    made, plain = sampler(), sampler()
    first = made.take(4)
    made.give_back(first[2:])
    assert made.take(3)[:2] == first[2:]
    plain.take(4)
    assert made.take(2) == plain.take(3)[1:], "what was drawn anew is the order that would have come anyway"


def test_the_newest_returned_come_before_those_that_still_wait() -> None:
    made = sampler()
    made.give_back([7, 5])
    assert made.take(1) == [7]
    made.give_back([3])
    assert made.take(2) == [3, 5]


def test_returned_prompts_do_not_disturb_balance() -> None:
    made = sampler(balanced=True)
    made.give_back([2])
    batch = made.take(5)
    assert batch[0] == 2
    assert Counter(TASKS[i] for i in batch[1:]) == {"a": 2, "b": 2}


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("before", [0, 3, 7, 10])
def test_a_state_goes_on_where_it_was(before: int, balanced: bool) -> None:
    made = sampler(balanced=balanced)
    made.take(before)
    made.give_back([5, 3])
    made.take(1)
    again = sampler(balanced=balanced)
    again.load(json.loads(json.dumps(made.state())))
    assert again.take(25) == made.take(25)
    assert again.state() == made.state()


def test_a_state_is_not_changed_by_what_follows() -> None:
    made = sampler()
    made.give_back([5])
    made.owe([4])
    state = made.state()
    made.take(9)
    made.owed()
    assert state == {"drawn": {"": 0}, "next_task": 0, "queue": [5], "owed": [4]}


def test_what_is_owed_comes_once_on_top_of_a_steps_own_and_is_in_the_state() -> None:
    made = sampler()
    made.owe([4, 2])
    made.owe([4])
    again = sampler()
    again.load(json.loads(json.dumps(made.state())))
    for one in (made, again):
        assert one.owed() == [4, 2, 4] and one.owed() == []
    assert made.take(5) == again.take(5) == sampler().take(5)


def test_a_state_of_before_there_were_debts_owes_nothing() -> None:
    made = sampler()
    made.load({"drawn": {"": 0}, "next_task": 0, "queue": []})
    assert made.owed() == []


def test_nothing_to_sample_from() -> None:
    with pytest.raises(ValueError, match="no prompt"):
        sampler(members=[])
