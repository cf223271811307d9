"""Who turns prompts into completions: the policy's own model here, or servers (`serving/client.py`).

Whoever it is, the same call on the same weights gives completions of the same distribution, as token ids with their log-probs,
on all ranks the same; `rollouts.roll_out` knows no difference. Only the local one repeats them token by token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..engine import Completion, Sampling, generate
from ..engine.generate import OnDone
from .prompts import Prompt

if TYPE_CHECKING:
    from .policy import Policy


UNFINISHED = "abort"
"""The finish reason of a completion that was stopped and can be gone on with."""

Sample = Callable[[Sequence[Prompt], int, Sampling, int, OnDone], list[list[Completion]]]
"""As `Generator.sample`; a group that is left empty is not there yet."""


def whole(group: Sequence[Completion]) -> bool:
    """Whether all of it has ended."""
    return all(one.finish_reason != UNFINISHED for one in group)


class Generator(Protocol):
    """Of one policy. All ranks make the same calls; between `start` and `close` it can be asked."""

    def start(self, window: int) -> None:
        """Ready to be asked when it returns, for prompts with completions of at most `window` tokens together."""
        ...

    def close(self) -> None:
        """Ends what `start` began; a second time does nothing."""
        ...

    def health(self) -> dict[str, str]:
        """What is wrong, by who: empty when all is well."""
        ...

    @property
    def versions(self) -> Mapping[str, int | None]:
        """`Policy.version` of the weights that each one generates with; None: not known."""
        ...

    def metrics(self) -> dict[str, float]:
        """What happened since this was last asked, for the step's metrics."""
        ...

    def refresh(self) -> None:
        """Brings the policy's weights to whoever lacks them, which `sample` else does when it begins."""
        ...

    def rest(self) -> None:
        """Nothing is sampled for a while: a server that shares its GPU with the trainer gives it up until it is asked again."""
        ...

    def beside(self, policy: Policy) -> Generator:
        """The same servers, asked by a thread of this rank alone while another trains; `policy` is that thread's.

        Weights are handed over by the generator that it was made of.
        """
        ...

    def call_off(self) -> None:
        """From another thread: a `sample` under way ends soon, with an error."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone
    ) -> list[list[Completion]]:
        """G completions of each prompt.

        `on_done` is handed each of this rank's as it ends (a generator that can't tell may leave it: what is returned
        counts).
        """
        ...

    def sample_most(
        self, prompts: Sequence[Prompt], begun: Sequence[Sequence[Completion]], spare: int, group_size: int,
        sampling: Sampling, seed: int, on_done: OnDone,
    ) -> list[list[Completion]]:  # fmt: skip
        """As `sample`, without waiting for the last `spare` groups: they come as far as they are.

        What of them hasn't ended is `UNFINISHED`, and `on_done` is not told of any of it. `begun` are the
        groups that an earlier call left so, for the first of the prompts: they are gone on with, by the weights of now.
        """
        ...


class LocalGenerator:
    """The policy's own model, with `engine.generate`; prompts are shared out over the ranks."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def start(self, window: int) -> None:
        pass

    def close(self) -> None:
        pass

    def health(self) -> dict[str, str]:
        return {}

    @property
    def versions(self) -> Mapping[str, int | None]:
        return {"here": self._policy.version}

    def metrics(self) -> dict[str, float]:
        return {}

    def refresh(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def beside(self, policy: Policy) -> Generator:
        raise AssertionError("the policy that trains can't generate meanwhile")

    def call_off(self) -> None:
        pass

    def sample_most(self, *_: Any, **__: Any) -> list[list[Completion]]:
        raise AssertionError("the policy's own model ends with its whole batch")

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, sampling: Sampling, seed: int, on_done: OnDone
    ) -> list[list[Completion]]:
        policy, ids = self._policy, [torch.tensor(prompt.ids) for prompt in prompts]
        shares = policy.ranks.share([len(prompt) + group_size * sampling.max_completion for prompt in ids])
        with policy.precision():
            mine = policy.weights.run_gathered(
                lambda: generate(
                    policy.model,
                    ids,
                    group_size,
                    sampling,
                    stop_ids=policy.stop_ids,
                    seed=seed,
                    batch_tokens=policy.generator.batch_tokens,
                    on_done=on_done,
                    share=shares[policy.ranks.rank],
                )
            )
        made = dict(zip(itertools.chain(*shares), itertools.chain(*policy.ranks.every(mine)), strict=True))
        return [made[i] for i in range(len(ids))]
