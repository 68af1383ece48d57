"""The table: where attention and FFN projections are, and what a stock forward accepts.

Layouts are matched by child names and shapes, so a family never seen before is usually
covered. Whether its forward takes narrower weights is known only for the classes listed
here; every other class gets padded projections, which are exact under any forward.

To add an architecture: add a row. To let its forward run natively: add its class to
``NATIVE`` and a model to ``vlprune.testing.families``; the conformance suite decides.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ATTENTION", "DENSE", "FFN", "HEAD_COUNTS", "HEAD_SIZES", "NATIVE", "WIDTHS", "Native"]


@dataclass(frozen=True)
class Attention:
    """Child paths of an attention block. ``qkv`` is one fused projection, rows [q | k | v].

    ``q`` and ``k`` are empty where weights do not come from a dot product (deformable
    attention). Several ``v`` and ``o`` belong to attention that runs in both directions.
    """

    q: str = ""
    k: str = ""
    v: tuple[str, ...] = ()
    o: tuple[str, ...] = ()
    qkv: str = ""


@dataclass(frozen=True)
class Ffn:
    """Child paths of an FFN. ``gate`` exists in gated MLPs; ``fused`` rows are [gate | up]."""

    up: str
    down: str
    gate: str = ""
    fused: bool = False


ATTENTION = (
    Attention("q_proj", "k_proj", ("v_proj",), ("out_proj",)),  # CLIP, SigLIP, OPT, Bart
    Attention("q_proj", "k_proj", ("v_proj",), ("o_proj",)),  # ViT, DETR, Swin, LLaMA, Qwen
    Attention("q_proj", "k_proj", ("v_proj",), ("projection_layer",)),  # InternVL
    Attention("q_lin", "k_lin", ("v_lin",), ("out_lin",)),  # DistilBERT
    Attention("query", "key", ("value",), ("out_proj",)),  # Grounding DINO
    Attention("self.query", "self.key", ("self.value",), ("output.dense",)),  # BERT, BLIP text
    Attention("attention.query", "attention.key", ("attention.value",), ("output.dense",)),
    Attention(  # Grounding DINO fusion: text reads vision, vision reads text
        "vision_proj",
        "text_proj",
        ("values_vision_proj", "values_text_proj"),
        ("out_text_proj", "out_vision_proj"),
    ),
    Attention(v=("value_proj",), o=("output_proj",)),  # deformable attention
    Attention(qkv="qkv", o=("projection",)),  # BLIP
    Attention(qkv="qkv", o=("proj",)),  # Qwen-VL vision, Florence-2, timm
    Attention(qkv="c_attn", o=("c_proj",)),  # GPT-2 (Conv1D)
)

FFN = (
    Ffn("up_proj", "down_proj", gate="gate_proj"),  # LLaMA, Qwen, Gemma
    Ffn("gate_up_proj", "down_proj", fused=True),  # Phi-3
    Ffn("weights_in", "weights_out", fused=True),  # DINOv2 SwiGLU
    Ffn("wi_1", "wo", gate="wi_0"),  # T5 v1.1
    Ffn("wi", "wo"),  # T5
    Ffn("fc1", "fc2"),
    Ffn("lin1", "lin2"),
    Ffn("linear1", "linear2"),
    Ffn("linear_fc1", "linear_fc2"),
    Ffn("c_fc", "c_proj"),
    Ffn("intermediate.dense", "output.dense"),
    Ffn("intermediate_query.dense", "output_query.dense"),
)

# Attributes that stock modules read in forward, by meaning.
HEAD_SIZES = ("head_dim", "attention_head_size")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_COUNTS = ("num_key_value_heads",)
WIDTHS = ("all_head_size", "split_size")


@dataclass(frozen=True)
class Native:
    """What a stock attention forward accepts without padding.

    ``head`` and ``head_dim``: fewer heads, smaller heads (the same for q, k and v).
    ``qk_vo``: value heads of another size than query heads. ``fold``: the forward derives
    the softmax temperature from the head size. ``swap``: our subclass does the forward.
    ``widths``: further attributes equal to heads x head size. ``per_head``: parameters
    with one column a head, as (path below the block, axis).
    """

    head: bool = True
    head_dim: bool = True
    qk_vo: bool = False
    fold: bool = False
    swap: str = ""
    widths: tuple[str, ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()


def _rows(native: Native, names: str) -> dict[str, Native]:
    return dict.fromkeys(names.split(), native)


NATIVE: dict[str, Native] = {
    # forward views its projections as (..., -1, head_dim) and keeps its own scale
    **_rows(
        Native(),
        "CLIPAttention SiglipAttention Siglip2Attention AltCLIPAttention CLIPSegAttention "
        "OwlViTAttention Owlv2Attention ViTAttention DeiTAttention Dinov2Attention "
        "Dinov2WithRegistersAttention DetrSelfAttention DetrCrossAttention "
        "BertSelfAttention BertCrossAttention RobertaSelfAttention RobertaCrossAttention "
        "XLMRobertaSelfAttention DistilBertSelfAttention BartAttention OPTAttention "
        "SmolVLMVisionAttention Idefics3VisionAttention Idefics2VisionAttention "
        "Blip2QFormerMultiHeadAttention InstructBlipQFormerMultiHeadAttention "
        "BridgeTowerSelfAttention BridgeTowerCrossAttention GPT2Attention",
    ),
    **_rows(
        Native(per_head=(("relative_position_bias.relative_position_bias_table", 1),)),
        "SwinAttention",
    ),
    **_rows(Native(widths=("embed_dim",)), "InternVLVisionAttention"),
    # forward divides by sqrt(attention_head_size), and spells attention out: ours is fused
    **_rows(
        Native(fold=True, swap="spelled"),
        "BlipTextSelfAttention ViltSelfAttention FlavaSelfAttention",
    ),
    # and its callers build masks with the full number of heads, which would broadcast
    **_rows(
        Native(head=False, fold=True),
        "GroundingDinoMultiheadAttention MMGroundingDinoMultiheadAttention",
    ),
    # rotary embeddings tie head dimensions to fixed frequencies: whole heads only
    **_rows(
        Native(head_dim=False),
        "LlamaAttention MistralAttention Qwen2Attention Qwen3Attention Qwen2VLAttention "
        "Qwen2_5_VLAttention Qwen3VLTextAttention GemmaAttention Gemma2Attention "
        "Gemma3Attention Qwen2VLVisionAttention VisionAttention Qwen2_5_VLVisionAttention "
        "Qwen3VLVisionAttention",
    ),
    # forward fixes its shapes: our subclass reads them from the weights
    **_rows(Native(qk_vo=True, swap="fused"), "BlipAttention Blip2Attention InstructBlipAttention"),
    **_rows(Native(qk_vo=True, swap="multihead"), "MultiheadAttention"),
}

# A fused projection is split only where its row order is known.
FUSED_ORDER_KNOWN = frozenset(
    "BlipAttention Blip2Attention InstructBlipAttention Qwen2VLVisionAttention VisionAttention "
    "Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Florence2VisionWindowAttention "
    "GPT2Attention".split()
)

# Blocks that look like a row of the table but are something else.
DENSE = {
    "Florence2VisionChannelAttention": "attends over channels, not over tokens",
}
