"""More models with pixels in them: families whose rows in the layout table need a check each.

Two checks are enough for these: that masked equals cut, and that the order is right.
"""

from __future__ import annotations

import torch
import transformers as T

from .families import (
    _CLIP_TEXT,
    IMAGE,
    IMAGE_TOKEN,
    PATCH,
    VOCAB,
    Sample,
    _ids,
    _language_model,
    _ones,
    _pixels,
    _prompt,
    _text,
    _variant,
    _vision,
)


@_variant
def sam() -> Sample:
    vision = _vision(output_channels=16, num_pos_feats=8, window_size=2, global_attn_indexes=[1])
    vision |= {"hidden_size": 32, "mlp_dim": 48, "image_size": 32}
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    prompt |= {"image_embedding_size": 4}
    decoder = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 20}
    decoder |= {"iou_head_hidden_dim": 12, "attention_downsample_rate": 2}
    config = T.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    points = torch.tensor([[[[4.0, 5.0]]], [[[9.0, 3.0]]]])
    return Sample(
        T.SamModel(config), {"pixel_values": _pixels(2, 3, 32, 32), "input_points": points}
    )


@_variant
def hiera() -> Sample:
    config = T.HieraConfig(
        embed_dim=8, image_size=[64, 64], patch_stride=[4, 4], patch_size=[7, 7],
        patch_padding=[3, 3], masked_unit_size=[8, 8], num_heads=[1, 2, 4, 8], depths=[1, 1, 2, 1],
        embed_dim_multiplier=2.0, mlp_ratio=2.0,
    )  # fmt: skip
    return Sample(T.HieraModel(config), {"pixel_values": _pixels(2, 3, 64, 64)})


@_variant
def vitdet() -> Sample:
    config = T.VitDetConfig(**_vision(window_block_indices=[0], window_size=2, mlp_ratio=2))
    return Sample(T.VitDetModel(config), {"pixel_values": _pixels()})


@_variant
def dinov3() -> Sample:
    config = T.DINOv3ViTConfig(**_vision(num_register_tokens=2))
    return Sample(T.DINOv3ViTModel(config), {"pixel_values": _pixels()})


@_variant
def dinov3_gated() -> Sample:
    config = T.DINOv3ViTConfig(**_vision(num_register_tokens=2, use_gated_mlp=True))
    return Sample(T.DINOv3ViTModel(config), {"pixel_values": _pixels()})


@_variant
def t5() -> Sample:
    config = T.T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=3,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    inputs = {"input_ids": _ids(), "attention_mask": _ones(), "decoder_input_ids": _ids(4)}
    return Sample(T.T5ForConditionalGeneration(config), inputs)


@_variant
def pix2struct() -> Sample:
    vision = {"hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 48, "d_kv": 8}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "seq_len": 8}
    text = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
        "num_heads": 4,
    }
    config = T.Pix2StructConfig(vision_config=vision, text_config=text)
    patches = _pixels(2, 5, 2 + config.vision_config.patch_embed_hidden_size)
    patches[..., :2] = torch.arange(10).reshape(5, 2) % 4 + 1
    inputs = {
        "flattened_patches": patches,
        "attention_mask": _ones(5),
        "decoder_input_ids": _ids(4),
    }
    return Sample(T.Pix2StructForConditionalGeneration(config), inputs)


