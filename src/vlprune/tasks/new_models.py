"""Configs and processors of small new models, for recipes without ``model.path``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..recipe import ModelSpec

__all__ = [
    "blip_config",
    "blip_processor",
    "clip_config",
    "clip_processor",
    "vit_processor",
    "vit_settings",
    "word_tokenizer",
]


def vit_settings(spec: ModelSpec) -> dict[str, Any]:
    """Sizes of a vision transformer, under the names that most configs share."""
    return {
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "intermediate_size": 4 * spec.width,
        "num_hidden_layers": spec.vision_layers,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
    }


def vit_processor(spec: ModelSpec) -> Any:
    """An image processor for a vision transformer alone."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": spec.image_size, "width": spec.image_size})


def blip_config(spec: ModelSpec, tokenizer: Any) -> Any:
    """A BlipConfig of these sizes."""
    from transformers import BlipConfig

    # BLIP's own 0.02 suits a width of 768; narrow models learn nothing for long with it.
    deviation = 0.8 * spec.width**-0.5
    return BlipConfig(
        vision_config={**vit_settings(spec), "initializer_range": deviation},
        text_config={
            "hidden_size": spec.width,
            "num_attention_heads": spec.heads,
            "intermediate_size": 4 * spec.width,
            "num_hidden_layers": spec.text_layers,
            "initializer_range": deviation,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": spec.width,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "sep_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=spec.width,
        image_text_hidden_size=spec.width,
        initializer_range=deviation,
    )


def blip_processor(spec: ModelSpec, texts: Sequence[str]) -> Any:
    """A BlipProcessor with a vocabulary of the words in ``texts``."""
    from transformers import BlipImageProcessor, BlipProcessor

    side = spec.image_size
    images = BlipImageProcessor(size={"height": side, "width": side})
    return BlipProcessor(images, word_tokenizer(texts))


def clip_config(spec: ModelSpec, tokenizer: Any) -> Any:
    """A CLIPConfig of these sizes."""
    from transformers import CLIPConfig

    return CLIPConfig(
        vision_config=vit_settings(spec),
        text_config={
            "hidden_size": spec.width,
            "num_attention_heads": spec.heads,
            "intermediate_size": 4 * spec.width,
            "num_hidden_layers": spec.text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=spec.width,
    )


def clip_processor(spec: ModelSpec, texts: Sequence[str]) -> Any:
    """A CLIPProcessor with a vocabulary of the words in ``texts``."""
    from transformers import CLIPImageProcessor, CLIPProcessor

    side = {"height": spec.image_size, "width": spec.image_size}
    return CLIPProcessor(CLIPImageProcessor(size=side, crop_size=side), word_tokenizer(texts))


def word_tokenizer(texts: Sequence[str], max_length: int = 64) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token a word of ``texts``: [BOS] words [EOS]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    }
    # [EOS] must not be 2: transformers' CLIP then pools in a way kept for old checkpoints.
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[BOS]", "[UNK]", "[EOS]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        cls_token="[BOS]",
        sep_token="[EOS]",
        model_max_length=max_length,
    )
