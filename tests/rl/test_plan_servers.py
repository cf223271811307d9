"""A recipe's servers as the planner sees them: whose GPUs, how many, and what can't be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longreach.engine.planner_hardware import GPUS
from longreach.engine.planner_memory import Servers
from longreach.rl import plan as planning
from longreach.rl.console import Console
from longreach.rl.plan import check_fits, make_plan
from longreach.rl.plan_servers import servers_of
from longreach.rl.plan_sweep import settings_on, sweep
from longreach.rl.plan_text import plan_text
from longreach.rl.recipe import Recipe, load_recipe

PLAIN = [("phases.0.top_p", "1"), ("phases.0.top_k", "0"), ("phases.1.top_p", "1"), ("phases.1.top_k", "0")]
APART = [("generator.servers", "2"), ("generator.devices", '["0,1","2,3"]'), ("generator.args", "-tp,2")]


def recipe(*keys: tuple[str, str], name: str = "qwenlong-l1-14b") -> Recipe:
    plain = PLAIN if name == "qwenlong-l1-14b" else []
    return load_recipe(name, [*plain, ("generator", "vllm"), *keys])


READ: dict[str, tuple[list[tuple[str, str]], dict[str, Any]]] = {
    "on the trainer's": ([], {"count": 1, "apart": False, "dtype": "bfloat16", "sync": "safetensors"}),
    "of their own": (APART, {"count": 2, "tensor": 2, "apart": True, "gpus": 4}),
    "running ones": ([("generator.urls", "http://a:1,http://b:1,http://c:1")], {"count": 3, "apart": True, "gpus": 3}),
    "copies": (
        [("generator.args", "--tensor-parallel-size=2,--data-parallel-size=4,--pipeline-parallel-size,2")],
        {"tensor": 4, "replicas": 4, "gpus": 16},
    ),
    "the last one counts": ([("generator.args", "-tp,2,-tp,4")], {"tensor": 4}),
    "asleep": ([*APART, ("generator.sync.sleep", "1")], {"apart": False, "sleep": 1}),
    "within a GPU": ([("generator.sync.kind", "ipc")], {"apart": False, "sync": "ipc"}),
    "sizes": (
        [("generator.cache_gib", "2"), ("generator.args", "--gpu-memory-utilization,0.5"), ("generator.concurrency", "7"),
         ("generator.dtype", "float32"), ("generator.max_model_len", "90000"), ("rl.staleness", "1")],
        {"cache": 2.0 * 2**30, "utilization": 0.5, "concurrency": 7, "size": 4, "window": 90_000, "staleness": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_generator_says(case: str) -> None:
    keys, expected = READ[case]
    servers = servers_of(recipe(*keys))
    assert servers is not None
    assert {name: getattr(servers, name) for name in expected} == expected
    assert servers.window == 90_000 if case == "sizes" else servers.window == recipe().served_window()


def test_the_trainer_s_own_model_is_no_server_and_adapters_travel_as_such() -> None:
    assert servers_of(load_recipe("qwenlong-l1-14b")) is None
    lora = servers_of(recipe(name="one-gpu-8b-lora"))
    assert lora is not None and lora.sync == "lora"
    asleep = servers_of(recipe(("generator.sync.sleep", "2"), name="one-gpu-8b-lora"))
    assert asleep is not None and asleep.sync == "safetensors", "dropped weights don't come back with an adapter"


def test_gpus_of_servers_that_run_come_from_serve() -> None:
    servers = servers_of(recipe(("generator.urls", "http://a:1,http://b:1")), serve=4)
    assert servers is not None and (servers.tensor, servers.gpus) == (4, 8)


@pytest.mark.parametrize(
    "keys, serve, words",
    [
        ([("generator.args", "-tp,two")], 0, "-tp needs a number, not 'two'"),
        ([("generator.args", "-tp")], 0, "-tp needs a number, not ''"),
        ([("generator.args", "-tp,0")], 0, "-tp must be positive"),
        ([("generator.args", "-tp,4")], 2, "--serve 2, but generator.args spreads a server over 4 GPUs"),
        ([*APART[:2], ("generator.args", "-tp,4")], 0, "gives a server '0,1', and generator.args spreads it over 4 GPUs"),
    ],
)  # fmt: skip
def test_what_contradicts_itself(keys: list[tuple[str, str]], serve: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        servers_of(recipe(*keys), serve)


def test_a_plan_leaves_servers_their_gpus_and_says_what_a_step_waits_for() -> None:
    made = make_plan(recipe(*APART, ("rl.staleness", "1")), GPUS["h200"], 16)
    own = made.proposal.own.setting
    assert (own.gpus, own.all_gpus, own.serve) == (12, 16, 0)
    text = plan_text(made)
    assert "on 16 x h200" in text
    assert "12 GPU(s) train; 2 vLLM server(s) of 2 GPUs generate on 4 others" in text
    assert "a step takes as long as generation" in text and "server" in text and "files" in text
    phase = made.chosen.plans[-1]
    assert f"{phase.seconds * 16 / 3600:,.2f}" in text, "GPU-hours are of all sixteen"
    assert "a step takes as long as" not in plan_text(make_plan(recipe(*APART), GPUS["h200"], 16))
    with pytest.raises(ValueError, match=r"2 server\(s\) of 2 take 4, and none is left for the trainer"):
        make_plan(recipe(*APART), GPUS["h200"], 4)


def test_more_servers_generate_sooner_until_training_bounds_the_step() -> None:
    def step(count: int) -> tuple[float, float, float]:
        devices = str([str(i) for i in range(count)]).replace("'", '"')
        keys = [("generator.servers", str(count)), ("generator.devices", devices), ("rl.staleness", "1")]
        plan = make_plan(recipe(*keys), GPUS["h200"], 8 + count).proposal.own.plans[-1]
        return plan.generation, plan.training, plan.seconds

    (slow, train, long), (fast, same, short) = step(4), step(48)
    assert slow > train and fast < same == train
    assert long > slow and train < short < long


def test_what_shares_the_trainer_s_gpus_claims_what_is_left_of_them() -> None:
    made = make_plan(recipe(), GPUS["h200"], 8)
    text = plan_text(made)
    assert "generate on the same ones, awake while it trains" in text
    assert "which a server claims for itself: bound it by generator.cache_gib" in text
    small = make_plan(recipe(("model.device", "cuda"), name="demo"), GPUS["h200"], 1)
    assert small.proposal.own.fits, "what trains in the tenth that is left may do so"


def test_what_nothing_else_would_change_is_said_once() -> None:
    odd = recipe(("generator.devices", '["0,1,2"]'), ("generator.args", "-tp,3"))
    roomy = replace(
        GPUS["h200"], memory=300e9
    )  # or whole weights and their gradients on one GPU would be another reason
    assert plan_text(make_plan(odd, roomy, 8)).count("over 3 GPUs can't share out 40 query heads") == 1


def test_a_sweep_counts_the_servers_gpus() -> None:
    made = make_plan(recipe(*APART), GPUS["h200"], 16)
    own = made.proposal.own.setting
    assert settings_on(own, 4) == []
    [setting] = settings_on(own, 6)
    assert setting.gpus == 2 and setting.all_gpus == 6 and isinstance(setting.servers, Servers)
    [none, some] = sweep(made, contexts=(16_000,), gpus=(4, 36))
    assert none.best is None and some.best is not None and some.best.setting.all_gpus == 36


def test_train_on_a_cpu_asks_nothing_of_a_server_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's own part alone must fit here; generation would take more."""
    tight = replace(GPUS["h100-80"], name="test memory", memory=1.06e8)
    monkeypatch.setattr(planning, "this_device", lambda recipe: (tight, "a small machine"))
    keys = [("generator.batch_tokens", "100000"), ("sft", "none"), ("model.device", "cpu")]
    with pytest.raises(ValueError, match="generation needs"):
        check_fits(load_recipe("smoke", keys), Console(quiet=True), force=False)
    check_fits(load_recipe("smoke", [*keys, ("generator", "vllm")]), Console(quiet=True), force=False)
