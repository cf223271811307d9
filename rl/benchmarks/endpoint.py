"""A model behind an OpenAI-compatible server, asked for n samples of each question.

Token ids go to /completions where the server takes them (vLLM does), so that the prompt is the one that was measured and
cut; else text goes to /chat/completions, and the server's template is around it. Reasoning that comes in a field of its own
is put back in front, between think marks, where every scoring looks for it.

A reply with fewer answers than asked for is taken, and the rest is asked for again; one that can't be read is tried again,
like a lost connection. What the server refuses (400: too long a prompt) is not, and is told with the server's own words.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from ..http_client import Client, Reply
from ..seeds import derive
from .questions import Question, chat_messages
from .results import Response
from .settings import EvaluationConfig, ServerConfig

MAX_REPLY = 64 << 20
"""Bytes of a reply that are read: 16 answers of 10,000 tokens, escaped, with room."""

REFUSALS = 20
"""So many questions refused and none answered: it is no question's fault."""

CONNECT_S = 120.0
"""Seconds for being told what the server is and can do."""

T = TypeVar("T")
OnResponse = Callable[[Response], object]


class ServerError(ValueError):
    """The server won't have the key, the model or the path."""


class ServerDown(OSError):
    """The server has been out for longer than `server.outage`."""


class Choice(NamedTuple):
    text: str
    finish_reason: str
    tokens: int | None


@dataclass(frozen=True)
class Pending:
    """What is still wanted of a question: the samples of these numbers."""

    question: Question
    samples: tuple[int, ...]


