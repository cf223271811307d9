"""A stand-in for vLLM's server, for order and failures: its routes for weights on a real socket, with a real model behind them.

It reloads the files that it is pointed at, keeps a head of its own as the CPU build does (what isn't in the file stays), has a
prefix cache that goes stale, loses everything when it "starts again", writes down what it is asked, and fails on request.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

BLOCK = 16


class StandIn:
    """`fail` maps a path to a status to answer with, or to seconds to wait first. `asked` has (path, query, body) in order."""

    def __init__(
        self, model: PreTrainedModel, *, lora_rank: int = 0, transfer: str | None = None, sleeps: bool = False
    ) -> None:
        self._first = copy.deepcopy(model)
        self.lora_rank, self.transfer, self.sleeps = lora_rank, transfer, sleeps
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.fail: dict[str, int | float] = {}
        self.keeps_cache = False
        self.deaf = False
        """Answers that it reloaded, and doesn't."""
        self.start_again()

    def start_again(self) -> None:
        self.model = copy.deepcopy(self._first)
        head = self.model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # repacked: its own from now on
        self.version, self.paused, self.asleep = "default", False, set[str]()
        self.adapters: dict[str, str] = {}
        self._stale: PreTrainedModel | None = None

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.asked]

    def answer(self, path: str, query: dict[str, str], body: Any) -> tuple[int, Any]:
        self.asked.append((path, query, body))
        wanted = self.fail.get(path)
        if isinstance(wanted, float):
            time.sleep(wanted)
        elif wanted is not None:
            return wanted, {"error": "as asked for"}
        name = "do_" + path.strip("/").replace("/", "_")
        return getattr(self, name)(query, body)

    def do_weight_info(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    def do_update_weight_version(self, query: Any, body: Any) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True}

    def do_server_info(self, query: Any, body: Any) -> tuple[int, Any]:
        assert query == {"config_format": "json"}
        config = {
            "model_config": {"dtype": "torch.float32", "max_model_len": 1024, "enable_sleep_mode": self.sleeps},
            "cache_config": {"block_size": BLOCK, "enable_prefix_caching": True},
            "parallel_config": {"world_size": 2, "data_parallel_size": 1},
            "weight_transfer_config": None if self.transfer is None else {"backend": self.transfer},
            "lora_config": {"max_lora_rank": self.lora_rank} if self.lora_rank else None,
        }
        return 200, {"vllm_config": config}

    def do_pause(self, query: Any, body: Any) -> tuple[int, Any]:
        self.paused = True
        return 200, {"status": "paused"}

    def do_resume(self, query: Any, body: Any) -> tuple[int, Any]:
        self.paused = False
        return 200, {"status": "resumed"}

    def do_sleep(self, query: Any, body: Any) -> tuple[int, Any]:
        self.asleep = {"weights", "kv_cache"}
        self._stale = None
        return 200, {"status": "sleeping"}

    def do_wake_up(self, query: Any, body: Any) -> tuple[int, Any]:
        self.asleep.discard(query["tags"])
        return 200, {"status": "sleeping" if self.asleep else "awake", "tags": [query["tags"]]}

    def do_reset_prefix_cache(self, query: Any, body: Any) -> tuple[int, Any]:
        if not self.keeps_cache:
            self._stale = None
        return 200, {"success": True}

    def do_weight_checker(self, query: Any, body: Any) -> tuple[int, Any]:
        sums = {n: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for n, t in self.model.named_parameters()}
        return 200, {"checksums": sums}

    def do_collective_rpc(self, query: Any, body: Any) -> tuple[int, Any]:
        assert body["method"] == "reload_weights"
        assert self.paused or "weights" not in self.asleep
        weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        if not self.deaf:
            self.take(weights)
        return 200, {"results": [None]}

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        self._stale = copy.deepcopy(self.model)
        own = self.model.state_dict()
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    def do_v1_models(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"data": [{"id": "policy"}, *({"id": name} for name in self.adapters)]}

    def do_v1_load_lora_adapter(self, query: Any, body: Any) -> tuple[int, Any]:
        if body["lora_name"] in self.adapters:
            return 400, {"error": "has already been loaded"}
        assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
        self.adapters[body["lora_name"]] = body["lora_path"]
        return 200, "Success: LoRA adapter added."

    def do_v1_unload_lora_adapter(self, query: Any, body: Any) -> tuple[int, Any]:
        return (404, {}) if self.adapters.pop(body["lora_name"], None) is None else (200, "Success: removed.")

    def do_init_weight_transfer_engine(self, query: Any, body: Any) -> tuple[int, Any]:
        return 200, {"message": "done"}

    do_start_weight_update = do_update_weights = do_finish_weight_update = do_init_weight_transfer_engine

    @torch.no_grad()
    def do_v1_completions(self, query: Any, body: Any) -> tuple[int, Any]:
        if self.paused or self.asleep:
            return 503, {"error": "stands still"}
        if body["model"] not in ("policy", *self.adapters):
            return 404, {"error": "no such model"}
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        return 200, {"choices": [self._choice(i, ids, body) for i, ids in enumerate(prompts)]}

    def _choice(self, index: int, ids: list[int], body: Any) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index}
        if body.get("logprobs"):
            model = self.model if "cache_salt" in body else self._stale or self.model
            values, tokens = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(body["logprobs"])
            top = {f"token_id:{t}": v for t, v in zip(tokens.tolist(), values.tolist(), strict=True)}
            made["logprobs"] = {"top_logprobs": [top]}
        return made


@contextmanager
def listening(stand_in: StandIn) -> Iterator[str]:
    """Its address, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(json.loads(raw) if raw else None)

        def _answer(self, body: Any) -> None:
            parts = urlsplit(self.path)
            status, made = stand_in.answer(parts.path, dict(parse_qsl(parts.query)), body)
            raw = made.encode() if isinstance(made, str) else json.dumps(made).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except ConnectionError:  # who asked has given up
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
