"""Converting MDETR's published checkpoints to the weight names of :class:`MdetrForGrounding`.

The published files are pickles. Read them with ``torch.load(path, weights_only=True)``, which
builds tensors and runs no code, and pass their ``"model"`` or ``"model_ema"`` entry on::

    state = torch.load("pretrained_resnet101_checkpoint.pth", weights_only=True)["model"]
    model = MdetrForGrounding(MdetrConfig(**sizes, **published_settings(state)))
    model.load_state_dict(convert_mdetr(state))
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import CheckpointError

__all__ = ["convert_mdetr", "published_settings"]

_ATTENTION = r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(self_attn|cross_attn_image)\."
_BOTTLENECK = r"backbone\.0\.body\.layer(\d)\.(\d+)\."

_RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.0\.body\.conv1\.", "vision_model.model.embedder.embedder.convolution."),
    (r"backbone\.0\.body\.bn1\.", "vision_model.model.embedder.embedder.normalization."),
    (r"transformer\.encoder\.layers\.(\d+)\.linear(\d)\.", r"fusion_encoder.layers.\1.mlp.fc\2."),
    (
        r"transformer\.encoder\.layers\.(\d+)\.norm1\.",
        r"fusion_encoder.layers.\1.self_attn_layer_norm.",
    ),
    (
        r"transformer\.encoder\.layers\.(\d+)\.norm2\.",
        r"fusion_encoder.layers.\1.final_layer_norm.",
    ),
    (r"transformer\.decoder\.layers\.(\d+)\.linear(\d)\.", r"decoder.layers.\1.mlp.fc\2."),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.", r"decoder.layers.\1.self_attn_layer_norm."),
    (
        r"transformer\.decoder\.layers\.(\d+)\.norm3\.",
        r"decoder.layers.\1.encoder_attn_layer_norm.",
    ),
    (r"transformer\.decoder\.layers\.(\d+)\.norm4\.", r"decoder.layers.\1.final_layer_norm."),
    (r"transformer\.decoder\.norm\.", "decoder.layernorm."),
    (r"transformer\.text_encoder\.", "text_encoder."),
    (r"transformer\.resizer\.", "resizer."),
    (r"contrastive_align_projection_image\.", "align_queries."),
    (r"contrastive_align_projection_text\.", "align_text."),
    (r"answer_(type|obj|rel|attr|cat|global)_head\.", r"answer_heads.answer_\1."),
    (r"(input_proj|query_embed|class_embed|bbox_embed)\.", r"\1."),
)
"""How names begin in the published checkpoints, and here."""

_UNUSED = re.compile(
    r".*position_ids$|.*num_batches_tracked$|transformer\.text_encoder\.pooler\.|isfinal_embed\.|"
    r"contrastive_projection_|contrastive_hdim|backbone\.0\.body\.fc\."
)
"""Weights that MDETR's forward pass for boxes or answers never reads."""


def convert_mdetr(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names used here; fused attention projections are split.

    Raises CheckpointError for a name that MDETR's models do not have, and for a checkpoint whose
    encoder also reads a CLS token (trained with ``--contrastive_loss``).
    """
    if any(name.startswith("transformer.CLS.") for name in state):
        raise CheckpointError(
            "the encoder of this checkpoint also reads a CLS token, which MdetrForGrounding has "
            "not: use a checkpoint that was trained without --contrastive_loss"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not _UNUSED.match(name):
            found |= _attention(name, tensor) or _bottleneck(name, tensor) or _plain(name, tensor)
    return found


def published_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of MdetrConfig with which a converted checkpoint answers as the authors' code does.

    These are the answer heads with their numbers of classes, the order of the types of questions,
    and the decoder layer that the heads read: the first, since the authors' code takes entry 0 of
    the list of all layers. Empty for a checkpoint without answer heads. To train a converted
    checkpoint on as the authors did, also give ``positive_map="published"``.
    """
    heads = {
        name.removesuffix("_head.weight"): len(tensor)
        for name, tensor in state.items()
        if re.fullmatch(r"answer_\w+_head\.weight", name)
    }
    if not heads:
        return {}
    types = list(PUBLISHED_TYPES)
    return {"answer_heads": heads, "answer_layer": "first", "answer_types": types}


def _attention(name: str, tensor: Tensor) -> dict[str, Tensor]:
    match = re.match(_ATTENTION, name)
    if match is None:
        return {}
    part, number, which = match.groups()
    block = "self_attn" if which == "self_attn" else "encoder_attn"
    path = f"{'fusion_encoder' if part == 'encoder' else 'decoder'}.layers.{number}.{block}"
    leaf = name[match.end() :]
    if leaf.startswith("out_proj."):
        return {f"{path}.o_proj.{leaf.removeprefix('out_proj.')}": tensor}
    kind = leaf.removeprefix("in_proj_")  # weight or bias, rows of q, k and v
    thirds = zip("qkv", tensor.chunk(3), strict=True)
    return {f"{path}.{letter}_proj.{kind}": rows.clone() for letter, rows in thirds}


def _bottleneck(name: str, tensor: Tensor) -> dict[str, Tensor]:
    match = re.match(_BOTTLENECK, name)
    if match is None:
        return {}
    stage, number = int(match.group(1)) - 1, match.group(2)
    kind, leaf = name[match.end() :].rsplit(".", 1)
    path = f"vision_model.model.encoder.stages.{stage}.layers.{number}"
    if kind.startswith("downsample"):
        inside = "shortcut.convolution" if kind.endswith("0") else "shortcut.normalization"
    else:
        what = "convolution" if kind.startswith("conv") else "normalization"
        inside = f"layer.{int(kind[-1]) - 1}.{what}"
    return {f"{path}.{inside}.{leaf}": tensor}


PUBLISHED_TYPES = ("obj", "attr", "rel", "global", "cat")
"""The classes of the authors' head ``answer_type``, in order."""

_ANSWER_ORDER = ("type", "obj", "rel", "attr", "cat", "global")
"""Answer heads of the six extra queries, in the order of the published checkpoints."""


def _plain(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "qa_embed.weight":  # sorted by name in MdetrForGrounding
        rows = [_ANSWER_ORDER.index(kind) for kind in sorted(_ANSWER_ORDER)]
        return {"answer_queries.weight": tensor[rows]}
    for pattern, new in _RULES:
        changed, count = re.subn(f"^{pattern}", new, name)
        if count:
            return {changed: tensor}
    raise CheckpointError(f"{name!r} is no weight of an MDETR: is this another model's checkpoint?")
