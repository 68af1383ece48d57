"""Random changes of training pictures: a resized crop, a mirror image, and RandAugment.

All randomness of a picture comes from one seed that goes with it, so a batch is the same whoever
makes it, and when.
"""

from __future__ import annotations

import dataclasses
import io
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from PIL import Image, ImageEnhance, ImageOps

from ..errors import DataError
from ..files import opened
from ..recipe.data import AugmentSpec
from .stored import Picture, StoredPicture

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "POLICIES",
    "AugmentedPicture",
    "Canvas",
    "augment",
    "augmented",
    "distorted",
    "random_box",
]

T = TypeVar("T", bound="DataclassInstance")
Size = tuple[int, int]

WIDEST = 4 / 3
"""The largest ratio of the sides of a crop."""
STRONGEST = 10
"""The magnitude at which an operation is strongest."""


@dataclass(frozen=True, slots=True)
class AugmentedPicture(StoredPicture):
    """A picture that is changed at random, by ``seed``, where it is made an input of the model.

    Elsewhere it stands for the picture itself, whose name and address it has.
    """

    lasting = False
    picture: Picture
    spec: AugmentSpec
    seed: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The name of the file."""
        return self.picture.name

    def open(self) -> BinaryIO:
        """The picture as it is stored."""
        if isinstance(self.picture, Path):
            with opened(self.picture, DataError) as file:
                return io.BytesIO(file.read())
        return self.picture.open()

    def __str__(self) -> str:
        return str(self.picture)


def augmented(item: T, spec: AugmentSpec, rng: random.Random) -> T:
    """The item with an :class:`AugmentedPicture` in place of each picture."""

    def one(picture: Picture) -> AugmentedPicture:
        return AugmentedPicture(picture, spec, rng.getrandbits(64))

    if hasattr(item, "images"):
        return dataclasses.replace(item, images=tuple(one(picture) for picture in item.images))
    picture: Picture = getattr(item, "image")  # noqa: B009
    return dataclasses.replace(item, image=one(picture))


def augment(
    image: Image.Image, spec: AugmentSpec, seed: int, size: Size | None, mean: tuple[int, ...]
) -> Image.Image:
    """The RGB picture, changed as ``spec`` says; a crop is scaled to ``size``, (width, height).

    ``mean`` is the colour that the policy ``timm`` fills empty corners with.
    """
    rng = random.Random(seed)
    if spec.crop:
        box = random_box(image.size, spec.crop, rng)
        image = image.crop(box).resize(size or image.size, Image.Resampling.BICUBIC)
    if spec.mirror and rng.random() < 0.5:
        image = ImageOps.mirror(image)
    policy = POLICIES[spec.policy]
    for _ in range(spec.operations):
        operation = rng.choice([*policy.operations.values()])
        if rng.random() < 0.5:
            continue
        strength = min(STRONGEST, max(0.0, rng.gauss(spec.magnitude, spec.deviation)))
        image = operation(Canvas(image, policy, mean, rng), strength / STRONGEST)
    return image


def random_box(size: Size, least: float, rng: random.Random) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom), as torchvision's RandomResizedCrop draws it.

    Its area is drawn evenly, the ratio of its sides evenly in the logarithm. After ten boxes that
    reach beyond the picture it is the largest central one with a ratio that is allowed.
    """
    width, height = size
    for _ in range(10):
        area = rng.uniform(least, 1) * width * height
        ratio = math.exp(rng.uniform(-math.log(WIDEST), math.log(WIDEST)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            left, top = rng.randint(0, width - wide), rng.randint(0, height - high)
            return left, top, left + wide, top + high
    wide, high = min(width, round(height * WIDEST)), min(height, round(width * WIDEST))
    left, top = (width - wide) // 2, (height - high) // 2
    return left, top, left + wide, top + high


def distorted(image: Image.Image, rng: random.Random) -> Image.Image:
    """The RGB picture in other colours, as mmseg's PhotoMetricDistortion draws them.

    Brightness moves by up to 32 levels, contrast and saturation by a factor between 0.5 and 1.5,
    the hue by up to 36 degrees, each half of the time; contrast comes before or after the colours.
    """

    def levels(image: Image.Image, change: Callable[[int], float]) -> Image.Image:
        table = [int(min(255, max(0, change(level)))) for level in range(256)]
        return image.point(table * len(image.getbands()))

    def contrast(image: Image.Image) -> Image.Image:
        if rng.random() < 0.5:
            return image
        factor = rng.uniform(0.5, 1.5)
        return levels(image, lambda level: factor * level)

    if rng.random() < 0.5:
        more = rng.uniform(-32, 32)
        image = levels(image, lambda level: level + more)
    first = rng.random() < 0.5
    image = contrast(image) if first else image
    hue, saturation, value = image.convert("HSV").split()
    if rng.random() < 0.5:
        factor = rng.uniform(0.5, 1.5)
        saturation = levels(saturation, lambda level: factor * level)
    if rng.random() < 0.5:
        turn = rng.randint(-26, 25)  # of 256, as -18 to 17 of 180
        hue = hue.point([(level + turn) % 256 for level in range(256)])
    image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image if first else contrast(image)


# -- RandAugment -----------------------------------------------------------------------


@dataclass(frozen=True)
class Canvas:
    """A picture, and how its pixels move: by which interpolation, over which colour."""

    image: Image.Image
    policy: _Policy
    mean: tuple[int, ...]
    rng: random.Random

    def sign(self, value: float) -> float:
        """The value or its negative."""
        return -value if self.rng.random() < 0.5 else value

    def moved(self, *matrix: float) -> Image.Image:
        """Each pixel (x, y) taken from (ax + by + c, dx + ey + f)."""
        return self.image.transform(
            self.image.size,
            Image.Transform.AFFINE,
            matrix,
            resample=self.policy.resample,
            fillcolor=self.fill,
        )

    def turned(self, degrees: float) -> Image.Image:
        """Turned about the centre."""
        return self.image.rotate(degrees, self.policy.resample, fillcolor=self.fill)

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour of what the picture does not cover."""
        return self.policy.fill or self.mean


Enhancer = Callable[[Image.Image], ImageEnhance._Enhance]
Operation = Callable[[Canvas, float], Image.Image]
"""From a picture and a strength between 0 and 1 to a picture."""


@dataclass(frozen=True)
class _Policy:
    operations: Mapping[str, Operation]
    resample: Image.Resampling
    fill: tuple[int, ...] = ()


def _enhanced(kind: Enhancer) -> Operation:
    """From 0.1 to 1.9 times as much of it, where 1 is the picture as it was."""
    return lambda canvas, s: kind(canvas.image).enhance(0.1 + 1.8 * s)


def _more_or_less(kind: Enhancer) -> Operation:
    """The stronger, the further from the picture as it was."""
    return lambda canvas, s: kind(canvas.image).enhance(1 + canvas.sign(0.9 * s))


def _brighter_where_dark(canvas: Canvas, strength: float) -> Image.Image:
    more = int(110 * strength)
    table = [min(255, level + more) if level < 128 else level for level in range(256)]
    return canvas.image.point(table * 3)


def _posterized(image: Image.Image, bits: int) -> Image.Image:
    """The highest ``bits`` of each colour; none of them leaves black, which Pillow refuses."""
    return image.point(lambda level: level & (0xFF00 >> bits))


COMMON: dict[str, Operation] = {
    "autocontrast": lambda canvas, s: ImageOps.autocontrast(canvas.image),
    "equalize": lambda canvas, s: ImageOps.equalize(canvas.image),
    "rotate": lambda canvas, s: canvas.turned(canvas.sign(30 * s)),
    "shear-x": lambda canvas, s: canvas.moved(1, canvas.sign(0.3 * s), 0, 0, 1, 0),
    "shear-y": lambda canvas, s: canvas.moved(1, 0, 0, canvas.sign(0.3 * s), 1, 0),
}

POLICIES = {
    # BLIP's ten, which move a picture by at most ten pixels; the centre of a turn lies half a pixel
    # from that of its OpenCV, and so does what a shear leaves in place
    "blip": _Policy(
        {
            **COMMON,
            "identity": lambda canvas, s: canvas.image,
            "brightness": _enhanced(ImageEnhance.Brightness),
            "sharpness": _enhanced(ImageEnhance.Sharpness),
            "translate-x": lambda canvas, s: canvas.moved(1, 0, canvas.sign(10 * s), 0, 1, 0),
            "translate-y": lambda canvas, s: canvas.moved(1, 0, 0, 0, 1, canvas.sign(10 * s)),
        },
        Image.Resampling.BILINEAR,
        (128, 128, 128),
    ),
    # timm's fifteen in the form "inc1": a larger magnitude is a stronger change
    "timm": _Policy(
        {
            **COMMON,
            "invert": lambda canvas, s: ImageOps.invert(canvas.image),
            "posterize": lambda canvas, s: _posterized(canvas.image, 4 - int(4 * s)),
            "solarize": lambda canvas, s: ImageOps.solarize(canvas.image, 256 - int(256 * s)),
            "solarize-add": _brighter_where_dark,
            "color": _more_or_less(ImageEnhance.Color),
            "contrast": _more_or_less(ImageEnhance.Contrast),
            "brightness": _more_or_less(ImageEnhance.Brightness),
            "sharpness": _more_or_less(ImageEnhance.Sharpness),
            "translate-x": lambda canvas, s: canvas.moved(
                1, 0, canvas.sign(0.45 * s * canvas.image.width), 0, 1, 0
            ),
            "translate-y": lambda canvas, s: canvas.moved(
                1, 0, 0, 0, 1, canvas.sign(0.45 * s * canvas.image.height)
            ),
        },
        Image.Resampling.BICUBIC,
    ),
}
"""The lists of operations of RandAugment, by the name of the code that they are from."""
