"""Detection with models that number their classes: labels, scores, classes, and whole runs."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from PIL import Image

import vlprune
from vlprune.commands.pipeline.compress import compress
from vlprune.data.regions import Scenery
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError, RecipeError, UnsupportedError
from vlprune.recipe.options import check_options
from vlprune.recipe.spec import DataSpec, ModelSpec, Recipe, Training
from vlprune.tasks import DetectionTask
from vlprune.tasks.detectors import ClassDetector
from vlprune.testing import build

TINY = ModelSpec(
    width=32, heads=4, vision_layers=2, text_layers=2, image_size=64, patch_size=16
)  # fmt: skip
QUIET = lambda done: None  # noqa: E731
CLASSES = {0: "N/A", 1: "triangle", 2: "circle", 3: "star", 4: "square"}
PROCESSORS = {
    "detr": T.DetrImageProcessor,
    "conditional_detr": T.ConditionalDetrImageProcessor,
    "deformable_detr": T.DeformableDetrImageProcessor,
    "rt_detr": T.RTDetrImageProcessor,
    "rt_detr_v2": T.RTDetrImageProcessor,
    "d_fine": T.RTDetrImageProcessor,
    "yolos": T.YolosImageProcessor,
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("scenes"), train=24, test=12)


def data(scenes: Path) -> DataSpec:
    return DataSpec(folder=str(scenes), train_items=24, test_items=12)


def published(name: str, folder: Path, classes: dict[int, str], **size: int) -> ModelSpec:
    """A folder with a tiny model of the family and its own image processor."""
    sample: Any = build(name).model
    sample.config.id2label = classes
    sample.config.label2id = {label: number for number, label in classes.items()}
    size = size or {"height": 64, "width": 64}
    vlprune.save(type(sample)(sample.config), folder, processor=PROCESSORS[name](size=size))
    return ModelSpec(path=str(folder))


def stretched(item: Scenery, path: Path) -> Scenery:
    """The picture at twice its width, with its boxes."""
    with Image.open(item.image) as picture:
        width, height = picture.size
        picture.convert("RGB").resize((2 * width, height)).save(path)
    boxes = tuple((2 * x, y, 2 * w, h) for x, y, w, h in item.boxes)
    return replace(item, image=path, size=(2 * width, height), boxes=boxes)


class Oracle(torch.nn.Module):
    """Answers with the true boxes, in the layout of the family's scores."""

    def __init__(self, task: DetectionTask, softmax: bool, shift: int = 0) -> None:
        super().__init__()
        self.task, self.softmax, self.shift = task, softmax, shift
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.items = iter(task.test)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        told = [self.task.detector.labels(next(self.items)) for _ in pixel_values]  # type: ignore[union-attr]
        classes = len(CLASSES) + self.softmax
        logits = torch.full((len(told), 8, classes), -9.0)
        if self.softmax:
            logits[..., -1] = 9.0
        boxes = torch.full((len(told), 8, 4), 0.5)
        for i, one in enumerate(told):
            for query, (number, box) in enumerate(
                zip(one["class_labels"], one["boxes"], strict=True)
            ):
                logits[i, query, (int(number) + self.shift) % len(CLASSES)] = 19.0
                boxes[i, query] = box
        return type("Output", (), {"logits": logits, "pred_boxes": boxes})()


