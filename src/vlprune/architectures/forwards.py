"""Attention forwards that the cut puts in place of stock ones.

Each is a subclass of the stock module with the same state dict; cutting swaps the
``__class__`` of the module. Some exist because the stock forward fixes its shapes, others because
it computes attention step by step: on two CPU cores that takes a third of a BLIP's time, and one
fused kernel (SDPA) computes the same. Attention maps are still returned on request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention
from transformers.models.flava.modeling_flava import FlavaSelfAttention
from transformers.models.instructblip.modeling_instructblip import InstructBlipAttention
from transformers.models.vilt.modeling_vilt import ViltSelfAttention
from transformers.utils import output_capturing

from ..cutting.native import register_native_forward

__all__ = ["CutMultiheadAttention"]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    maps: bool = False,
    **_kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention: (batch, heads, tokens, size) -> (batch, tokens, heads, size), and its maps.

    The maps are computed only if ``maps`` is true or a hook watches the module; otherwise None.
    """
    if not maps and not _watched(module):
        drop = dropout if module.training else 0.0
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, mask, drop, scale=scaling
        )
        return out.transpose(1, 2), None
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


def _watched(module: nn.Module) -> bool:
    """Whether a hook wants the module's attention maps.

    transformers collects ``output_attentions`` through hooks that stay after the call; they count
    only while it is collecting.
    """
    hooks = module._forward_hooks.values()
    if not hooks:
        return False
    if any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks):
        return True
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is None or any("attentions" in name for name in collector.get() or ())


