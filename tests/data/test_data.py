"""Readers on the formats as the world has them, and the generator that writes them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlprune.data.captions import read_coco_captions, read_karpathy
from vlprune.data.files import open_image, read_jsonl
from vlprune.data.pairs import read_nlvr2
from vlprune.data.questions import read_easy_vqa, read_vqav2
from vlprune.data.shapes.scene import SHAPES, draw, make_scene
from vlprune.data.shapes.words import questions
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=12, test=6)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def test_the_same_seed_writes_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    again = write_shapes(tmp_path / "again", train=12, test=6)
    other = write_shapes(tmp_path / "other", train=12, test=6, seed=1)
    assert digest(shapes) == digest(again) != digest(other)


def test_vqav2_files_are_read_back(shapes: Path) -> None:
    notes = shapes / "annotations"
    found = read_vqav2(
        notes / "questions_train2014.json", notes / "answers_train2014.json", shapes / "images"
    )
    assert len(found) > 12
    assert all(q.image.exists() and len(q.answers) == 10 for q in found)


def test_captions_are_read_back_from_both_formats(shapes: Path) -> None:
    notes, images = shapes / "annotations", shapes / "images"
    coco = read_coco_captions(notes / "captions_val2014.json", images / "val2014")
    karpathy = read_karpathy(notes / "dataset_shapes.json", images, "test")
    assert [(c.image.resolve(), c.captions) for c in coco] == [
        (k.image.resolve(), k.captions) for k in karpathy
    ]
    assert len(read_karpathy(notes / "dataset_shapes.json", images, "train")) == 12
    assert all(c.image.exists() and len(c.captions) == 5 for c in coco)


def test_every_other_format_is_consistent(shapes: Path) -> None:
    notes = shapes / "annotations"
    boxes = json.loads((notes / "instances_train2014.json").read_text())
    by_id = {b["id"]: b for b in boxes["annotations"]}
    assert {c["name"] for c in boxes["categories"]} == set(SHAPES)
    for box in by_id.values():
        x, y, w, h = box["bbox"]
        assert w > 0
        assert h > 0
        assert 0 < box["area"] <= w * h + 1e-6
        points = box["segmentation"][0]
        assert min(points[::2]) == pytest.approx(x)
        assert max(points[1::2]) == pytest.approx(y + h, abs=0.02)
        mask = Image.open(
            shapes / "ade20k" / "annotations" / "training" / f"{box['image_id']:012d}.png"
        )
        assert mask.getpixel((int(x + w / 2), int(y + h / 2))) == 1 + box["category_id"]
    refs = json.loads((notes / "refs_train2014.json").read_text())
    assert refs
    assert all(r["ann_id"] in by_id for r in refs)
    for text in (shapes / "nlvr2" / "train.json").read_text().splitlines():
        line = json.loads(text)
        assert line["label"] in ("True", "False")
        stem = line["identifier"].rpartition("-")[0]
        assert all((shapes / "nlvr2" / "train" / f"{stem}-img{i}.png").exists() for i in (0, 1))


def test_answers_are_true() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        scene = make_scene(rng)
        draw(scene, rng)
        for question, answer, _kind in questions(scene, rng):
            words = question.strip("?").split()
            if question.startswith("is there a"):
                there = any((t.colour, t.shape) == (words[3], words[4]) for t in scene.things)
                assert answer == ("yes" if there else "no")
            elif question.startswith("what color"):
                assert [t.colour for t in scene.things if t.shape == words[-1]] == [answer]
            elif question.startswith("what shape"):
                assert [t.shape for t in scene.things if t.colour == words[4]] == [answer]


def test_too_few_scenes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least two"):
        write_shapes(tmp_path, train=1, test=2)


def coco(tmp_path: Path, **body: Any) -> Path:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(body))
    return path


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path) -> None:
    def fails(says: str, call: Any, *args: Any) -> None:
        with pytest.raises(DataError, match=says) as caught:
            call(*args)
        assert "\n" not in str(caught.value)

    path = tmp_path / "c.json"
    fails("there is no file", read_coco_captions, path, tmp_path)
    path.write_text('{"images": [}')
    fails(r"c\.json, line 1, column 13: not valid JSON", read_coco_captions, path, tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    fails("is not UTF-8 text", read_coco_captions, path, tmp_path)
    coco(tmp_path, images=[])
    fails("has no 'annotations', which must be a list", read_coco_captions, path, tmp_path)
    coco(tmp_path, images=[], annotations=[{"caption": "x"}])
    fails("entry 0 of 'annotations' has no 'image_id'", read_coco_captions, path, tmp_path)
    coco(tmp_path, images=[], annotations=[])
    fails("no captioned image", read_coco_captions, path, tmp_path)
    lines = tmp_path / "l.json"
    lines.write_text('{"a": 1}\n\n{"b": \n')
    fails(r"l\.json, line 3", lambda p: list(read_jsonl(p)), lines)
    lines.write_text("[1]\n")
    fails("line 1 must be an object with", read_nlvr2, lines, tmp_path)
    (tmp_path / "questions.json").write_text('[["q", "a"]]')
    fails("entry 0 must be .question, answer, image id.", read_easy_vqa, tmp_path)
    (tmp_path / "questions.json").write_text("[]")
    fails("holds no question", read_easy_vqa, tmp_path)


def test_damaged_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no image"):
        open_image(tmp_path / "x.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(tmp_path / "x.png")
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(DataError, match=r"x\.png cannot be decoded"):
        open_image(tmp_path / "x.png")


def test_a_question_without_answers_is_named(shapes: Path, tmp_path: Path) -> None:
    notes = shapes / "annotations"
    answers = json.loads((notes / "answers_val2014.json").read_text())
    gone = answers["annotations"].pop()["question_id"]
    (tmp_path / "a.json").write_text(json.dumps(answers))
    with pytest.raises(DataError, match=f"no answers for question {gone}"):
        read_vqav2(notes / "questions_val2014.json", tmp_path / "a.json", shapes / "images")


def test_real_coco_captions(real_data: Path) -> None:
    found = read_coco_captions(
        real_data / "coco-cc" / "annotations" / "captions_val2017.json",
        real_data / "coco-cc" / "val2017",
    )
    assert len(found) == 25
    assert all(len(item.captions) >= 5 for item in found)
    assert open_image(found[0].image).mode == "RGB"


def test_real_easy_vqa(real_data: Path) -> None:
    found = read_easy_vqa(real_data / "easy-vqa" / "train")
    answers = (real_data / "easy-vqa" / "answers.txt").read_text().split()
    assert len(found) == 38575
    assert len(answers) == 13
    assert {q.answers[0] for q in found} <= set(answers)
    assert open_image(found[0].image).size == (64, 64)
