"""Small models that several tests share."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

import vlprune
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def clip(depths: tuple[int, int] = (4, 2), widths: tuple[int, int] = (24, 24)) -> Any:
    """A CLIP whose towers are as wide as each other; text FFNs are smaller."""
    torch.manual_seed(0)
    text, vision = (
        {"hidden_size": w, "num_hidden_layers": d, "num_attention_heads": 3, "intermediate_size": f}
        for w, d, f in zip(widths, reversed(depths), (20, 32), strict=True)
    )
    config = T.CLIPConfig(
        text_config={
            **text, "vocab_size": 64, "max_position_embeddings": 8,
            "bos_token_id": 0, "eos_token_id": 63, "pad_token_id": 1,
        },
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    model = T.CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four texts and pictures for :func:`clip`."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 60, (4, 6), generator=g)
    return {"input_ids": ids, "pixel_values": torch.randn(4, 3, 16, 16, generator=g).to(dtype)}


def small(family: str = "clip", seed: int = 0, **options: Any) -> Any:
    """A model of the suite, cut to half its units."""
    sample = build(family, seed)
    description = vlprune.discover(sample.model, **options)
    plan = make_plan(description, lambda size: max(1, size // 2), seed)
    return vlprune.rewrite(sample.model, description, plan)
