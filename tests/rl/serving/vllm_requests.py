"""Run by vLLM's own interpreter: FILE... Plays requests that the trainer made to vLLM's own routes and classes; says what they became.

FILE: {"requests": [[path, query, body], ...], "backend": "nccl" | "ipc", "sizes": [...], "limit": n}. Prints a line of JSON for each.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors
from vllm.entrypoints.rl.online import api_router as rl
from vllm.entrypoints.serve.dev.cache import api_router as cache
from vllm.entrypoints.serve.dev.rpc import api_router as rpc
from vllm.entrypoints.serve.dev.sleep import api_router as sleep
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

CLASSES = {
    "nccl": (NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo),
    "ipc": (IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo),
}


class Engine:
    """What the routes call: writes down each call, with infos read by the classes that vLLM's workers read them with."""

    def __init__(self, backend: str) -> None:
        self.init, self.update = CLASSES[backend]
        self.called: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **keywords: Any) -> Any:
            self.called.append([name, self._plain([*arguments, *keywords.values()])])
            return {"reset_prefix_cache": True, "get_weight_version": "default", "wake_up": False}.get(name)

        return call

    def _plain(self, arguments: list[Any]) -> list[Any]:
        made = []
        for argument in arguments:
            if hasattr(argument, "init_info"):
                info = self.init(**argument.init_info)
                made.append(
                    {**asdict(info), "unique id bytes": len(getattr(info, "nccl_unique_id_bytes", None) or b"")}
                )
            elif hasattr(argument, "update_info"):
                made.append(asdict(self.update(**argument.update_info)))
            else:
                made.append(argument)
        return made


def main(file: Path) -> None:
    told = json.loads(file.read_text())
    WeightTransferConfig(backend=told["backend"])
    app = FastAPI()
    for router in (rl.router, cache.router, rpc.router, sleep.router):
        app.include_router(router)
    app.state.engine_client = engine = Engine(told["backend"])
    statuses = []
    with TestClient(app) as client:
        for path, query, body in told["requests"]:
            if path == "/v1/load_lora_adapter":
                engine.called.append(["lora", LoadLoRAAdapterRequest.model_validate(body, extra="forbid").model_dump()])
            elif path == "/v1/unload_lora_adapter":
                engine.called.append(
                    ["lora", UnloadLoRAAdapterRequest.model_validate(body, extra="forbid").model_dump()]
                )
            else:
                answer = client.request(
                    "GET" if body is None and path == "/weight_info" else "POST", path, params=query, json=body
                )
                statuses.append([path, answer.status_code, answer.text[:300]])
    print(
        json.dumps(
            {"statuses": statuses, "called": engine.called, "chunks": cut(told["sizes"], told["limit"])}, default=str
        )
    )


def cut(sizes: list[int], limit: int) -> list[list[str]]:
    """How vLLM's own packing cuts tensors of so many bytes."""
    pairs = iter([(str(i), torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)])
    made = []
    while (chunk := pack_tensors(pairs, lambda pair: pair[1], limit)) is not None:
        made.append(chunk.names)
    return made


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(Path(argument))
