"""Batches that a model trains on: changed at random, and no others."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

import vlprune
from vlprune.commands.pipeline.make import CalibrationBatches, HeldOut
from vlprune.data.pairs import Statement
from vlprune.data.pictures import IGNORE, open_mask
from vlprune.errors import RecipeError
from vlprune.recipe.data import AugmentSpec
from vlprune.recipe.spec import CalibrationSpec, DataSpec, ModelSpec, Recipe, Training
from vlprune.tasks import TASKS, Task
from vlprune.tasks.reasoning import swapped
from vlprune.training.fit import fit
from vlprune.training.loading import Seeded
from vlprune.training.regularise import regularised

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)
BLIP = AugmentSpec(crop=0.5, mirror=True, operations=2, magnitude=5)
ABLE = ["blip-retrieval", "captioning", "classification", "reasoning", "retrieval", "vqa",
        "zero-shot"]  # fmt: skip


def made(name: str, folder: Path, augment: AugmentSpec = BLIP, **options: Any) -> Task:
    data = DataSpec(format="shapes", train_items=6, test_items=4, augment=augment)
    return TASKS[name](SMALL, data, folder, options)


@pytest.mark.parametrize("name", ABLE)
def test_training_batches_are_changed_and_no_others(name: str, tmp_path: Path) -> None:
    off = {"flip": False, "mixup": 0.0} if name == "classification" else {}
    task = made(name, tmp_path, **off)
    items = list(task.train[:4])
    batch = Seeded(task.training_batch, seed=1)
    rows = list(enumerate(items))
    one, again = batch(rows), batch(rows)
    other = Seeded(task.training_batch, seed=2)(rows)
    plain = task.collate(items, random.Random(0))
    shape = plain["pixel_values"].shape
    assert one["pixel_values"].shape == other["pixel_values"].shape == shape
    assert torch.equal(one["pixel_values"], again["pixel_values"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])
    assert not torch.equal(one["pixel_values"], plain["pixel_values"])
    if "keys" in plain:  # what belongs to the same picture is still known
        assert torch.equal(one["keys"], plain["keys"])
    pixels = task.collate(items)["pixel_values"]
    assert torch.equal(plain["pixel_values"], pixels)
    assert torch.equal(HeldOut(task, items, 4)[0]["pixel_values"], pixels)
    recipe = Recipe(name, {"params": 0.5}, calibration=CalibrationSpec(6, 6))
    seen = CalibrationBatches(task, recipe)
    chosen = [task.train[number] for number in seen.chosen]
    assert torch.equal(seen[0]["pixel_values"], task.collate(chosen)["pixel_values"])


class Stop(TrainerCallback):
    """Ends a training after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


def test_a_training_that_is_stopped_goes_on_exactly(tmp_path: Path) -> None:
    """With changed pictures, drop path and dropout."""
    task = made("reasoning", tmp_path, swap=True)
    spec = Training(steps=4, batch_size=2, save_steps=2)
    collate = pickle.loads(pickle.dumps(task.training_batch))  # as a worker gets it

    def trained(*callbacks: Any, **more: Any) -> Tensor:
        torch.manual_seed(0)
        model = task.new_model()
        rates = {"vision_model.*": 0.5}, {"text_encoder.*": 0.1}
        with regularised(model, model, vlprune.discover(model).structures, *rates):
            fit(model, task.train, collate, spec, seed=3, callbacks=callbacks, **more)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = trained()
    stopped = trained(Stop(), checkpoints=tmp_path / "phase")
    assert not torch.equal(stopped, whole)
    assert torch.equal(trained(checkpoints=tmp_path / "phase"), whole)


@pytest.mark.parametrize("name", ABLE)
def test_without_changes_a_training_batch_is_what_it_was(name: str, tmp_path: Path) -> None:
    task = made(name, tmp_path, AugmentSpec())
    items = list(task.train[:4])
    one = task.training_batch(items, random.Random(7))
    two = task.collate(items, random.Random(7))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[key]))


def test_a_processor_that_crops_gets_no_second_crop(tmp_path: Path) -> None:
    """DeiT's scales to 256 and cuts out 224: a picture of 224 must pass as it is."""
    from transformers import DeiTImageProcessor

    task = made("classification", tmp_path, AugmentSpec(crop=1.0), flip=False, mixup=0.0)
    task.pixels.image_processor = DeiTImageProcessor(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}
    )
    assert task.pixels.size == (32, 32)
    batch = task.training_batch([task.train[0]], random.Random(0))
    assert batch["pixel_values"].shape[2:] == (32, 32)
    task.pixels.image_processor.crop_size = None
    task.pixels.image_processor.do_center_crop = False
    assert task.pixels.size == (40, 40)


