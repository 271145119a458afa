"""nn.MultiheadAttention whose output projection is a module that is called, not a weight that is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def unsupported(attention: nn.MultiheadAttention) -> str | None:
    """Why this attention keeps its float output projection, or None."""
    if attention.bias_k is not None or attention.bias_v is not None:
        return "add_bias_kv is not supported by the quantized attention"
    if attention.add_zero_attn:
        return "add_zero_attn is not supported by the quantized attention"
    return None


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """The same attention with `out_proj` called as a module.

    nn.MultiheadAttention hands `out_proj.weight` to a function, past the module's forward, and in eval mode takes a
    fused path that does the same. This class runs the published steps itself: projections in float, scaled
    dot-product attention, then `out_proj`. An instance of nn.MultiheadAttention becomes one by a change of its
    `__class__`.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._project(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            context = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            context = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(context.transpose(1, 2).flatten(2))
        if not batched:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            else:
                matrices = self.in_proj_weight.chunk(3)
                projected = tuple(
                    F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, bias, strict=True)
                )
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            projected = tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, bias, strict=True))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected)
        return q, k, v

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask that broadcasts over [batch, heads, queries, keys]."""

        def additive(mask: Tensor) -> Tensor:
            return (
                torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -torch.inf)
                if mask.dtype == torch.bool
                else mask
            )

        mask = None
        if attn_mask is not None:
            mask = additive(attn_mask)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], self.num_heads))
        if padding is not None:
            row = additive(padding)[:, None, None, :]
            mask = row if mask is None else mask + row
        return mask
