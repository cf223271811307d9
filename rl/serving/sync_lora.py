"""Adapters handed over as they are, in peft's layout, and loaded by a running server: a few MB for a model of any size.

Every push is a model of its own name to the server ("policy-v12-3f9a", never given twice, since the server's prefix cache knows
an adapter by its name alone). Requests name it, so nothing is stopped: what still runs with the adapter before goes on with
that, and no completion mixes two; the version spans that a server reports are of the mark, not of the adapter. Nothing is
merged, so nothing is rounded away. The server needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; a server that started again has lost its adapters and
refuses their names. Runs on vLLM's CPU build too.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...engine.checkpoint import drop_newer, save_checkpoint
from ...engine.model import trainable
from ...engine.whole import whole
from ..policy import Policy
from .control import Facts, Mark, StaleServer, SyncError
from .http import ServerError
from .sync_files import FolderSync


class LoraSync(FolderSync):
    """The adapters alone. `_loaded`: their names on the servers, the newest last."""

    how = "lora"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._loaded: list[str] = []

    @property
    def served_model(self) -> str:
        return self._loaded[-1] if self._loaded else self.base_model

    def check(self) -> None:
        super().check()
        self._models(self.served_model)

    def _fit(self, policy: Policy, facts: Sequence[Facts]) -> None:
        super()._fit(policy, facts)
        lora = policy.config.lora
        if lora is None:
            raise ValueError(
                'generator.sync.kind = "lora" hands adapters over, and the model has none: give it a [model.lora]'
            )
        for url, fact in zip(self.control.urls, facts, strict=True):
            if fact.lora_rank < lora.rank:
                raise ValueError(
                    f"{url} serves adapters of ranks up to {fact.lora_rank}, and lora.rank is {lora.rank}: start it with "
                    f"--enable-lora --max-lora-rank {lora.rank} or more and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                )

    def _prepare(self, policy: Policy, version: int) -> int:
        try:
            self._written = write_adapter(self.folder, policy, version, self.config.keep)
        except OSError as error:
            raise SyncError(
                f"the adapter of version {version} can't be written to {self.folder}: {error}; the servers still have the one "
                "before. Make room, or set generator.sync.folder to another disk that servers see too"
            ) from error
        return sum(p.numel() * p.element_size() for p in trainable(policy.model).values())

    def _begin(self, policy: Policy) -> None:
        super()._begin(policy)
        self._summed = False  # the sums are of the base's weights, which stay

    def _stop(self, version: int) -> None:
        if self.config.sleep:
            super()._stop(version)

    def _transfer(self, policy: Policy, version: int) -> int:
        self._lead(policy.ranks, lambda: self._load(version))
        return 0

    def _go_on(self, version: int) -> None:
        self.control.set_mark(Mark(self.owner, version))
        if self.config.sleep:
            self.gate.open()

    def _left_behind(self) -> str:
        return f"The servers still have {self.served_model} (do they see {self.folder}?)."

    def _load(self, version: int) -> None:
        again = (
            version == self.version and self.control.urls != self.urls
        )  # to one that started again: as the others have it
        name = self.served_model if again else f"{self.base_model}-v{version}-{secrets.token_hex(2)}"
        self._told("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._written)})
        if again:
            return
        self._loaded.append(name)
        while len(self._loaded) > self.config.keep:
            self._told("/v1/unload_lora_adapter", {"lora_name": self._loaded.pop(0)}, missing=True)

    def _told(self, path: str, body: dict[str, str], *, missing: bool = False) -> None:
        """These routes answer with a sentence, which is no JSON. `missing`: what isn't there (any more) is no error."""
        try:
            self.control.post(path, body)
        except ServerError as error:
            if error.status != 200 and not (missing and error.status == 404):
                raise

    def _models(self, name: str) -> None:
        for url, answer in zip(self.control.urls, self.control.get("/v1/models"), strict=True):
            if name not in {entry["id"] for entry in answer["data"]}:
                raise StaleServer(
                    f"{url} has no adapter {name}: it was started again, or someone unloaded it; push once more"
                )


def write_adapter(root: Path, policy: Policy, version: int, keep: int) -> Path:
    """Folder `version` under `root` in peft's layout; all ranks call it. As `write_handover`."""
    own = policy.config.lora
    assert own is not None
    adapters = {name: whole(p.detach()).cpu().contiguous() for name, p in trainable(policy.model).items()}

    def write(folder: Path) -> None:
        save_file(
            {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in adapters.items()},
            folder / "adapter_model.safetensors",
        )
        described = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": own.rank, "lora_alpha": own.alpha,
            "target_modules": list(own.targets), "base_model_name_or_path": policy.config.path, "inference_mode": True,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(described, indent=1))

    def lead() -> Path:
        drop_newer(root, version)
        return save_checkpoint(root, version, write, keep=keep)

    return policy.ranks.together(lead, lambda: None)
