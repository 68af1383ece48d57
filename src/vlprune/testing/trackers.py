"""SAM 2 and SAM 3: masks of what a word or a point names, in pictures and along videos.

Variants, as in :mod:`vlprune.testing.variants`; what a row means is in :mod:`vlprune.testing.tiny`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as T

from .families import _ids, _ones
from .segmenters import BIG, DECODER, NECKS, PROMPT, points
from .tiny import images


def along(name: str) -> Any:
    """The class ``name`` of transformers, following one point along the frames that it is given.

    Its own forward takes a session, which keeps what earlier passes computed; here every pass has
    a session of its own.
    """
    stock: Any = getattr(T, f"{name}Model")

    class Along(stock):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            # the object is in sight, or all its masks would be the same constant
            torch.nn.init.constant_(self.mask_decoder.pred_obj_score_head.proj_out.bias, 9.0)

        def forward(self, pixel_values: torch.Tensor) -> list[Any]:
            """(frames, 3, side, side) -> the masks of one object and its score, per frame."""
            session = getattr(T, f"{name}InferenceSession")(pixel_values, dtype=pixel_values.dtype)
            session.add_point_inputs(
                session.obj_id_to_idx(1),
                0,
                {
                    "point_coords": pixel_values.new_tensor([[[[9.0, 20.0]]]]),
                    "point_labels": torch.ones(1, 1, 1, dtype=torch.int32),
                },
            )
            session.obj_with_new_inputs = [1]
            frames = range(len(pixel_values))
            return [super(Along, self).forward(session, frame) for frame in frames]

    Along.__name__ = stock.__name__
    return Along


# fmt: off
VIT = {"model_type": "sam3_vit_model", "image_size": 64, "pretrain_image_size": 32, "patch_size": 8,
    "window_size": 4, "global_attn_indexes": [1]}
VISION = {"model_type": "sam3_vision_model", "backbone_config": VIT, "fpn_hidden_size": 32,
    "scale_factors": [4.0, 2.0, 1.0, 0.5], "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
FOUR = {"num_attention_heads": 4, "hidden_size": 32}
for name, words in (("sam3", {}), ("sam3_lite_text", {"num_hidden_layers": 3,
    "num_attention_heads": 2})):
    images(name, *BIG, vision_config=VISION, geometry_encoder_config={**FOUR, "roi_size": 3},
        detr_encoder_config=FOUR, detr_decoder_config=FOUR, mask_decoder_config=FOUR,
        text_config=words, also=lambda: {"input_ids": _ids(), "attention_mask": _ones()},
        idle="geometry_encoder")
images("sam3_tracker", *BIG, vision_config=VISION, prompt_encoder_config={**PROMPT,
    "image_size": 64, "patch_size": 8, "hidden_size": 32}, mask_decoder_config={**DECODER,
    "hidden_size": 32}, also=points)
WIDE = {"hidden_size": 128}  # twice the 64 channels of a memory, which its config cannot change
MEMORY: dict[str, Any] = {"image_size": 64, "memory_attention_num_layers": 2,
    "memory_attention_num_attention_heads": 2, "memory_attention_feed_forward_hidden_size": 20,
    "memory_attention_hidden_size": 128, "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128, "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128, "memory_fuser_num_layers": 1,
    "memory_fuser_intermediate_dim": 20, "memory_fuser_layer_scale_init_value": 0.5,
    "prompt_encoder_config": {**PROMPT, **WIDE, "image_size": 64, "patch_size": 16},
    "mask_decoder_config": {**DECODER, **WIDE}}
images("sam2_video", 2, 3, 64, 64, head=partial(along, "Sam2Video"), vision_config={**NECKS,
    "fpn_hidden_size": 128}, **MEMORY)
images("sam3_tracker_video", 2, 3, 64, 64, head=partial(along, "Sam3TrackerVideo"),
    vision_config={**VISION, "fpn_hidden_size": 128}, **{**MEMORY,
    "prompt_encoder_config": {**PROMPT, **WIDE, "image_size": 64, "patch_size": 8}})