# -- published models ------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_published_model_trains_and_is_judged(name: str, scenes: Path, tmp_path: Path) -> None:
    task = DetectionTask(published(name, tmp_path, CLASSES), data(scenes), scenes)
    assert task.detector
    assert task.detector.numbers == {"circle": 2, "square": 4, "triangle": 1}
    model = task.dense_model().train()
    batch = task.collate(list(task.train[:4]), random.Random(0))
    loss = task.objective(model)(**batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    figures = task.evaluate(model, QUIET, batch_size=5)
    assert figures == pytest.approx(task.evaluate(model, QUIET, batch_size=12))
    assert {one["category_id"] for one in task.results(model)} <= {1, 2, 3}
    task.test = [stretched(one, tmp_path / f"{i}.png") for i, one in enumerate(task.test)]
    oracle = Oracle(task, softmax=name in ("detr", "yolos"))
    assert task.evaluate(oracle, QUIET, batch_size=5)["ap"] == pytest.approx(1.0)
    oracle.items, oracle.shift = iter(task.test), 1
    assert task.evaluate(oracle, QUIET, batch_size=5)["ap"] < 0.3


@pytest.mark.parametrize("name", ["detr", "rt_detr"])
def test_labels_are_those_of_the_models_own_processor(
    name: str, scenes: Path, tmp_path: Path
) -> None:
    task = DetectionTask(published(name, tmp_path, CLASSES), data(scenes), scenes)
    item = stretched(max(task.train, key=lambda one: len(one.boxes)), tmp_path / "wide.png")
    notes = [
        {"bbox": list(box), "category_id": task.detector.numbers[label], "area": 1.0, "iscrowd": 0}
        for box, label in zip(item.boxes, item.labels, strict=True)
    ]
    with Image.open(item.image) as picture:
        told = task.processor(
            picture.convert("RGB"),
            annotations={"image_id": 1, "annotations": notes},
            return_tensors="pt",
        )
    batch = task.collate([item])
    assert torch.equal(batch["pixel_values"], told["pixel_values"])
    for key, value in batch["labels"][0].items():
        assert torch.allclose(value, told["labels"][0][key]), key


def test_pictures_of_several_sizes(scenes: Path, tmp_path: Path) -> None:
    """DETR reads a mask of the padding; RT-DETR's boxes would count it as picture."""
    sides = {"shortest_edge": 48, "longest_edge": 96}
    for name in ("detr", "rt_detr"):
        spec = published(name, tmp_path / name, CLASSES, **sides)
        task = DetectionTask(spec, data(scenes), scenes)
        item = stretched(task.train[0], tmp_path / "wide.png")
        if name == "detr":
            batch = task.collate([task.train[1], item])
            assert set(batch) == {"pixel_values", "pixel_mask", "labels"}
            assert batch["pixel_mask"][0].float().mean() == 0.5
        else:
            with pytest.raises(DataError, match="rt_detr reads pictures of one size"):
                task.collate([task.train[1], item])


def test_the_models_classes_must_have_those_of_the_data(scenes: Path, tmp_path: Path) -> None:
    spec = published("rt_detr", tmp_path, {0: "circles", 1: "square", 2: "triangle"})
    with pytest.raises(
        UnsupportedError, match=r"3 classes, but not circle .*Did you mean 'circles'"
    ):
        DetectionTask(spec, data(scenes), scenes)
    task = DetectionTask(spec, data(scenes), scenes, {"names": {"circle": "circles"}})
    assert task.detector == ClassDetector("rt_detr", {"circle": 0, "square": 1, "triangle": 2})
    for names, says in (
        ({"circles": "circle"}, "no class of the data. Did you mean 'circle'"),
        ({"circle": "square"}, "two classes of the data the same name"),
    ):
        with pytest.raises(RecipeError, match=says):
            DetectionTask(spec, data(scenes), scenes, {"names": names})
    with pytest.raises(RecipeError, match="that numbers its classes: leave it out"):
        DetectionTask(TINY, data(scenes), scenes, {"names": {"circle": "circles"}})
    few = published("rt_detr", tmp_path / "few", {0: "dog"})
    with pytest.raises(UnsupportedError, match="not circle, square, triangle of the data"):
        DetectionTask(few, data(scenes), scenes)


def test_other_types_of_models_are_refused(scenes: Path, tmp_path: Path) -> None:
    vlprune.save(build("vit").model, tmp_path)
    with pytest.raises(UnsupportedError, match=r"is of the type vit; detection reads .*d_fine"):
        DetectionTask(ModelSpec(path=str(tmp_path)), data(scenes), scenes)


def test_pictures_without_a_box_train(scenes: Path) -> None:
    for model in ("rt-detr", "d-fine"):
        task = DetectionTask(TINY, data(scenes), scenes, {"model": model})
        items = [replace(one, boxes=(), labels=()) for one in task.train[:3]]
        torch.manual_seed(0)
        assert task.new_model().train()(**task.collate(items, random.Random(0))).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "sizes", "says"),
    [
        ({"model": "rt-detr", "queries": 85}, {}, "queries must be at most 84, the places of 64"),
        ({"model": "d-fine"}, {"image_size": 48}, "in multiples of 32 for d-fine, not 48"),
        ({"model": "rt-detr", "fusion_width": 34}, {}, "multiple of 4 and of the 4 heads"),
        ({"model": "rt_detr"}, {}, "Did you mean 'rt-detr'"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_built_are_refused(
    options: dict[str, Any], sizes: dict[str, int], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe(
            task="detection", budget={"params": 0.9}, model=replace(TINY, **sizes), options=options
        )


@pytest.mark.parametrize("model", ["rt-detr", "d-fine"])
def test_the_smallest_allowed_sizes_build_and_run(model: str, scenes: Path) -> None:
    for width, side in ((8, 32), (16, 96)):
        spec = replace(TINY, width=width, heads=2, image_size=side)
        options = {"model": model, "queries": 21}
        check_options("detection", options, spec)
        task = DetectionTask(spec, data(scenes), scenes, options)
        assert task.evaluate(task.new_model(), QUIET)["ap"] >= 0


# -- whole runs --------------------------------------------------------------------------

SHORT = Training(steps=4, batch_size=8, learning_rate=3e-4, save_steps=0)


@pytest.mark.parametrize(
    ("model", "attention"),
    [("rt-detr", "head"), pytest.param("d-fine", "head_dim", marks=pytest.mark.slow)],
)
def test_a_detector_from_data_to_folder(
    model: str, attention: str, scenes: Path, tmp_path: Path
) -> None:
    """With fewer heads: RT-DETR masks its denoising queries while it trains."""
    recipe = Recipe(
        task="detection",
        budget={"params": 0.9},
        attention=attention,
        method={"name": "taylor"},
        model=TINY,
        options={"model": model, "queries": 12, "decoder_layers": 2},
        data=data(scenes),
        train=SHORT,
        search=SHORT,
        retrain=SHORT,
        teacher={"features": 0.1},
    )
    report = compress(recipe, tmp_path / "out")
    assert report["params"]["after"] <= 0.9 * report["params"]["before"]
    assert set(report["metrics"]["retrained"]) == {"ap", "ap50", "ap75"}
    loaded = T.AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) == report["params"]["after"]
    task = DetectionTask(ModelSpec(path=str(tmp_path / "out")), data(scenes), scenes)
    assert task.evaluate(loaded, QUIET) == pytest.approx(report["metrics"]["retrained"])
