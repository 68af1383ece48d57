"""Made-up inputs for a forward pass, read off a model's config."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..device import device_of, moved_to
from ..errors import UnsupportedError
from ..files import shown

__all__ = ["made_up_inputs"]

TEXT_TOKENS = 16


def made_up_inputs(
    model: Any, batch_size: int = 1, tokens: int = TEXT_TOKENS
) -> dict[str, torch.Tensor]:
    """Random images of the configured size and random tokens, as far as the model takes them.

    The inputs lie on the model's device, with the same numbers on every device. There is no
    attention mask on the meta device: forward passes look at a mask's values, and there are none.

    Raises UnsupportedError for models whose prompts hold image placeholders or whose images are cut
    into patches beforehand, since their inputs depend on the processor, and for configs that give
    no usable image size.
    """
    config = model.config
    takes = inspect.signature(model.forward).parameters
    if any(hasattr(config, name) for name in ("image_token_id", "image_token_index")):
        raise UnsupportedError("its prompt holds image placeholders that only a processor can set")
    names = ("vision_config", "image_config", "backbone_config")
    vision = next((getattr(config, name) for name in names if hasattr(config, name)), config)
    text = next((getattr(config, n) for n in ("text_config",) if hasattr(config, n)), config)
    words = min(1000, getattr(text, "vocab_size", 1000))
    inputs = {}
    numbers = torch.Generator().manual_seed(0)
    with torch.device("cpu"):
        if "pixel_values" in takes:
            side = getattr(vision, "image_size", None)
            if side is None:
                raise UnsupportedError("its config does not say how large an image is")
            sides = side if isinstance(side, list | tuple) else (side, side)
            shape = [getattr(vision, "num_channels", 3), *sides]
            if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
                raise UnsupportedError(f"its config says that an image is {shown(shape)}")
            inputs["pixel_values"] = torch.randn(batch_size, *shape, generator=numbers)
        if "input_ids" in takes:
            if "attention_mask" in takes and device_of(model).type != "meta":
                inputs["attention_mask"] = torch.ones(batch_size, tokens, dtype=torch.long)
            ids = torch.randint(4, max(5, words), (batch_size, tokens), generator=numbers)
            inputs["input_ids"] = ids
        if "decoder_input_ids" in takes:
            ids = torch.randint(4, max(5, words), (batch_size, tokens), generator=numbers)
            inputs["decoder_input_ids"] = ids
    if not inputs:
        raise UnsupportedError("it takes neither pixel_values nor input_ids")
    return moved_to(model, inputs)
