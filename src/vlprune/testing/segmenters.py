"""Detectors, segmenters, depth estimators and keypoint matchers, one row each.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

from typing import Any

import torch

from .detectors import WIDTHS
from .families import _ids, _ones, _pixels
from .tiny import images, variant

BIG = (2, 3, 64, 64)
ONES = [1, 1, 1, 1]
ALL = ["stage1", "stage2", "stage3", "stage4"]

# fmt: off
# -- detectors
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": WIDTHS, "depths": ONES,
    "layer_type": "basic", "out_features": ["stage4"]}
HGNET = {"model_type": "hgnet_v2", "stem_channels": [3, 8, 8], "embedding_size": 8,
    "hidden_sizes": WIDTHS, "depths": ONES, "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [4, 4, 8, 8], "stage_out_channels": WIDTHS, "stage_num_blocks": ONES,
    "stage_kernel_size": [3, 3, 3, 3], "stage_numb_of_layers": ONES, "out_features": ALL[1:]}
HYBRID: dict[str, Any] = {"d_model": 32, "encoder_hidden_dim": 32,
    "encoder_in_channels": WIDTHS[1:], "decoder_in_channels": [32, 32, 32], "num_feature_levels": 3,
    "decoder_n_points": 2, "decoder_attention_heads": 2, "backbone_config": HGNET}
PLAIN: dict[str, Any] = {"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4,
    "decoder_n_points": 2, "group_detr": 1, "d_model": 32}
images("table_transformer", *BIG, kind="table-transformer",
    head="TableTransformerForObjectDetection", backbone_config=RESNET)
images("deimv2", *BIG, head="Deimv2ForObjectDetection", **HYBRID)
images("pp_doclayout_v2", *BIG, head="PPDocLayoutV2ForObjectDetection", class_thresholds=[0.1] * 5,
    class_order=[0, 1, 2, 3, 4], reading_order_config={"coordinate_size": 4, "shape_size": 4},
    **HYBRID)
images("pp_doclayout_v3", *BIG, head="PPDocLayoutV3ForObjectDetection", x4_feat_dim=8,
    mask_feature_channels=[8, 8], **{**HYBRID, "backbone_config": {**HGNET, "out_features": ALL}})
images("pp_doclayout_v4", *BIG, **HYBRID)
images("lw_detr", *BIG, head="LwDetrForObjectDetection",
    backbone_config={"model_type": "lw_detr_vit", "image_size": 64, "num_windows": 4,
    "window_block_indices": [0], "out_features": ["stage2"], "pretrain_image_size": 64},
    projector_scale_factors=[1.0], **PLAIN)
images("rf_detr", *BIG, head="RfDetrForObjectDetection",
    backbone_config={"model_type": "rf_detr_dinov2", "image_size": 64, "num_windows": 2,
    "out_features": ["stage2"]}, **PLAIN)

variant("dab_detr", lambda: {"pixel_values": _pixels(2, 3, 64, 64)}, kind="dab-detr", single=True,
    head="DabDetrForObjectDetection", backbone_config=RESNET, hidden_size=32,
    decoder_attention_heads=4)

# -- masks
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": ONES, "num_heads": [2, 2, 2, 4],
    "window_size": 4, "image_size": 64, "patch_size": 4, "out_features": ALL}
DETR = {"model_type": "detr", "d_model": 32, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "use_timm_backbone": False}
images("eomt", head="EomtForUniversalSegmentation", num_blocks=1, idle="mask_head")
images("eomt_dinov3", head="EomtDinov3ForUniversalSegmentation", num_blocks=1, idle="mask_head")
variant("videomt", lambda: {"pixel_values_videos": _pixels(2, 2, 3, 16, 16)},
    head="VideomtForUniversalSegmentation", num_blocks=1, idle="mask_head")
images("mask2former", *BIG, head="Mask2FormerForUniversalSegmentation", backbone_config=SWIN,
    feature_size=32, mask_feature_size=32, num_attention_heads=4, hidden_dim=32)
images("maskformer", *BIG, head="MaskFormerForInstanceSegmentation", backbone_config={**SWIN,
    "model_type": "maskformer-swin"}, decoder_config=DETR, fpn_feature_size=32,
    mask_feature_size=32)
images("oneformer", *BIG, head="OneFormerForUniversalSegmentation", backbone_config=SWIN,
    conv_dim=32, mask_dim=32, hidden_dim=32, num_attention_heads=4, text_encoder_width=16,
    text_encoder_num_layers=1, text_encoder_vocab_size=64, task_seq_len=7,
    also=lambda: {"task_inputs": _ids(7)})
images("upernet", *BIG, head="UperNetForSemanticSegmentation", backbone_config=SWIN, hidden_size=16,
    auxiliary_in_channels=32)

# -- what words name
variant("omdet_turbo", lambda: {"pixel_values": _pixels(*BIG), "classes_input_ids": _ids(6, 3),
    "classes_attention_mask": _ones(6, 3), "tasks_input_ids": _ids(6, 2),
    "tasks_attention_mask": _ones(6, 2), "classes_structure": torch.tensor([1, 2])},
    kind="omdet-turbo", head="OmDetTurboForObjectDetection", backbone_config={**SWIN,
    "out_features": ["stage2", "stage3", "stage4"]}, text_config={"model_type": "clip_text_model",
    "eos_token_id": 63, "hidden_size": 40, "num_attention_heads": 4, "projection_dim": 40},
    image_size=64, text_projection_in_dim=40, text_projection_out_dim=40, class_embed_dim=40,
    task_encoder_hidden_dim=40, encoder_hidden_dim=32, vision_features_channels=[32, 32, 32],
    encoder_in_channels=[16, 32, 64], encoder_dim_feedforward=48, decoder_hidden_dim=32,
    decoder_num_heads=4, decoder_num_layers=2, decoder_dim_feedforward=40, decoder_num_points=2,
    apply_layernorm_after_vision_backbone=False)

# -- masks of what is pointed at
VIT = {"image_size": 32, "output_channels": 16, "num_pos_feats": 8, "window_size": 2,
    "global_attn_indexes": [1]}
HIERA = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 24, 32],
    "num_attention_heads_per_stage": [1, 2, 2, 4], "window_size_per_stage": [4, 4, 2, 2],
    "global_attention_blocks": [3], "patch_kernel_size": [7, 7],
    "window_positional_embedding_background_size": [4, 4], "num_attention_heads": 1}
NECKS = {"model_type": "sam2_vision_model", "backbone_config": HIERA, "backbone_channel_list": [32,
    24, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 16}
PROMPT = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
DECODER = {"hidden_size": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 12}


def points() -> dict[str, Any]:
    """One point in each picture."""
    return {"input_points": torch.tensor([[[[4.0, 5.0]]], [[[9.0, 3.0]]]])}


images("sam_eager", 2, 3, 32, 32, kind="sam", eager=True, vision_config=VIT,
    prompt_encoder_config=PROMPT, mask_decoder_config=DECODER, also=points)
for eager in (False, True):
    images("sam_hq" + "_eager" * eager, 2, 3, 32, 32, kind="sam_hq", eager=eager, vision_config=VIT,
        prompt_encoder_config=PROMPT, mask_decoder_config={**DECODER, "vit_dim": 32}, also=points)
images("sam2", *BIG, vision_config=NECKS, prompt_encoder_config={**PROMPT, "image_size": 64,
    "patch_size": 16}, mask_decoder_config=DECODER, also=points)

# -- depth, poses
TWO = {"out_features": ["stage1", "stage2"], "reshape_hidden_states": False}
DINO = {"model_type": "dinov2", **TWO}
NECK = {"neck_hidden_sizes": [8, 8], "reassemble_factors": [1, 1], "fusion_hidden_size": 8}
HEAD = {"reassemble_hidden_size": 32, "head_hidden_size": 8, "depth_estimation_type": "metric"}
PART = {"model_type": "dinov2", "image_size": 8, "patch_size": 4}
images("depth_anything", head="DepthAnythingForDepthEstimation", backbone_config=DINO, **HEAD,
    **NECK)
images("prompt_depth_anything", head="PromptDepthAnythingForDepthEstimation", backbone_config=DINO,
    **HEAD, **NECK)
images("zoedepth", head="ZoeDepthForDepthEstimation", backbone_config={"model_type": "beit", **TWO},
    bin_configurations=[{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
    num_attractors=[4, 3, 2, 1], bin_embedding_dim=8, bottleneck_features=8,
    num_relative_features=4, initializer_range=0.3, **NECK)
images("tipsv2_dpt", head="Tipsv2DptForDepthEstimation",
    backbone_config={"model_type": "tipsv2_vision_model", **TWO}, num_depth_bins=4, **NECK)
images("chmv2", head="CHMv2ForDepthEstimation", backbone_config={"model_type": "dinov3_vit",
    "out_features": TWO["out_features"], "return_class_token": True}, post_process_channels=[8, 8],
    head_hidden_size=8, number_output_channels=4, fusion_hidden_size=8, reassemble_factors=[1, 1])
images("depth_pro", 2, 3, 32, 32, head="DepthProForDepthEstimation", image_model_config=PART,
    patch_model_config=PART, fov_model_config=PART, patch_size=8, intermediate_hook_ids=[1, 0],
    intermediate_feature_dims=[8, 8], scaled_images_feature_dims=[8, 8, 8], fusion_hidden_size=8)
images("vitpose", head="VitPoseForPoseEstimation",
    backbone_config={"model_type": "vitpose_backbone", "image_size": [16, 16], "patch_size": [8, 8],
    "out_features": ["stage2"]})

# -- points that two pictures share
POINTER = {"model_type": "superpoint", "encoder_hidden_sizes": [8, 8, 8, 8],
    "decoder_hidden_size": 16, "descriptor_decoder_dim": 32}
images("superglue", 2, 2, 3, 32, 32, head="SuperGlueForKeypointMatching",
    keypoint_detector_config=POINTER, hidden_size=32, num_attention_heads=4,
    keypoint_encoder_sizes=[8, 16], gnn_layers_types=["self", "cross"])
images("lightglue", 2, 2, 3, 32, 32, head="LightGlueForKeypointMatching",
    keypoint_detector_config=POINTER, descriptor_dim=32, num_key_value_heads=4)
images("efficientloftr", 2, 2, 3, 64, 64, stage_num_blocks=[1, 1, 1, 1], out_features=[8, 8, 16,
    32], stage_stride=[2, 1, 2, 2], num_attention_layers=1, num_attention_heads=8, hidden_size=32,
    fine_matching_slice_dim=4)
