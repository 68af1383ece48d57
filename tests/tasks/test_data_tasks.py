"""Tasks and their data: pictures are there, what is left out is told, nothing is written over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from small_runs import DEMO, TINY
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError
from vlprune.recipe.spec import DataSpec, ModelSpec
from vlprune.tasks import (
    ClassificationTask,
    DetectionTask,
    ReasoningTask,
    RetrievalTask,
    SegmentationTask,
    VqaTask,
)

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)


def tree(folder: Path) -> dict[str, Any]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "scenes", train=4, test=3)


def captions(root: Path, **more: Any) -> DataSpec:
    train, test = (
        {"captions": str(root / "annotations" / f"captions_{sub}.json"),
         "images": str(root / "images" / sub)}
        for sub in ("train2014", "val2014")
    )  # fmt: skip
    return DataSpec("coco-captions", train=train, test=test, **more)


# -- nothing is written over -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["annotations/instances_train2014.json", "images/train2014/a.jpg", "shapes.json", "notes.txt"],
)
def test_scenes_are_never_written_over_files_of_others(tmp_path: Path, name: str) -> None:
    path = tmp_path / "coco" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"images": []}')
    before = tree(tmp_path)
    said = r"data\.folder=.*coco holds files that vlprune did not write, and data\.format=shapes"
    with pytest.raises(DataError, match=said):
        RetrievalTask(SMALL, DataSpec(folder=str(tmp_path / "coco")), tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_command_that_would_write_over_annotations_ends_with_2(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    code, _, err = run(
        "compress", DEMO, "-o", str(tmp_path / "out"), *TINY, f"data.folder={tmp_path / 'coco'}"
    )
    assert code == 2
    assert "data.format" in " ".join(err.split())
    assert "Traceback" not in err
    assert path.read_text() == "mine"


def test_scenes_of_other_settings_lie_beside_those_that_are_there(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "s", train=4, test=3)
    before = tree(root)
    (root / "mine.txt").write_text("mine")
    again = write_shapes(root, train=4, test=3)
    other = write_shapes(root, train=5, test=3)
    assert again == root != other
    assert other.parent == root
    assert write_shapes(root, train=5, test=3) == other
    assert {k: v for k, v in tree(root).items() if k in before} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"data\.folder=.*file: Not a directory"):
        write_shapes(tmp_path / "file", train=4, test=3)


def test_scenes_that_were_left_half_way_are_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(write_shapes(tmp_path / "whole", train=4, test=3))

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "half", train=4, test=3, progress=stop)
    half = tree(write_shapes(tmp_path / "half", train=4, test=3))
    assert {k: v[0] for k, v in half.items()} == {k: v[0] for k, v in whole.items()}


# -- pictures are there ----------------------------------------------------------------------


def test_missing_pictures_are_told_at_reading(scenes: Path, tmp_path: Path) -> None:
    folder = scenes / "images" / "train2014"
    gone = sorted(folder.iterdir())[1:3]
    for path in gone:
        path.unlink()
    said = rf"2 of the 4 images of data\.train are missing, as .*{gone[0].name}: give the right"
    with pytest.raises(DataError, match=said):
        RetrievalTask(SMALL, captions(scenes), tmp_path)
    assert len(RetrievalTask(SMALL, captions(scenes, train_items=1), tmp_path).train) == 1
    root = str(scenes / "nlvr2")  # not where they lie
    part = {n: {"statements": f"{root}/{n}.json", "images": root} for n in ("train", "dev")}
    with pytest.raises(DataError, match=r"4 of the 4 images of data\.train are missing"):
        ReasoningTask(SMALL, DataSpec("nlvr2", train=part["train"], test=part["dev"]), tmp_path)


def test_names_of_any_kind_may_be_missing(scenes: Path, tmp_path: Path) -> None:
    path = scenes / "annotations" / "captions_train2014.json"
    body = json.loads(path.read_text())
    body["images"][0]["file_name"] = "n" * 300
    body["images"][1]["file_name"] = "\x1b[31m/\u202e.jpg"
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"2 of the 4 images") as caught:
        RetrievalTask(SMALL, captions(scenes), tmp_path)
    assert str(caught.value).isprintable()


# -- what is left out is told ----------------------------------------------------------------


def test_a_run_says_once_what_it_left_out(tmp_path: Path, run: Any) -> None:
    root = write_shapes(tmp_path / "s", train=12, test=6)
    path = root / "annotations" / "questions_val2014.json"
    body = json.loads(path.read_text())
    body["questions"][0]["question"] = " "
    path.write_text(json.dumps(body))
    parts = [
        f"data.{split}.{key}={root}/{place}"
        for split, sub in (("train", "train2014"), ("test", "val2014"))
        for key, place in (
            ("questions", f"annotations/questions_{sub}.json"),
            ("annotations", f"annotations/answers_{sub}.json"),
            ("images", "images"),
        )
    ]
    out = tmp_path / "out"
    tiny = [one for one in TINY if not one.startswith("data.")]
    code, _, err = run("compress", DEMO, "-o", str(out), *tiny, *parts, "data.format=vqav2")
    assert code == 0, err
    said = "left out of data.test: questions that are blank (1)"
    assert " ".join(err.split()).count(said) == 1
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["test"] == {
        "items": len(body["questions"]) - 1,
        "left_out": {"questions that are blank": 1},
    }
    assert report["data"]["train"]["left_out"] == {}
    assert report["notes"].count(said) == 1
    assert said[1:] in (out / "README.md").read_text()
    code, shown, _ = run("report", str(out))
    assert code == 0
    assert said in " ".join(shown.split())


def test_classes_are_counted_by_the_task(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat/a.png", "dog/b.tif", "dog/c.jpg"):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "val" / "dog" / "list.csv").write_text("x")
    task = ClassificationTask(SMALL, DataSpec("image-folder", folder=str(tmp_path)), tmp_path)
    assert task.left_out == "left out of data.test: files that are no pictures (1)"
    assert task.facts()["train"] == {"items": 3, "left_out": {}}


def test_all_keys_to_join_visual_genome_are_asked_for(scenes: Path, tmp_path: Path) -> None:
    notes = scenes / "annotations"
    part = {
        "questions": str(notes / "questions_val2014.json"),
        "annotations": str(notes / "answers_val2014.json"),
        "images": str(scenes / "images"),
        "visual_genome": "x.json",
    }
    with pytest.raises(DataError, match="visual_genome_data, visual_genome_images must be given"):
        VqaTask(SMALL, DataSpec("vqav2", train=part, test=part), tmp_path)


# -- masks and boxes -------------------------------------------------------------------------


def masked(tmp_path: Path, *values: int) -> DataSpec:
    for split in ("training", "validation"):
        for name in ("images", "annotations"):
            (tmp_path / name / split).mkdir(parents=True)
        for n, value in enumerate(values):
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / split / f"{n}.jpg")
            mask = Image.fromarray(np.full((32, 32), value, np.uint8))
            mask.save(tmp_path / "annotations" / split / f"{n}.png")
    return DataSpec("ade20k", folder=str(tmp_path))


def test_void_does_not_make_classes_nor_a_loss(tmp_path: Path) -> None:
    task = SegmentationTask(SMALL, masked(tmp_path, 1, 2, 255), tmp_path)
    model = task.new_model()
    assert model.config.num_labels == 2
    loss = model(**task.collate([task.train[2]])).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    batch = task.collate(list(task.train))
    output = model(**batch)
    full = torch.nn.functional.interpolate(output.logits, (32, 32), mode="bilinear")
    want = torch.nn.functional.cross_entropy(full, batch["labels"], ignore_index=255)
    assert float(output.loss) == pytest.approx(float(want))


def test_a_mask_with_more_classes_than_the_model_is_one_message(tmp_path: Path) -> None:
    task = SegmentationTask(SMALL, masked(tmp_path, 1, 5), tmp_path, {"classes": 2})
    with pytest.raises(DataError, match=r"1\.png holds the value 5, and the model has 2 classes"):
        task.collate([task.train[1]])
    model = task.new_model()
    with pytest.raises(DataError, match=r"1\.png holds the value 5, and the model has 2 classes"):
        task.evaluate(model, lambda done, note="": None)


def test_boxes_on_turned_pictures_are_where_they_were_drawn(tmp_path: Path) -> None:
    """The same scene, upright as people see it, stored on its side with a note of the camera."""
    pytest.importorskip("pycocotools")
    shown = Image.new("RGB", (32, 64))
    shown.paste("white", (0, 0, 16, 16))
    exif = shown.getexif()
    exif[0x0112] = 6
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    body = {
        "images": [{"id": "x", "file_name": "a.png", "width": 32, "height": 64}],
        "annotations": [{"image_id": "x", "category_id": 1, "bbox": [0, 0, 16, 16]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "i.json").write_text(json.dumps(body))
    part = {"instances": str(tmp_path / "i.json"), "images": str(tmp_path)}
    spec = DataSpec("coco-instances", train=part, test=part)
    task = DetectionTask(SMALL, spec, tmp_path, {"model": "mdetr"})
    pixels = task.collate(list(task.train))["pixel_values"][0].mean(0)
    top, side = pixels[:8, :16].mean(), pixels[8:, 16:].mean()  # the processor makes it a square
    assert top > side + 1
    # images with words for ids are scored as others are
    right = {"image_id": 0, "category_id": 1, "score": 0.9, "bbox": [0, 0, 16, 16]}
    assert task._average_precision([right])["ap"] == pytest.approx(1)
    body["images"][0]["width"] = 64
    (tmp_path / "i.json").write_text(json.dumps(body))
    task = DetectionTask(SMALL, spec, tmp_path, {"model": "mdetr"})
    with pytest.raises(DataError, match="is 32 x 64 pixels, and its boxes are for a picture of 64"):
        task.collate(list(task.train))
