"""Attention layouts of generation: prompts prefilled once per group, completions decoded together on the shared keys.

The keys of a prompt are stored once, whatever G is; each decode step reads them once for all G completions, as one
matrix product per prompt and key head. The completions' own keys are small and stand beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import attention
from .packing import PackedRow


class PrefixCache:
    """Keys and values of B prompts and of their B x G completions, per layer.

    Prompts [B, K, P, E] are right-padded to the longest; completions [B, G, K, R, E] grow by one token a step.
    """

    def __init__(self, prompt_lengths: list[int], group_size: int, max_completion: int) -> None:
        self.prompt_lengths = torch.tensor(prompt_lengths)
        self.group_size = group_size
        self.max_completion = max_completion
        self.decoded = 0
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.completions: dict[int, tuple[Tensor, Tensor]] = {}
        self._hidden_keys: Tensor | None = None

    def store_prompts(self, layer: int, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Takes the keys and values of the prompts, end to end, out of the prefill call."""
        lengths = self.prompt_lengths.tolist()
        pads = [torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True) for x in (k_TKE, v_TKE)]
        self.prompts[layer] = (pads[0].transpose(1, 2).contiguous(), pads[1].transpose(1, 2).contiguous())
        B, K, E = len(lengths), k_TKE.shape[1], k_TKE.shape[2]
        empty = k_TKE.new_empty((B, self.group_size, K, self.max_completion, E))
        self.completions[layer] = (empty, torch.empty_like(empty))

    def hidden_keys(self, device: torch.device) -> Tensor:
        """[B, 1, 1, P] bool: padding of the prompts."""
        if self._hidden_keys is None:
            longest = int(self.prompt_lengths.max())
            self._hidden_keys = (torch.arange(longest) >= self.prompt_lengths[:, None])[:, None, None].to(device)
        return self._hidden_keys

    def keep(self, prompts: Tensor) -> None:
        """Drops all prompts but these (LongTensor of indices): called when their completions have ended."""
        self.prompt_lengths = self.prompt_lengths[prompts.to(self.prompt_lengths.device)]
        self.prompts = {n: (k[prompts], v[prompts]) for n, (k, v) in self.prompts.items()}
        self.completions = {n: (k[prompts], v[prompts]) for n, (k, v) in self.completions.items()}
        self._hidden_keys = None


class Prefill:
    """Layout of the prompts' own pass: causal, and their keys stay in the cache."""

    def __init__(self, row: PackedRow, cache: PrefixCache, backend: str = "auto") -> None:
        self.row, self.cache, self.backend = row, cache, backend

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        self.cache.store_prompts(layer, k_TKE, v_TKE)
        cu = self.row.cu_prompts
        out, _ = attention.forward(
            q_THE, k_TKE, v_TKE, causal=True, scale=scale, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=self.backend
        )
        return out


class Decode:
    """Layout of one decode step: one new token for each of the B x G completions."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        cache, t, G = self.cache, self.cache.decoded, self.cache.group_size
        pk, pv = cache.prompts[layer]
        B, K, P, E = pk.shape
        H = q_THE.shape[1]
        ck, cv = cache.completions[layer]
        ck[:, :, :, t] = k_TKE.view(B, G, K, E)
        cv[:, :, :, t] = v_TKE.view(B, G, K, E)
        own_k, own_v = ck[:, :, :, : t + 1], cv[:, :, :, : t + 1]
        q = q_THE.reshape(B, G, K, H // K, E)
        q_shared = q.transpose(1, 2).reshape(B, K, G * (H // K), E)
        on_prompt = (q_shared @ pk.transpose(-1, -2)).float() * scale
        on_prompt = on_prompt.masked_fill(cache.hidden_keys(q.device), -torch.inf)
        on_prompt = on_prompt.view(B, K, G, H // K, P).transpose(1, 2)
        on_own = (q @ own_k.transpose(-1, -2)).float() * scale
        weights = torch.cat([on_prompt, on_own], dim=-1).softmax(-1).to(q.dtype)
        w_shared = weights[..., :P].transpose(1, 2).reshape(B, K, G * (H // K), P)
        out = (w_shared @ pv).view(B, K, G, H // K, E).transpose(1, 2) + weights[..., P:] @ own_v
        return out.reshape(B * G, H, E)
