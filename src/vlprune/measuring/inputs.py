"""Made-up inputs for a forward pass, read off a model's config."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch

from ..device import device_of, moved_to
from ..errors import UnsupportedError
from ..files import shown

__all__ = ["made_up_inputs", "made_up_parts"]

TEXT_TOKENS = 16


def made_up_inputs(
    model: Any,
    batch_size: int = 1,
    tokens: int = TEXT_TOKENS,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Random images of the configured size and random tokens, as far as the model takes them.

    The inputs lie on ``device`` (default: the model's, and in its dtype), with the same numbers on
    every device. There is no attention mask on the meta device: forward passes look at a mask's
    values, and there are none.

    Raises UnsupportedError for models whose prompts hold image placeholders or whose images are cut
    into patches beforehand, since their inputs depend on the processor, and for configs that give
    no usable image size.
    """
    config, place = model.config, device or device_of(model)
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
            if "attention_mask" in takes and place.type != "meta":
                inputs["attention_mask"] = torch.ones(batch_size, tokens, dtype=torch.long)
            ids = torch.randint(4, max(5, words), (batch_size, tokens), generator=numbers)
            inputs["input_ids"] = ids
        if "decoder_input_ids" in takes:
            ids = torch.randint(4, max(5, words), (batch_size, tokens), generator=numbers)
            inputs["decoder_input_ids"] = ids
        if "grid_thw" in takes:
            inputs |= _patches(config, numbers)
    if not inputs:
        raise UnsupportedError("it takes neither pixel_values nor input_ids")
    if device is not None:
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return moved_to(model, inputs)


def _patches(config: Any, numbers: torch.Generator) -> dict[str, torch.Tensor]:
    """One image of 2 x 2 merged patches for the vision tower of a Qwen-VL, cut up as it takes it.

    Raises UnsupportedError for a config without the sizes.
    """
    names = ("temporal_patch_size", "patch_size", "spatial_merge_size")
    depth, side, merged = (getattr(config, name, None) for name in names)
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", None) or 3
    if not (depth and side and merged):
        raise UnsupportedError("its config does not say how images are cut into patches")
    grid = torch.tensor([[1, 2 * merged, 2 * merged]])
    patches = torch.randn(int(grid.prod()), channels * depth * side**2, generator=numbers)
    return {"hidden_states": patches, "grid_thw": grid}


def made_up_parts(model: Any, device: torch.device) -> dict[str, dict[str, torch.Tensor]]:
    """Made-up inputs for the model as a whole, or else for each part of it that allows them.

    {path of the part, "" for the model: keywords of its forward pass}, on ``device``. A part is a
    model of its own inside, such as a tower: a vision-language model whose prompts only a processor
    can make still has a vision tower that takes images, and a language model that takes words.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if "" in found or inside or not hasattr(module, "base_model_prefix"):
            continue
        with suppress(UnsupportedError, AttributeError):
            found[path] = made_up_inputs(module, device=device)
    return found
