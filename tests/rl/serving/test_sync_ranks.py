"""Two ranks with half of the weights each push the whole of them, and fail together."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longreach.rl.policy import Policy

_SPEC = importlib.util.spec_from_file_location("stand_in_server", Path(__file__).with_name("stand_in_server.py"))
assert _SPEC is not None and _SPEC.loader is not None
stand_in_server = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stand_in_server)


def test_all_ranks_push_one_policy_and_hear_of_one_failure(
    policy: Policy, tiny_dir: Path, tmp_path: Path, start_ranks: Callable[..., Any]
) -> None:
    server = stand_in_server.StandIn(policy.model)
    with stand_in_server.listening(server) as url:
        (tmp_path / "told.json").write_text(json.dumps({"model": str(tiny_dir), "urls": [url]}))
        started = start_ranks(2, Path(__file__).with_name("sync_rank.py"), tmp_path)
        assert [rank.wait(120.0) for rank in started] == [0, 0], "\n".join(r.err.read_text()[-3000:] for r in started)
    first, taken, full, last = json.loads((tmp_path / "said-0.json").read_text())
    others = json.loads((tmp_path / "said-1.json").read_text())
    assert others[1:3] == [taken, full]
    assert taken[0] == full[0] == "SyncError" and "there:/runs/b" in taken[1] and "can't be written" in full[1]
    for metrics in (first, last, others[0], others[3]):
        assert metrics["sync/probe_max_diff"] < 1e-3 and metrics["sync/bytes"] > 0
    for name, tensor in policy.model.state_dict().items():
        torch.testing.assert_close(server.model.state_dict()[name], tensor * 1.05)
    assert server.version == "version 2 of here:/runs/a"
