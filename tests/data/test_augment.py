"""Random changes of training pictures: worked out by hand where they can be."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlprune.data.augment import (
    POLICIES,
    AugmentedPicture,
    Canvas,
    augment,
    augmented,
    distorted,
    random_box,
)
from vlprune.data.captions import CaptionedImage
from vlprune.data.files import open_image
from vlprune.errors import RecipeError
from vlprune.recipe.data import AugmentSpec
from vlprune.recipe.spec import DataSpec, Recipe, load_recipe

GREY = (128, 128, 128)


def picture(width: int = 24, height: int = 16) -> Image.Image:
    """Every pixel another colour: red counts columns, green rows."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns * 7, rows * 9, columns], -1).astype(np.uint8))


def applied(policy: str, name: str, strength: float, image: Image.Image, seed: int = 0) -> Any:
    chosen = POLICIES[policy]
    canvas = Canvas(image, chosen, (1, 2, 3), random.Random(seed))
    return np.asarray(chosen.operations[name](canvas, strength)).astype(int)


# -- crops ---------------------------------------------------------------------------------


def test_crops_have_the_areas_and_ratios_that_were_asked_for() -> None:
    areas, ratios = [], []
    rng = random.Random(0)
    for _ in range(2000):
        left, top, right, bottom = random_box((240, 160), 0.25, rng)
        assert 0 <= left < right <= 240
        assert 0 <= top < bottom <= 160
        areas.append((right - left) * (bottom - top) / (240 * 160))
        ratios.append((right - left) / (bottom - top))
    assert 0.24 < min(areas) < 0.27
    assert 0.86 < max(areas) < 0.9  # of a picture of 3 to 2, as much as 4 to 3 can cover
    assert 0.73 < min(ratios) < 0.77
    assert 1.3 < max(ratios) < 1.36


def test_a_crop_of_the_whole_of_a_long_picture_is_its_middle() -> None:
    assert random_box((100, 10), 1.0, random.Random(0)) == (43, 0, 56, 10)
    assert random_box((10, 100), 1.0, random.Random(0)) == (0, 43, 10, 56)


def test_a_crop_is_the_part_of_the_picture_scaled_to_the_models_size() -> None:
    image, spec = picture(), AugmentSpec(crop=0.5)
    box = random_box(image.size, 0.5, random.Random(3))
    wanted = image.crop(box).resize((8, 8), Image.Resampling.BICUBIC)
    assert np.array_equal(augment(image, spec, 3, (8, 8), GREY), wanted)


def test_half_of_the_pictures_are_mirrored() -> None:
    image, spec = picture(), AugmentSpec(mirror=True)
    found = [np.asarray(augment(image, spec, seed, None, GREY)) for seed in range(200)]
    mirrored = [bool(np.array_equal(one, np.asarray(image)[:, ::-1])) for one in found]
    same = [bool(np.array_equal(one, image)) for one in found]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 80 < sum(mirrored) < 120


# -- operations ----------------------------------------------------------------------------


def test_blips_list_at_magnitude_5() -> None:
    """BLIP's strengths, by hand: brightness and sharpness 1.0, shifts of five pixels, and so on."""
    assert sorted(POLICIES["blip"].operations) == [
        "autocontrast", "brightness", "equalize", "identity", "rotate", "sharpness", "shear-x",
        "shear-y", "translate-x", "translate-y",
    ]  # fmt: skip
    image = picture()
    pixels = np.asarray(image).astype(int)
    for name in ("identity", "brightness", "sharpness"):
        assert np.array_equal(applied("blip", name, 0.5, image), pixels)
    assert abs(applied("blip", "brightness", 1.0, image) - (1.9 * pixels).clip(0, 255)).max() < 1.01
    moved = {tuple(applied("blip", "translate-x", 0.5, image, seed).flat) for seed in range(20)}
    left = np.full_like(pixels, 128)
    left[:, :-5] = pixels[:, 5:]
    right = np.full_like(pixels, 128)
    right[:, 5:] = pixels[:, :-5]
    assert moved == {tuple(left.flat), tuple(right.flat)}
    down = {tuple(applied("blip", "translate-y", 0.5, image, seed).flat) for seed in range(20)}
    up = np.full_like(pixels, 128)
    up[:-5] = pixels[5:]
    assert tuple(up.flat) in down
    sheared = applied("blip", "shear-x", 0.5, image, 1)
    assert abs(sheared[0] - pixels[0]).max() <= 7  # the first row moves by less than a pixel
    assert abs(sheared[-1] - pixels[-1]).max() > 14
    stretched = applied("blip", "autocontrast", 0.5, image)
    assert stretched[..., 0].max() == 255
    turned = applied("blip", "rotate", 1.0, image, 1)
    assert list(turned[0, 0]) == [128, 128, 128]


