"""Detectors with classes of their own: DETR's relatives, with backbones of convolutions.

Variants, as in :mod:`vlprune.testing.variants`.
"""

from __future__ import annotations

from typing import Any

import transformers as T

from .families import Sample, _pixels, _variant

WIDTHS = [8, 8, 16, 16]
SIDE = 64


def _resnet(config_class: Any, *stages: str) -> Any:
    return config_class(
        embedding_size=8, hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], layer_type="basic",
        out_features=[*stages],
    )  # fmt: skip


def _hgnet() -> Any:
    return T.HGNetV2Config(
        stem_channels=[3, 8, 8], embedding_size=8, hidden_sizes=WIDTHS, depths=[1, 1, 1, 1],
        stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[4, 4, 8, 8],
        stage_out_channels=WIDTHS, stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True], stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3], stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def _sizes() -> dict[str, Any]:
    """Sizes under the names that DETR and its relatives share."""
    return {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 40,
        "num_queries": 6,
        "num_labels": 5,
    }


def _detector(config: Any, model_class: Any) -> Sample:
    return Sample(model_class(config), {"pixel_values": _pixels(2, 3, SIDE, SIDE)})


def _hybrid(config_class: Any, model_class: Any, backbone: Any) -> Sample:
    """A detector with attention on the coarsest level and convolutions across the levels."""
    config = config_class(
        backbone_config=backbone,
        **_sizes(),
        encoder_hidden_dim=32,
        encoder_in_channels=WIDTHS[1:],
        decoder_in_channels=[32, 32, 32],
        num_feature_levels=3,
        decoder_n_points=2,
    )
    return _detector(config, model_class)


@_variant
def rt_detr() -> Sample:
    backbone = _resnet(T.RTDetrResNetConfig, "stage2", "stage3", "stage4")
    return _hybrid(T.RTDetrConfig, T.RTDetrForObjectDetection, backbone)


@_variant
def rt_detr_v2() -> Sample:
    backbone = _resnet(T.RTDetrResNetConfig, "stage2", "stage3", "stage4")
    return _hybrid(T.RTDetrV2Config, T.RTDetrV2ForObjectDetection, backbone)


@_variant
def d_fine() -> Sample:
    return _hybrid(T.DFineConfig, T.DFineForObjectDetection, _hgnet())


@_variant
def conditional_detr() -> Sample:
    config = T.ConditionalDetrConfig(backbone_config=_resnet(T.ResNetConfig, "stage4"), **_sizes())
    return _detector(config, T.ConditionalDetrForObjectDetection)


@_variant
def deformable_detr() -> Sample:
    config = T.DeformableDetrConfig(
        backbone_config=_resnet(T.ResNetConfig, "stage3", "stage4"),
        **_sizes(),
        num_feature_levels=2,
        encoder_n_points=2,
        decoder_n_points=2,
    )
    return _detector(config, T.DeformableDetrForObjectDetection)
