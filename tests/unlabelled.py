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
    clip_processor,
    vit_processor,
    vit_settings,
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
