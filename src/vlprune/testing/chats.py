"""Vision-language models, one row each: a prompt with places for a picture, and the picture.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

from typing import Any

import torch

from .families import IMAGE_TOKEN, VOCAB, _ids, _ones, _pixels
from .tiny import chats, variant

CLIP = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
SIGLIP2 = {"model_type": "siglip2_vision_model", "vision_use_head": False, "num_patches": 4}
SAM = {"output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "image_size": 32}
PIXTRAL = {"model_type": "pixtral"}
LLAMA = {"model_type": "llama"}
QWEN2 = {"model_type": "qwen2"}
COHERE2 = {"model_type": "cohere2"}
FULL = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


def sides() -> dict[str, Any]:
    """The sides of two pictures."""
    return {"image_sizes": torch.tensor([[16, 16], [16, 16]])}


def rows(width: int) -> Any:
    """Four patches of each picture, each behind its row and its column."""
    return torch.cat([_pixels(2, 4, 2).abs().floor(), _pixels(2, 4, width)], -1)


def types(tokens: int, text: int = 4) -> dict[str, Any]:
    """Which tokens of a prompt stand for a picture."""
    return {"mm_token_type_ids": torch.tensor([[1] * tokens + [0] * text] * 2)}


# fmt: off
# -- an image encoder, a projector, a decoder
chats("aya_vision", 1, vision_config=SIGLIP, text_config=COHERE2)
chats("cohere2_vision", 1, vision_config=SIGLIP, text_config=COHERE2,
    alignment_intermediate_size=32)
chats("deepseek_vl", 4, vision_config=SIGLIP, text_config=LLAMA)
chats("deepseek_vl_hybrid", 4, vision_config=SIGLIP, text_config=LLAMA,
    high_res_vision_config={"model_type": "sam_vision_model", **SAM},
    also=lambda: {"high_res_pixel_values": _pixels(2, 3, 32, 32)})
chats("got_ocr2", 1, 2, 3, 32, 32, vision_config=SAM, text_config=QWEN2)
chats("janus", 4, vision_config={"num_image_tokens": 4, "projection_dim": 32}, text_config=LLAMA,
    vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
    "latent_channels": 32, "num_embeddings": 16})
chats("lfm2_vl", 1, vision_config=SIGLIP2, text_config={"model_type": "lfm2",
    "layer_types": ["full_attention", "conv"], "block_ff_dim": 48, "block_multiple_of": 8},
    projector_hidden_size=32, also=lambda: {"pixel_values": _pixels(2, 4, 192),
    "pixel_attention_mask": _ones(4), "spatial_shapes": torch.tensor([[2, 2], [2, 2]])})
chats("lighton_ocr", 1, vision_config=PIXTRAL, text_config={"model_type": "qwen3"}, also=sides)
chats("mistral3", 1, vision_config=PIXTRAL, text_config={"model_type": "mistral"}, also=sides)
chats("llava_next", 10, 2, 2, 3, 16, 16, vision_config=CLIP, text_config=LLAMA,
    image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1, also=sides)
chats("llava_next_video", 10, 2, 2, 3, 16, 16, vision_config=CLIP, text_config=LLAMA,
    image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1, also=sides)
chats("llava_onevision", 10, 2, 2, 3, 16, 16, vision_config=SIGLIP, text_config=QWEN2,
    image_grid_pinpoints=[[16, 16]], also=sides)
chats("video_llava", 4, vision_config=CLIP, text_config=LLAMA, vision_feature_layer=-1,
    idle="video_tower")
chats("vipllava", 4, vision_config=CLIP, text_config=LLAMA, vision_feature_layers=[-1, -2])
chats("ovis2", 4, vision_config={"vocab_size": 16}, text_config=QWEN2,
    visual_indicator_token_ids=[50, 51, 52, 53, 54], hidden_size=32)
chats("qianfan_ocr", 1, text_config={"model_type": "qwen3"})
chats("mllama", 1, 2, 1, 1, 3, 16, 16, vision_config={"num_global_layers": 1, "attention_heads": 4,
    "vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1,
    1]], "max_num_tiles": 1}, text_config={"cross_attention_layers": [1]},
    also=lambda: {"aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
    "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long), "cross_attention_mask": torch.ones(
    2, 5, 1, 1, dtype=torch.long)})
chats("idefics", 0, 2, 1, 3, 16, 16, vision_config={"embed_dim": 32},
    also=lambda: {"image_attention_mask": torch.ones(2, 4, 1, dtype=torch.long)},
    additional_vocab_size=0, cross_layer_interval=1, use_resampler=False)
chats("instructblipvideo", 8, 2, 2, 3, 16, 16, head="InstructBlipVideoForConditionalGeneration",
    qformer_config={"encoder_hidden_size": 32}, text_config=LLAMA, num_query_tokens=4,
    video_token_index=IMAGE_TOKEN, also=lambda: {"qformer_input_ids": _ids(),
    "qformer_attention_mask": _ones()})
chats("kosmos2_5", 4, kind="kosmos-2.5", head="Kosmos2_5ForConditionalGeneration", generates=False,
    latent_query_num=4, text_config={"layers": 2, "embed_dim": 32, "attention_heads": 4},
    vision_config={"patch_embed_hidden_size": 192, "head_dim": 8},
    also=lambda: {"flattened_patches": rows(192),
    "image_embeds_position_mask": torch.tensor([[1] * 4 + [0] * 4] * 2)})
chats("shieldgemma2", 4, head="ShieldGemma2ForImageClassification", generates=False,
    yes_token_index=5, no_token_index=6, vision_config=SIGLIP,
    text_config={"model_type": "gemma3_text"}, mm_tokens_per_image=4)
chats("step3p7", 1, text_config={**FULL, "sliding_window": 16, "mlp_layer_types": ["dense",
    "dense"]})
chats("gemma4", 1, idle="audio", audio_config={"conv_kernel_size": 3, "output_proj_dims": 32,
    "subsampling_conv_channels": [8, 8]}, vision_config={"pooling_kernel_size": 2,
    "position_embedding_size": 16}, text_config={**FULL, "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8}, also=lambda: {"pixel_values": _pixels(2, 4, 192),
    "image_position_ids": torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]] * 2), **types(1)})
chats("minicpmv4_6", 1, 1, 3, 8, 128, vision_config={"insert_layer_id": 1}, insert_layer_id=1,
    text_config=QWEN2, also=lambda: {"target_sizes": torch.tensor([[4, 4]]),
    "input_ids": torch.tensor([[3, 9, 8, 7]])})
chats("hunyuan_vl", 8, vision_config={"out_hidden_size": 32, "text_hidden_size": 32,
    "num_key_value_heads": 4}, text_config={"num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [1, 1, 1,
    1]}}, also=lambda: {"pixel_values": _pixels(32, 192), "image_grid_thw": torch.tensor([[1, 4,
    4]] * 2), **types(8)})

# -- read off at the last layer, for retrieval
MODERN = {"model_type": "modernbert", "cls_token_id": 1, "sep_token_id": 2}
VBERT = {"vision_config": SIGLIP, "text_config": MODERN, "pixel_shuffle_factor": 2}
GEMMA = {"model_type": "paligemma", "projection_dim": 32, "vision_config": {**SIGLIP,
    "projection_dim": 32}, "text_config": {"model_type": "gemma"}}
chats("modernvbert", 1, 2, 1, 3, 16, 16, head="AutoModel", generates=False, **VBERT)
chats("colmodernvbert", 1, 2, 1, 3, 16, 16, head="ColModernVBertForRetrieval", generates=False,
    vlm_config={"model_type": "modernvbert", **VBERT}, embedding_dim=8)
chats("ultravbert", 1, 2, 1, 3, 16, 16, head="AutoModel", generates=False, **{**VBERT,
    "text_config": {"model_type": "ultrabert"}})
chats("colpali", 4, head="ColPaliForRetrieval", generates=False, vlm_config=GEMMA, embedding_dim=8)

# -- pictures of any size, as rows of patches
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
TEXT = {"rope_parameters": MROPE}
OUT = {"out_hidden_size": 32}
DEEP = {**OUT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
WINDOWS = {**OUT, "window_size": 32, "fullatt_block_indexes": [1]}
# fmt: on


def qwens(name: str, *shape: int, types: bool = False, **more: Any) -> None:
    """Add a model whose one picture is 16 patches, of the ``shape`` (16, 384) or as given."""
    marks = {"vision_start_token_id": VOCAB - 2, "vision_end_token_id": VOCAB - 1}
    marks |= {"image_start_token_id": VOCAB - 2, "image_end_token_id": VOCAB - 1}
    also = more.pop("also", dict)

    def inputs() -> dict[str, Any]:
        ids = _ids(10, 1)
        ids[:, 0], ids[:, 1:5], ids[:, 5] = VOCAB - 2, IMAGE_TOKEN, VOCAB - 1
        given = {"input_ids": ids, "pixel_values": _pixels(*(shape or (16, 384))), **also()}
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        return given | ({"mm_token_type_ids": (ids == IMAGE_TOKEN).long()} if types else {})

    more = {"head": "AutoModelForImageTextToText", "generates": True, **marks, **more}
    variant(name, inputs, **more)


# fmt: off
qwens("glm4v", types=True, vision_config=OUT, text_config=TEXT)
qwens("glm46v", types=True, vision_config={"model_type": "glm4v_vision", **OUT},
    text_config={"model_type": "glm4v_text", **TEXT})
qwens("glm_ocr", types=True, vision_config=OUT, text_config=TEXT)
qwens("exaone4_5", vision_config={**WINDOWS, "num_key_value_heads": 2},
    text_config={"model_type": "exaone4"})
qwens("qwen3_5_vl", kind="qwen3_5", types=True, vision_config={**OUT,
    "num_position_embeddings": 16}, text_config={"layer_types": ["linear_attention",
    "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2})
qwens("cohere_compass", types=True, vision_config=DEEP, text_config={**FULL,
    "rope_parameters": dict.fromkeys(FULL["layer_types"], MROPE)})
qwens("hyperclovax_vision_v2", vision_config={"model_type": "qwen2_5_vl_vision", **WINDOWS},
    text_config={"model_type": "hyperclovax"})
qwens("paddleocr_vl", 16, 3, 8, 8, types=True, text_config=TEXT)
qwens("video_llama_3", 16, 192, text_config=QWEN2, also=lambda: {"image_merge_sizes": torch.tensor(
    [2])})
qwens("muse_glimmer", vision_config={"pos_emb_height": 4, "pos_emb_width": 4}, out_hidden_size=128,
    projector_hidden_size=32, text_config=FULL)
qwens("lfm3_vl", vision_config={"layer_types": ["conv", "full_attention"]},
    text_config={"model_type": "lfm3", "layer_types": ["conv", "full_attention"]},
    projector_hidden_size=32)
qwens("minimax_m3_vl", projector_hidden_size=32, text_config={"dense_intermediate_size": 48,
    "shared_intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
    "rotary_dim": 4, "mlp_layer_types": ["dense", "sparse"]})
qwens("cosmos3_edge", 16, 192, types=True, vision_config={"num_patches": 16}, text_config=TEXT,
    projector_hidden_size=32)
qwens("colqwen2", 1, 16, 384, types=True, head="ColQwen2ForRetrieval", generates=False,
    vlm_config={"model_type": "qwen2_vl", "vision_config": {"hidden_size": 32},
    "text_config": TEXT}, embedding_dim=8, also=lambda: {"attention_mask": _ones(10, 1)})
OMNI = {"num_mel_bins": 8, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "d_model": 16, "output_dim": 32, "max_source_positions": 16}
qwens("qwen2_5_omni_thinker", head="Qwen2_5OmniThinkerForConditionalGeneration", idle="audio_tower",
    audio_config=OMNI, vision_config=WINDOWS, text_config=TEXT)
qwens("qwen3_omni_moe_thinker", head="Qwen3OmniMoeThinkerForConditionalGeneration",
    idle="audio_tower", audio_config={**OMNI, "downsample_hidden_size": 8}, vision_config=DEEP,
    text_config={**TEXT, **EXPERTS})