def test_a_crop_needs_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.tasks.pixels import PixelCache

    monkeypatch.setattr(PixelCache, "size", None)
    with pytest.raises(RecipeError, match=r"data.augment.crop must be 0"):
        made("captioning", tmp_path)
    made("captioning", tmp_path, AugmentSpec(mirror=True))


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("The left image shows two dogs.", "The right image shows two dogs."),
        ("Left: one. RIGHT: two", "Right: one. Left: two"),
        ("a (left) and a left/right one", "a (right) and a left/right one"),
        ("the left-hand dog, left", "the left-hand dog, right"),
        ("Nothing is leftover.", "Nothing is leftover."),
    ],
)
def test_a_statement_from_the_other_side(text: str, other: str) -> None:
    one = Statement("1", text, (Path("a"), Path("b")), True)
    assert swapped(one) == Statement("1", other, (Path("b"), Path("a")), True)


def test_half_of_the_statements_are_swapped_only_where_asked_for(tmp_path: Path) -> None:
    task = made("reasoning", tmp_path, AugmentSpec(), swap=True)
    item = task.train[0]
    assert item.images[0] != item.images[1]
    rng = random.Random(0)
    found = [task.changed(item, rng) for _ in range(200)]
    assert {one.truth for one in found} == {item.truth}
    assert 80 < sum(one.images == item.images[::-1] for one in found) < 120
    plain = made("reasoning", tmp_path, AugmentSpec())
    assert all(plain.changed(item, rng) is item for _ in range(20))


# -- segmentation ----------------------------------------------------------------------------


def segmentation(folder: Path, **options: Any) -> Any:
    """A task on one picture of 32 by 64: class 1 is its right third, the rest is class 0."""
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (64, 32), (200, 100, 50)).save(folder / "images" / "a.png")
    mask = np.ones((32, 64), dtype=np.uint8)
    mask[:, 43:] = 2
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    split = {"images": str(folder / "images"), "masks": str(folder / "masks")}
    data = DataSpec(format="ade20k", train=split, test=split)
    return TASKS["segmentation"](SMALL, data, folder, options)


def test_a_crop_with_one_class_is_drawn_again(tmp_path: Path) -> None:
    """At the picture's own size half of the places have class 0 alone."""
    shares = []
    for most in (1.0, 0.75):
        task, rng, counted = segmentation(tmp_path, largest_class=most), random.Random(0), []
        labels = torch.from_numpy(open_mask(task.train[0].mask))
        for _ in range(300):
            x, y = task._place(labels, rng)
            assert y == 0
            assert 0 <= x <= 32
            counted.append(float((labels[:, x : x + 32] == 0).double().mean()))
        shares.append(counted)
    assert sum(share == 1 for share in shares[0]) > 80
    assert max(shares[1]) > 0.7  # what a hundredth of all ten draws miss may be above
    assert sum(share >= 0.75 for share in shares[1]) < 5
    assert task._place(labels, None) == (16, 0)


def test_colours_are_distorted_only_while_training(tmp_path: Path) -> None:
    task = segmentation(tmp_path, distort=True, augment=False)
    items = list(task.train)
    plain = task.collate(items)
    assert torch.equal(task.collate(items, random.Random(0))["pixel_values"], plain["pixel_values"])
    seen = [task.training_batch(items, random.Random(seed)) for seed in range(20)]
    assert len({float(one["pixel_values"].sum()) for one in seen}) > 15
    assert all(torch.equal(one["labels"], plain["labels"]) for one in seen)
    again = segmentation(tmp_path, augment=False).training_batch(items, random.Random(0))
    assert torch.equal(again["pixel_values"], plain["pixel_values"])


def test_small_crops_are_padded_on_the_right_after_the_mirror(tmp_path: Path) -> None:
    task = segmentation(tmp_path, augment=True)
    for seed in range(40):
        batch = task.collate(list(task.train), random.Random(seed))
        ignored = (batch["labels"][0] == IGNORE).any(0)
        assert not ignored[0] or bool(ignored.all())
