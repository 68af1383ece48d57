"""Configs and processors for small new models, for recipes without ``model.path``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..recipe.spec import ModelSpec

__all__ = [
    "bert_settings",
    "blip_config",
    "blip_processor",
    "clip_config",
    "clip_image_processor",
    "clip_processor",
    "llava_config",
    "llava_processor",
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
    """An image processor for a vision transformer without a text encoder."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": spec.image_size, "width": spec.image_size})


def bert_settings(spec: ModelSpec, tokenizer: Any) -> dict[str, Any]:
    """Sizes of a text encoder, under the names that BERT and its relatives share."""
    return {
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "intermediate_size": 4 * spec.width,
        "num_hidden_layers": spec.text_layers,
        "initializer_range": 0.8 * spec.width**-0.5,
        "vocab_size": max(tokenizer.get_vocab().values()) + 1,
        "max_position_embeddings": 66,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def blip_config(spec: ModelSpec, tokenizer: Any) -> Any:
    """A BlipConfig with the sizes in ``spec``."""
    from transformers import BlipConfig

    # BLIP's own 0.02 suits a width of 768; with it, narrow models learn nothing for a long time.
    deviation = 0.8 * spec.width**-0.5
    return BlipConfig(
        vision_config={**vit_settings(spec), "initializer_range": deviation},
        text_config={
            **bert_settings(spec, tokenizer),
            "encoder_hidden_size": spec.width,
            "sep_token_id": tokenizer.eos_token_id,
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
    """A CLIPConfig with the sizes in ``spec``."""
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
    from transformers import CLIPProcessor

    return CLIPProcessor(clip_image_processor(spec), word_tokenizer(texts))


def clip_image_processor(spec: ModelSpec) -> Any:
    """An image processor that resizes every image to a square of the model's size."""
    from transformers import CLIPImageProcessor

    side = {"height": spec.image_size, "width": spec.image_size}
    return CLIPImageProcessor(size=side, crop_size=side)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llava_processor(spec: ModelSpec, texts: Sequence[str]) -> Any:
    """A LlavaProcessor with a vocabulary of the words in ``texts``, and a chat template."""
    from transformers import LlavaProcessor

    tokenizer = word_tokenizer(texts, max_length=10**6)
    marks = ["<image>", *(f"<|{role}|>" for role in ("system", "user", "assistant"))]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return LlavaProcessor(
        clip_image_processor(spec),
        tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy drops
        chat_template=CHAT_TEMPLATE,
    )


def llava_config(spec: ModelSpec, processor: Any) -> Any:
    """A LlavaConfig of a CLIP vision tower and a Llama with the sizes in ``spec``."""
    from transformers import LlavaConfig

    tokenizer = processor.tokenizer
    return LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vit_settings(spec)},
        text_config={
            "model_type": "llama",
            "hidden_size": spec.width,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.heads,
            "intermediate_size": 3 * spec.width,
            "num_hidden_layers": spec.text_layers,
            "initializer_range": 0.8 * spec.width**-0.5,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(spec.image_size // spec.patch_size) ** 2,
        vision_feature_layer=-1,
    )


SPECIAL = {"[PAD]": 0, "[BOS]": 1, "[UNK]": 2, "[EOS]": 3}


def word_tokenizer(
    texts: Sequence[str], max_length: int = 64, special: Mapping[str, int] = SPECIAL
) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token per word of ``texts``: [BOS] words [EOS].

    ``special`` fixes the ids of some tokens; the words, sorted, take the free ids.
    ``max_length`` is the tokenizer's ``model_max_length``.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    }
    # [EOS] must not be 2: transformers' CLIP then pools as for old checkpoints.
    taken = set(special.values())
    numbers = (i for i in itertools.count() if i not in taken)
    others = sorted(w for w in {"[UNK]", *words} if w not in special)
    vocabulary = {**special, **dict(zip(others, numbers, strict=False))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        special_tokens=[(name, vocabulary[name]) for name in ("[BOS]", "[EOS]")],
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
