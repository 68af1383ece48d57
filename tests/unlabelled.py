"""Small models with their processors, and samples without labels, for compression untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as T
from PIL import Image

from vlprune.recipe.spec import ModelSpec
from vlprune.tasks.new_models import (
    blip_config,
    blip_processor,
    clip_config,
    clip_image_processor,
    clip_processor,
    vit_processor,
    vit_settings,
    word_tokenizer,
)

WORDS = ["a red square", "a blue circle", "two green boxes", "a photo of a dog"]
SIZES = ModelSpec(width=32, heads=2, vision_layers=2, text_layers=2, image_size=32)


def dual_encoder(folder: Path) -> Path:
    """A CLIP with its processor."""
    processor = clip_processor(SIZES, WORDS)
    return _saved(T.CLIPModel, clip_config(SIZES, processor.tokenizer), processor, folder)


def captioner(folder: Path) -> Path:
    """A BLIP that writes captions, with its processor."""
    processor = blip_processor(SIZES, WORDS)
    config = blip_config(SIZES, processor.tokenizer)
    return _saved(T.BlipForConditionalGeneration, config, processor, folder)


def classifier(folder: Path) -> Path:
    """A ViT that classifies, with its image processor."""
    config = T.ViTConfig(**vit_settings(SIZES))
    return _saved(T.ViTForImageClassification, config, vit_processor(SIZES), folder)


def _saved(cls: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = cls(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pictures(folder: Path, count: int = 20) -> Path:
    """A folder of pictures of different sizes, some of them deeper."""
    numbers = torch.Generator().manual_seed(1)
    for number in range(count):
        place = folder / "deeper" if number % 3 == 0 else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (24 + number, 40, 3), generator=numbers, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    return folder


def captioned(folder: Path, count: int = 20, name: str = "captions.jsonl") -> Path:
    """A file of images and captions, beside its images."""
    images = sorted(pictures(folder, count).rglob("*.png"))
    rows = [
        {"image": str(path.relative_to(folder)), "text": WORDS[n % len(WORDS)]}
        for n, path in enumerate(images)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def sigmoid_encoder(folder: Path) -> Path:
    """A SigLIP, whose texts are always as long as its text tower allows."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower["intermediate_size"] = 64
    tokenizer = word_tokenizer(WORDS)
    images = T.SiglipImageProcessor(size={"height": 32, "width": 32})
    config = T.SiglipConfig(
        text_config={
            **tower, "vocab_size": len(tokenizer), "max_position_embeddings": 12,
            "projection_size": 32, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0,
        },
        vision_config={**tower, "image_size": 32, "patch_size": 16},
    )  # fmt: skip
    return _saved(T.SiglipModel, config, T.SiglipProcessor(images, tokenizer), folder)


def reader(folder: Path) -> Path:
    """A BERT that classifies texts, with its tokenizer."""
    tokenizer = word_tokenizer(WORDS)
    config = T.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=len(tokenizer), max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return _saved(T.BertForSequenceClassification, config, tokenizer, folder)


def assistant(folder: Path) -> Path:
    """A LLaVA, whose language model reads one token per patch of the image."""
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image = tokenizer.convert_tokens_to_ids("<image>")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = T.LlavaConfig(
        vision_config={
            **tower, "model_type": "clip_vision_model", "intermediate_size": 64,
            "image_size": 32, "patch_size": 16, "projection_dim": 16,
        },
        text_config={
            **tower, "model_type": "llama", "intermediate_size": 48, "num_key_value_heads": 1,
            "vocab_size": len(tokenizer) + 1, "max_position_embeddings": 64,
        },
        image_token_id=image, image_token_index=image, image_seq_length=4, vision_feature_layer=-1,
    )  # fmt: skip
    processor = T.LlavaProcessor(
        clip_image_processor(SIZES), tokenizer, patch_size=16, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    return _saved(T.LlavaForConditionalGeneration, config, processor, folder)
