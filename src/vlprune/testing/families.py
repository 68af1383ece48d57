"""One tiny random model for every supported family, with inputs for one forward pass.

Widths, depths and head counts differ between the towers of a model on purpose, so that a
mix-up of axes shows. Nothing is downloaded. Add a family by adding one function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

__all__ = ["FAMILIES", "VARIANTS", "Sample", "build"]

VOCAB = 64
IMAGE, PATCH = 16, 8
PATCHES = (IMAGE // PATCH) ** 2
IMAGE_TOKEN = 3


@dataclass
class Sample:
    """A model, the inputs of one forward pass, and, for generative heads, of ``generate``.

    ``idle`` matches the structures that these inputs cannot reach, or that cannot matter.
    ``rounding`` is the difference that a forward makes by itself, if it computes in float32
    whatever the dtype of the model is. ``dtype`` is the widest in which the model runs.
    """

    model: nn.Module
    inputs: dict[str, Any]
    generate: dict[str, Any] | None = None
    idle: str = ""
    rounding: float = 0.0
    dtype: torch.dtype = torch.float64


FAMILIES: dict[str, Callable[[], Sample]] = {}
"""The families that every check of the conformance suite runs on."""

VARIANTS: dict[str, Callable[[], Sample]] = {}
"""Variants whose attention differs from a family's by the name of its class only.

