"""A push goes through its steps in one order, arrives or stops the run, and says what the servers have then.

Against a stand-in for vLLM (`stand_in_server.py`); the real one is in test_sync_vllm.py.
"""

from __future__ import annotations

import errno
import importlib.util
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longreach.engine.plain_weights import PlainWeights
from longreach.engine.tensor_file import write_tensors
from longreach.rl.policy import Policy
from longreach.rl.serving import sync_files
from longreach.rl.serving.control import Mark, StaleServer, SyncError
from longreach.rl.serving.http import ServerError
from longreach.rl.serving.sync import SyncReport
from longreach.rl.serving.sync_config import SyncConfig, server_needs
from longreach.rl.serving.sync_files import FileSync
from longreach.rl.serving.sync_kinds import weight_sync
from longreach.rl.serving.sync_transfer import NcclSync

_SPEC = importlib.util.spec_from_file_location("stand_in_server", Path(__file__).with_name("stand_in_server.py"))
assert _SPEC is not None and _SPEC.loader is not None
stand_in_server = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stand_in_server)

OWNER = "here:/runs/a"
Serve = Callable[..., tuple[Any, str]]


@pytest.fixture
def serve(policy: Policy) -> Iterator[Serve]:
    """Starts a stand-in with the policy's weights: (it, its address)."""
    with ExitStack() as stack:

        def start(**keywords: Any) -> tuple[Any, str]:
            made = stand_in_server.StandIn(policy.model, **keywords)
            return made, stack.enter_context(stand_in_server.listening(made))

        yield start


def files(url: str | list[str], folder: Path, owner: str = OWNER, **keywords: Any) -> FileSync:
    config = SyncConfig(**{"kind": "safetensors", "deadline": 5.0, **keywords})
    return FileSync([url] if isinstance(url, str) else url, "policy", owner, config, folder=folder)


