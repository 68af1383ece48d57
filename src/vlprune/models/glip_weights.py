"""Converting GLIP's published checkpoints to the weight names of :class:`GlipForGrounding`.

The published files are pickles. Read them with ``torch.load(path, weights_only=True)``, which
builds tensors and runs no code, and pass their ``"model"`` entry on::

    state = torch.load("glip_tiny_model_o365_goldg.pth", weights_only=True)["model"]
    model = GlipForGrounding(GlipConfig(**published_settings(state)))
    model.load_state_dict(convert_glip(state))

The authors' model sees pictures as BGR, the converted one as RGB with ImageNet's mean and standard
deviation, as transformers' image processors give them: the channels of the first weight change
places. Pictures have a short side of 800 and a long one of at most 1,333 pixels there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ["convert_glip", "published_settings"]

_BLOCK = r"backbone\.body\.layers\.(\d)\.blocks\.(\d+)\."
_BLOCK_HERE = r"vision_model.swin.encoder.layers.\1.blocks.\2."
_BERT = r"language_backbone\.body\.model\."
_BACKBONE = "vision_model.swin."

_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.body\.patch_embed\.proj\.", f"{_BACKBONE}embeddings.patch_embeddings.projection."),
    (r"backbone\.body\.patch_embed\.norm\.", f"{_BACKBONE}embeddings.norm."),
    (rf"{_BLOCK}norm1\.", rf"{_BLOCK_HERE}layernorm_before."),
    (rf"{_BLOCK}norm2\.", rf"{_BLOCK_HERE}layernorm_after."),
    (rf"{_BLOCK}mlp\.", rf"{_BLOCK_HERE}mlp."),
    (rf"{_BLOCK}attn\.proj\.", rf"{_BLOCK_HERE}attention.o_proj."),
    (
        rf"{_BLOCK}attn\.relative_position_bias_table$",
        rf"{_BLOCK_HERE}attention.relative_position_bias.relative_position_bias_table",
    ),
    (r"backbone\.body\.layers\.(\d)\.downsample\.", rf"{_BACKBONE}encoder.layers.\1.downsample."),
    (rf"{_BERT}(embeddings|encoder)\.", r"text_encoder.\1."),
    (r"backbone\.fpn\.top_blocks\.p6\.", "pyramid.extra.0."),
    (r"backbone\.fpn\.top_blocks\.p7\.", "pyramid.extra.1."),
    (r"rpn\.head\.bbox_pred\.", "box_head."),
    (r"rpn\.head\.centerness\.", "centerness_head."),
    (r"rpn\.head\.dot_product_projection_text\.", "token_head."),
    (r"rpn\.head\.bias_lang$", "token_bias"),
    (r"rpn\.head\.bias0$", "bias"),
    (r"rpn\.head\.log_scale$", "log_scale"),
)
"""How names begin in the published checkpoints, and here."""

_TOWER = r"rpn\.head\.dyhead_tower\.(\d+)\."
_IN_TOWER: tuple[tuple[tuple[str, str], ...], ...] = (
    (  # the first of three modules of a layer: fusion
        (r"b_attn\.layer_norm_v\.", "fusion.layer_norm_vision."),
        (r"b_attn\.layer_norm_l\.", "fusion.layer_norm_text."),
        (r"b_attn\.attn\.(values_|out_|)v_proj\.", r"fusion.attn.\1vision_proj."),
        (r"b_attn\.attn\.(values_|out_|)l_proj\.", r"fusion.attn.\1text_proj."),
        (r"b_attn\.gamma_v$", "fusion.vision_param"),
        (r"b_attn\.gamma_l$", "fusion.text_param"),
    ),
    ((r"(attention|intermediate|output)\.", r"text_layer.\1."),),
    (
        *(
            (rf"DyConv\.{number}\.{there}\.", f"dynamic.{level}.{here}")
            for number, level in enumerate(("coarser", "same", "finer"))
            for there, here in (("conv", ""), ("bn", "norm."))
        ),
        (r"AttnConv\.1\.", "dynamic.attention."),
        (r"relu\.fc\.(0|2)\.", r"dynamic.relu.lines.\1."),
        (r"offset\.", "dynamic.offset."),
    ),
)

_UNUSED = re.compile(
    r".*\.relative_position_index$|.*\.position_ids$|language_backbone\.body\.model\.pooler\.|"
    r"rpn\.head\.cls_logits\.|rpn\.anchor_generator\."
)
"""What is computed here, and weights that no forward pass of GLIP reads."""


def convert_glip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers under the names used here, every weight of the model and no other.

    Fused queries, keys and values are split, the scales of the levels joined. Raises
    CheckpointError for a name that GLIP does not have, and for a checkpoint without deep fusion.
    """
    state = _checked(state)
    for needed in ("backbone.body.patch_embed.proj.weight", "rpn.head.scales.0.scale"):
        _shape(state, needed)
    last = _shape(state, "backbone.body.norm3.weight")[0]
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _UNUSED.match(name):
            found |= _converted(name, tensor)
    scales = sorted(name for name in found if name.startswith("box_scales."))
    found["box_scales"] = torch.cat([found.pop(name).reshape(1) for name in scales])
    pixels = f"{_BACKBONE}embeddings.patch_embeddings.projection.weight"
    found[pixels] = found[pixels].flip(1)  # BGR there, RGB here
    # the norm that ends transformers' Swin: a backbone's levels have their own
    found[f"{_BACKBONE}layernorm.weight"] = torch.ones(last)
    found[f"{_BACKBONE}layernorm.bias"] = torch.zeros(last)
    return found