class Endpoint:
    """`style` and `served_name` are settled by `connect`."""

    def __init__(
        self, config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, api_key: str | None = None
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.base = config.model.rstrip("/")
        self.served_name, self.style = config.served_name, config.server.style
        self._key = api_key

    def identity(self) -> dict[str, Any]:
        """What tells this model from another; its URL doesn't."""
        own = self.style == "chat" or not self.config.server.vllm_fields
        kept = "as the server has them" if own else "off"
        return {"kind": "server", "name": self.served_name, "asked with": self.style, "min_p and penalties": kept}

    def recall(self, identity: Any) -> None:
        """What an earlier evaluation in the same folder found out, so that it is asked with the same prompts again."""
        if isinstance(identity, dict) and identity.get("kind") == "server":
            self.served_name = self.served_name or identity["name"]
            self.style = identity["asked with"] if self.style == "auto" else self.style

    def check(self, questions: Sequence[Question]) -> None:
        """Nothing: a server tells itself which prompts are too long for it."""

    def connect(self) -> None:
        """Finds out what the server calls its model and whether it takes token ids, by a request of one token.

        Raises:
            ServerError: it refuses, or serves several models and none was named. ServerDown: nobody answers.
        """
        asyncio.run(self._connect())

    def ask(self, pending: Sequence[Pending], places: Sequence[int], count: int, on_response: OnResponse) -> None:
        """Hands every response in as it ends; `places` and `count` are as `LocalModel` has them. Raises ServerError or ServerDown, with those so far handed in."""
        doubt = _Doubt(self.base, on_response)
        asyncio.run(self._ask_all(pending, doubt))
        doubt.release()

    def _client(self, read: Callable[[bytes], Reply[T]], settings: ServerConfig) -> Client[T]:
        return Client(
            settings, read=read, refused=self._refusal, api_key=self._key, max_reply=MAX_REPLY, outage=settings.outage
        )

    def _refusal(self, status: int) -> ServerError:
        return ServerError(
            f"the server at {self.base} answered {status} for model {self.served_name!r}: check the URL (it ends in /v1 as a "
            "rule), --served-name and --api-key-env"
        )

    async def _connect(self) -> None:
        server = self.config.server
        soon = replace(server, timeout=min(server.timeout, CONNECT_S), deadline=min(server.deadline, CONNECT_S))
        if not self.served_name:
            async with self._client(_model_ids, soon) as client:
                self.served_name = self._only(await client.get(f"{self.base}/models"))
        if self.style != "auto":
            return
        ids = self.tokenizer("a", add_special_tokens=False)["input_ids"][:1]
        body = {"model": self.served_name, "prompt": [int(ids[0])], "max_tokens": 1, "temperature": 0.0}
        async with self._client(read_choices, soon) as client:
            try:
                reply = await client.post(f"{self.base}/completions", body, size=1, most=1)
            except ServerError:  # no such path; a wrong key shows at the first question
                reply = Reply[list[Choice]]()
        if reply.again:
            raise self._silent(reply.why)
        self.style = "completions" if reply.value else "chat"

    def _only(self, reply: Reply[list[str]]) -> str:
        if reply.again:
            raise self._silent(reply.why)
        names = reply.value or []
        if len(names) != 1:
            told = f"serves {', '.join(names[:10])}" if names else "does not say what it serves"
            raise ServerError(f"the server at {self.base} {told}: name the model (--served-name NAME)")
        return names[0]

    def _silent(self, why: str) -> ServerDown:
        return ServerDown(
            f"the server at {self.base} does not answer ({why}): start it, or set --server.style and --served-name if it only "
            "dislikes being asked what it can do"
        )

    async def _ask_all(self, pending: Sequence[Pending], on_response: OnResponse) -> None:
        # A slot is held while a request is put together, since 120,000 numbers each would fill a memory.
        slots = asyncio.Semaphore(self.config.server.concurrency)
        try:
            async with self._client(read_choices, self.config.server) as client, asyncio.TaskGroup() as group:
                for one in pending:
                    group.create_task(self._question(client, slots, one, on_response))
        except ExceptionGroup as several:  # the first called the others off
            raise several.exceptions[0] from None

    async def _question(
        self, client: Client[list[Choice]], slots: asyncio.Semaphore, wanted: Pending, on_response: OnResponse
    ) -> None:
        key, left = wanted.question.key, list(wanted.samples)
        while left:
            async with slots:
                reply = await self._request(client, wanted.question, left)
            choices = (reply.value or [])[: len(left)]
            for sample, choice in zip(left, choices, strict=False):
                on_response(Response(*key, sample, choice.text, choice.finish_reason, choice.tokens))
            left = left[len(choices) :]
            if not choices:
                said = " ".join(reply.detail.split())[:500]
                for sample in left:
                    on_response(
                        Response(*key, sample, failed=f"{reply.why}: {said}" if said else reply.why, again=reply.again)
                    )
                return

    async def _request(
        self, client: Client[list[Choice]], question: Question, samples: Sequence[int]
    ) -> Reply[list[Choice]]:
        """One request for so many samples; raises ServerDown where nobody would wait any longer."""
        config = self.config
        body: dict[str, Any] = {
            "model": self.served_name, config.server.limit_key: config.max_output, "temperature": config.temperature,
            "top_p": config.top_p, "n": len(samples),
        }  # fmt: skip
        if config.server.send_seed:
            body["seed"] = derive(config.seed, "eval", *question.key, samples[0]) % 2**31
        if config.top_k:
            body["top_k"] = config.top_k
        if self.style == "completions" and config.server.vllm_fields:
            body |= {"top_k": config.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
        if self.style == "completions":
            path, body["prompt"] = "completions", question.ids.tolist()
        else:
            path, body["messages"] = "chat/completions", chat_messages(question, self.tokenizer)
        size, most = 3 * len(question.ids), len(samples) * config.max_output
        reply = await client.post(f"{self.base}/{path}", body, size=size, most=most)
        if not reply.value and client.down:
            raise ServerDown(
                f"the server at {self.base} has been failing for more than {config.server.outage:.0f} s ({reply.why}): "
                "what it has answered is kept, and the same command goes on"
            )
        return reply


class _Doubt:
    """Holds refusals back until something was answered: a server that refuses all dislikes a setting, not the questions."""

    def __init__(self, base: str, on_response: OnResponse) -> None:
        self._base, self._on_response = base, on_response
        self._answered = False
        self._held: list[Response] = []

    def __call__(self, response: Response) -> None:
        if response.failed is None or response.again or self._answered:
            self._answered = self._answered or response.failed is None
            for one in (*(self._held if self._answered else ()), response):
                self._on_response(one)
            self._held = [] if self._answered else self._held
            return
        self._held.append(response)
        if len(self._held) >= REFUSALS:
            raise ServerError(
                f"the server at {self._base} refused the first {len(self._held)} questions ({response.failed}): lower "
                "--max-input or --max-output, or see --server.send-seed, --server.vllm-fields and --server.limit-key"
            )

    def release(self) -> None:
        """Nothing more comes: they were refused, one by one."""
        for one in self._held:
            self._on_response(one)
        self._held = []


def read_choices(body: bytes) -> Reply[list[Choice]]:
    """The answers of a completion or a chat completion. What has none is worth another try: proxies tear replies."""
    try:
        parsed = json.loads(body)
        choices = sorted(parsed["choices"], key=lambda choice: choice.get("index") or 0)
        made = [_choice(choice) for choice in choices]
        usage = parsed.get("usage")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not JSON, or no completion
        return Reply(why="no completion in the reply", again=True)
    if not made:
        return Reply(why="no choices in the reply", again=True)
    if any(choice is None for choice in made):
        return Reply(why="a choice without text", again=True)
    tokens = usage if isinstance(usage, dict) else {}
    total, written = (_count(tokens.get(name)) for name in ("total_tokens", "completion_tokens"))
    whole = [choice for choice in made if choice is not None]
    if len(whole) == 1 and written is not None:
        whole = [whole[0]._replace(tokens=written)]
    return Reply(whole, tokens=None if total is None else float(total))


def _choice(choice: dict[str, Any]) -> Choice | None:
    """None: it holds no text of any kind."""
    finish = choice.get("finish_reason")
    finish = finish if isinstance(finish, str) else "unknown"
    if "message" not in choice:
        text = choice.get("text")
        return Choice(text, finish, None) if isinstance(text, str) else None
    message = choice["message"]
    text = message.get("content")
    thoughts = next((message[k] for k in ("reasoning_content", "reasoning") if isinstance(message.get(k), str)), "")
    if not isinstance(text, str):
        # Cut off within its thoughts, or refused by a filter: an answer of no words, not a failed request.
        if text is not None or not (thoughts or finish in ("length", "content_filter")):
            return None
        return Choice(f"<think>\n{thoughts}" if thoughts else "", finish, None)
    return Choice(f"<think>\n{thoughts}\n</think>\n\n{text}" if thoughts else text, finish, None)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31 else None


def _model_ids(body: bytes) -> Reply[list[str]]:
    try:
        return Reply([str(model["id"]) for model in json.loads(body)["data"]])
    except (ValueError, KeyError, TypeError, RecursionError):
        return Reply([], why="no list of models")