Two checks are enough for variants: that masked equals cut, and that the order is right.
"""


def build(name: str, seed: int = 0) -> Sample:
    """A fresh sample of the family or variant, in eval mode, the same for the same seed.

    Raises KeyError for an unknown name.
    """
    torch.manual_seed(seed)
    sample = (FAMILIES.get(name) or VARIANTS[name])()
    sample.model.eval()
    gains = torch.Generator().manual_seed(seed)
    for parameter in sample.model.parameters():
        # Stock initialisation is so small that attention hardly moves the output, its zero biases
        # would hide a forgotten bias, and its equal gains those of another unit: make everything
        # count.
        if bool((parameter == 0).all()):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() == 1 and len(parameter) > 1 and bool((parameter == 1).all()):
            nn.init.uniform_(parameter, 0.5, 1.5, gains)
        elif parameter.dim() == 2 and float(parameter.detach().std(correction=0)) < 0.1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return sample


def _family(make: Callable[[], Sample]) -> Callable[[], Sample]:
    FAMILIES[make.__name__] = make
    return make


def _variant(make: Callable[[], Sample]) -> Callable[[], Sample]:
    VARIANTS[make.__name__] = make
    return make


def _ids(length: int = 6, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(6, VOCAB - 6, (batch, length), generator=generator)


def _ones(length: int = 6, batch: int = 2) -> Tensor:
    return torch.ones(batch, length, dtype=torch.long)


def _pixels(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, IMAGE, IMAGE)), generator=torch.Generator().manual_seed(2))


def _prompt(image_tokens: int, text: int = 4, batch: int = 2) -> Tensor:
    """Token ids that begin with ``image_tokens`` placeholders."""
    ids = _ids(image_tokens + text, batch)
    ids[:, :image_tokens] = IMAGE_TOKEN
    return ids


def _text(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "vocab_size": VOCAB,
        **more,
    }


def _vision(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": IMAGE,
        "patch_size": PATCH,
        **more,
    }


def _language_model(**more: Any) -> dict[str, Any]:
    """A decoder with grouped-query attention: 4 query heads, 2 key-value heads."""
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


_CLIP_TEXT: dict[str, Any] = {
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": 1,
}


@_family
def clip() -> Sample:
    text, vision = _text(**_CLIP_TEXT, projection_dim=16), _vision(projection_dim=16)
    config = T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ids = _ids()
    ids[:, -1] = _CLIP_TEXT["eos_token_id"]  # where the text is read off
    inputs = {"input_ids": ids, "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.CLIPModel(config), inputs)


@_variant
def altclip() -> Sample:
    text = _text(max_position_embeddings=16, project_dim=20, pad_token_id=1)
    config = T.AltCLIPConfig(text_config=text, vision_config=_vision(), projection_dim=16)
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.AltCLIPModel(config), inputs)


@_variant
def clipseg() -> Sample:
    config = T.CLIPSegConfig(
        text_config=_text(**_CLIP_TEXT),
        vision_config=_vision(),
        projection_dim=16,
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=28,
    )
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.CLIPSegForImageSegmentation(config), inputs)


@_family
def vision_text_dual_encoder() -> Sample:
    vision = _vision(mlp_ratio=2, num_register_tokens=2)
    del vision["intermediate_size"]
    config = T.VisionTextDualEncoderConfig(
        vision_config={"model_type": "dinov2_with_registers", **vision},
        text_config={
            "model_type": "xlm-roberta",
            **_text(max_position_embeddings=16, pad_token_id=1),
        },
        projection_dim=16,
    )
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.VisionTextDualEncoderModel(config), inputs)


@_family
def siglip() -> Sample:
    text = _text(max_position_embeddings=16, projection_size=32)
    config = T.SiglipConfig(text_config=text, vision_config=_vision())
    return Sample(T.SiglipModel(config), {"input_ids": _ids(), "pixel_values": _pixels()})


@_family
def siglip2() -> Sample:
    vision = _vision(num_patches=PATCHES)
    del vision["image_size"]
    text = _text(max_position_embeddings=16, projection_size=32)
    config = T.Siglip2Config(text_config=text, vision_config=vision)
    inputs = {
        "input_ids": _ids(),
        "pixel_values": _pixels(2, PATCHES, 3 * PATCH * PATCH),
        "pixel_attention_mask": _ones(PATCHES),
        "spatial_shapes": torch.tensor([[2, 2], [2, 2]]),
    }
    return Sample(T.Siglip2Model(config), inputs)


def _blip_config(**vision: Any) -> Any:
    vision = _vision(**vision)
    text = _text(
        max_position_embeddings=32,
        encoder_hidden_size=vision["hidden_size"],
        projection_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
    )
    return T.BlipConfig(
        text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16
    )


@_family
def blip() -> Sample:
    inputs = {"input_ids": _ids(), "pixel_values": _pixels()}
    # BlipModel encodes the text alone: its cross-attention exists but never runs
    return Sample(T.BlipModel(_blip_config()), inputs, idle=r"crossattention")


@_family
def blip_captioning() -> Sample:
    model = T.BlipForConditionalGeneration(_blip_config())
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "labels": _ids()}
    prompt = torch.tensor([[1, 7, 2], [1, 7, 2]])
    return Sample(model, inputs, {"pixel_values": _pixels(), "input_ids": prompt})


@_family
def blip_vqa() -> Sample:
    # its decoder reads the question's states where the encoder reads the image's: one width
    model = T.BlipForQuestionAnswering(_blip_config(hidden_size=24, num_attention_heads=3))
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "labels": _ids(4)}
    return Sample(model, inputs, {"input_ids": _ids(), "pixel_values": _pixels()})


@_family
def blip_retrieval() -> Sample:
    model = T.BlipForImageTextRetrieval(_blip_config())
    return Sample(model, {"input_ids": _ids(), "pixel_values": _pixels()})


@_family
def blip2() -> Sample:
    config = T.Blip2Config(
        vision_config=_vision(),
        qformer_config=_text(encoder_hidden_size=32, cross_attention_frequency=2),
        text_config={
            "model_type": "opt",
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "ffn_dim": 40,
            "num_attention_heads": 3,
            "vocab_size": VOCAB,
            "word_embed_proj_dim": 24,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        num_query_tokens=4,
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
    )
    inputs = {"input_ids": _prompt(4), "pixel_values": _pixels()}
    return Sample(T.Blip2ForConditionalGeneration(config), inputs, dict(inputs))


@_family
def instructblip() -> Sample:
    config = T.InstructBlipConfig(
        vision_config=_vision(),
        qformer_config=_text(
            encoder_hidden_size=32, cross_attention_frequency=2, max_position_embeddings=16
        ),
        text_config={"model_type": "llama", **_language_model()},
        num_query_tokens=4,
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
    )
    inputs = {
        "input_ids": _prompt(4),
        "qformer_input_ids": _ids(),
        "qformer_attention_mask": _ones(),
        "pixel_values": _pixels(),
    }
    return Sample(T.InstructBlipForConditionalGeneration(config), inputs, dict(inputs))


@_family
def vit() -> Sample:
    config = T.ViTConfig(**_vision(num_labels=5))
    return Sample(T.ViTForImageClassification(config), {"pixel_values": _pixels()})


@_family
def deit() -> Sample:
    config = T.DeiTConfig(**_vision(num_labels=5))
    return Sample(T.DeiTForImageClassificationWithTeacher(config), {"pixel_values": _pixels()})


def _dinov2(**more: Any) -> Sample:
    vision = _vision(mlp_ratio=2, num_labels=5, **more)
    del vision["intermediate_size"]
    model = T.Dinov2ForImageClassification(T.Dinov2Config(**vision))
    return Sample(model, {"pixel_values": _pixels()})


@_family
def dinov2() -> Sample:
    return _dinov2()


@_family
def dinov2_swiglu() -> Sample:
    return _dinov2(use_swiglu_ffn=True)


@_family
def bert() -> Sample:
    config = T.BertConfig(**_text(max_position_embeddings=32, num_labels=3))
    inputs = {"input_ids": _ids(), "attention_mask": _ones()}
    return Sample(T.BertForSequenceClassification(config), inputs)


@_family
def roberta() -> Sample:
    config = T.RobertaConfig(**_text(max_position_embeddings=32, pad_token_id=1, num_labels=3))
    return Sample(T.RobertaForSequenceClassification(config), {"input_ids": _ids()})


def _text_decoder(config_class: Any, model_class: Any) -> Sample:
    """A text encoder's class as a decoder that reads an image encoder's states."""
    config = config_class(
        **_text(max_position_embeddings=32, pad_token_id=1, bos_token_id=0, eos_token_id=2),
        is_decoder=True,
        add_cross_attention=True,
    )
    inputs = {"input_ids": _ids(), "encoder_hidden_states": _pixels(2, PATCHES, 24)}
    return Sample(model_class(config), inputs)


@_family
def bert_decoder() -> Sample:
    return _text_decoder(T.BertConfig, T.BertLMHeadModel)


@_variant
def roberta_decoder() -> Sample:
    return _text_decoder(T.RobertaConfig, T.RobertaForCausalLM)


@_family
def distilbert() -> Sample:
    config = T.DistilBertConfig(
        dim=24, n_layers=2, n_heads=3, hidden_dim=40, vocab_size=VOCAB, max_position_embeddings=32
    )
    return Sample(T.DistilBertForSequenceClassification(config), {"input_ids": _ids()})


@_family
def gpt2() -> Sample:
    config = T.GPT2Config(
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=40,
        vocab_size=VOCAB,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Sample(T.GPT2LMHeadModel(config), {"input_ids": _ids()}, {"input_ids": _ids()})


@_family
def vilt() -> Sample:
    config = T.ViltConfig(
        **_text(max_position_embeddings=32, image_size=IMAGE, patch_size=PATCH, num_labels=5)
    )
    model = T.ViltForQuestionAnswering(config)
    return Sample(model, {"input_ids": _ids(), "pixel_values": _pixels()})


@_family
def bridgetower() -> Sample:
    config = T.BridgeTowerConfig(
        text_config=_text(max_position_embeddings=32),
        vision_config={
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "patch_size": PATCH,
            "image_size": IMAGE,
        },
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        contrastive_hidden_size=16,
    )
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    # its forward stops before the last block of the image encoder
    return Sample(T.BridgeTowerForImageAndTextRetrieval(config), inputs, idle=r"resblocks\.2\.")


@_family
def flava() -> Sample:
    config = T.FlavaConfig(
        text_config=_text(max_position_embeddings=32),
        image_config=_vision(mask_token=True, vocab_size=VOCAB),
        multimodal_config=_text(),
        hidden_size=24,
        projection_dim=16,
    )
    return Sample(T.FlavaModel(config), {"input_ids": _ids(), "pixel_values": _pixels()})


@_family
def owlvit() -> Sample:
    config = T.OwlViTConfig(
        text_config=_text(**_CLIP_TEXT), vision_config=_vision(), projection_dim=24
    )
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.OwlViTForObjectDetection(config), inputs)


@_family
def owlv2() -> Sample:
    config = T.Owlv2Config(
        text_config=_text(**_CLIP_TEXT), vision_config=_vision(), projection_dim=24
    )
    inputs = {"input_ids": _ids(), "pixel_values": _pixels(), "attention_mask": _ones()}
    return Sample(T.Owlv2ForObjectDetection(config), inputs)


def _swin_backbone() -> Any:
    return T.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 4],
        window_size=4,
        image_size=64,
        patch_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )


def _grounding_dino(config_class: Any, model_class: Any) -> Sample:
    config = config_class(
        backbone_config=_swin_backbone(),
        text_config={
            "model_type": "bert",
            **_text(max_position_embeddings=32) | {"vocab_size": 1100},
        },
        d_model=32,
        encoder_layers=2,
        encoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_layers=2,
        decoder_ffn_dim=40,
        decoder_attention_heads=4,
        num_queries=6,
        num_feature_levels=4,
        max_text_len=16,
        fusion_dropout=0.0,
        fusion_droppath=0.0,
    )
    # [CLS] words . words . [SEP] in BERT's ids: a token attends inside its own phrase only
    ids = torch.tensor([[101, 7, 8, 9, 1012, 10, 11, 12, 1012, 102]] * 2)
    inputs = {"input_ids": ids, "pixel_values": _pixels(2, 3, 64, 64), "attention_mask": _ones(10)}
    return Sample(model_class(config), inputs)


@_family
def grounding_dino() -> Sample:
    return _grounding_dino(T.GroundingDinoConfig, T.GroundingDinoForObjectDetection)


@_variant
def mm_grounding_dino() -> Sample:
    return _grounding_dino(T.MMGroundingDinoConfig, T.MMGroundingDinoForObjectDetection)


@_family
def detr() -> Sample:
    backbone = T.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = T.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=40,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=5,
        num_labels=5,
    )
    # the first decoder layer starts from zeros: all values are equal, so weights do not matter
    return Sample(
        T.DetrForObjectDetection(config),
        {"pixel_values": _pixels(2, 3, 64, 64)},
        idle=r"decoder\.layers\.0\.self_attn\.qk",
    )


@_family
def swin() -> Sample:
    config = T.SwinConfig(
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=2,
        image_size=IMAGE,
        patch_size=2,
        num_labels=5,
    )
    return Sample(T.SwinForImageClassification(config), {"pixel_values": _pixels()})


@_family
def llava() -> Sample:
    config = T.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_vision(projection_dim=16)},
        text_config={"model_type": "llama", **_language_model()},
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    inputs = {"input_ids": _prompt(PATCHES), "pixel_values": _pixels()}
    return Sample(T.LlavaForConditionalGeneration(config), inputs, dict(inputs))


def _qwen(config_class: Any, model_class: Any, vision: dict[str, Any], **text: Any) -> Sample:
    config = config_class(
        vision_config=vision,
        text_config=_language_model(
            **{
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [1, 1, 2],
                    "rope_theta": 10000.0,
                },
                **text,
            }
        ),
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
        vision_start_token_id=VOCAB - 2,
        vision_end_token_id=VOCAB - 1,
    )
    ids = _ids(10, 1)
    ids[:, 0], ids[:, 1:5], ids[:, 5] = VOCAB - 2, IMAGE_TOKEN, VOCAB - 1
    inputs = {
        "input_ids": ids,
        "pixel_values": _pixels(16, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }
    return Sample(model_class(config), inputs, dict(inputs))


@_family
def qwen2_vl() -> Sample:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    return _qwen(T.Qwen2VLConfig, T.Qwen2VLForConditionalGeneration, vision)


@_family
def qwen2_5_vl() -> Sample:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    return _qwen(T.Qwen2_5_VLConfig, T.Qwen2_5_VLForConditionalGeneration, vision)


@_family
def qwen3_vl() -> Sample:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(T.Qwen3VLConfig, T.Qwen3VLForConditionalGeneration, vision)


def _paligemma(text: str, **more: Any) -> Sample:
    config = T.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **_vision(vision_use_head=False, projection_dim=32),
        },
        text_config={"model_type": text, **_language_model(head_dim=8, **more)},
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
    )
    ids = _prompt(PATCHES)
    inputs = {"input_ids": ids, "pixel_values": _pixels(), "token_type_ids": torch.zeros_like(ids)}
    return Sample(T.PaliGemmaForConditionalGeneration(config), inputs, dict(inputs))


@_family
def paligemma() -> Sample:
    return _paligemma("gemma")


@_variant
def paligemma2() -> Sample:
    return _paligemma("gemma2", query_pre_attn_scalar=8, sliding_window=16)


@_family
def gemma3() -> Sample:
    text = _language_model(
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = T.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_vision(vision_use_head=False)},
        text_config={"model_type": "gemma3_text", **text},
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=4,
        eoi_token_index=5,
    )
    ids = _prompt(4)
    types = (ids == IMAGE_TOKEN).long()
    inputs = {"input_ids": ids, "pixel_values": _pixels(), "token_type_ids": types}
    return Sample(T.Gemma3ForConditionalGeneration(config), inputs, dict(inputs))


def _idefics(config_class: Any, model_class: Any) -> Sample:
    config = config_class(
        vision_config=_vision(),
        text_config={"model_type": "llama", **_language_model()},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    inputs = {"input_ids": _prompt(1), "pixel_values": _pixels().unsqueeze(1)}
    return Sample(model_class(config), inputs, dict(inputs))


@_family
def smolvlm() -> Sample:
    return _idefics(T.SmolVLMConfig, T.SmolVLMForConditionalGeneration)


@_family
def idefics3() -> Sample:
    return _idefics(T.Idefics3Config, T.Idefics3ForConditionalGeneration)


@_family
def idefics2() -> Sample:
    config = T.Idefics2Config(
        vision_config=_vision(),
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 6,
            "num_key_value_heads": 1,
        },
        text_config={"model_type": "mistral", **_language_model()},
        image_token_id=IMAGE_TOKEN,
    )
    inputs = {"input_ids": _prompt(3), "pixel_values": _pixels().unsqueeze(1)}
    return Sample(T.Idefics2ForConditionalGeneration(config), inputs, dict(inputs))


def _internvl(text: str = "qwen2", **vision: Any) -> Sample:
    config = T.InternVLConfig(
        vision_config=_vision(image_size=[IMAGE, IMAGE], patch_size=[PATCH, PATCH]) | vision,
        text_config={"model_type": text, **_language_model()},
        image_token_id=IMAGE_TOKEN,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    inputs = {"input_ids": _prompt(1), "pixel_values": _pixels()}
    return Sample(T.InternVLForConditionalGeneration(config), inputs, dict(inputs))


@_family
def internvl() -> Sample:
    return _internvl()


@_family
def internvl_qk_norm() -> Sample:
    return _internvl(use_qk_norm=True)


@_variant
def internvl_qwen3() -> Sample:
    return _internvl("qwen3")


@_family
def blip_nlvr() -> Sample:
    from ..models import BlipForVisualReasoning, BlipNlvrConfig

    config = BlipNlvrConfig(
        vision_config=_vision(),
        text_config=_text(
            encoder_hidden_size=32, max_position_embeddings=16, bos_token_id=1, sep_token_id=2
        ),
        merge_from_layer=1,
    )
    pixels = torch.stack([_pixels(), _pixels().flip(-1)], dim=1)
    inputs = {"pixel_values": pixels, "input_ids": _ids(), "attention_mask": _ones()}
    return Sample(BlipForVisualReasoning(config), inputs)


@_family
def segmenter() -> Sample:
    from ..models import SegmenterConfig, SegmenterForSemanticSegmentation

    config = SegmenterConfig(**_vision(), num_labels=5)
    return Sample(SegmenterForSemanticSegmentation(config), {"pixel_values": _pixels()})


def _mdetr(backbone: Any, **more: Any) -> Sample:
    from ..models import MdetrConfig, MdetrForGrounding

    config = MdetrConfig(
        backbone_config=backbone,
        text_config=T.RobertaConfig(**_text(max_position_embeddings=16, pad_token_id=1)),
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=28,
        num_queries=3,
        text_positions=12,
        alignment_size=8,
        **more,
    )
    inputs = {"pixel_values": _pixels(2, 3, 32, 32), "input_ids": _ids(), "attention_mask": _ones()}
    inputs["attention_mask"][1, 4:] = 0
    # every query starts as zeros, so in the first layer they all read the same values
    return Sample(MdetrForGrounding(config), inputs, idle=r"^decoder\.layers\.0\.self_attn\.qk")


@_family
def mdetr() -> Sample:
    backbone = T.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    return _mdetr(backbone, answer_heads={"answer_type": 3, "answer_obj": 2})


@_family
def vit_mdetr() -> Sample:
    return _mdetr(T.DeiTConfig(**_vision(image_size=32)))


@_family
def glip() -> Sample:
    from ..models import GlipConfig, GlipForGrounding

    backbone = T.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        image_size=32,
        patch_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = GlipConfig(
        backbone_config=backbone,
        text_config=T.BertConfig(**_text(max_position_embeddings=16)),
        d_model=32,
        fusion_layers=1,
        fusion_size=24,
        fusion_heads=4,
        strides=[4, 8, 16, 32, 64],
        anchor_scale=4,
    )
    inputs = {"pixel_values": _pixels(2, 3, 32, 32), "input_ids": _ids(), "attention_mask": _ones()}
    inputs["attention_mask"][1, 4:] = 0
    return Sample(GlipForGrounding(config), inputs)


@_family
def florence2() -> Sample:
    config = T.Florence2Config(
        vision_config={
            "embed_dim": [8, 16, 16, 32],
            "num_heads": [1, 2, 2, 4],
            "num_groups": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
            "projection_dim": 24,
            "window_size": 2,
            "patch_size": [7, 3, 3, 3],
            "patch_stride": [4, 2, 2, 2],
            "patch_padding": [3, 1, 1, 1],
            "max_temporal_embeddings": 10,
            "max_position_embeddings": 10,
        },
        text_config={
            "model_type": "bart",
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 32,
            "vocab_size": VOCAB,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE_TOKEN,
    )
    inputs = {
        "input_ids": _prompt(5),
        "pixel_values": _pixels(2, 3, 64, 64),
        "decoder_input_ids": _ids(4),
    }
    generate = {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    return Sample(T.Florence2ForConditionalGeneration(config), inputs, generate)