def train(policy: Policy, by: float = 0.1) -> None:
    """Another policy than before, embeddings included."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(by * p.std().nan_to_num(0.1) * torch.randn(p.shape, generator=draw))


def test_one_order_and_nothing_besides(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    server, url = serve()
    sync = files(url, tmp_path)
    sync.push(policy, 0)
    train(policy)
    server.asked.clear()
    report = sync.push(policy, 1)
    assert server.paths == [
        "/weight_info",  # whose weights it has
        "/v1/completions",  # old keys and values of the probe, into the cache
        "/pause", "/weight_checker", "/update_weight_version", "/collective_rpc", "/weight_checker",
        "/update_weight_version", "/reset_prefix_cache", "/resume",
        "/v1/completions", "/v1/completions", "/v1/completions", "/v1/completions",  # by each route the longest, then all
        "/weight_info",
    ]  # fmt: skip
    marks = [body["new_version"] for path, _, body in server.asked if path == "/update_weight_version"]
    assert marks == [f"loading 1 of {OWNER}", f"version 1 of {OWNER}"]
    assert server.asked[2][1] == {"mode": "wait"}
    assert server.asked[5][2]["kwargs"] == {"weights_path": str(tmp_path / "00000001")}
    metrics = report.metrics()
    assert metrics["sync/version"] == 1 and metrics["sync/bytes"] == PlainWeights(policy.model).bytes
    assert 0 < metrics["sync/seconds"] < 60
    assert 0 < metrics["sync/probe_max_diff"] < 1e-3, "fp32 on both sides"


def test_the_cached_route_is_asked_first_and_the_other_is_computed_afresh(
    policy: Policy, serve: Serve, tmp_path: Path
) -> None:
    server, url = serve()
    files(url, tmp_path).push(policy, 0)
    asked = [body for path, _, body in server.asked if path == "/v1/completions"]
    assert [len(body["prompt"]) for body in asked] == [1, 16] * 2
    salts = [body.get("cache_salt") for body in asked]
    assert salts[:2] == [None, None] and salts[2] == salts[3] is not None


def test_a_report_without_a_probe_claims_nothing() -> None:
    assert "sync/probe_max_diff" not in SyncReport(1, 0.1, 10, "safetensors").metrics()


def test_settings_reach_what_they_are_for(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    _, url = serve()
    elsewhere = tmp_path / "elsewhere"
    config = SyncConfig(kind="safetensors", deadline=5.0, folder=str(elsewhere), probe_multiple=7.0, probe_limit=0.125)
    sync = weight_sync(policy, [url], "policy", OWNER, config, tmp_path / "run")
    sync.push(policy, 0)
    assert [path.name for path in elsewhere.iterdir()] == ["00000000"] and not (tmp_path / "run").exists()
    assert (sync.gauge.multiple, sync.gauge.limit) == (7.0, 0.125)
    transfer = weight_sync(policy, [url], "policy", OWNER, SyncConfig(kind="nccl", buffer_mb=3), tmp_path)
    assert isinstance(transfer, NcclSync) and transfer.limit == 3 << 20
    (body,) = transfer.joining(b"x" * 128)
    assert body["init_info"]["packed_buffer_size_bytes"] == 3 << 20, "both sides cut alike"


@pytest.mark.parametrize("pause", ["wait", "keep", "abort"])
def test_what_becomes_of_running_requests_is_the_servers_to_hear(
    policy: Policy, serve: Serve, tmp_path: Path, pause: str
) -> None:
    server, url = serve()
    files(url, tmp_path, pause=pause).push(policy, 0)
    queries = {path: query for path, query, _ in server.asked}
    assert queries["/pause"] == {"mode": pause}
    kept = {"reset_running_requests": "true"} if pause == "keep" else {}
    assert queries["/reset_prefix_cache"] == kept, "requests that go on are computed again, else they keep old blocks"


class WithoutHead(PlainWeights):
    """The hand-over as `save_pretrained` writes it: a tied head isn't in it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entries = [entry for entry in self.entries if entry.name != "lm_head.weight"]

    def pairs(self, *, keep: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        return (pair for pair in super().pairs(keep=keep) if pair[0] != "lm_head.weight")


def test_a_tied_head_left_behind_is_caught(
    policy: Policy, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = serve()
    sync = files(url, tmp_path, checksum_gb=0.0)  # the stand-in could sum its head, as a GPU's server; a CPU's can't
    sync.push(policy, 0)
    train(policy)
    monkeypatch.setattr(sync_files, "PlainWeights", WithoutHead)
    with pytest.raises(SyncError, match=r"version 1 did not take: .* fresh route .*tied head"):
        sync.push(policy, 1)
    with pytest.raises(SyncError, match="version 1 was pushed and did not take"):
        sync.check()


def test_a_stale_cache_is_caught_though_fresh_log_probs_are_right(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    server, url = serve()
    sync = files(url, tmp_path)
    sync.push(policy, 0)
    server.keeps_cache = True
    train(policy)
    with pytest.raises(SyncError, match=r"cached route .* prefix cache"):
        sync.push(policy, 1)


def test_a_server_that_took_nothing_is_caught_by_its_checksums_where_the_probe_sees_nothing(
    policy: Policy, serve: Serve, tmp_path: Path
) -> None:
    server, url = serve()
    sync = files(url, tmp_path)
    sync.push(policy, 0)
    server.deaf = True
    train(policy, by=1e-5)
    with pytest.raises(SyncError, match=r"took version 1, but of \d+ weights that both sides can sum \d+ are others"):
        sync.push(policy, 1)
    unsummed = files(url, tmp_path, checksum_gb=0.0)
    report = unsummed.push(policy, 2)
    assert "hide" in report.resolution and report.differences[0].mean["fresh"] < 0.002, "as the report says"


def test_weights_changed_behind_our_back(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    server, url = serve()
    sync = files(url, tmp_path)
    sync.push(policy, 0)
    with torch.no_grad():
        next(server.model.parameters()).mul_(1.0001)
    with pytest.raises(SyncError, match=r"changed since the last push: model\.embed_tokens\.weight"):
        sync.push(policy, 1)


def test_two_runs_at_one_server_are_both_named(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    server, url = serve()
    ours = files(url, tmp_path / "a")
    ours.push(policy, 3)
    other = files(url, tmp_path / "b", owner="there:/runs/b")
    server.asked.clear()
    with pytest.raises(SyncError, match=r"there:/runs/b.*here:/runs/a.*take_over"):
        other.push(policy, 0)
    assert server.paths == ["/weight_info"], "nothing was done to it"
    ours.check()
    files(url, tmp_path / "b", owner="there:/runs/b", take_over=True).push(policy, 0)
    with pytest.raises(SyncError, match="here:/runs/a and there:/runs/b"):
        ours.check()


def test_a_run_that_ended_leaves_its_servers_to_others(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    _, url = serve()
    ours = files(url, tmp_path / "a")
    ours.push(policy, 3)
    ours.close()
    files(url, tmp_path / "b", owner="there:/runs/b").push(policy, 0)


def test_a_server_that_started_again_is_noticed_and_mended(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    (server, url), (_, other) = serve(), serve()
    sync = files([url, other], tmp_path)
    train(policy)
    sync.push(policy, 1)
    server.start_again()
    with pytest.raises(StaleServer, match=f"{url} was started again .* not version 1"):
        sync.check()
    sync.push(policy, 1, [url])
    sync.check()
    assert torch.equal(server.model.state_dict()["lm_head.weight"], policy.model.state_dict()["lm_head.weight"])


def test_a_server_that_joins_later_belongs_from_then_on(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    (_, url), (late, other) = serve(), serve()
    sync = files(url, tmp_path)
    sync.push(policy, 1)
    sync.push(policy, 1, [other])
    assert late.version == f"version 1 of {OWNER}"
    late.start_again()
    with pytest.raises(StaleServer, match=other):
        sync.check()


@pytest.mark.parametrize("path", ["/weight_info", "/server_info", "/pause", "/weight_checker", "/collective_rpc", "/reset_prefix_cache", "/resume", "/v1/completions"])  # fmt: skip
@pytest.mark.parametrize("how", [500, 3.0])
def test_a_refusal_or_a_hang_ends_it_with_the_servers_name_and_the_request(
    policy: Policy, serve: Serve, tmp_path: Path, path: str, how: float
) -> None:
    (server, url), (_, other) = serve(), serve()
    sync = files([other, url], tmp_path, deadline=10.0 if how == 500 else 2.0)
    server.fail = {path: how}
    with pytest.raises(
        OSError, match=f"{url}: .*{path}.*" + ("answered 500" if how == 500 else r"within 2 s")
    ) as found:
        sync.push(policy, 0)
    assert isinstance(found.value, SyncError | ServerError)
    server.fail = {}
    with pytest.raises(SyncError):
        sync.check()


def test_after_half_a_push_nothing_is_pushed_any_more(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    (server, url), (other, second) = serve(), serve()
    sync = files([url, second], tmp_path)
    other.fail = {"/collective_rpc": 500}
    with pytest.raises(SyncError, match=r"did not arrive.*left paused.*not known"):
        sync.push(policy, 0)
    assert server.version == other.version == f"loading 0 of {OWNER}" and server.paused
    other.fail = {}
    with pytest.raises(SyncError, match="must be restarted"):
        sync.push(policy, 1)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files end at `size` bytes: the operating system's own refusal, as of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("fault", ["the system", "no space"])
def test_a_full_disk_leaves_server_and_last_hand_over_as_they_were(
    policy: Policy, serve: Serve, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = serve()
    sync = files(url, tmp_path)
    sync.push(policy, 0)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train(policy)
    server.asked.clear()

    def full(path: Path, *arguments: Any) -> None:
        write_tensors(path, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    if fault == "no space":
        monkeypatch.setattr(sync_files, "write_tensors", full)
    with (
        disk_of(20_000 if fault == "the system" else 1 << 30),
        pytest.raises(SyncError, match=r"version 1 can't be written .* GB are free; the servers still have version 0"),
    ):
        sync.push(policy, 1)
    assert server.paths == ["/weight_info"] and not server.paused
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    sync.check()
    monkeypatch.undo()
    sync.push(policy, 1)


def test_only_the_newest_hand_overs_stay_and_each_is_a_model(policy: Policy, serve: Serve, tmp_path: Path) -> None:
    _, url = serve()
    sync = files(url, tmp_path, keep=2)
    for version in range(4):
        sync.push(policy, version)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]
    sync.push(policy, 1)  # a run that went on from an older checkpoint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001"]
    weights = load_file(tmp_path / "00000001" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    again = Policy(policy.config, policy.generator, tmp_path / "00000001")
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), policy.model.parameters(), strict=True))


LORA = {"kind": "lora", "deadline": 5.0, "probe": False}  # the stand-in doesn't add adapters up: test_sync_vllm does


def adapted(make_policy: Callable[..., Policy]) -> Policy:
    from longreach.engine.model import LoraConfig

    return make_policy(lora=LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "down_proj")))


def test_adapters_have_a_name_a_push_and_old_ones_go(
    make_policy: Callable[..., Policy], serve: Serve, tmp_path: Path
) -> None:
    server, url = serve(lora_rank=8)
    sync = weight_sync(adapted(make_policy), [url], "policy", OWNER, SyncConfig(**LORA), tmp_path)
    names = []
    for version in (1, 2, 2, 3):
        assert sync.push(adapted(make_policy), version).how == "lora"
        sync.check()
        names.append(sync.served_model)
        assert names[-1].startswith(f"policy-v{version}-") and names[-1] in server.adapters
    assert len(set(names)) == 4, "a name is never given twice"
    assert list(server.adapters) == names[-2:]
    assert "/pause" not in server.paths, "what runs goes on with the adapter that it named"
    server.adapters.clear()
    with pytest.raises(StaleServer, match="no adapter policy-v3"):
        sync.check()


def test_a_server_that_started_again_gets_the_adapter_by_the_others_name(
    make_policy: Callable[..., Policy], serve: Serve, tmp_path: Path
) -> None:
    (server, url), (_, other) = serve(lora_rank=8), serve(lora_rank=8)
    sync = weight_sync(adapted(make_policy), [url, other], "policy", OWNER, SyncConfig(**LORA), tmp_path)
    for version in (1, 2):
        sync.push(adapted(make_policy), version)
    name = sync.served_model
    server.start_again()
    with pytest.raises(StaleServer):
        sync.check()
    sync.push(adapted(make_policy), 2, [url])
    assert sync.served_model == name and list(server.adapters) == [name]
    sync.push(adapted(make_policy), 3)
    sync.push(adapted(make_policy), 4)  # forgets an adapter that one of them never had
    sync.check()


def test_auto_takes_what_both_sides_are_set_up_for(
    policy: Policy, make_policy: Callable[..., Policy], serve: Serve, tmp_path: Path
) -> None:
    (_, plain), (_, with_lora) = serve(), serve(lora_rank=8)

    def way(whose: Policy, *urls: str) -> str:
        return weight_sync(whose, urls, "policy", OWNER, SyncConfig(), tmp_path).how

    lora = adapted(make_policy)
    assert (
        way(policy, plain) == way(lora, plain) == way(lora, plain, with_lora) == way(policy, with_lora) == "safetensors"
    )
    assert way(lora, with_lora) == "lora"


@pytest.mark.parametrize(
    ("keywords", "config", "message"),
    [
        ({}, {"kind": "nccl"}, "started for weight transfer by none, not nccl"),
        ({"transfer": "ipc"}, {"kind": "nccl"}, "by ipc, not nccl"),
        ({"lora_rank": 8}, {"kind": "lora"}, "the model has none"),
        ({}, {"kind": "safetensors", "sleep": 1}, "enable-sleep-mode"),
    ],
)
def test_servers_that_do_not_fit_are_refused_before_anything_is_done(
    policy: Policy, serve: Serve, tmp_path: Path, keywords: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    server, url = serve(**keywords)
    sync = weight_sync(policy, [url], "policy", OWNER, SyncConfig(**config), tmp_path)
    with pytest.raises(ValueError, match=message):
        sync.push(policy, 0)
    assert set(server.paths) <= {"/weight_info", "/server_info"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "file"}, {"pause": "stop"}, {"sleep": 3}, {"keep": 0}, {"deadline": 0.0}, {"probe_limit": float("nan")},
        {"probe_multiple": 1.0}, {"checksum_gb": -1.0}, {"buffer_mb": 0}, {"sleep": 1, "pause": "keep"},
        {"sleep": 2, "kind": "lora"},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"generator.sync.{next(iter(wrong))}"):
        SyncConfig(**wrong)


def test_what_a_server_is_started_with() -> None:
    assert server_needs(SyncConfig()).arguments == ()
    assert server_needs(SyncConfig(), lora_rank=9).arguments == ("--enable-lora", "--max-lora-rank", "16")
    assert server_needs(SyncConfig(kind="safetensors"), lora_rank=9).arguments == ()
    assert server_needs(SyncConfig(kind="ipc")).environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"
    assert server_needs(SyncConfig(kind="nccl", sleep=1)).arguments[-1] == "--enable-sleep-mode"
    with pytest.raises(ValueError, match=r"lora\.rank is 513"):
        server_needs(SyncConfig(kind="lora"), lora_rank=513)


def test_marks_are_read_back() -> None:
    mark = Mark("host of many:/runs/version 3 of x\n", 12, "loading")
    assert Mark.read(str(mark)) == mark
    assert Mark.read("default") is None and Mark.read("12") is None
