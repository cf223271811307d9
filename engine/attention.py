"""Our attention inside any transformers causal LM, through transformers' attention interface.

The model is not patched: it is loaded with `attn_implementation="longreach"`, and every call of its decoder hands a
`layout` down to each layer, which says how the tokens of this call see each other:

* `SharedPrefix` (training, log-probs): three mask-free calls merged by log-sum-exp, and their exact backward;
* `Prefill` and `Decode` (generation) live in `decoding.py`.

Without a layout (a user's own `model(...)` or `model.generate(...)`) plain causal attention runs. Whatever would need
a mask there (padding, packed positions, a static cache) is refused: a mask is T x T, and none is ever made.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..kernels import attention
from .packing import PackedRow

NAME = "longreach"

_CHANGES_SCORES = ("softcap", "s_aux", "sliding_window", "position_bias")
"""What models hand to an attention function that changes which keys are seen, or how much."""


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
        return _SharedPrefixAttention.apply(q_THE, k_TKE, v_TKE, self.row, scale, self.backend)


class _SharedPrefixAttention(torch.autograd.Function):
    """Each call's backward takes the merged out and lse, so the three calls are independent of each other."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float, backend: str) -> Tensor:
        P = row.prompt_tokens
        prompts, cross, completions = _calls(row, scale, backend)
        out, lse = attention.forward(q[:P], k[:P], v[:P], **prompts)
        if row.tokens > P:
            wide = torch.promote_types(q.dtype, torch.float32)  # partial results are merged before they are rounded
            out_x, lse_x = attention.forward(q[P:], k[:P], v[:P], out_dtype=wide, **cross)
            out_c, lse_c = attention.forward(q[P:], k[P:], v[P:], out_dtype=wide, **completions)
            out_c, lse_c = attention.merge(out_x, lse_x, out_c, lse_c)
            out, lse = torch.cat([out, out_c.to(out.dtype)]), torch.cat([lse, lse_c], dim=-1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (row, scale, backend)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        row, P = ctx.call[0], ctx.call[0].prompt_tokens
        prompts, cross, completions = _calls(*ctx.call)

        def partial(queries: slice, keys: slice, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
            wide = torch.promote_types(q.dtype, torch.float32)  # partial gradients are added before they are rounded
            b_dout, b_q, b_out, b_lse = dout[queries], q[queries], out[queries], lse[:, queries]
            return attention.backward(b_dout, b_q, k[keys], v[keys], b_out, b_lse, grad_dtype=wide, **arguments)

        prompt, rest = slice(0, P), slice(P, None)
        with torch.autocast(q.device.type, enabled=False):  # a caller's backward may run within autocast
            dq, dk, dv = partial(prompt, prompt, prompts)
            if row.tokens > P:
                dq_x, dk_x, dv_x = partial(rest, prompt, cross)
                dq_c, dk_c, dv_c = partial(rest, rest, completions)
                dq = torch.cat([dq, dq_x.add_(dq_c)])
                dk = torch.cat([dk.add_(dk_x), dk_c])
                dv = torch.cat([dv.add_(dv_x), dv_c])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _calls(row: PackedRow, scale: float, backend: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Arguments of the three calls: prompts on themselves, completions on their prompts, completions on themselves."""

    def call(causal: bool, cu_q: Tensor, cu_k: Tensor) -> dict[str, Any]:
        return {"causal": causal, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "scale": scale, "backend": backend}

    return (
        call(True, row.cu_prompts, row.cu_prompts),
        call(False, row.cu_queries, row.cu_prompts),
        call(True, row.cu_completions, row.cu_completions),
    )


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
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' calling convention: query [B, H, T, E], key and value [B, K, S, E] -> ([B, T, H, E], None)."""
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported: set the model's attention_dropout to 0")
    changed = [name for name in _CHANGES_SCORES if others.get(name) is not None]
    if changed:
        raise ValueError(f"{type(module).__name__} attends with {', '.join(changed)}: not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings leave q and k in fp32
    if layout is None:
        return _plain(query, key, value, attention_mask, scale), None
    assert query.shape[0] == 1, "a layout describes one packed row"
    layer = module.layer_idx
    assert isinstance(layer, int)
    q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    return _attend(layout, layer, q_THE, k_TKE, v_TKE, scale).unsqueeze(0), None


@torch.compiler.disable(reason="the lengths of segments steer Python: traced, every row would be compiled anew")
def _attend(layout: Layout, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, scale: float) -> Tensor:
    with torch.autocast(q_THE.device.type, enabled=False):  # the kernels choose their own precision
        return layout.attend(layer, q_THE, k_TKE, v_TKE, scale)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Causal attention without a layout, for `model(...)` and `model.generate(...)` called by hand."""
    if mask is not None:
        raise ValueError(
            "this call needs an attention mask (padding, packed positions, a static cache or a mask of its own), and "
            "none is supported: run sequences one by one, or pack them with longreach.engine.completion_hidden"
        )
    queries, keys = query.shape[2], key.shape[2]
    if 1 < queries != keys:
        raise ValueError(
            f"{queries} new tokens on a cache of {keys - queries}: feed a cached sequence one token at a time"
        )
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=queries > 1, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def _mask(*, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **_: Any) -> Tensor | None:
    """No mask is ever made. An empty one says that plain causal attention would be wrong; a layout takes no notice."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    return torch.empty((1, 1, 0, 0)) if padded or not allow_is_causal_skip else None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
