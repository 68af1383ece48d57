"""Models that read documents, and encoders that join words with regions of a picture, one row each.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

import torch

from .chats import QWEN2
from .families import _ids, _ones, _pixels
from .segmenters import BIG, HGNET, RESNET
from .tiny import chats, images, texts, variant


def boxes(words: int = 6, corners: int = 4, high: int = 16) -> torch.Tensor:
    """Where each word lies on its page, as (left, top, right, bottom)."""
    return _ids(words * corners).reshape(2, words, corners).sort(-1).values % high


# fmt: off
# -- words and regions
texts("lxmert", also=lambda: {"visual_feats": _pixels(2, 4, 16), "visual_pos": _pixels(2, 4,
    4).sigmoid()}, l_layers=2, r_layers=1, x_layers=2, visual_feat_dim=16)
texts("visual_bert", also=lambda: {"visual_embeds": _pixels(2, 4, 16)}, visual_embedding_dim=16)
variant("tvp", lambda: {"input_ids": _ids(batch=1), "attention_mask": _ones(batch=1),
    "pixel_values": _pixels(1, 2, 3, 64, 64)}, head="TvpForVideoGrounding", backbone_config=RESNET,
    hidden_size=16, num_attention_heads=4, max_img_size=64, num_frames=2,
    visual_prompt_size=8, max_grid_col_position_embeddings=8, max_grid_row_position_embeddings=8)

# -- documents
texts("bros", also=lambda: {"bbox": _pixels(2, 6, 4).sigmoid()}, hidden_size=64,
    num_attention_heads=4)
variant("udop", lambda: {"input_ids": _ids(), "attention_mask": _ones(), "bbox": boxes() / 16,
    "pixel_values": _pixels(), "decoder_input_ids": _ids(4)}, head="UdopForConditionalGeneration",
    num_heads=3, d_model=24, d_kv=8, max_2d_position_embeddings=32)

# -- pages to text
TWICE = {"image_size": 64, "downsample_channels": [16, 32], "output_channels": 16, "window_size": 2,
    "global_attn_indexes": [1]}
SPARSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse"]}
chats("deepseek_ocr2", 145, 2, 3, 64, 64, vision_config={"sam_config": TWICE, "encoder_config": {}},
    text_config=SPARSE, also=lambda: {"num_local_patches": [0, 0]})
chats("unlimited_ocr", 7, 2, 3, 64, 64, vision_config={"sam_config": TWICE,
    "encoder_config": {"image_size": 64, "patch_size": 32}}, text_config={**SPARSE,
    "num_key_value_heads": 4}, also=lambda: {"num_local_patches": [0, 0]})
chats("granite_docling", 1, 2, 1, 3, 16, 16, also=lambda: {"pixel_attention_mask": torch.ones(2, 1,
    dtype=torch.bool)}, vision_config={"out_hidden_size": 32, "scale_factor": 2,
    "deepstack_visual_indexes": [0]}, density_router_hidden_size=8)
chats("minicpm_ocr", 1, 1, 3, 8, 128, downsample_mode="16x", vision_config={"insert_layer_id": 1},
    insert_layer_id=1, text_config=QWEN2, also=lambda: {"target_sizes": torch.tensor([[4, 4]]),
    "input_ids": torch.tensor([[3, 9, 8, 7]])})

# -- lines, tables and formulas
images("slanext", *BIG, head="SLANeXtForTableRecognition", vision_config={"image_size": 64,
    "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]}, post_conv_in_channels=16,
    post_conv_out_channels=16, out_channels=8, max_text_length=4, hidden_size=16, single=True)
images("pp_ocrv5_server_rec", 2, 3, 96, 64, head="PPOCRV5ServerRecForTextRecognition",
    backbone_config={k: v for k, v in HGNET.items() if k != "out_features"}, head_out_channels=12,
    num_attention_heads=4, hidden_size=32)
images("pp_ocrv6_small_rec", 2, 3, 48, 64, head="PPOCRV6SmallRecForTextRecognition",
    head_out_channels=12, num_attention_heads=4, hidden_size=32)
images("pp_formulanet", *BIG, head="PPFormulaNetForConditionalGeneration",
    also=lambda: {"decoder_input_ids": _ids(4)}, vision_config={"image_size": 64,
    "output_channels": 16, "window_size": 2, "global_attn_indexes": [1],
    "post_conv_in_channels": 16, "post_conv_mid_channels": 16, "post_conv_out_channels": 32,
    "decoder_hidden_size": 24}, text_config={})
