"""Weights from GPU to GPU through vLLM's own weight transfer, with no vLLM in the trainer. NOT RUN ON A GPU YET.

    init_weight_transfer_engine once; each push: start_weight_update, update_weights, finish_weight_update

"nccl": trainer rank 0 and every worker of every server are one NCCL communicator, met through a unique id that goes over HTTP;
weights are packed into buffers and broadcast, while /update_weights waits for them on the other side. "ipc": trainer and server
on the same GPU; each rank packs into a buffer of its own and posts a handle to it (pickled: the server must be started with
VLLM_ALLOW_INSECURE_SERIALIZATION=1 and listen on this host alone). The requests are checked against vLLM 0.32's own classes.
Both sides must have NCCL versions that speak with each other. It gives up on partial updates: every push is all weights.
"""

from __future__ import annotations

import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ...engine.plain_weights import Entry, PlainWeights
from ..policy import Policy
from .control import Facts
from .http import ServerError
from .sync import WeightSync

T = TypeVar("T")
_BUFFERS = 2
"""On the servers' side: one is loaded while the next arrives."""


def update_info(entries: Sequence[Entry]) -> dict[str, Any]:
    """What tells a server which tensors come, in order."""
    return {
        "names": [entry.name for entry in entries],
        "dtype_names": [str(entry.dtype).removeprefix("torch.") for entry in entries],
        "shapes": [list(entry.shape) for entry in entries],
    }


