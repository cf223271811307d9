"""Servers are stopped and set going in the one order that works, and no other can be asked for."""

from __future__ import annotations

from typing import Any

import pytest

from longreach.rl.serving.control import Control, SyncError
from longreach.rl.serving.gate import Gate
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.sync_config import SyncConfig


class Recording(Control):
    """Answers as servers do, and writes down what was asked."""

    def __init__(self) -> None:
        super().__init__(["http://a", "http://b"], 1.0)
        self.asked: list[str] = []
        self.asleep: set[str] = set()
        self.lies: dict[str, Any] = {}

    def post(self, path: str, json: Any = None, **query: str | int) -> list[Any]:
        self.asked.append(" ".join([path, *(f"{name}={value}" for name, value in query.items())]))
        if path == "/sleep":
            self.asleep = {"weights", "kv_cache"}
        if path == "/wake_up":
            self.asleep.remove(str(query["tags"]))
        plain = {"status": "sleeping" if self.asleep else "awake", "success": True}
        return [plain, self.lies.get(path, plain)]


def test_a_server_of_its_own_pauses_and_goes_on_with_an_empty_cache() -> None:
    control = Recording()
    gate = Gate(control, SyncConfig())
    gate.close()
    gate.open()
    assert control.asked == ["/pause mode=wait", "/reset_prefix_cache", "/resume"] and gate.awake


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("trains", [True, False])
def test_one_gpu_is_shared_in_the_order_that_peaks_lowest(level: int, trains: bool) -> None:
    control = Recording()
    gate = Gate(control, SyncConfig(sleep=level))
    for _ in range(2):
        if trains:
            gate.sleep()
            assert not gate.awake
        gate.close()  # sleeps first where nothing was trained, so that the cache's memory is free while weights come
        assert control.asleep == {"kv_cache"}, "weights have their memory, the cache doesn't yet"
        gate.open()
    order = [
        f"/sleep level={level} mode=wait",
        "/wake_up tags=weights",
        "/wake_up tags=kv_cache",
        "/reset_prefix_cache",
    ]
    assert control.asked == order * 2 and gate.awake


def test_no_other_order_can_be_asked_for() -> None:
    gate = Gate(Recording(), SyncConfig(sleep=2))
    with pytest.raises(AssertionError):
        gate.open()  # nothing was closed: no weights arrived
    gate.sleep()
    with pytest.raises(SyncError, match="asleep: push weights before"):
        gate.sleep()
    with pytest.raises(SyncError, match="asleep: push weights before"):
        gate.check()
    with pytest.raises(AssertionError):
        gate.open()  # without new weights, level 2 would generate from dropped ones
    gate.close()
    with pytest.raises(SyncError, match="failed before"):
        gate.close()
    with pytest.raises(SyncError, match="open for weights"):
        gate.sleep()
    gate.open()
    gate.check()


def test_a_server_of_its_own_never_sleeps() -> None:
    control = Recording()
    with pytest.raises(ValueError, match=r"generator\.sync\.sleep is 0"):
        Gate(control, SyncConfig()).sleep()
    assert not control.asked


@pytest.mark.parametrize(
    ("config", "lies", "message"),
    [
        (SyncConfig(), {"/reset_prefix_cache": {"success": False}}, "b: its prefix cache was not reset"),
        (SyncConfig(), {"/reset_prefix_cache": None}, "b: its prefix cache was not reset"),
        (SyncConfig(sleep=1), {"/wake_up": {"status": "awake"}}, "b: after waking its weights it should be sleeping"),
    ],
)
def test_a_server_that_did_not_do_it_is_named_and_stays_shut(
    config: SyncConfig, lies: dict[str, Any], message: str
) -> None:
    control = Recording()
    control.lies = lies
    gate = Gate(control, config)

    def through() -> None:
        gate.close()
        gate.open()

    with pytest.raises(ServerError, match=message):
        through()
    with pytest.raises(SyncError):
        gate.check()
