"""Made-up inputs for a forward pass, read off a model's config."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .errors import UnsupportedError

__all__ = ["made_up_inputs"]

TEXT_TOKENS = 16


def made_up_inputs(model: Any) -> dict[str, torch.Tensor]:
    """One image of the configured size and 16 tokens, as far as the model takes them.

    No attention mask: forward passes look into masks, which a model without weights (on the
    meta device) cannot. Raises UnsupportedError for models whose prompts hold image
    placeholders or whose images are cut into patches beforehand: their inputs depend on their
    processor.
    """
    config = model.config
    takes = inspect.signature(model.forward).parameters
    if any(hasattr(config, name) for name in ("image_token_id", "image_token_index")):
        raise UnsupportedError("its prompt holds image placeholders that only a processor can set")
    names = ("vision_config", "image_config", "backbone_config")
    vision = next((getattr(config, name) for name in names if hasattr(config, name)), config)
    inputs = {}
    with torch.device(model.device):
        if "pixel_values" in takes:
            side = getattr(vision, "image_size", None)
            if side is None:
                raise UnsupportedError("its config does not say how large an image is")
            height, width = (side, side) if isinstance(side, int) else tuple(side)
            channels = getattr(vision, "num_channels", 3)
            inputs["pixel_values"] = torch.zeros(1, channels, height, width)
        if "input_ids" in takes:
            inputs["input_ids"] = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
        if "decoder_input_ids" in takes:
            inputs["decoder_input_ids"] = torch.ones(1, TEXT_TOKENS, dtype=torch.long)
    if not inputs:
        raise UnsupportedError("it takes neither pixel_values nor input_ids")
    return inputs