def published_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of GlipConfig with the sizes of a published checkpoint, of GLIP-T or GLIP-L.

    They compute what the authors' code computes: ``offsets="published"``, with which the weights
    were trained, and ``corners="inclusive"`` for further training. Fusion has 8 heads in all
    published models, heads of BERT are 64 wide. Raises CheckpointError as :func:`convert_glip`.
    """
    state = _checked(state)
    first = "backbone.body.layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [_shape(state, first.format(stage)) for stage in range(4)]
    width, _, patch, _ = _shape(state, "backbone.body.patch_embed.proj.weight")
    bert = "language_backbone.body.model."
    words, text = _shape(state, f"{bert}embeddings.word_embeddings.weight")
    fusion = _shape(state, "rpn.head.dyhead_tower.0.b_attn.attn.v_proj.weight")
    return {
        "backbone_config": {
            "model_type": "swin",
            "embed_dim": width,
            "patch_size": patch,
            "depths": [
                _count(state, rf"backbone\.body\.layers\.{n}\.blocks\.\d+\.norm1\.weight")
                for n in range(4)
            ],
            "num_heads": [heads for _, heads in tables],
            "window_size": (math.isqrt(tables[0][0]) + 1) // 2,  # a table has (2 w - 1)^2 rows
            "mlp_ratio": _shape(state, "backbone.body.layers.0.blocks.0.mlp.fc1.weight")[0] / width,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        "text_config": {
            "model_type": "bert",
            "vocab_size": words,
            "hidden_size": text,
            "num_hidden_layers": _count(state, rf"{_BERT}encoder\.layer\.\d+\.output\.dense\.bias"),
            "num_attention_heads": max(1, text // 64),
            "intermediate_size": _shape(state, f"{bert}encoder.layer.0.intermediate.dense.bias")[0],
            "max_position_embeddings": _shape(
                state, f"{bert}embeddings.position_embeddings.weight"
            )[0],
        },
        "d_model": fusion[1],
        "fusion_layers": _count(state, rf"{_TOWER}b_attn\.gamma_v"),
        "fusion_size": fusion[0],
        "fusion_heads": 8,
        "offsets": "published",
        "corners": "inclusive",
    }


def _checked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefix of distributed training. Raises CheckpointError."""
    plain = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith("rpn.tunable_linear.") for name in plain):
        raise CheckpointError(
            "this checkpoint adds a tuned prompt to its text, which GlipForGrounding has not: use "
            "one that was trained without ADD_LINEAR_LAYER"
        )
    if "rpn.head.dyhead_tower.0.DyConv.0.conv.weight" in plain:
        raise CheckpointError(
            "this checkpoint has no deep fusion of image and text (GLIP-T A), on which "
            "GlipForGrounding is built: use GLIP-T B, C or GLIP-L"
        )
    return plain


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(
            f"the checkpoint lacks {name!r}, which every GLIP has: is it another model's, or not "
            "the entry 'model' of the file?"
        )
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in state)


def _converted(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensor under its name here, or the three of a fused projection."""
    if match := re.fullmatch(rf"{_BLOCK}attn\.qkv\.(weight|bias)", name):
        path, kind = match.expand(_BLOCK_HERE), match[3]
        thirds = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{path}attention.{letter}_proj.{kind}": rows.clone() for letter, rows in thirds}
    if match := re.match(_TOWER, name):
        number, kind = divmod(int(match[1]), 3)
        rules, rest, before = _IN_TOWER[kind], name[match.end() :], f"fusion_layers.{number}."
    elif match := re.match(r"backbone\.fpn\.fpn_(inner|layer)([234])\.", name):
        part = "lateral" if match[1] == "inner" else "smooth"
        return {f"pyramid.{part}.{int(match[2]) - 2}.{name[match.end() :]}": tensor}
    elif match := re.match(r"backbone\.body\.norm([123])\.", name):
        stage = f"vision_model.hidden_states_norms.stage{int(match[1]) + 1}"
        return {f"{stage}.{name[match.end() :]}": tensor}
    elif match := re.fullmatch(r"rpn\.head\.scales\.(\d)\.scale", name):
        return {f"box_scales.{match[1]}": tensor}
    else:
        rules, rest, before = _RULES, name, ""
    for pattern, new in rules:
        changed, count = re.subn(f"^{pattern}", new, rest)
        if count:
            return {before + changed: tensor}
    raise CheckpointError(f"{name!r} is no weight of a GLIP: is this another model's checkpoint?")
