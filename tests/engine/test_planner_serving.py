"""Serving engines in a plan, held against numbers worked out by hand on a model whose numbers are easy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreach.engine.model import LoraConfig
from longreach.engine.planner import Load, plan_step
from longreach.engine.planner_hardware import GPUS
from longreach.engine.planner_memory import Servers, Setting, training_memory
from longreach.engine.planner_serving import (
    batching,
    cache_room,
    fixed_parts,
    server_memory,
    server_problems,
    serving_time,
    token_bytes,
    weights_time,
)
from longreach.engine.planner_shape import KNOWN, Row
from longreach.engine.planner_time import decode_time, prefill_time

SHAPE, GPU = KNOWN["Qwen/Qwen3-8B"], GPUS["h100-80"]
SERVERS = Servers(count=2, tensor=2)
SETTING = Setting(gpus=4, dtype="bfloat16", gradient_checkpointing=True, lora=LoraConfig(rank=32), servers=SERVERS)
LOAD = Load("phase", 1, Row(1, 30_000, 8, 2000), 16, prompts=16, size=8, prompt=30_000, completion=2000)
TOKEN = 36 * 2 * 8 * 128 * 2  # layers x (keys and values) x key heads x E x bytes
GROUP = 30_000 + 8 * 2000


def test_a_server_s_gpu_holds_its_share_of_weights_and_heads() -> None:
    assert token_bytes(SHAPE, SERVERS) == TOKEN / 2
    assert token_bytes(SHAPE, replace(SERVERS, tensor=16)) == TOKEN / 8, "key heads are repeated beyond their number"
    assert token_bytes(SHAPE, replace(SERVERS, dtype="float32")) == TOKEN
    assert fixed_parts(SHAPE, SERVERS, LOAD)["generator weights"] == 2 * SHAPE.parameters / 2
    scores = 3 * 4 * 256 * 151936  # fp32 of 256 sequences, three times
    assert fixed_parts(SHAPE, replace(SERVERS, tensor=64), LOAD)["peak in a layer"] == scores


def test_what_is_left_of_the_gpu_holds_groups() -> None:
    room = cache_room(SHAPE, SERVERS, GPU, LOAD)
    assert room == 0.9 * 80e9 - sum(fixed_parts(SHAPE, SERVERS, LOAD).values())
    fit = int(room // (GROUP * TOKEN / 2))
    assert fit > 8 and batching(SHAPE, SERVERS, GPU, LOAD).groups == 8, "16 prompts over two servers"
    many = batching(SHAPE, SERVERS, GPU, replace(LOAD, prompts=400))
    assert (many.groups, many.batches) == (fit, -(-200 // fit))
    few = batching(SHAPE, replace(SERVERS, concurrency=3), GPU, LOAD)
    assert (few.groups, few.batches) == (3, 3)


def test_a_group_that_does_not_fit_is_sampled_in_parts() -> None:
    """Room for the prompt and three and a half completions: three at a time, so three times for eight."""
    tight = replace(SERVERS, cache=(30_000 + 3.5 * 2000) * TOKEN / 2)
    made = batching(SHAPE, tight, GPU, LOAD)
    assert (made.groups, made.size, made.batches) == (1, 3, 8 * 3)
    assert not server_problems(SHAPE, SETTING, tight, GPU, LOAD)


def test_memory_of_a_server_by_part() -> None:
    memory = server_memory(SHAPE, SETTING, SERVERS, GPU, LOAD)
    assert memory.parts["generator keys and values"] == 8 * GROUP * TOKEN / 2
    assert "weights" not in memory.parts, "on GPUs of its own nothing of the trainer's is there"
    plan = plan_step(SHAPE, SETTING, GPU, LOAD)
    assert plan.memory["server"] == memory and plan.memory["update"] == training_memory(SHAPE, SETTING, LOAD.row)
    assert "generation" not in plan.memory


def test_on_the_trainer_s_gpus_both_are_held_unless_it_sleeps() -> None:
    shared = replace(SERVERS, apart=False, cache=10e9)
    plain = training_memory(SHAPE, SETTING, LOAD.row).total
    awake = plan_step(SHAPE, replace(SETTING, servers=shared), GPU, LOAD)
    asleep = plan_step(SHAPE, replace(SETTING, servers=replace(shared, sleep=1)), GPU, LOAD)
    assert awake.memory["update"].total == pytest.approx(plain + SHAPE.parameters + 10e9)
    assert awake.memory["update"].moments["the loss"] > 10e9 + SHAPE.parameters
    assert asleep.memory["update"].total == plain
    assert awake.memory["server"].parts["weights"] > 0
    unbounded = plan_step(SHAPE, replace(SETTING, servers=replace(shared, cache=0.0)), GPU, LOAD)
    peak = fixed_parts(SHAPE, SERVERS, LOAD)["peak in a layer"]
    assert unbounded.memory["update"].total == pytest.approx(plain + 0.9 * 80e9 - peak), (
        "its share of the GPU, all of it"
    )
    assert "bound it by generator.cache_gib" in unbounded.problems[0] and "cache_gib" not in "".join(awake.problems)
    assert awake.setting.all_gpus == 4 and SETTING.all_gpus == 8


def test_every_completion_reads_its_prompt_and_every_prompt_is_prefilled_once() -> None:
    engine = Setting(dtype="bfloat16", serve=2)
    prefill = 8 * prefill_time(SHAPE, engine, GPU, 30_000).seconds / 2
    weights = 2 * (SHAPE.parameters - SHAPE.head_parameters)
    read = 2000 * (weights + 64 * TOKEN * (30_000 + 1000)) / (2 * 0.8 * 3350e9)
    assert decode_time(SHAPE, engine, GPU, 30_000, 64, 1, 2000).seconds == pytest.approx(read)
    time = serving_time(SHAPE, SERVERS, GPU, LOAD)
    assert time.seconds == pytest.approx(prefill + read) and "keys and values read" in time.bound
    halves = serving_time(SHAPE, replace(SERVERS, replicas=2), GPU, LOAD).seconds
    assert halves < 0.6 * time.seconds, "copies share the prompts out"


WAYS = {  # of 2 bytes a weight, on four GPUs whose weights are gathered first
    "files": ("safetensors", 2 * 2 / 2e9, "files"),
    "links within a node": ("nccl", 2 / (0.8 * 450e9), "links"),
    "within a GPU": ("ipc", 2 * 2 / (0.8 * 3350e9), "memory bandwidth"),
}


@pytest.mark.parametrize("way", WAYS)
def test_seconds_of_new_weights(way: str) -> None:
    kind, rate, bound = WAYS[way]
    gathered = 2 * SHAPE.parameters / (0.8 * 450e9)
    time = weights_time(SHAPE, SETTING, replace(SERVERS, sync=kind), GPU)
    assert time.seconds == pytest.approx(gathered + rate * SHAPE.parameters) and time.bound == bound


def test_new_weights_of_adapters_are_small_and_beyond_a_node_the_network_carries_them() -> None:
    adapters = weights_time(SHAPE, SETTING, replace(SERVERS, sync="lora"), GPU)
    assert adapters.seconds == pytest.approx(2 * 4 * SHAPE.adapter_parameters(LoraConfig(rank=32)) / 2e9)
    wide = replace(SETTING, shard=False, gpus=8, servers=replace(SERVERS, sync="nccl"))
    assert wide.servers is not None
    assert weights_time(SHAPE, wide, wide.servers, GPU).seconds == pytest.approx(2 * SHAPE.parameters / (0.8 * 50e9))


def test_a_server_that_slept_gets_its_weights_back_over_the_host_s_link() -> None:
    shared = replace(SERVERS, apart=False, sync="ipc")
    base, slept = (weights_time(SHAPE, SETTING, replace(shared, sleep=sleep), GPU).seconds for sleep in (2, 1))
    assert slept - base == pytest.approx(2 * (2 * SHAPE.parameters / 2) / (0.8 * 55e9))


def test_with_staleness_a_step_takes_as_long_as_the_longer_of_the_two() -> None:
    waits = plan_step(SHAPE, SETTING, GPU, LOAD)
    stale = plan_step(SHAPE, replace(SETTING, servers=replace(SERVERS, staleness=1)), GPU, LOAD)
    shared = replace(SERVERS, staleness=1, apart=False, cache=10e9)
    both = plan_step(SHAPE, replace(SETTING, servers=shared), GPU, LOAD)
    sync = waits.times["weight sync"].total
    assert waits.seconds == pytest.approx(waits.training + waits.generation + sync)
    assert stale.seconds == pytest.approx(max(stale.training, stale.generation) + sync)
    assert stale.overlaps and not waits.overlaps and not both.overlaps, "on the same GPUs nothing is won"
    assert waits.training == waits.times["update"].total > 0


def problem(servers: Servers, setting: Setting = SETTING) -> str:
    return " | ".join(server_problems(SHAPE, setting, servers, GPU, LOAD))


def test_why_servers_can_not_be() -> None:
    assert problem(SERVERS) == ""
    assert "over 3 GPUs can't share out 32 query heads" in problem(replace(SERVERS, tensor=3))
    assert "takes sequences of 16,000 tokens, and a prompt with its completion has 32,000" in problem(
        replace(SERVERS, window=16_000)
    )
    assert "one sequence of 500,000 tokens takes 73.7" in problem(replace(SERVERS, tensor=1, window=500_000))
    assert "--tensor-parallel-size" in problem(replace(SERVERS, dtype="float32", tensor=1, utilization=0.4))
    assert "take 8 of 4" in problem(replace(SERVERS, apart=False, cache=1e9, count=4))
    assert problem(replace(SERVERS, apart=False, cache=10e9)) == ""
    big = replace(SETTING, servers=replace(SERVERS, tensor=1, dtype="float32", utilization=0.4))
    assert not plan_step(SHAPE, big, GPU, LOAD).fits
    assert plan_step(SHAPE, big, GPU, replace(LOAD, prompts=0)).fits, "SFT asks no server"