class _FusedForward:
    """Self-attention with one fused projection for q, k and v and any head sizes.

    ``head_dim`` is the size of a query or key head, ``value_dim`` that of a value head.
    """

    num_heads: int
    head_dim: int
    value_dim: int
    scale: float
    training: bool
    config: Any
    qkv: nn.Linear
    projection: nn.Linear

    def adopt(self) -> None:
        """Set what the stock module does not have; called once, when it becomes this class."""
        self.value_dim = self.head_dim

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """(batch, tokens, width) -> the same shape, and the attention maps or None."""
        batch, tokens, _ = hidden_states.shape
        narrow, wide = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        q, k, v = self.qkv(hidden_states).split([narrow, narrow, wide], dim=-1)
        q, k, v = (x.reshape(batch, tokens, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        drop = getattr(self, "attention_dropout", None)
        if drop is None:
            drop = self.dropout.p  # type: ignore[attr-defined]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _attend)
        out, weights = attend(
            self,
            q,
            k,
            v,
            None,
            scaling=self.scale,
            dropout=drop if self.training else 0.0,
            **kwargs,
        )
        return self.projection(out.reshape(batch, tokens, -1)), weights


@register_native_forward("fused:BlipAttention")
class CutBlipAttention(_FusedForward, BlipAttention):
    """BlipAttention that takes any head size."""


@register_native_forward("fused:Blip2Attention")
class CutBlip2Attention(_FusedForward, Blip2Attention):
    """Blip2Attention that takes any head size."""


@register_native_forward("fused:InstructBlipAttention")
class CutInstructBlipAttention(_FusedForward, InstructBlipAttention):
    """InstructBlipAttention that takes any head size."""


class _ProjectedForward:
    """Attention with separate q, k and v, whose softmax temperature follows the head size."""

    attention_head_size: int
    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout

    def adopt(self) -> None:
        """Do nothing: the stock module has all attributes that this class needs."""

    def heads(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads x size) -> (batch, heads, tokens, size)."""
        return x.unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, maps: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Heads of q, k and v -> (batch, tokens, heads x size), and the attention maps or None."""
        scaling = self.attention_head_size**-0.5
        out, weights = _attend(self, q, k, v, mask, scaling, self.dropout.p, maps)  # type: ignore[arg-type]
        return out.flatten(2), weights


class _PairForward(_ProjectedForward):
    """Self-attention that returns its maps only on request."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        """(batch, tokens, width) -> the heads' output, and the attention maps on request."""
        q, k, v = (self.heads(p(hidden_states)) for p in (self.query, self.key, self.value))
        out, weights = self.attend(q, k, v, attention_mask, output_attentions)
        return (out, weights) if output_attentions and weights is not None else (out,)


@register_native_forward("spelled:ViltSelfAttention")
class CutViltSelfAttention(_PairForward, ViltSelfAttention):
    """ViltSelfAttention computed by SDPA."""


@register_native_forward("spelled:FlavaSelfAttention")
class CutFlavaSelfAttention(_PairForward, FlavaSelfAttention):
    """FlavaSelfAttention computed by SDPA."""


@register_native_forward("spelled:BlipTextSelfAttention")
class CutBlipTextSelfAttention(_ProjectedForward, BlipTextSelfAttention):
    """BlipTextSelfAttention computed by SDPA."""

    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, tokens, width) -> the heads' output, and the attention maps or None."""
        # transformers 5.24 renamed ``past_key_values`` to ``cache``
        past = cache if cache is not None else past_key_values
        crosses = encoder_hidden_states is not None
        source = encoder_hidden_states if encoder_hidden_states is not None else hidden_states
        mask = encoder_attention_mask if crosses else attention_mask
        both = isinstance(past, EncoderDecoderCache)
        own = past
        if both:
            own = past.cross_attention_cache if crosses else past.self_attention_cache
        q = self.heads(self.query(hidden_states))
        if both and crosses and past.is_updated.get(self.layer_idx):
            k, v = own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        else:
            k, v = self.heads(self.key(source)), self.heads(self.value(source))
            if own is not None:
                k, v = own.update(k, v, self.layer_idx)
            if both and crosses:
                past.is_updated[self.layer_idx] = True
        return self.attend(q, k, v, mask)


@register_native_forward("multihead:MultiheadAttention")
class CutMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with fewer or smaller heads than its width implies.

    ``head_dim`` is the size of a query or key head, ``value_dim`` that of a value head; the
    softmax temperature stays that of the uncut module (``scale``).
    """

    value_dim: int
    scale: float

    def adopt(self) -> None:
        """Set what the stock module does not have; called once, when it becomes this class."""
        self.scale = self.head_dim**-0.5
        self.value_dim = self.head_dim

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
        """Compute attention as nn.MultiheadAttention.forward does, and its maps if requested.

        Inputs are (tokens, width), or batched: (batch, tokens, width) with ``batch_first``,
        (tokens, batch, width) without. Raises RuntimeError for ``is_causal`` without
        ``attn_mask``, ValueError if heads were cut and the mask differs between heads.
        """
        if is_causal and attn_mask is None:  # a hint about attn_mask, as in the stock module
            raise RuntimeError("is_causal needs attn_mask: it only says what the mask looks like")
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in self.project(query, key, value)
        )
        mask = _merge_masks(attn_mask, key_padding_mask, q, k)
        out, attention = _attend(self, q, k, v, mask, self.scale, self.dropout, need_weights)
        out = self.out_proj(out.flatten(2))
        if unbatched:
            out = out.squeeze(0)
            attention = attention if attention is None else attention.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if attention is None or not need_weights:
            return out, None
        return out, attention.mean(-3) if average_attn_weights else attention

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v of all heads: (batch, tokens, width) -> (batch, tokens, heads * size) each."""
        narrow = self.num_heads * self.head_dim
        sizes = [narrow, narrow, self.num_heads * self.value_dim]
        weights = self.in_proj_weight.split(sizes)
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        return [
            nn.functional.linear(x, w, b)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]


def _merge_masks(
    attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks as one float mask that broadcasts to (batch, heads, queries, keys)."""

    def as_float(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(q.dtype)
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))

    merged = None
    if attn_mask is not None:
        merged = as_float(attn_mask)
        if merged.dim() == 3:  # (batch * heads, queries, keys), heads of the uncut module
            merged = merged.unflatten(0, (q.shape[0], -1))
            if merged.shape[1] != q.shape[1]:
                if not bool((merged == merged[:, :1]).all()):
                    raise ValueError("heads were cut, so the mask must be the same for all heads")
                merged = merged[:, :1]
    if padding is not None:
        extra = as_float(padding).reshape(q.shape[0], 1, 1, k.shape[-2])
        merged = extra if merged is None else merged + extra
    return merged
