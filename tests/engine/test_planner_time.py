"""Bytes that travel, what bounds a part, and how time scales. Operations are held to traces in test_planner_memory.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longreach.engine.planner_hardware import GPUS, Gpu, gpu_named
from longreach.engine.planner_memory import Setting
from longreach.engine.planner_shape import KNOWN, Row
from longreach.engine.planner_time import (
    decode_time,
    forward_time,
    link_rate,
    prefill_time,
    ring_bytes,
    sync_time,
    ulysses_bytes,
    update_time,
)

SHAPE, H200 = KNOWN["Qwen/Qwen3-8B"], GPUS["h200"]
BF16 = Setting(dtype="bfloat16", gradient_checkpointing=True)
ROW = Row(1, 64_000, 8, 2000)


def test_ring_bytes_are_each_blocks_keys_and_values_times_the_hops() -> None:
    """Forward: 2 K E 2 bytes of the other ranks' prompt tokens; checkpointed three times, gradients in fp32 once."""
    forward = 36 * 3 * (64_000 / 4) * 2 * 1024 * 2
    setting = replace(BF16, gpus=4, ring=4)
    assert ring_bytes(SHAPE, setting, ROW, backward=False) == forward
    assert ring_bytes(SHAPE, setting, ROW, backward=True) == forward / 2 * (3 * 2 + 4)


def test_ulysses_bytes_are_four_exchanges_a_layer() -> None:
    setting = replace(BF16, gpus=4, ulysses=4)
    one = 2 * ROW.tokens / 4 * (2 * 4096 + 2 * 1024) * 3 / 4
    assert ulysses_bytes(SHAPE, setting, ROW, backward=False) == pytest.approx(36 * one)
    assert ulysses_bytes(SHAPE, setting, ROW, backward=True) == pytest.approx(3 * 36 * one)


def test_keys_are_repeated_beyond_their_heads() -> None:
    at_heads, beyond = (ulysses_bytes(SHAPE, replace(BF16, gpus=n, ulysses=n), ROW, backward=False) for n in (8, 32))
    fewer_tokens = at_heads * 8 / 32 * (31 / 32) / (7 / 8)
    assert beyond > fewer_tokens
    assert beyond == pytest.approx(fewer_tokens * (2 * 4096 + 4 * 2 * 1024) / (2 * 4096 + 2 * 1024))


def test_one_rank_sends_nothing() -> None:
    assert update_time(SHAPE, BF16, H200, ROW).communication == 0
    assert sync_time(SHAPE, BF16, H200).total == 0
    assert sync_time(SHAPE, replace(BF16, gpus=8), H200).total > 0


def test_beyond_a_node_the_network_is_the_link() -> None:
    assert link_rate(H200, 8) == 0.8 * H200.link
    assert link_rate(H200, 16) == 0.8 * H200.network
    slow, fast = (update_time(SHAPE, replace(BF16, gpus=n), H200, ROW).communication for n in (16, 8))
    assert slow > 5 * fast


def test_what_bounds_what() -> None:
    assert update_time(SHAPE, BF16, H200, ROW).bound == "attention"  # at 64K
    assert update_time(SHAPE, BF16, H200, Row(8, 500, 4, 100)).bound == "matrix products"
    crawling = replace(H200, host_link=1e8)
    offloaded = replace(BF16, offload_activations=True)
    assert update_time(SHAPE, offloaded, crawling, ROW).bound == "host link"
    assert update_time(SHAPE, offloaded, crawling, ROW).total > 10 * update_time(SHAPE, BF16, H200, ROW).total
    assert decode_time(SHAPE, BF16, H200, 100, 1, 1, 100).bound in ("weights read", "launches")
    assert decode_time(SHAPE, BF16, H200, 120_000, 8, 8, 1000).bound == "keys and values read"


def test_decoding_reads_all_weights_for_every_token() -> None:
    tokens = 100
    weights = 2 * (SHAPE.parameters - SHAPE.head_parameters)
    slow = replace(H200, bandwidth=1e11)  # where launches don't matter
    least = tokens * weights / (0.8 * 1e11)
    assert least < decode_time(SHAPE, BF16, slow, 10, 1, 1, tokens).seconds < 1.02 * least


def test_a_group_reads_its_prompt_once() -> None:
    slow = replace(H200, bandwidth=1e11)
    one, eight = (decode_time(SHAPE, BF16, slow, 100_000, 1, size, 10).seconds for size in (1, 8))
    assert eight < 1.02 * one


def test_time_grows_with_work_and_falls_with_speed() -> None:
    def seconds(gpu: Gpu, row: Row) -> float:
        return update_time(SHAPE, BF16, gpu, row).seconds

    assert seconds(H200, Row(1, 120_000, 8, 2000)) > 2 * seconds(H200, ROW)
    assert seconds(GPUS["a100-80"], ROW) > seconds(H200, ROW)
    assert forward_time(SHAPE, BF16, H200, ROW).seconds < seconds(H200, ROW) / 2
    assert prefill_time(SHAPE, BF16, H200, 120_000).seconds > 2 * prefill_time(SHAPE, BF16, H200, 60_000).seconds


def test_gpus_of_ones_own() -> None:
    custom = gpu_named("custom", memory_gb=48, tflops=362, bandwidth_gbs=864)
    assert (custom.memory, custom.flops, custom.bandwidth, custom.link) == (48e9, 362e12, 864e9, GPUS["h100-80"].link)
    assert gpu_named("h200") is GPUS["h200"]


@pytest.mark.parametrize(
    "name, numbers, words",
    [
        ("h100-8O", {}, "did you mean 'h100-80'"),
        ("mi300x", {}, "known: h100-80, h200, a100-80, rtx-4090, custom"),
        ("custom", {}, "needs --gpu-memory-gb"),
        ("custom", {"memory_gb": -1.0}, "must be positive, not -1.0"),
        ("h200", {"memory_gb": 200.0}, "has its own numbers"),
    ],
)
def test_gpus_that_cannot_be(name: str, numbers: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gpu_named(name, **numbers)