def test_timms_list_at_the_greatest_magnitude() -> None:
    """With ``inc1`` the greatest magnitude is the strongest change."""
    assert len(POLICIES["timm"].operations) == 15
    image = picture()
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(applied("timm", "invert", 1.0, image), 255 - pixels)
    assert np.array_equal(applied("timm", "posterize", 0.5, image), pixels & 0b11000000)
    assert np.array_equal(applied("timm", "posterize", 1.0, image), pixels * 0)
    assert np.array_equal(applied("timm", "solarize", 0.0, image), pixels)
    assert np.array_equal(applied("timm", "solarize", 1.0, image), 255 - pixels)
    added = applied("timm", "solarize-add", 1.0, image)
    assert np.array_equal(added, np.where(pixels < 128, np.minimum(255, pixels + 110), pixels))
    bright = {applied("timm", "brightness", 1.0, image, seed).max() for seed in range(9)}
    most = int(pixels.max())
    assert bright == {round(0.1 * most), min(255, round(1.9 * most))}
    moved = [applied("timm", "translate-x", 1.0, image, seed) for seed in range(9)]
    share = {int((one == (1, 2, 3)).all(-1).sum()) / one[..., 0].size for one in moved}
    assert all(0.40 < one < 0.50 for one in share)  # 45 % of the width, over the mean colour


def test_operations_are_drawn_evenly_and_left_out_half_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts: dict[str, int] = {}
    strengths: list[float] = []

    def noted(name: str) -> Any:
        def one(canvas: Any, strength: float) -> Image.Image:
            counts[name] = counts.get(name, 0) + 1
            strengths.append(strength)
            return canvas.image

        return one

    policy = POLICIES["timm"]
    for name in [*policy.operations]:
        monkeypatch.setitem(policy.operations, name, noted(name))  # type: ignore[arg-type]
    spec = AugmentSpec(operations=2, magnitude=9, deviation=0.5, policy="timm")
    for seed in range(3000):
        augment(picture(2, 2), spec, seed, None, GREY)
    assert 2850 < sum(counts.values()) < 3150
    assert len(counts) == 15
    assert min(counts.values()) > 150
    assert 0.88 < sum(strengths) / len(strengths) < 0.91
    assert max(strengths) == 1.0  # cut off at the greatest


def test_distorted_colours_stay_within_their_ranges() -> None:
    """A grey picture has no colour to turn: contrast and brightness alone, half of the time each.

    100 becomes 50 to 150 by contrast, 68 to 132 by brightness, and at most 198 by both.
    """
    grey = Image.new("RGB", (2, 2), (100, 100, 100))
    found = []
    for seed in range(400):
        pixels = np.asarray(distorted(grey, random.Random(seed)))
        assert pixels.min() == pixels.max()
        found.append(int(pixels[0, 0, 0]))
    assert 70 < sum(level == 100 for level in found) < 130  # a quarter stays
    assert 34 <= min(found) < 60
    assert 150 < max(found) <= 198
    colour = Image.new("RGB", (2, 2), (120, 40, 40))  # too dark to be cut off
    seen = [distorted(colour, random.Random(seed)).convert("HSV").getpixel((0, 0))
            for seed in range(400)]  # fmt: skip
    turns = {min(hue, 256 - hue) for hue, _, _ in seen}  # type: ignore[misc]
    assert 24 <= max(turns) <= 29  # red is 0; 36 degrees are 26 of 256, before rounding


# -- where the randomness comes from ---------------------------------------------------------


def test_a_picture_is_changed_by_its_seed_alone(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    spec = AugmentSpec(crop=0.5, mirror=True, operations=2)
    item = CaptionedImage(tmp_path / "a.png", ("a",))
    one, two = (augmented(item, spec, random.Random(5)).image for _ in range(2))
    assert isinstance(one, AugmentedPicture)
    assert one == two
    assert one != augmented(item, spec, random.Random(6)).image
    assert str(one) == str(item.image)
    assert (one.name, one.stem) == ("a.png", "a")
    assert np.array_equal(open_image(one), picture())
    random.seed(0)
    first = augment(picture(), spec, one.seed, (8, 8), GREY)
    random.seed(1)
    np.random.seed(1)
    assert np.array_equal(augment(picture(), spec, two.seed, (8, 8), GREY), first)


def test_only_some_tasks_augment() -> None:
    data = DataSpec(augment=AugmentSpec(crop=0.5))
    with pytest.raises(RecipeError, match=r"data.augment is only for .*captioning.*, not|only for"):
        Recipe("grounding", {"params": 0.5}, data=data)
    recipe = Recipe("vqa", {"params": 0.5}, data=data)
    assert recipe.toy().data.augment == data.augment
    with pytest.raises(RecipeError, match=r"data.augment.crop must be a number"):
        load_recipe(Path(__file__).parents[2] / "src/vlprune/demo.yaml", ["data.augment.crop=2"])
