"""Attention layouts of generation: prompts prefilled once per group, completions decoded together on the shared keys.

The keys of a prompt are stored once, whatever G is; each decode step reads them once for all G completions, as one
matrix product per prompt and key head. The completions' own keys are small and stand beside them. Scores and sums are
fp32 whatever the model's dtype, as in training. What it gives up: prompts of one batch are padded to the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import attention
from .packing import PackedRow


class PrefixCache:
    """Keys and values of B prompts and of their B x G completions, per layer.

    Prompts [B, K, P, E] are right-padded to the longest; completions [B, K, G, R, E] grow by one token a step.
    `decoded` counts the tokens that each completion has in the cache.
    """

    def __init__(self, prompt_lengths: list[int], group_size: int, max_completion: int) -> None:
        self.prompt_lengths = torch.tensor(prompt_lengths)
        self.group_size = group_size
        self.max_completion = max_completion
        self.decoded = 0
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}
        self.completions: dict[int, tuple[Tensor, Tensor]] = {}
        self._padding: Tensor | None = None

    def store_prompts(self, layer: int, first: int, row: PackedRow, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Takes keys and values of the row's prompts, which are number `first` and following of the batch."""
        if layer not in self.prompts:
            B, P, (_, K, E) = len(self.prompt_lengths), int(self.prompt_lengths.max()), k_TKE.shape
            # zeros: a padded value has weight 0, and 0 x whatever memory held may be NaN
            self.prompts[layer] = (k_TKE.new_zeros((B, K, P, E)), v_TKE.new_zeros((B, K, P, E)))
            shape = (B, K, self.group_size, self.max_completion, E)
            self.completions[layer] = (k_TKE.new_empty(shape), v_TKE.new_empty(shape))
        for stored, given in zip(self.prompts[layer], (k_TKE, v_TKE), strict=True):
            for b, prompt in enumerate(given.split(row.prompt_lengths), first):
                stored[b, :, : len(prompt)] = prompt.transpose(0, 1)

    def padding(self, device: torch.device) -> Tensor | None:
        """[B, 1, 1, P] bool, or None where no prompt is padded."""
        longest = int(self.prompt_lengths.max())
        if int(self.prompt_lengths.min()) == longest:
            return None
        if self._padding is None:
            self._padding = (torch.arange(longest) >= self.prompt_lengths[:, None])[:, None, None].to(device)
        return self._padding

    def keep(self, prompts: Tensor) -> None:
        """Drops all prompts but these (LongTensor of indices): called when their completions have ended."""
        self.prompt_lengths = self.prompt_lengths[prompts]
        self._padding = None
        longest = int(self.prompt_lengths.max())
        for layer, (
            k,
            v,
        ) in self.prompts.items():  # one layer at a time: the old and new cache never stand side by side
            at = prompts.to(k.device)
            self.prompts[layer] = (k[at, :, :longest], v[at, :, :longest])
            own_k, own_v = self.completions[layer]
            self.completions[layer] = (own_k[at], own_v[at])


class Prefill:
    """Layout of some prompts' own pass: causal, and their keys stay in the cache as number `first` and following."""

    def __init__(self, row: PackedRow, first: int, cache: PrefixCache, backend: str = "auto") -> None:
        self.row, self.first, self.cache, self.backend = row, first, cache, backend

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        self.cache.store_prompts(layer, self.first, self.row, k_TKE, v_TKE)
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
        for stored, given in zip(cache.completions[layer], (k_TKE, v_TKE), strict=True):
            stored[:, :, :, t] = given.view(B, G, K, E).transpose(1, 2)
        ck, cv = (stored[:, :, :, : t + 1] for stored in cache.completions[layer])
        q = q_THE.reshape(B, G, K, -1, E).transpose(1, 2).contiguous()  # [B, K, G, H / K, E]
        on_prompt = _product(q.flatten(2, 3), pk.transpose(-1, -2), scale)
        padding = cache.padding(q.device)
        if padding is not None:
            on_prompt.masked_fill_(padding, -torch.inf)
        on_own = _product(q, ck.transpose(-1, -2), scale).flatten(2, 3)
        weights = torch.cat([on_prompt, on_own], dim=-1).softmax(-1).to(q.dtype)
        out = _product(weights[..., :P], pv).view(B, K, G, -1, E)
        out += _product(weights[..., P:].view(B, K, G, -1, t + 1), cv)
        return out.to(q.dtype).transpose(1, 2).reshape(B * G, -1, E)


def _product(a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """factor a @ b over the last two dimensions, summed and kept in fp32 (fp64 for fp64)."""
    wide, lead = torch.promote_types(a.dtype, torch.float32), a.shape[:-2]
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    if a.is_cuda and a.dtype != wide:
        return torch.bmm(a, b, out_dtype=wide).mul_(factor).unflatten(0, lead)
    unused = a.new_empty((), dtype=wide)
    return torch.baddbmm(unused, a.to(wide), b.to(wide), beta=0, alpha=factor).unflatten(0, lead)
