"""What goes from GPU to GPU, as far as a machine without one can tell: order, failures, and that vLLM's own classes take the requests.

NCCL and CUDA's shared memory are stood in for; the requests around them are the real ones, played to vLLM's own routes in its own
environment (skipped without it).
"""

from __future__ import annotations

import base64
import importlib.util
import json
import pickle
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longreach.engine.plain_weights import Entry, PlainWeights
from longreach.rl.policy import Policy
from longreach.rl.serving.control import Facts, SyncError
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.sync_config import SyncConfig
from longreach.rl.serving.sync_transfer import IpcSync, NcclSync, TransferSync, chunks, update_info

_SPEC = importlib.util.spec_from_file_location("stand_in_server", Path(__file__).with_name("stand_in_server.py"))
assert _SPEC is not None and _SPEC.loader is not None
stand_in_server = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stand_in_server)

OWNER = "here:/runs/a"
LIMIT = 1 << 20


class Wire(NcclSync):
    """NCCL's part kept in memory: what was sent goes to the stand-in, cut as it was announced."""

    def __init__(self, *arguments: Any, servers: list[Any]) -> None:
        super().__init__(*arguments)
        self.servers, self.sent = servers, list[Tensor]()

    @property
    def limit(self) -> int:
        return 20_000  # several chunks

    def _join(self, device: torch.device) -> None:
        self.control.each("/init_weight_transfer_engine", self.joining(bytes(range(128))))

    def _broadcast(self, packed: Tensor, told: Future[Any]) -> None:
        self.sent.append(packed)
        self._until(lambda: True, told, "nothing")

    def arrive(self) -> None:
        for server in self.servers:
            for body in [body for path, _, body in server.asked if path == "/update_weights"][-1:]:
                server.take(unpack(torch.cat(self.sent), body["update_info"]))
        self.sent.clear()

    def _until(self, done: Callable[[], bool], told: Future[Any], what: str) -> None:
        super()._until(done, told, what)
        if what.startswith("the servers to load"):
            self.arrive()


class Shared(IpcSync):
    """The shared buffer is this process's own."""

    @property
    def limit(self) -> int:
        return 20_000

    def __init__(self, *arguments: Any, servers: list[Any]) -> None:
        super().__init__(*arguments)
        self.servers = servers
        for server in servers:
            server.do_update_weights = self._read

    def _handle(self, buffer: Tensor) -> dict[str, Any]:
        self.buffer = buffer
        return {"GPU-0": ("what rebuilds it", 1)}

    def _settle(self) -> None:
        pass

    def _read(self, query: Any, body: Any) -> tuple[int, Any]:
        info = body["update_info"]
        assert pickle.loads(base64.b64decode(info["ipc_handles_pickled"])) == {"GPU-0": ("what rebuilds it", 1)}
        for server in self.servers:
            server.take(unpack(self.buffer[: sum(info["tensor_sizes"])], info))
        return 200, {}


def unpack(packed: Tensor, info: Any) -> dict[str, Tensor]:
    dtypes = [getattr(torch, name) for name in info["dtype_names"]]
    sizes = [torch.Size(s).numel() * d.itemsize for s, d in zip(info["shapes"], dtypes, strict=True)]
    assert info.get("tensor_sizes", sizes) == sizes
    parts = zip(info["names"], packed.split(sizes), dtypes, info["shapes"], strict=True)
    return {name: part.clone().view(dtype).view(shape) for name, part, dtype, shape in parts}


Serve = Callable[..., tuple[TransferSync, list[Any]]]


@pytest.fixture
def serve(policy: Policy) -> Iterator[Serve]:
    """A sync of one kind and its stand-ins."""
    with ExitStack() as stack:

        def start(kind: str, count: int = 1, **keywords: Any) -> tuple[TransferSync, list[Any]]:
            servers = [stand_in_server.StandIn(policy.model, transfer=kind) for _ in range(count)]
            urls = [stack.enter_context(stand_in_server.listening(server)) for server in servers]
            config = SyncConfig(**{"kind": kind, "deadline": 5.0, **keywords})
            return (Wire if kind == "nccl" else Shared)(urls, "policy", OWNER, config, servers=servers), servers

        yield start


