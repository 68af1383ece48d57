"""Pictures as a model's inputs: prepared by its image processor, and kept where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.augment import AugmentedPicture, augment
from ..data.files import open_image
from ..data.stored import Picture, StoredPicture

__all__ = ["PIXELS", "Names", "PixelCache"]

Names = tuple[str, ...]
PIXELS = ("pixel_values",)


class PixelCache:
    """Inputs made of images; keeps those of as many images as fit in ``limit`` bytes.

    Each process has its own, and so has each worker of a loader.
    """

    def __init__(self, image_processor: Any, limit: int = 2 * 1024**3) -> None:
        self.image_processor = image_processor
        self.limit = self.room = limit
        self.kept: dict[tuple[Picture, Names, tuple[int, int] | None], dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": {}, "room": self.limit}

    def __call__(self, pictures: Sequence[Picture], size: tuple[int, int] | None = None) -> Tensor:
        """(images, channels, height, width), float32; ``size`` as in :func:`open_image`."""
        return self.inputs(pictures, PIXELS, size)["pixel_values"]

    def inputs(
        self, pictures: Sequence[Picture], names: Names, size: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """What the image processor makes under these names, for all images: (images, ...) each."""
        found = [self._one(picture, names, size) for picture in pictures]
        return {name: torch.stack([one[name] for one in found]) for name in names}

    def _one(
        self, picture: Picture, names: Names, asked: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        if isinstance(picture, AugmentedPicture):
            return self._augmented(picture, names)
        found = self.kept.get((picture, names, asked))
        if found is None:
            image: Image.Image = open_image(picture, asked)
            made = self.image_processor(image, return_tensors="pt")
            found = {name: made[name][0] for name in names}
            size = sum(one.numel() * one.element_size() for one in found.values())
            seen_again = not isinstance(picture, StoredPicture) or picture.lasting
            if seen_again and size <= self.room:
                self.room -= size
                self.kept[picture, names, asked] = found
        return found

    def _augmented(self, picture: AugmentedPicture, names: Names) -> dict[str, Tensor]:
        """A crop has the model's size already, so that nothing is resized or cropped again."""
        mean = getattr(self.image_processor, "image_mean", None) or [0.5] * 3
        colour = tuple(round(255 * level) for level in mean)
        image = open_image(picture.picture)
        image = augment(image, picture.spec, picture.seed, self.size, colour)
        as_it_is = {"do_resize": False, "do_center_crop": False} if picture.spec.crop else {}
        made = self.image_processor(image, return_tensors="pt", **as_it_is)
        return {name: made[name][0] for name in names}

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the model's pictures; None if not all have the same."""
        centre = getattr(self.image_processor, "do_center_crop", False)
        size = getattr(self.image_processor, "crop_size" if centre else "size", None)
        sides = {name: size[name] for name in ("width", "height") if size and name in size}
        if not all(sides.get(name) for name in ("width", "height")):
            return None
        return int(sides["width"]), int(sides["height"])
