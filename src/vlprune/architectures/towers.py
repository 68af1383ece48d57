"""The tower that a module belongs to, and the order in which modules run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from ..cutting.wrappers import stock_class
from .attention import join

__all__ = ["child_of", "default_tower", "in_order"]


def tower_of(path: str) -> str:
    """The tower in a module path: one of the names in ``_TOWERS``, or "" if none matches."""
    for pattern, tower in _TOWERS:
        if re.search(pattern, path):
            return tower
    return ""


_TOWERS = (
    (r"cross_?att|encoder_attn|cross_modal|\.x_layers", "cross"),
    (r"fusion|multimodal_model|qformer|text_enhancer|deformable_layer|connector", "fusion"),
    (
        r"vision|visual|image_model|image_encoder|image_embed\.|\.r_layers"
        r"|backbone\.conv_encoder|backbone\.model",
        "vision",
    ),
    (r"text_decoder", "decoder"),
    (r"text|language_(?:model|backbone)|transformer\.resblocks", "text"),
    (r"(^|\.)decoder\.", "decoder"),
    (r"(^|\.)model\.encoder\.", "encoder"),
)


def default_tower(model: nn.Module) -> str:
    """The tower of modules whose path names none: ``vision``, ``text`` or just ``model``."""
    return {"pixel_values": "vision", "input_ids": "text"}.get(
        str(getattr(model, "main_input_name", "")), "model"
    )


# Blocks whose children are defined in a different order from the one in which they run.
_ORDER = {
    "GroundingDinoEncoderLayer": ("fusion_layer", "text_enhancer_layer", "deformable_layer"),
    "MMGroundingDinoEncoderLayer": ("fusion_layer", "text_enhancer_layer", "deformable_layer"),
    "GroundingDinoDecoderLayer": ("self_attn", "encoder_attn_text", "encoder_attn"),
    "MMGroundingDinoDecoderLayer": ("self_attn", "encoder_attn_text", "encoder_attn"),
    "CLIPModel": ("vision_model", "text_model"),
    "SiglipModel": ("vision_model", "text_model"),
    "Siglip2Model": ("vision_model", "text_model"),
    "FlavaModel": ("image_model", "text_model", "multimodal_model"),
    "Gemma4AudioLayer": ("feed_forward1", "self_attn", "lconv1d"),
    "GraniteMoeHybridDecoderLayer": ("self_attn", "mamba", "block_sparse_moe"),
    "BambaDecoderLayer": ("self_attn",),
    "FalconH1DecoderLayer": ("self_attn",),
    "GteLayer": ("self_attn",),
    "JinaEmbeddingsV3Layer": ("self_attn",),
    "NomicBertLayer": ("self_attn",),
    "PixtralAttentionLayer": ("attention", "feed_forward"),
    "TimesformerLayer": ("temporal_attention", "attention"),
    "GroupViTModel": ("vision_model", "text_model"),
    "GroupViTStage": ("group_projector", "layers", "downsample"),
    "XCLIPModel": ("vision_model", "mit", "text_model"),
    "XCLIPVisionEncoderLayer": ("message_attn", "self_attn"),
    "Phi4MultimodalModel": ("embed_tokens", "embed_tokens_extend"),
    "Sam2VideoModel": ("vision_encoder", "mask_decoder", "object_pointer_proj", "memory_encoder"),
    "Sam3TrackerVideoModel": (
        "vision_encoder",
        "mask_decoder",
        "object_pointer_proj",
        "memory_encoder",
    ),
    "OmDetTurboForObjectDetection": ("vision_backbone", "encoder"),
    "OmDetTurboDecoder": ("task_encoder",),
    "LxmertEncoder": ("visn_fc", "layer", "r_layers"),
    "Kosmos2_5ForConditionalGeneration": (
        "vision_model",
        "image_to_text_projection",
        "text_model",
    ),
    "Ernie4_5_VLMoeModel": ("vision_tower", "resampler_model", "language_model"),
    "DeepseekVLHybridModel": ("vision_model", "high_res_vision_model"),
    "InstructBlipVideoQFormerLayer": ("attention", "crossattention", "intermediate_query"),
    "InstructBlipQFormerLayer": ("attention", "crossattention", "intermediate_query"),
    # the expert that every token goes to runs before the others
    "Ernie4_5_MoeSparseMoeBlock": ("shared_experts",),
    "Ernie4_5_VLMoeMoeBlock": ("shared_experts",),
    "HunYuanMoEV1Moe": ("shared_mlp",),
    "LagunaSparseMoeBlock": ("shared_experts",),
    "MiniMaxM3VLSparseMoeBlock": ("shared_experts",),
    "Qwen2MoeSparseMoeBlock": ("shared_expert",),
    "Qwen3NextSparseMoeBlock": ("shared_expert",),
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": ("shared_expert",),
    "Qwen3_5MoeSparseMoeBlock": ("shared_expert",),
    "Qwen4ExpTextSparseMoeBlock": ("shared_expert",),
    "Step3p7SparseMoeBlock": ("shared_experts",),
}


# Lists of layers that run in turn: the first of each list, then the second of each, ...
_IN_TURN = {"BridgeTowerModel": ("cross_modal_text_layers", "cross_modal_image_layers")}


def in_order(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules once, parents first, children in the order in which they run."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        first = _ORDER.get(stock_class(module).__name__, ())
        children = dict(module.named_children())
        lists = [n for n in _IN_TURN.get(stock_class(module).__name__, ()) if n in children]
        for name in [
            *(n for n in first if n in children),
            *(n for n in children if n not in first),
        ]:
            if name not in lists:
                yield from walk(join(path, name), children[name])
            elif name == lists[0]:
                for layers in zip(*(children[n].named_children() for n in lists), strict=False):
                    for list_name, (number, layer) in zip(lists, layers, strict=True):
                        yield from walk(join(path, f"{list_name}.{number}"), layer)

    yield from walk("", model)


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The child at the dotted path ``name`` below ``module``, or None."""
    for part in name.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module