def train(policy: Policy) -> None:
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_weights_arrive_in_several_chunks_and_every_time(policy: Policy, serve: Serve, kind: str) -> None:
    sync, (server,) = serve(kind)
    for version in range(2):
        train(policy)
        server.asked.clear()
        report = sync.push(policy, version)
        assert report.how == kind and report.bytes == PlainWeights(policy.model).bytes
        joins = ["/init_weight_transfer_engine"] if version == 0 else []
        updates = server.paths.count("/update_weights")
        at = server.paths.index("/update_weight_version") + 1
        order = [
            *joins,
            "/start_weight_update",
            *["/update_weights"] * updates,
            "/finish_weight_update",
            "/weight_checker",
        ]
        assert server.paths[at : at + len(order)] == order
        assert updates == 1 if kind == "nccl" else updates > 2
    assert torch.equal(server.model.state_dict()["lm_head.weight"], policy.model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_a_server_that_started_again_is_joined_again(policy: Policy, serve: Serve, kind: str) -> None:
    sync, (server, other) = serve(kind, 2)
    sync.push(policy, 1)
    server.start_again()
    if kind == "ipc":
        server.do_update_weights = sync._read  # type: ignore[attr-defined]
    for each in (server, other):
        each.asked.clear()
    sync.push(policy, 1, [sync.urls[0]])
    assert "/init_weight_transfer_engine" in server.paths and other.paths == ["/weight_info"]
    sync.push(policy, 2)
    assert "/init_weight_transfer_engine" in other.paths, "a communicator has fixed members"


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"])  # fmt: skip
@pytest.mark.parametrize("kind", ["nccl", "ipc"])
def test_a_failure_on_the_way_ends_it(policy: Policy, serve: Serve, kind: str, path: str) -> None:
    sync, (server,) = serve(kind)
    server.fail = {path: 500}
    with pytest.raises(SyncError, match=f"did not arrive by {kind}.*{path}.*500.*left paused"):
        sync.push(policy, 0)
    assert server.version.startswith("loading")


def test_a_broadcast_whose_other_side_is_gone_has_an_end(serve: Serve) -> None:
    sync, _ = serve("nccl", deadline=0.2)
    assert isinstance(sync, NcclSync)
    told: Future[Any] = Future()
    with pytest.raises(ServerError, match=r"waited 0\.2 s for 7 bytes to arrive"):
        NcclSync._until(sync, lambda: False, told, "7 bytes to arrive")
    told.set_exception(ServerError("http://a", "it refused"))
    with pytest.raises(ServerError, match="it refused"):
        NcclSync._until(sync, lambda: False, told, "7 bytes to arrive")
    assert threading.active_count() < 50


def test_workers_of_all_servers_have_their_own_places(serve: Serve) -> None:
    sync, _ = serve("nccl", 2)
    assert isinstance(sync, NcclSync)
    known = {
        url: Facts(torch.float32, 16, 1024, n, True, "nccl", 0, False) for url, n in zip(sync.urls, (4, 2), strict=True)
    }
    sync._known = known
    infos = [body["init_info"] for body in sync.joining(b"x" * 128)]
    assert [info["rank_offset"] for info in infos] == [1, 5] and {info["world_size"] for info in infos} == {7}


@pytest.mark.vllm
@pytest.mark.slow
def test_vllms_own_classes_and_routes_take_the_requests(
    policy: Policy, serve: Serve, tmp_path: Path, vllm_python: Path
) -> None:
    sizes = [5, 90, 5, 3, 3, 94, 101, 1, 1]
    limit = 100
    cuts = [
        [n for n, _ in c]
        for c in chunks(((str(i), torch.zeros(s, dtype=torch.uint8)) for i, s in enumerate(sizes)), limit)
    ]
    files, syncs = [], []
    for kind in ("nccl", "ipc"):
        sync, (server,) = serve(kind)
        sync.push(policy, 0)
        asked = [ask for ask in server.asked if ask[0] not in ("/v1/completions", "/server_info", "/weight_checker")]
        asked += [("/sleep", {"level": "1", "mode": "wait"}, None), ("/wake_up", {"tags": "weights"}, None)]
        asked += [
            ("/collective_rpc", {}, {"method": "reload_weights", "kwargs": {"weights_path": "/x"}, "timeout": 9.0})
        ]
        asked += [("/v1/load_lora_adapter", {}, {"lora_name": "policy-v1", "lora_path": "/x"})]
        asked += [("/v1/unload_lora_adapter", {}, {"lora_name": "policy-v1"})]
        files.append(tmp_path / f"{kind}.json")
        files[-1].write_text(json.dumps({"requests": asked, "backend": kind, "sizes": sizes, "limit": limit}))
        syncs.append(sync)
    names = [entry.name for entry in PlainWeights(policy.model).entries]
    for sync, said in zip(syncs, played(vllm_python, files, tmp_path), strict=True):
        assert all(status == 200 for _, status, _ in said["statuses"]), said["statuses"]
        assert said["chunks"] == cuts == [["0", "1", "2", "3"], ["4", "5", "6"], ["7", "8"]]
        called = dict(said["called"])
        (init,), (update, *_) = called["init_weight_transfer_engine"], called["update_weights"]
        assert init["packed"] is True
        if sync.how == "nccl":
            assert init["unique id bytes"] == 128 and init["rank_offset"] == 1 and init["world_size"] == 3
            assert init["packed_buffer_size_bytes"] == sync.limit and update["names"] == names
        else:
            assert update["ipc_handles"] == {"GPU-0": ["what rebuilds it", 1]} and update["names"][-1] == names[-1]
        assert called["collective_rpc"] == ["reload_weights", 9.0, [], {"weights_path": "/x"}]
        assert called["pause_generation"][0] == "wait" and called["update_weight_version"] == [f"version 0 of {OWNER}"]


def played(python: Path, files: list[Path], folder: Path) -> list[dict[str, Any]]:
    """What vLLM makes of the requests in each file."""
    environment = {"PATH": "/usr/bin:/bin", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "HOME": str(folder)}
    script = Path(__file__).with_name("vllm_requests.py")
    ran = subprocess.run(
        [python, "-P", script, *files], env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"statuses"')]


def test_what_is_announced_names_dtypes_as_torch_does() -> None:
    entries = [Entry("a", (2, 3), torch.bfloat16), Entry("b", (), torch.float32)]
    assert update_info(entries) == {"names": ["a", "b"], "dtype_names": ["bfloat16", "float32"], "shapes": [[2, 3], []]}
    assert [entry.bytes for entry in entries] == [12, 4]
