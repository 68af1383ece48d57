"""A model that runs the same layer several times, as ALBERT does."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from vlprune.testing import build

__all__ = ["batches", "looped"]


class _Again(nn.Module):
    """A layer, three times over."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.only = nn.ModuleList([layer])

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        for _ in range(3):
            out = self.only[0](hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return out


def looped() -> T.ViTForImageClassification:
    """A ViT whose second layer runs three times, in float64."""
    model: Any = build("vit").model.double()
    model.vit.layers[1] = _Again(model.vit.layers[1])
    return model  # type: ignore[no-any-return]


def batches(count: int = 8, items: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    """Pictures for a ViT of the suite, in float64."""
    g = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(items, 3, 16, 16, generator=g).double()} for _ in range(count)
    ]
