"""Log-probs of a fixed request, a server's against the trainer's own: whether the two have the same weights, as far as rounding lets it show.

Asked for are the likeliest next tokens after prefixes of a fixed prompt that are some blocks long, by two routes, since each
hides what the other shows. `fresh`, with a salt that was never used, is computed afresh. `cached` reads the server's prefix cache,
so keys and values left over from older weights show: asked once before an update (`touch`), the old blocks are surely in the
cache after it, unless it was reset. (Log-probs of a prompt's own tokens bypass that cache as well; but where vLLM's CPU build
serves adapters, asking for them beside another request ends its engine.)

The measure is the mean of |server - trainer| over a route's values. Servers round otherwise than trainers do, so equal weights
differ too: the first push measures by how much (`Gauge.noise`), and later ones may differ `multiple` times as much. That is the
resolution. It catches weights that did not arrive, a tied head left behind, a stale cache, another run's weights; one small step
of training that did not arrive hides in it (bfloat16 noise on likely tokens is 0.003 to 0.008 nats, on unlikely ones 0.04),
and only the server's version and checksums speak of that.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...engine import Group
from ..policy import Policy
from .control import Control, Facts, SyncError
from .http import ServerError

PREFIXES = 16
"""Each a token longer than the one before."""
TOP = 8
"""Likeliest next tokens asked for after each: fewer than any server's limit."""
STRIDE = 8
"""Prefixes that the trainer computes from one prompt: more of them repeat more of what lies between, fewer repeat the prompt."""
SHORTEST = 128
"""Tokens before the first prefix ends, at least; and two blocks of the cache at least."""
_FLOOR = 0.002
"""Nats. With equal dtypes on both sides the noise can be next to nothing, and a multiple of that means nothing."""
_PLAIN = {
    "max_tokens": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Against a model's own generation_config, which servers read as defaults."""


@dataclass(frozen=True)
class Answers:
    """One server's log-probs of the likeliest tokens after each prefix, by either route."""

    fresh: list[dict[int, float]]
    cached: list[dict[int, float]]


@dataclass(frozen=True)
class Difference:
    """|server - trainer| in nats, by route: the mean and the largest."""

    mean: dict[str, float]
    largest: dict[str, float]


@dataclass(frozen=True)
class Probe:
    """`ids` of the prompt; the shortest prefix has `start` of them, and there are PREFIXES."""

    ids: tuple[int, ...]
    start: int

    @classmethod
    def build(cls, policy: Policy, facts: Sequence[Facts], ids: Sequence[int] = ()) -> Probe:
        """From the given ids (the first prompt of the data, say), filled up with random tokens that have no special meaning.

        Two blocks of the cache are read; of a server whose sequences have no room for that, what it could have of them.

        Raises:
            ValueError: a server's longest sequence has no room for a handful of tokens.
        """
        longest = min(fact.longest for fact in facts)
        start = min(max(SHORTEST, *(2 * fact.block for fact in facts)), longest - PREFIXES)  # and one more is sampled
        if start < 1:
            raise ValueError(
                f"the probe needs {PREFIXES + 1} tokens, and the server takes {longest}: start it with a larger "
                "--max-model-len, or set generator.sync.probe = false"
            )
        length = start + PREFIXES - 1
        special = set(policy.tokenizer.all_special_ids)
        known = [i for i in range(min(len(policy.tokenizer), policy.model.config.vocab_size)) if i not in special]
        filling = random.Random(0).choices(known, k=length)
        return cls(tuple([*ids, *filling][:length]), start)

    def touch(self, control: Control, model: str) -> None:
        """Leaves the prefixes' blocks in the servers' caches."""
        control.post("/v1/completions", {"model": model, "prompt": list(self.ids[: self.start]), **_PLAIN})

    def ask(self, control: Control, model: str) -> list[Answers]:
        """Each server's answers; the cached route first, while the cache is as the update left it.

        Raises:
            ServerError: an answer without the log-probs that were asked for.
        """
        prefixes = [list(self.ids[: self.start + i]) for i in range(PREFIXES)]
        wanted = {"model": model, **_PLAIN, "logprobs": TOP, "return_tokens_as_token_ids": True}

        def asked(**salt: str) -> list[Any]:
            """The longest by itself first: the others then find in the cache what they have in common."""
            control.post("/v1/completions", {**wanted, **salt, "prompt": prefixes[-1:]})
            return control.post("/v1/completions", {**wanted, **salt, "prompt": prefixes})

        cached = asked()
        fresh = asked(cache_salt=secrets.token_hex(8))
        made = []
        for url, one, other in zip(control.urls, fresh, cached, strict=True):
            try:
                made.append(Answers(_top_values(one), _top_values(other)))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise ServerError(
                    url, f"the probe's answer lacks log-probs that were asked for ({type(error).__name__}: {error})"
                ) from None
        return made

    def compare(self, policy: Policy, answers: Sequence[Answers]) -> list[Difference]:
        """The trainer's own values of the same tokens against each server's; a collective call where `policy.in_step`."""
        seen = [one.fresh + one.cached for one in answers]
        asked = [sorted(set().union(*(tops[i] | tops[i + PREFIXES] for tops in seen))) for i in range(PREFIXES)]
        groups = [self._group(first, asked[first : first + STRIDE]) for first in range(0, PREFIXES, STRIDE)]
        with torch.no_grad():
            logp = policy.logprobs(groups, 1.0).logp.double().cpu()
        lengths = [len(completion) for group in groups for completion in group.completions]
        values = iter(logp[torch.tensor(lengths).cumsum(0) - 1].tolist())
        own = [{token: next(values) for token in tokens} for tokens in asked]
        return [_difference({"fresh": one.fresh, "cached": one.cached}, own) for one in answers]

    def _group(self, first: int, asked: Sequence[Sequence[int]]) -> Group:
        """Of tokens asked for after prefix number `first` and those behind it: a completion each, whose last token it is."""
        ids, begin = torch.tensor(self.ids), self.start + first
        ends = [(ids[begin : begin + i], token) for i, tokens in enumerate(asked) for token in tokens]
        return Group(ids[:begin], [torch.cat([path, torch.tensor([token])]) for path, token in ends])


@dataclass
class Gauge:
    """What a difference may be. `limit`: nats of the mean that equal weights may differ by; `multiple`: of that noise, later."""

    multiple: float
    limit: float
    noise: dict[str, float] = field(default_factory=dict)

    def judge(self, urls: Sequence[str], differences: Sequence[Difference], version: int) -> None:
        """The first time it takes the difference for the noise, if that is small enough.

        Raises:
            SyncError: a server differs by more than rounding explains.
        """
        for url, difference in zip(urls, differences, strict=True):
            for route, mean in difference.mean.items():
                allowed = self.allowed(route)
                if not mean <= allowed:  # also not a number
                    raise SyncError(self._message(url, route, mean, difference, version))
        if not self.noise:
            self.noise = {route: max(one.mean[route] for one in differences) for route in differences[0].mean}

    def allowed(self, route: str) -> float:
        return min(self.limit, max(_FLOOR, self.multiple * self.noise[route])) if self.noise else self.limit

    def _message(self, url: str, route: str, mean: float, difference: Difference, version: int) -> str:
        fine = [name for name, value in difference.mean.items() if value <= self.allowed(name)]
        if route == "cached" and "fresh" in fine:
            cause = "computed afresh its log-probs are right: it reads keys and values of older weights from its prefix cache"
        else:
            cause = (
                "it has other weights than the trainer: a part was left behind (a tied head?), or they never arrived, or "
                "it rounds far more coarsely (quantised weights or cache)"
            )
        basis = f"{self.multiple:g} times the noise of the first push" if self.noise else "generator.sync.probe_limit"
        return (
            f"{url}: version {version} did not take: log-probs of the probe's {route} route are {mean:.4f} nats off on "
            f"average (largest {difference.largest[route]:.4f}), {self.allowed(route):.4f} are allowed ({basis}). {cause}"
        )

    def resolution(self) -> str:
        """What the probe can't see, for a report."""
        if not self.noise:
            return "the probe has measured nothing yet"
        return (
            "weights that differ by less than "
            + ", ".join(f"{self.allowed(route):.4f} nats ({route})" for route in self.noise)
            + " on average look alike to the probe; one small step of training can hide in that"
        )


def _top_values(answer: Any) -> list[dict[int, float]]:
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != PREFIXES:
        raise ValueError(f"{len(choices)} choices for {PREFIXES} prefixes")
    made = []
    for choice in choices:
        (top,) = choice["logprobs"]["top_logprobs"]
        if not top:
            raise ValueError("no log-probs at all")
        made.append({int(name.removeprefix("token_id:")): float(value) for name, value in top.items()})
    return made


def _difference(routes: dict[str, list[dict[int, float]]], own: list[dict[int, float]]) -> Difference:
    """A value that is no number is infinitely far off."""
    found = {
        route: [abs(value - ours[token]) for top, ours in zip(tops, own, strict=True) for token, value in top.items()]
        for route, tops in routes.items()
    }
    clean = {route: [v if math.isfinite(v) else math.inf for v in values] for route, values in found.items()}
    return Difference(
        {route: sum(values) / len(values) for route, values in clean.items()},
        {route: max(values) for route, values in clean.items()},
    )
