"""Our attention inside any transformers causal LM, through transformers' attention interface.

The model is not patched: it is loaded with `attn_implementation="longreach"`, and every call of its decoder hands a
`layout` down to each layer, which says how the tokens of this call see each other:

* `PackedRow` layout (training, log-probs): three mask-free calls merged by log-sum-exp, and their exact backward;
* `Prefill` and `Decode` layouts (generation) live in `decoding.py`.

Without a layout (a user's own `model.generate`) plain causal attention runs; a padded mask is refused, since a
registered attention function is never given one that it could honour here without a T x T tensor.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..kernels import attention
from .packing import PackedRow

NAME = "longreach"


class Layout(Protocol):
    """How the tokens of one decoder call see each other."""

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        """Attention output [T, H, E] of one layer."""
        ...


class SharedPrefix:
    """Layout of a packed row: causal(prompts), full(completions x own prompt), causal(completions), merged."""

    def __init__(self, row: PackedRow, backend: str = "auto") -> None:
        self.row = row
        self.backend = backend

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
        return _SharedPrefixAttention.apply(q_THE, k_TKE, v_TKE, self.row, scale, self.backend)  # type: ignore[no-any-return]


class _SharedPrefixAttention(torch.autograd.Function):
    """The backward of each of the three calls takes the merged out and lse, so the calls are independent of each other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float, backend: str) -> Tensor:
        P = row.prompt_tokens
        out_p, lse_p = attention.forward(q[:P], k[:P], v[:P], **_prompt_call(row, scale, backend))
        out, lse = out_p, lse_p
        if row.tokens > P:
            wide = torch.promote_types(q.dtype, torch.float32)  # partial results are merged before they are rounded
            out_x, lse_x = attention.forward(q[P:], k[:P], v[:P], out_dtype=wide, **_cross_call(row, scale, backend))
            out_c, lse_c = attention.forward(
                q[P:], k[P:], v[P:], out_dtype=wide, **_completion_call(row, scale, backend)
            )
            out_c, lse_c = attention.merge(out_x, lse_x, out_c, lse_c)
            out, lse = torch.cat([out_p, out_c.to(out_p.dtype)]), torch.cat([lse_p, lse_c], dim=-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (row, scale, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        row, scale, backend = ctx.call
        P = row.prompt_tokens

        def call(queries: slice, keys: slice, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            return attention.backward(
                dout[queries],
                q[queries],
                k[keys],
                v[keys],
                out[queries],
                lse[:, queries],
                grad_dtype=torch.promote_types(q.dtype, torch.float32),
                **arguments,
            )

        prompt, rest = slice(0, P), slice(P, None)
        dq_p, dk_p, dv_p = call(prompt, prompt, _prompt_call(row, scale, backend))
        if row.tokens == P:
            return dq_p.to(q.dtype), dk_p.to(k.dtype), dv_p.to(v.dtype), None, None, None
        dq_x, dk_x, dv_x = call(rest, prompt, _cross_call(row, scale, backend))
        dq_c, dk_c, dv_c = call(rest, rest, _completion_call(row, scale, backend))
        dq = torch.cat([dq_p, dq_x.add_(dq_c)])
        dk = torch.cat([dk_p.add_(dk_x), dk_c])
        dv = torch.cat([dv_p.add_(dv_x), dv_c])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _prompt_call(row: PackedRow, scale: float, backend: str) -> dict[str, Any]:
    cu = row.cu_prompts
    return {"causal": True, "scale": scale, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "backend": backend}


def _cross_call(row: PackedRow, scale: float, backend: str) -> dict[str, Any]:
    return {
        "causal": False,
        "scale": scale,
        "cu_seqlens_q": row.cu_queries,
        "cu_seqlens_k": row.cu_prompts,
        "backend": backend,
    }


def _completion_call(row: PackedRow, scale: float, backend: str) -> dict[str, Any]:
    cu = row.cu_completions
    return {"causal": True, "scale": scale, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "backend": backend}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' calling convention: query [B, H, T, E], key and value [B, K, S, E] -> ([B, T, H, E], None)."""
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: set the model's attention_dropout to 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast a norm can leave q and k in fp32
    if layout is None:
        return _plain(query, key, value, scale), None
    assert query.shape[0] == 1, "a layout describes one packed row"
    layer = module.layer_idx
    assert isinstance(layer, int)
    out_THE = layout.attend(layer, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scale)
    return out_THE.unsqueeze(0), None


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention without a layout, for `model(...)` and `model.generate(...)` called by hand."""
    queries, keys = query.shape[2], key.shape[2]
    if 1 < queries != keys:
        raise ValueError(
            f"{queries} new tokens on a cache of {keys - queries}: feed a cached sequence one token at a time"
        )
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=queries > 1, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    """No mask tensor is ever made; padding, which would need one, is refused instead of being dropped silently."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            "padded attention masks are not supported: pack the sequences (longreach.engine.completion_hidden), or run them "
            "one by one"
        )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