@_variant
def modernbert() -> Sample:
    config = T.ModernBertConfig(
        **_text(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        max_position_embeddings=32,
    )
    return Sample(T.ModernBertModel(config), {"input_ids": _ids(), "attention_mask": _ones()})


@_variant
def phi3() -> Sample:
    config = T.Phi3Config(**_language_model())
    return Sample(T.Phi3ForCausalLM(config), {"input_ids": _ids(), "attention_mask": _ones()})


@_variant
def fuyu() -> Sample:
    language = _language_model(model_type="persimmon", num_key_value_heads=4)
    config = T.FuyuConfig(
        text_config=language,
        **_language_model(num_key_value_heads=4),
        patch_size=4,
        image_size=IMAGE,
        image_token_id=IMAGE_TOKEN,
    )
    patches = _pixels(2, 4, 48)
    ids = _prompt(4)
    return Sample(T.FuyuForCausalLM(config), {"input_ids": ids, "image_patches": patches})


@_variant
def qwen3_5() -> Sample:
    config = T.Qwen3_5TextConfig(
        **_language_model(head_dim=8, layer_types=["full_attention", "linear_attention"]),
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=2,
    )  # fmt: skip
    return Sample(T.Qwen3_5ForCausalLM(config), {"input_ids": _ids(), "attention_mask": _ones()})


@_variant
def lfm2() -> Sample:
    config = T.Lfm2Config(
        **_language_model(
            layer_types=["full_attention", "conv"], block_ff_dim=48, block_multiple_of=8
        )
    )
    return Sample(T.Lfm2ForCausalLM(config), {"input_ids": _ids(), "attention_mask": _ones()})


@_variant
def chinese_clip() -> Sample:
    config = T.ChineseCLIPConfig(
        text_config=_text(max_position_embeddings=16), vision_config=_vision(), projection_dim=16
    )
    return Sample(
        T.ChineseCLIPModel(config),
        {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()},
    )


@_variant
def metaclip2() -> Sample:
    text = _text(**{**_CLIP_TEXT, "max_position_embeddings": 16})
    config = T.MetaClip2Config(text_config=text, vision_config=_vision(), projection_dim=16)
    return Sample(
        T.MetaClip2Model(config),
        {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()},
    )


@_variant
def aimv2() -> Sample:
    text = {**_text(**_CLIP_TEXT), "hidden_size": 24}
    config = T.Aimv2Config(text_config=text, vision_config=_vision(), projection_dim=16)
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.Aimv2Model(config), inputs)


@_variant
def yolos() -> Sample:
    config = T.YolosConfig(**{**_vision(), "image_size": [IMAGE, IMAGE]}, num_detection_tokens=3)
    return Sample(T.YolosForObjectDetection(config), {"pixel_values": _pixels()})


@_variant
def git() -> Sample:
    config = T.GitConfig(vision_config=_vision(), **_text(max_position_embeddings=32))
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.GitForCausalLM(config), inputs)


@_variant
def dpt() -> Sample:
    config = T.DPTConfig(
        **_vision(), backbone_out_indices=[0, 1, 0, 1], neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, num_labels=3,
    )  # fmt: skip
    return Sample(T.DPTModel(config), {"pixel_values": _pixels()})


@_variant
def layoutlmv3() -> Sample:
    config = T.LayoutLMv3Config(
        **_text(max_position_embeddings=32, pad_token_id=1), input_size=IMAGE, patch_size=PATCH,
        coordinate_size=4, shape_size=4, max_2d_position_embeddings=32, rel_pos_bins=4,
        max_rel_pos=8, rel_2d_pos_bins=4, max_rel_2d_pos=8,
    )  # fmt: skip
    boxes = _ids(24).reshape(2, 6, 4).sort(-1).values % 16
    inputs = {"input_ids": _ids(), "bbox": boxes, "pixel_values": _pixels()}
    return Sample(T.LayoutLMv3Model(config), {**inputs, "attention_mask": _ones()})


@_variant
def pixtral() -> Sample:
    config = T.PixtralVisionConfig(**_vision())
    return Sample(T.PixtralVisionModel(config), {"pixel_values": _pixels()})


@_variant
def vit_msn() -> Sample:
    return Sample(T.ViTMSNModel(T.ViTMSNConfig(**_vision())), {"pixel_values": _pixels()})


@_variant
def ijepa() -> Sample:
    return Sample(T.IJepaModel(T.IJepaConfig(**_vision())), {"pixel_values": _pixels()})
