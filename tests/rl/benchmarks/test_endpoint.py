"""A served model asked over real HTTP: what goes over the wire, and what becomes of replies that are no use."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longreach.engine import load_tokenizer
from longreach.rl.benchmarks import endpoint as module
from longreach.rl.benchmarks.endpoint import Choice, Endpoint, Pending, ServerDown, ServerError, read_choices
from longreach.rl.benchmarks.questions import Question, read_questions
from longreach.rl.benchmarks.results import Response
from longreach.rl.seeds import derive

Settings = Callable[..., Any]


@pytest.fixture
def ask(server: Any, tiny_dir: Path, settings: Settings, quiet: Any) -> Callable[..., list[Response]]:
    """Asks questions 0 .. count - 1 of qasper, and gives the responses by question and sample."""
    tokenizer = load_tokenizer(tiny_dir)

    def run(*, count: int = 1, samples: tuple[int, ...] = (0,), key: str | None = None, **keys: Any) -> list[Response]:
        config = settings(server.url, "qasper", samples=max(samples) + 1, **keys)
        questions, _ = read_questions(config, tokenizer, quiet)
        model = Endpoint(config, tokenizer, key)
        model.connect()
        found: list[Response] = []
        model.ask([Pending(question, samples) for question in questions[:count]], range(count), 4, found.append)
        return sorted(found, key=lambda response: (response.id, response.sample))

    return run


def replies(**completion: Any) -> str:
    return json.dumps(completion)


def text(*texts: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"index": i, "text": t, "finish_reason": "stop", **more} for i, t in enumerate(texts)]


# What is no completion: tried again, then listed with this reason.
USELESS: dict[str, tuple[str, str]] = {
    "a page": ("<html>busy</html>", "no completion in the reply"),
    "nothing": ("", "no completion in the reply"),
    "half of its JSON": ('{"choices": [{"text": "Therefo', "no completion in the reply"),
    "a list": ("[1]", "no completion in the reply"),
    "another object": ('{"error": "overloaded"}', "no completion in the reply"),
    "choices that are no list": ('{"choices": 7}', "no completion in the reply"),
    "a choice that is no object": ('{"choices": ["x"]}', "no completion in the reply"),
    "a message that is no object": ('{"choices": [{"message": "x"}]}', "no completion in the reply"),
    "indices that can't be ordered": ('{"choices": [{"index": "a", "text": "x"}, {"index": 1, "text": "y"}]}', "no completion in the reply"),
    "brackets without end": ("[" * 100_000, "no completion in the reply"),
    "no choices": ('{"choices": []}', "no choices in the reply"),
    "a choice without text": ('{"choices": [{"index": 0}]}', "a choice without text"),
    "text that is none": ('{"choices": [{"text": {"a": 1}}]}', "a choice without text"),
    "a message without content": ('{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}', "a choice without text"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_useless_replies_are_tried_again_and_then_listed(server: Any, ask: Any, name: str) -> None:
    body, why = USELESS[name]
    server.respond = lambda _n, _body: server.http(200, body)
    [response] = ask(server__retries=2)
    assert (response.failed, response.again, response.text) == (why, True, "")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("name", USELESS)
def test_a_server_that_recovers_costs_nothing(server: Any, ask: Any, name: str) -> None:
    server.respond = lambda n, _body: server.http(200, USELESS[name][0] if n == 0 else replies(choices=text("well")))
    [response] = ask()
    assert (response.text, response.failed) == ("well", None)


def test_connections_that_break_are_tried_again(server: Any, ask: Any) -> None:
    whole = server.http(200, replies(choices=text("well")))
    broken = [
        server.Raw([], reset=True), server.Raw([b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"]), server.http(429),
    ]  # fmt: skip
    server.respond = lambda n, _body: broken[n] if n < 3 else whole
    assert [r.text for r in ask(server__timeout=1.5)] == ["well"]
    assert len(server.bodies) == 4


def test_a_request_and_all_its_tries_meet_their_deadlines(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.after(3, server.http(500))
    [response] = ask(server__timeout=0.1, server__retries=1)
    assert (response.failed, response.again, len(server.bodies)) == ("timeout", True, 2)
    [response] = ask(server__timeout=0.1, server__retries=1000, server__deadline=0.35, server__backoff=0.01)
    assert response.failed == "timeout" and len(server.bodies) < 2 + 6


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_the_server_refuses_is_told_in_its_words_and_not_tried_again(server: Any, ask: Any, status: int) -> None:
    def respond(n: int, _body: dict[str, Any]) -> Any:
        return (
            server.http(status, '{"message":\n "too long: 200000 tokens"}' + "x" * 5000)
            if n == 0
            else server.http(200, replies(choices=text("a")))
        )

    server.respond = respond
    first, second = ask(count=2, server__concurrency=1)
    assert first.failed is not None and first.failed.startswith(f'{status}: {{"message": "too long: 200000 tokens"}}')
    assert len(first.failed) < 600 and not first.again
    assert second.text == "a" and len(server.bodies) == 2


def test_a_server_that_refuses_everything_is_not_put_down_to_the_questions(
    server: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "REFUSALS", 3)
    server.respond = lambda _n, _body: server.http(400, "unknown field seed")
    with pytest.raises(
        ServerError, match=r"refused the first 3 questions .400: unknown field seed.*--server.send-seed"
    ):
        ask(count=4, server__concurrency=1)
    server.bodies.clear()
    assert [r.failed for r in ask(count=2)] == ["400: unknown field seed"] * 2, "two may be the questions' own fault"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(server: Any, ask: Any, status: int) -> None:
    server.respond = lambda _n, _body: server.http(status)
    with pytest.raises(ServerError, match=rf"answered {status} for model 'small'.*--api-key-env"):
        ask(count=4)


def test_fewer_answers_than_asked_for_are_topped_up(server: Any, ask: Any) -> None:
    """A vendor that gives one answer a request, whatever n is: each is asked for, under a seed of its own."""
    server.respond = lambda n, _body: server.http(200, replies(choices=text(f"answer {n}")))
    made = ask(samples=(0, 1, 2))
    assert [(r.sample, r.text) for r in made] == [(0, "answer 0"), (1, "answer 1"), (2, "answer 2")]
    assert [body["n"] for body in server.bodies] == [3, 2, 1]
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == 3 and seeds[1] == derive(0, "eval", "qasper", "qasper-0", 1) % 2**31


def test_what_is_missing_at_last_is_listed_alone(server: Any, ask: Any) -> None:
    server.respond = lambda n, _body: server.http(200, replies(choices=text("one")) if n == 0 else '{"choices": []}')
    made = ask(samples=(0, 1, 2), server__retries=0)
    assert [(r.text, r.failed) for r in made] == [("one", None), *[("", "no choices in the reply")] * 2]


def test_more_answers_than_asked_for_are_left(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.http(200, replies(choices=text("a", "b", "c")))
    assert [r.text for r in ask(samples=(0, 1))] == ["a", "b"]


def test_only_missing_samples_are_asked_for(server: Any, ask: Any) -> None:
    server.respond = lambda _n, body: server.http(200, replies(choices=text(*"xyz"[: body["n"]])))
    assert [(r.sample, r.text) for r in ask(samples=(1, 3))] == [(1, "x"), (3, "y")]
    assert server.bodies[0]["n"] == 2


def test_answers_come_in_the_order_of_their_index(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.http(200, replies(choices=text("first", "second")[::-1]))
    assert [r.text for r in ask(samples=(0, 1))] == ["first", "second"]


def test_requests_are_bounded_and_the_bound_is_used(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.after(0.05, server.http(200, replies(choices=text("a"))))
    assert len(ask(count=4, server__concurrency=2)) == 4
    assert server.most == 2


def test_reasoning_in_a_field_of_its_own_is_put_back(server: Any, ask: Any) -> None:
    message = {"content": "Therefore, the answer is 4.", "reasoning_content": "2 + 2"}
    server.respond = lambda _n, _body: server.http(
        200, replies(choices=[{"message": message, "finish_reason": "stop"}])
    )
    [response] = ask(server__style="chat")
    assert response.text == "<think>\n2 + 2\n</think>\n\nTherefore, the answer is 4."
    cut = {"content": None, "reasoning": "2 +"}
    server.respond = lambda _n, _body: server.http(200, replies(choices=[{"message": cut, "finish_reason": "length"}]))
    [response] = ask(server__style="chat")
    assert (response.text, response.finish_reason) == ("<think>\n2 +", "length"), "its thoughts never ended"


def test_chat_sends_the_template_as_one_turn_with_the_middle_of_the_document_cut(
    server: Any, ask: Any, tiny_dir: Path
) -> None:
    server.respond = lambda _n, _body: server.chat("a")
    ask(count=4, server__style="chat", max_input=150)
    assert set(server.paths) == {"/v1/chat/completions"}
    turns = sorted((body["messages"] for body in server.bodies), key=lambda m: m[0]["content"])
    assert all(len(turn) == 1 and turn[0]["role"] == "user" for turn in turns)
    [longest] = [t[0]["content"] for t in turns if "item 3" in t[0]["content"]]
    assert longest.startswith("Please read the following text and answer the question below.\n\n<text>\nReport 3.")
    assert (
        'What is item 3 of qasper?\n\nFormat your response as follows: "Therefore, the answer is (insert answer here)".'
        in longest
    )
    tokenizer = load_tokenizer(tiny_dir)
    count = len(tokenizer(longest)["input_ids"])
    assert 140 <= count <= 150 + 4, "two tokens may become three where the ends meet"
    assert longest.count("Report 3.") < 63


def test_token_ids_go_to_completions_and_auto_finds_out(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.http(200, replies(choices=text("a")))
    ask(server__style="auto")
    assert server.paths == ["/v1/completions"] * 2
    assert server.bodies[0]["max_tokens"] == 1 and len(server.bodies[0]["prompt"]) == 1
    assert all(isinstance(token, int) for token in server.bodies[1]["prompt"])


@pytest.mark.parametrize("status", [400, 404, 405, 422])
def test_auto_takes_chat_where_completions_are_not_to_be_had(server: Any, ask: Any, status: int) -> None:
    server.respond = lambda _n, body: server.http(status) if "prompt" in body else server.chat("a")
    [response] = ask(server__style="auto")
    assert response.text == "a" and server.paths[-1] == "/v1/chat/completions"


def test_the_only_model_is_found_and_several_are_named(server: Any, ask: Any) -> None:
    def serving(*names: str) -> Callable[[int, dict[str, Any]], Any]:
        listed = json.dumps({"data": [{"id": name} for name in names]})
        return lambda _n, body: server.http(200, listed if not body else replies(choices=text("a")))

    server.respond = serving("qwen")
    ask(served_name="")
    assert server.paths[0] == "/v1/models" and server.bodies[1]["model"] == "qwen"
    server.respond = serving("one", "two")
    with pytest.raises(ServerError, match=r"serves one, two: name the model \(--served-name"):
        ask(served_name="")
    server.respond = lambda _n, _body: server.http(200, "[]")
    with pytest.raises(ServerError, match=r"does not say what it serves"):
        ask(served_name="")


def test_nobody_there_is_said_before_anything_is_asked(settings: Settings, tiny_dir: Path) -> None:
    config = settings("http://127.0.0.1:9/v1", "qasper", server__style="auto", server__retries=1)
    with pytest.raises(ServerDown, match=r"does not answer \(connection\)"):
        Endpoint(config, load_tokenizer(tiny_dir)).connect()


def test_key_limit_name_seed_and_top_k_go_as_told(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.http(200, replies(choices=text("a")))
    ask(
        key="secret",
        server__limit_key="max_completion_tokens",
        server__send_seed=False,
        top_k=20,
        temperature=0.1,
        top_p=0.5,
    )
    [body] = server.bodies
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert (body["max_completion_tokens"], body["top_k"], body["temperature"], body["top_p"]) == (8, 20, 0.1, 0.5)
    assert "seed" not in body and "max_tokens" not in body


def test_what_vllm_would_take_from_the_models_own_defaults_is_switched_off(server: Any, ask: Any) -> None:
    off = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    server.respond = lambda _n, body: (
        server.http(200, replies(choices=text("a"))) if "prompt" in body else server.chat("a")
    )
    ask()
    assert {name: server.bodies[-1].get(name) for name in off} == off
    for keys in ({"server__vllm_fields": False}, {"server__style": "chat"}):
        ask(**keys)
        assert not set(off) & set(server.bodies[-1])


def test_the_identity_tells_whose_defaults_hold(settings: Settings, tiny_dir: Path) -> None:
    def told(**keys: Any) -> str:
        return Endpoint(settings("http://h/v1", "qasper", **keys), load_tokenizer(tiny_dir)).identity()[
            "min_p and penalties"
        ]

    assert told() == "off"
    assert told(server__vllm_fields=False) == told(server__style="chat") == "as the server has them"


def test_a_question_has_its_seed_whatever_else_is_asked(server: Any, ask: Any) -> None:
    server.respond = lambda _n, _body: server.http(200, replies(choices=text("a")))
    ask(count=3, seed=5)
    first = {body["seed"] for body in server.bodies}
    assert len(first) == 3
    server.bodies.clear()
    ask(count=1, seed=5)
    assert server.bodies[0]["seed"] in first
    ask(count=1, seed=6)
    assert server.bodies[1]["seed"] not in first


def test_what_handing_in_raises_comes_out_and_calls_the_rest_off(
    server: Any, settings: Settings, tiny_dir: Path, quiet: Any
) -> None:
    """A full disk, for one."""
    server.respond = lambda n, _body: server.after(0.01 if n == 0 else 5, server.http(200, replies(choices=text("a"))))
    config, tokenizer = settings(server.url, "qasper"), load_tokenizer(tiny_dir)
    questions, _ = read_questions(config, tokenizer, quiet)

    def full(_: Response) -> None:
        raise OSError("no space left")

    before = threading.active_count()
    with pytest.raises(OSError, match=r"no space left"):
        Endpoint(config, tokenizer).ask([Pending(q, (0,)) for q in questions], range(4), 4, full)
    assert threading.active_count() <= before + 8  # the server's own


def test_counted_tokens_are_those_of_one_answer_alone() -> None:
    usage = {"completion_tokens": 30, "total_tokens": 130}
    one = read_choices(replies(choices=text("a"), usage=usage).encode())
    assert one.value == [Choice("a", "stop", 30)] and one.tokens == 130.0
    two = read_choices(replies(choices=text("a", "b"), usage=usage).encode())
    assert two.value is not None and [c.tokens for c in two.value] == [None, None]
    for strange in (
        {"completion_tokens": -1},
        {"completion_tokens": True},
        {"completion_tokens": "9"},
        [1],
        None,
        10**40,
    ):
        got = read_choices(replies(choices=text("a"), usage=strange).encode())
        assert got.value == [Choice("a", "stop", None)] and got.tokens is None


def test_an_unknown_end_is_no_stop() -> None:
    assert read_choices(b'{"choices": [{"text": "a", "finish_reason": null}]}').value == [Choice("a", "unknown", None)]
    filtered = read_choices(b'{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}')
    assert filtered.value == [Choice("", "content_filter", None)], "an answer of no words: wrong, not failed"


def test_questions_of_other_shapes_are_chat_too(tiny_dir: Path) -> None:
    import numpy as np

    from longreach.rl.benchmarks.questions import chat_messages
    from longreach.rl.rows import Example

    tokenizer = load_tokenizer(tiny_dir)
    ready = "Start. " + "filler words. " * 40 + "What is it?"
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": ready})
    for example in (Example("a", "b", ("x",), text=ready), Example("a", "b", ("x",), messages=turns)):
        length = len(tokenizer(ready, add_special_tokens=False)["input_ids"])
        whole = chat_messages(Question("b", example, np.zeros(length, np.int32), length), tokenizer)
        assert whole[-1] == {"role": "user", "content": ready}
        cut = chat_messages(Question("b", example, np.zeros(length - 50, np.int32), length), tokenizer)
        content = cut[-1]["content"]
        assert content.startswith("Start.") and content.endswith("What is it?")
        assert abs(len(tokenizer(content, add_special_tokens=False)["input_ids"]) - (length - 50)) <= 3
        assert len(cut) == len(whole)
    with pytest.raises(ValueError, match=r"raise max_input"):
        chat_messages(Question("b", example, np.zeros(0, np.int32), 10_000), tokenizer)
