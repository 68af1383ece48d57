"""Image and video encoders, one row each.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

import torch

from .families import _ids, _ones, _pixels
from .tiny import images, variant

VIDEO = (2, 4, 3, 16, 16)
BIG = (2, 3, 64, 64)
PYRAMID = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
MIX = {**PYRAMID, "num_attention_heads": [2, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2]}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 2}
GREAT = {"initializer_range": 0.3, "layer_scale_init_value": 0.5}

# fmt: off
# -- one width from the first layer to the last
images("beit")
images("beit_bias", kind="beit", use_relative_position_bias=True)
images("beit_shared_bias", kind="beit", use_shared_relative_position_bias=True)
images("data2vec_vision", kind="data2vec-vision", use_relative_position_bias=True)
images("data2vec_vision_eager", kind="data2vec-vision", use_relative_position_bias=True, eager=True)
images("vit_mae", mask_ratio=0.0)
images("vitpose_backbone", head="AutoBackbone", image_size=[16, 16], patch_size=[8, 8])
images("pixio")
images("radio", max_img_size=32)
images("sapiens2", num_key_value_attention_heads=2)
images("mlcd_vision_model")
images("mgp_str", kind="mgp-str", image_size=[16, 16], num_bpe_labels=9, num_wordpiece_labels=9)
images("videomae", *VIDEO, num_frames=4)
images("vivit", *VIDEO, num_frames=4, tubelet_size=[2, 8, 8])
images("timesformer", *VIDEO, num_frames=4)
variant("videoprism_vision_model", lambda: {"pixel_values_videos": _pixels(*VIDEO)}, num_frames=4,
    tubelet_size=[1, 8, 8], num_spatial_layers=2, num_temporal_layers=2)
variant("vjepa2", lambda: {"pixel_values_videos": _pixels(*VIDEO)}, crop_size=16, frames_per_clip=4,
    pred_hidden_size=16, pred_num_attention_heads=2, pred_num_hidden_layers=1)
variant("seggpt", lambda: {n: _pixels() for n in ("pixel_values", "prompt_pixel_values",
    "prompt_masks")}, image_size=[32, 16], pretrain_image_size=16, merge_index=0,
    intermediate_hidden_state_indices=[0, 1])

# -- pyramids
images("convnext", *BIG, **PYRAMID, **GREAT)
images("dinov3_convnext", *BIG, **PYRAMID, **GREAT)
images("swinv2", **STAGES, pretrained_window_sizes=[0, 0])
images("swin2sr", patch_size=1, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
images("donut_swin", kind="donut-swin", **STAGES)
images("maskformer_swin", kind="maskformer-swin", **STAGES)
images("segformer", *BIG, **MIX)
images("glpn", *BIG, **MIX)
images("pvt", *BIG, **MIX, image_size=64)
images("pvt_v2", *BIG, **MIX, image_size=64)
images("mobilevit", *BIG, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
    image_size=64, patch_size=2, initializer_range=0.3)
images("focalnet", 2, 3, 32, 32, embed_dim=8, hidden_sizes=[8, 16], depths=[1, 1], focal_levels=[1,
    1], focal_windows=[3, 3], image_size=32, patch_size=4)
images("cvt", 2, 3, 32, 32, embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3],
    mlp_ratio=[2.0, 2.0, 2.0])

# -- with words
variant("xclip", lambda: {"input_ids": _ids(), "pixel_values": _pixels(*VIDEO),
    "attention_mask": _ones()}, vision_config={"mit_hidden_size": 16, "mit_intermediate_size": 20,
    "mit_num_attention_heads": 2, "num_frames": 4}, prompt_num_attention_heads=2)
images("groupvit", also=lambda: {"input_ids": _ids()}, vision_config={"depths": [1, 1, 1],
    "num_group_tokens": [4, 4, 0], "num_output_groups": [4, 4, 4]}, projection_intermediate_dim=20)
images("tipsv2", also=lambda: {"input_ids": _ids(), "attention_mask": _ones()},
    text_config={"hidden_size": 32, "num_attention_heads": 4})
images("align", also=lambda: {"input_ids": _ids(), "attention_mask": _ones()},
    vision_config={"in_channels": [32, 8], "out_channels": [8, 16], "kernel_sizes": [3, 3],
    "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2],
    "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 16, "image_size": 32},
    projection_dim=16)
variant("videoprism", lambda: {"pixel_values_videos": _pixels(2, 4, 3, 16, 16), "input_ids": _ids(),
    "attention_mask": _ones()}, head="VideoPrismClipModel", vision_config={"num_frames": 4,
    "tubelet_size": [1, 8, 8], "num_spatial_layers": 1, "num_temporal_layers": 1,
    "num_auxiliary_layers": 1}, text_config={"hidden_size": 32, "num_attention_heads": 4})

# -- of anything
variant("perceiver", lambda: {"inputs": _pixels()}, head="PerceiverForImageClassificationLearned",
    d_model=16, d_latents=32, num_latents=6, num_blocks=1, num_self_attends_per_block=2,
    num_self_attention_heads=4, num_cross_attention_heads=1)
variant("imagegpt", lambda: {"input_ids": _ids()}, head="ImageGPTForCausalImageModeling",
    generates=True)

# -- the ears of chat models that see, too
variant("gemma3n_audio", lambda: {"audio_mel": _pixels(2, 24, 16), "audio_mel_mask":
    torch.zeros(2, 24, dtype=torch.bool)}, input_feat_size=16, conf_num_attention_heads=4,
    conf_num_hidden_layers=2, sscp_conv_channel_size=[8, 4], conf_attention_chunk_size=4,
    conf_attention_context_left=5)
variant("gemma4_audio", lambda: {"input_features": _pixels(2, 24, 16), "attention_mask":
    torch.ones(2, 24, dtype=torch.bool)}, hidden_size=32, num_attention_heads=4,
    subsampling_conv_channels=[16, 4], attention_chunk_size=4, attention_context_left=5,
    output_proj_dims=16, single=True)