def chunks(pairs: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """As vLLM cuts them on its side: a chunk ends with the tensor that takes it past `limit` bytes."""
    chunk, size = [], 0
    for name, tensor in pairs:
        chunk.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size > limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


class TransferSync(WeightSync):
    """What the two ways share."""

    _joined: frozenset[str] = frozenset()
    """Servers that are set up for it, together."""

    @property
    def limit(self) -> int:
        return self.config.buffer_mb << 20

    def _fit(self, policy: Policy, facts: Sequence[Facts]) -> None:
        super()._fit(policy, facts)
        for url, fact in zip(self.control.urls, facts, strict=True):
            if fact.transfer != self.how:
                raise ValueError(
                    f"{url} was started for weight transfer by {fact.transfer or 'none'}, not {self.how}: give it "
                    f"""--weight-transfer-config '{{"backend": "{self.how}"}}'"""
                )

    def _forget(self, url: str) -> None:
        super()._forget(url)
        self._joined = frozenset()

    def _weights(self, policy: Policy) -> PlainWeights:
        return PlainWeights(policy.model, policy.ranks.first(lambda: self.facts()[0].dtype))


class NcclSync(TransferSync):
    """Rank 0 sends; other ranks gather with it."""

    how = "nccl"
    _comm: Any = None

    def _transfer(self, policy: Policy, version: int) -> int:
        weights = self._weights(policy)
        pairs = self._noted(weights.pairs(keep=policy.ranks.main))

        def send() -> None:
            try:
                if self._joined != set(self.control.urls):
                    self._join(policy.model.device)
                    self._joined = frozenset(self.control.urls)
                self.control.post("/start_weight_update")
                told = _aside(
                    lambda: self.control.post("/update_weights", {"update_info": update_info(weights.entries)})
                )
                for chunk in chunks(pairs, self.limit):
                    self._broadcast(torch.cat([_bytes(tensor) for _, tensor in chunk]), told)
                self._until(told.done, told, "the servers to load what was sent")
                told.result()
                self.control.post("/finish_weight_update")
            finally:
                for _ in pairs:  # what other ranks wait to gather
                    pass

        policy.ranks.together(send, lambda: [None for _ in pairs])
        return weights.bytes

    def joining(self, unique_id: bytes) -> list[dict[str, Any]]:
        """Each server's request to join: workers come after the trainer's one rank."""
        made, offset, ranks = [], 1, [fact.ranks for fact in self.facts()]
        for count in ranks:
            made.append(
                {
                    "init_info": {
                        "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
                        "rank_offset": offset,
                        "world_size": 1 + sum(ranks),
                        "packed": True,
                        "packed_buffer_size_bytes": self.limit,
                        "packed_num_buffers": _BUFFERS,
                    }
                }
            )
            offset += count
        return made

    def _join(self, device: torch.device) -> None:
        from torch.cuda import nccl

        unique_id = nccl.unique_id()
        bodies = self.joining(unique_id)
        world = bodies[0]["init_info"]["world_size"]
        told = _aside(lambda: self.control.each("/init_weight_transfer_engine", bodies))

        def enter() -> Any:
            with torch.cuda.device(device):
                return nccl.init_rank(world, unique_id, 0)

        entered = _aside(enter)
        self._until(entered.done, told, f"{world} ranks to meet")
        self._comm = entered.result()
        greeting = torch.zeros(1, device=device)  # a server's first act is a sum of one number, which waits for ours
        nccl.all_reduce([greeting], comms=[self._comm])
        self._until(told.done, told, "the servers to have met")
        told.result()

    def _broadcast(self, packed: Tensor, told: Future[Any]) -> None:
        from torch.cuda import nccl

        nccl.broadcast([packed], comms=[self._comm])
        arrived = torch.cuda.Event()
        arrived.record()
        self._until(arrived.query, told, f"{packed.numel()} bytes to arrive")

    def _until(self, done: Callable[[], bool], told: Future[Any], what: str) -> None:
        """Waits with an end: a collective call whose other side has failed never returns by itself."""
        end = time.monotonic() + self.config.deadline
        while not done():
            if told.done():
                told.result()  # its error, if that is why
            if time.monotonic() > end:
                raise ServerError(", ".join(self.control.urls), f"waited {self.config.deadline:g} s for {what}")
            time.sleep(0.001)


class IpcSync(TransferSync):
    """Every rank shares a buffer with the workers on its own GPU; rank 0 posts all handles."""

    how = "ipc"

    def _transfer(self, policy: Policy, version: int) -> int:
        weights, ranks = self._weights(policy), policy.ranks
        self._lead(ranks, self._begin_update)
        largest = max(entry.bytes for entry in weights.entries)
        buffer = torch.empty(self.limit + largest, dtype=torch.uint8, device=policy.model.device)
        handle = self._handle(buffer)
        handles = {gpu: parts for one in ranks.every(handle) for gpu, parts in one.items()}
        for chunk in chunks(self._noted(weights.pairs()), self.limit):
            packed = torch.cat([_bytes(tensor) for _, tensor in chunk])
            buffer[: packed.numel()].copy_(packed)
            self._settle()
            ranks.every(None)  # all ranks' buffers are filled before anyone reads
            body = {"update_info": shared_info(chunk, handles)}
            self._lead(ranks, lambda body=body: self.control.post("/update_weights", body))
        self._lead(ranks, lambda: self.control.post("/finish_weight_update"))
        return weights.bytes

    def _begin_update(self) -> None:
        if self._joined != set(self.control.urls):
            self.control.post("/init_weight_transfer_engine", {"init_info": {"packed": True}})
            self._joined = frozenset(self.control.urls)
        self.control.post("/start_weight_update")

    def _handle(self, buffer: Tensor) -> dict[str, Any]:
        """By the GPU's id, what rebuilds the buffer in another process on it."""
        _, parts = reduce_tensor(buffer)
        return {str(torch.cuda.get_device_properties(buffer.device).uuid): parts}

    def _settle(self) -> None:
        torch.cuda.synchronize()


def shared_info(chunk: Sequence[tuple[str, Tensor]], handles: dict[str, Any]) -> dict[str, Any]:
    """One chunk in a shared buffer; the sizes are bytes."""
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in chunk]
    return {
        **update_info(entries),
        "tensor_sizes": [entry.bytes for entry in entries],
        "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
    }


def _aside(work: Callable[[], T]) -> Future[T]:
    """Runs it in a thread that nobody has to wait for: an interpreter that ends leaves it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # it comes out of the future
            future.set_exception(error)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return future
