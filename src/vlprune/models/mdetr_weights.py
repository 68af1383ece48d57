"""Converting MDETR's published checkpoints to the weight names of :class:`MdetrForGrounding`.

The published files are pickles. Read them with ``torch.load(path, weights_only=True)``, which
builds tensors and runs no code, and pass their ``"model"`` or ``"model_ema"`` entry on::

    state = torch.load("pretrained_resnet101_checkpoint.pth", weights_only=True)["model"]
    model = MdetrForGrounding(MdetrConfig(**published_settings(state)))
    model.load_state_dict(convert_mdetr(state, model.config))
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

_BODY, _TEXT = r"backbone\.0\.body\.", r"transformer\.text_encoder\."

_UNUSED = re.compile(
    r".*position_ids$|.*num_batches_tracked$|transformer\.text_encoder\.pooler\.|isfinal_embed\.|"
    r"contrastive_projection_|contrastive_hdim|backbone\.0\.body\.fc\."
)
"""Weights that MDETR's forward pass for boxes or answers never reads."""


def convert_mdetr(state: Mapping[str, Tensor], config: Any = None) -> dict[str, Tensor]:
    """The same tensors under the names used here; fused attention projections are split.

    A checkpoint with answer heads needs the ``config`` of the model that will take the tensors. It
    is set to what the authors' code computes: the heads read the first decoder layer, and the types
    of questions have the authors' order. With other settings the model would give wrong answers.

    Raises CheckpointError for a name that MDETR's models do not have, for answer heads that differ
    from those of ``config``, and for a checkpoint whose encoder also reads a CLS token (trained
    with ``--contrastive_loss``).
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
    if answers := _answers(state):
        if config is None:
            raise CheckpointError(
                "this checkpoint answers questions, and from the first decoder layer: give the "
                "config of the model too, which is then set so, as in "
                "convert_mdetr(state, model.config)"
            )
        heads, own = answers["answer_heads"], dict(config.answer_heads)
        if own != heads:
            raise CheckpointError(
                f"this checkpoint has the answer heads {heads}, the config {own}: "
                "MdetrConfig(**published_settings(state)) has its"
            )
        config.answer_layer, config.answer_types = answers["answer_layer"], answers["answer_types"]
    return found


def published_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of MdetrConfig with the sizes of a published checkpoint with a ResNet.

    They compute what the authors' code computes. For a checkpoint with answer heads these are the
    heads with their numbers of classes, the order of the types of questions, and the decoder layer
    that the heads read: the first, since the authors' code takes entry 0 of the list of all layers.
    The encoder and the decoder have 8 heads in all published models, heads of RoBERTa are 64 wide.
    To train a converted checkpoint on as the authors did, also give ``positive_map="published"``.
    Raises CheckpointError for a checkpoint that lacks what every MDETR with a ResNet has.
    """
    body, text = "backbone.0.body.", "transformer.text_encoder."
    words, width = _shape(state, f"{text}embeddings.word_embeddings.weight")
    stages = _numbers(state, rf"{_BODY}layer(\d+)\..*")
    return {
        "backbone_config": {
            "model_type": "resnet",
            "embedding_size": _shape(state, f"{body}conv1.weight")[0],
            "hidden_sizes": [
                _shape(state, f"{body}layer{n + 1}.0.conv3.weight")[0] for n in stages
            ],
            "depths": [len(_numbers(state, rf"{_BODY}layer{n + 1}\.(\d+)\..*")) for n in stages],
            "out_features": [f"stage{len(stages)}"],
        },
        "text_config": {
            "model_type": "roberta",
            "vocab_size": words,
            "hidden_size": width,
            "num_hidden_layers": len(_numbers(state, rf"{_TEXT}encoder\.layer\.(\d+)\..*")),
            "num_attention_heads": max(1, width // 64),
            "intermediate_size": _shape(state, f"{text}encoder.layer.0.intermediate.dense.bias")[0],
            "max_position_embeddings": _shape(
                state, f"{text}embeddings.position_embeddings.weight"
            )[0],
            "type_vocab_size": _shape(state, f"{text}embeddings.token_type_embeddings.weight")[0],
            "layer_norm_eps": 1e-5,
        },
        "d_model": _shape(state, "input_proj.weight")[0],
        "encoder_layers": len(_numbers(state, r"transformer\.encoder\.layers\.(\d+)\..*")),
        "decoder_layers": len(_numbers(state, r"transformer\.decoder\.layers\.(\d+)\..*")),
        "encoder_ffn_dim": _shape(state, "transformer.encoder.layers.0.linear1.weight")[0],
        "decoder_ffn_dim": _shape(state, "transformer.decoder.layers.0.linear1.weight")[0],
        "num_queries": _shape(state, "query_embed.weight")[0],
        "text_positions": _shape(state, "class_embed.weight")[0],
        "alignment_size": _shape(state, "contrastive_align_projection_image.weight")[0],
        **_answers(state),
    }


def _answers(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The settings of a checkpoint with answer heads; none for another."""
    heads = {
        name.removesuffix("_head.weight"): len(tensor)
        for name, tensor in state.items()
        if re.fullmatch(r"answer_\w+_head\.weight", name)
    }
    if not heads:
        return {}
    types = list(PUBLISHED_TYPES)
    return {"answer_heads": heads, "answer_layer": "first", "answer_types": types}


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(
            f"the checkpoint lacks {name!r}, which every MDETR with a ResNet has: is it another "
            "model's, or not the entry 'model' or 'model_ema' of the file?"
        )
    return tuple(state[name].shape)


def _numbers(state: Mapping[str, Tensor], pattern: str) -> range:
    """How many different numbers stand in names at the group of ``pattern``, counted from 0."""
    matches = (re.fullmatch(pattern, name) for name in state)
    return range(len({match[1] for match in matches if match}))


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
