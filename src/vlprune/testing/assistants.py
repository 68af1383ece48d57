"""Vision-language models that are more than an encoder and a decoder of other families, a row each.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

from typing import Any

import torch

from .chats import CLIP, DEEP, FULL, MROPE, OUT, PIXTRAL, SIGLIP, TEXT, qwens, sides, types
from .families import IMAGE_TOKEN, VOCAB, _ids, _ones, _pixels, _prompt
from .tiny import chats, variant

GEMMA = {"model_type": "gemma"}


def grids(side: int) -> dict[str, Any]:
    """Two pictures of ``side`` times ``side`` patches."""
    return {"image_grid_thw": torch.tensor([[1, side, side]] * 2)}


def placed() -> dict[str, Any]:
    """Two pictures as rows of patches, and where each patch lies."""
    places = torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]] * 2)
    return {"pixel_values": _pixels(2, 4, 192), "image_position_ids": places}


# fmt: off
# -- pictures as tokens of a codebook
VQ = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32,
    "num_embeddings": 16, "resolution": 4}
WORDS = {"<image>": IMAGE_TOKEN} | {f"IMGIMG{chr(65 + i // 10)}{chr(65 + i % 10)}Z": 20 + i
    for i in range(16)}
chats("chameleon", 16, 2, 3, 4, 4, vq_config=VQ, vocabulary_map=WORDS)
chats("emu3", 6, 2, 3, 16, 16, idle="vqmodel", vq_config={"base_channels": 32,
    "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "latent_channels": 4,
    "codebook_size": 8, "hidden_size": 32, "embed_dim": 4, "num_attention_heads": 1,
    "temporal_downsample_factor": 1, "attn_resolutions": []},
    vocabulary_map={"<image>": IMAGE_TOKEN,
    "<|extra_200|>": 10}| {f"<|visual token {i:06d}|>": 20 + i for i in range(8)}, also=sides)
chats("glm_image", 16, 32, 192, head="GlmImageForConditionalGeneration", vision_config={},
    text_config={"rope_parameters": MROPE, "vision_vocab_size": 32},
    vq_config={"num_embeddings": 16, "latent_channels": 32, "embed_dim": 8},
    also=lambda: {"images_per_sample": 2 * _ones(2, 1)[0], "image_grid_thw": torch.tensor([[1, 4,
    4]] * 4)})
chats("apertus1p5", 4, also=sides, vision_config={"base_channels": 32, "channel_multiplier": [1, 1,
    1, 1], "num_res_blocks": 1, "latent_channels": 32, "codebook_size": 16, "attn_resolutions": []},
    audio_config={"model_type": "wavtokenizer_encoder", "codebook_dim": 24, "codebook_size": 16,
    "num_filters": 4, "decoder_hidden_size": 16, "decoder_intermediate_size": 16,
    "decoder_num_layers": 1, "decoder_attention_num_groups": 2, "num_lstm_layers": 1},
    idle="audio|vision", image_token_offset=20, audio_token_offset=36)

# -- an encoder, a connector, a decoder
chats("kosmos2", 4, kind="kosmos-2", single=True, head="Kosmos2ForConditionalGeneration",
    generates=False, latent_query_num=4, text_config={"layers": 2, "embed_dim": 32,
    "attention_heads": 4},
    also=lambda: {"image_embeds_position_mask": torch.tensor([[1] * 4 + [0] * 4] * 2)})
chats("granite4_vision", 3, 2, 2, 3, 16, 16, idle=r"spatial_projectors\.[123]",
    image_grid_pinpoints=[[16, 16]], vision_feature_layer=-1, downsample_rate="1/2",
    deepstack_layer_map=[[-1, 0]], spatial_target_layers=[1],
    qformer_config={"encoder_hidden_size": 64, "num_hidden_layers": 1, "hidden_size": 64,
    "num_attention_heads": 2}, vision_config={**CLIP, "hidden_size": 64}, also=sides)
chats("molmo2", 4, 2, 4, 192, image_patch_id=IMAGE_TOKEN,
    also=lambda: {"image_token_pooling": torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [4, 5], [6,
    7], [5, 7], [4, 6]]), "image_grids": torch.tensor([[2, 1, 2, 1]] * 2),
    "image_num_crops": torch.ones(2, dtype=torch.long), **types(4)},
    vision_config={"image_size": [16, 16]}, adapter_config={"text_hidden_size": 32,
    "vision_feature_layer": [-1]}, text_config={"additional_vocab_size": 8})
variant("phi4_multimodal", lambda: {"input_ids": _prompt(5), "image_pixel_values": _pixels(2, 2, 3,
    16, 16), "image_sizes": torch.tensor([[16, 16]] * 2), "image_attention_mask": torch.ones(2, 2,
    2, 2)}, head="Phi4MultimodalForCausalLM", idle="audio|head\\.", vision_config={"crop_size": 16,
    "feature_layer": -1})
chats("t5gemma2", 4, encoder={"vision_config": SIGLIP, "mm_tokens_per_image": 4,
    "text_config": FULL, "boi_token_index": 5, "eoi_token_index": 6, "image_token_index": 3},
    decoder=FULL, eoi_token_index=6, also=lambda: {"decoder_input_ids": _ids(4)})
variant("pi0", lambda: {"input_ids": _prompt(4), "pixel_values": _pixels(2, 1, 3, 16, 16),
    "state": _pixels(2, 6), "actions": _pixels(2, 5, 6), "noise": _pixels(2, 5, 6),
    "timestep": _pixels(2).sigmoid(), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    "attention_mask": _ones(8)}, head="PI0ForConditionalGeneration",
    idle=r"vlm\.language_model\.layers\.1\.mlp", chunk_size=5, max_state_dim=6,
    max_action_dim=6, vlm_config={"vision_config": SIGLIP, "text_config": {"model_type": "gemma"},
    "projection_dim": 32})
variant("vision_encoder_decoder", lambda: {"pixel_values": _pixels(), "decoder_input_ids": _ids(4)},
    kind="vision-encoder-decoder", head="VisionEncoderDecoderModel", encoder={"model_type": "vit"},
    decoder={"model_type": "bert", "is_decoder": True, "add_cross_attention": True})
qwens("cosmos3_omni", types=True, vision_config={"model_type": "qwen3_vl_vision", **DEEP},
    text_config={"model_type": "qwen3_vl_text", **TEXT})
qwens("glmga", types=True, head="Glm46VForConditionalGeneration",
    vision_config={"model_type": "glm4v_vision", **OUT}, text_config={"model_type": "glm4v_text",
    **TEXT})
chats("gemma4_unified", 1, idle="audio", audio_config={"audio_embed_dim": 8},
    vision_config={"pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16,
    "output_proj_dims": 32}, text_config=FULL, also=lambda: {"pixel_values": _pixels(2, 1, 768),
    "image_position_ids": torch.tensor([[[0, 0]]] * 2), **types(1)})
chats("embedding_gemma2", 1, head="AutoModel", generates=False,
    vision_config={"model_type": "gemma4_vision", "pooling_kernel_size": 2,
    "position_embedding_size": 16}, audio_config=None, text_config={**FULL,
    "hidden_size_per_layer_input": 8, "embedding_dim": 16}, also=placed)
chats("neomme", 4, 8, 192, head="AutoModel", generates=False, layer_types=["full_attention",
    "sliding_attention"], rope_parameters={k: {"rope_type": "default", "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5} for k in ("full_attention", "sliding_attention")},
    embedding_rank=8, embedding_dim=16)
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2}
chats("minicpmv4_7", 1, 1, 3, 8, 128, vision_config={"insert_layer_id": 1}, insert_layer_id=1,
    text_config=LINEAR, also=lambda: {"target_sizes": torch.tensor([[4, 4]]),
    "input_ids": torch.tensor([[3, 9, 8, 7]]), "mm_token_type_ids": torch.tensor([[1, 0, 0, 0]])})

# -- with experts
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1}
LATENT = {"kv_lora_rank": 10, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2,
    "num_key_value_heads": 4, "head_dim": 4}
chats("diffusion_gemma", 1, head="DiffusionGemmaForBlockDiffusion", generates=False,
    vision_config={"pooling_kernel_size": 2, "position_embedding_size": 16}, text_config={**FULL,
    "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}, canvas_length=4,
    also=lambda: {**placed(), "self_conditioning_logits": _pixels(2, 4, VOCAB)})
qwens("muse_spark", vision_config={"pos_emb_height": 4, "pos_emb_width": 4}, out_hidden_size=128,
    projector_hidden_size=32, text_config={**FULL, "num_local_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "moe_hidden_size": 32}, audio_config={"patch_sizes": [4, 2],
    "hidden_sizes": [8, 8], "depths": [1, 1], "out_hidden_size": 32}, idle="audio")
chats("nemotron_h_omni", 1, 8, 192, head="NemotronH_Omni_Reasoning_V3",
    vision_config={"max_img_size": 32, "video_temporal_patch_size": 2},
    text_config={"layers_block_type": ["attention", "moe"], **ROUTED,
    "moe_shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1},
    projector_hidden_size=32, vision_hidden_size=32, force_image_size=16,
    also=lambda: {"image_grid_hw": torch.tensor([[2, 2]] * 2)})
chats("mistral_large4_vl", 1, kind="mistral_large4", vision_config=PIXTRAL, text_config={**ROUTED,
    **LATENT}, also=sides)
qwens("dots3_note", 16, 192, vision_config={"num_local_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 16, "adapter_in_dim": 32, "adapter_out_dim": 32,
    "mlp_layer_types": ["dense", "sparse"]}, text_config={**ROUTED, **LATENT},
    audio_config={"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    idle="audio")
qwens("glm5_next", types=True, vision_config={**OUT, "projection_intermediate_size": 32},
    text_config={**ROUTED, **LATENT, "qk_rope_head_dim": 0, "layer_types": ["linear_attention",
    "indexed_attention"], "mlp_layer_types": ["dense", "sparse"], "linear_head_dim": 8,
    "linear_num_heads": 2, "hc_mult": 2, "hc_sinkhorn_iters": 2, "index_kpool": 2})
chats("hy_v4_vl", 6, 32, 192, also=lambda: grids(4) | types(6), vision_config={**OUT,
    "max_image_size": 64}, text_config={**ROUTED, **LATENT, "qk_rope_head_dim": 6, "hc_mult": 2,
    "mlp_layer_types": ["dense", "sparse"], "rope_parameters": {"rope_type": "default",
    "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}})
qwens("qwen4_exp", types=True, vision_config={**OUT, "num_position_embeddings": 16},
    text_config={**LINEAR, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 1, "num_experts": 2, "hc_count": 2, "hc_lowrank": 4,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2})
NEAR = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
    "rel_extent": 16, "conv_kernel_size": 2}
CHOSEN = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "unpadded_vocab_size": 64, "sliding_window_size": 16}
GRID = {"posemb_grid_size": 4, "projection_hidden_dim": 32, "text_hidden_size": 32}
chats("inkling", 1, 2, 2, 8, 8, 3, kind="inkling_mm_model", vision_config={"text_hidden_size": 32},
    text_config={**NEAR, **ROUTED}, audio_config={"text_hidden_size": 32, "n_mel_bins": 8})
chats("inkling2", 4, 8, 16, 16, 3, also=lambda: grids(2), vision_config=GRID, text_config={**NEAR,
    **CHOSEN}, single=True)
chats("inkling2_loop", 4, 8, 16, 16, 3, also=lambda: grids(2), vision_config=GRID,
    text_config={"num_hidden_layers": 3, "loop_layer_index_start": 1, "loop_layer_index_end": 2,
    "loop_num_passes": 2, "loop_gate_rank": 4, "n_layers_per_attn_res_block": 1, **NEAR, **CHOSEN},
    single=True)
