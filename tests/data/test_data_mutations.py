"""Whatever a data file holds, readers give sound data or one message: thousands of mutations."""

from __future__ import annotations

import ast
import copy
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from vlprune.data import captions, conversations, files, kinds, pairs, questions, regions, samples
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError

SOURCE = Path(files.__file__).parent
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 0.5, 640.0, 1e300, -1e300, math.inf, math.nan, 10**400, "",
    " ", "7", "x", "..", "../../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[31m", "\u2028", [], {},
    [[]], [1, 2], [1, 2, 3, 4], ["1", 2, 3, 4], {"id": 1}, "n" * 300,
]  # fmt: skip


def nlvr1(root: Path) -> None:
    """NLVR v1's and easy-VQA's and Visual Genome's files, which the generator does not write."""
    thing = {"x_loc": 3, "y_loc": 40, "size": 20, "type": "square", "color": "#0099ff"}
    for part in ("dev", "hidden"):
        (root / part).mkdir()
        lines = [
            {"identifier": f"{n}-0", "sentence": f"{n} boxes", "label": "true",
             "structured_rep": [[thing], [], [thing, {**thing, "color": "Yellow"}]]}
            for n in range(4)
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / part / f"{part}.json").write_text(text)


def others(root: Path) -> None:
    body: Any = [["is it red?", "yes", 3], ["what is it?", "circle", 4]]
    (root / "questions.json").write_text(json.dumps(body))
    body = [{"image_id": n, "url": f"https://host/VG_100K/{n}.jpg"} for n in (1, 2)]
    (root / "vg_images.json").write_text(json.dumps(body))
    body = [
        {"id": n, "qas": [{"image_id": n, "qa_id": 5 + n, "question": "Who?", "answer": "He."}]}
        for n in (1, 2)
    ]
    (root / "vg.json").write_text(json.dumps(body))
    shown = [{"type": "image", "path": "1.jpg"}, {"type": "text", "text": "what?"}]
    body = [
        {"id": n, "images": ["2.jpg"], "messages": [
            {"role": "user", "content": [{"type": "image"}, *shown]},
            {"role": "assistant", "content": "a cat"}]}
        for n in (1, 2)
    ]  # fmt: skip
    (root / "messages.json").write_text(json.dumps(body))
    lines = [{"image": f"{n}.png", "text": f"{n} boxes", "caption": None} for n in range(4)]
    (root / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


Read = Callable[[Path], list[Any]]
NOTES = "annotations"
READERS: dict[str, tuple[str, Read]] = {
    "samples": ("samples.jsonl", lambda r: inside(r, samples.read_samples(r / "samples.jsonl"))),
    "coco captions": (
        f"{NOTES}/captions_val2014.json",
        lambda r: captions.read_coco_captions(r / NOTES / "captions_val2014.json", r / "images"),
    ),
    "karpathy": (
        f"{NOTES}/dataset_shapes.json",
        lambda r: captions.read_karpathy(r / NOTES / "dataset_shapes.json", r / "images", "test"),
    ),
    "instances": (
        f"{NOTES}/instances_val2014.json",
        lambda r: regions.read_coco_instances(r / NOTES / "instances_val2014.json", r / "images"),
    ),
    "mdetr": (
        f"{NOTES}/captions_mdetr_val2014.json",
        lambda r: regions.read_mdetr(r / NOTES / "captions_mdetr_val2014.json", r / "images"),
    ),
    "refs": (
        f"{NOTES}/refs_val2014.json",
        lambda r: regions.read_refer(
            r / NOTES / "refs_val2014.json",
            r / NOTES / "instances_val2014.json",
            r / "images",
            "test",
        ),
    ),
    "vqa questions": (f"{NOTES}/questions_val2014.json", lambda r: vqa(r)),
    "vqa answers": (f"{NOTES}/answers_val2014.json", lambda r: vqa(r)),
    "gqa": (
        f"{NOTES}/gqa_val2014.json",
        lambda r: questions.read_gqa(r / NOTES / "gqa_val2014.json", r / "images"),
    ),
    "llava": (
        f"{NOTES}/conversations_val2014.json",
        lambda r: conversations.read_llava(r / NOTES / "conversations_val2014.json", r / "images"),
    ),
    "messages": (
        "messages.json",
        lambda r: conversations.read_messages(r / "messages.json", r / "images"),
    ),
    "nlvr2": (
        "nlvr2/dev.json",
        lambda r: pairs.read_nlvr2(r / "nlvr2" / "dev.json", r / "images"),
    ),
    "nlvr1": ("dev/dev.json", lambda r: pairs.read_nlvr1(r, "train")),
    "nlvr1 objects": ("dev/dev.json", lambda r: regions.read_nlvr1_objects(r, "train")),
    "easy-vqa": ("questions.json", lambda r: questions.read_easy_vqa(r)),
    "visual genome": ("vg.json", lambda r: visual_genome(r)),
    "visual genome images": ("vg_images.json", lambda r: visual_genome(r)),
}


def inside(root: Path, found: list[samples.Sample]) -> list[samples.Sample]:
    """Without samples that name their image by an absolute path, which is allowed here."""
    return [one for one in found if one.image is None or one.image.is_relative_to(root)]


def vqa(root: Path) -> list[Any]:
    notes = root / NOTES
    return questions.read_vqav2(
        notes / "questions_val2014.json", notes / "answers_val2014.json", root / "images"
    )


def visual_genome(root: Path) -> list[Any]:
    return questions.read_visual_genome(root / "vg.json", root / "vg_images.json", root / "images")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shapes(tmp_path_factory.mktemp("scenes"), train=2, test=2)
    nlvr1(folder)
    others(folder)
    return folder


def places(body: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a parsed file."""
    for key in body if isinstance(body, dict) else range(len(body)):
        yield body, key
        if isinstance(body[key], dict | list):
            yield from places(body[key])


def mutated(body: Any, rng: random.Random) -> Any:
    """A copy with one or two places changed, deleted or doubled."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2))):
        spots = list(places(body))
        if not spots:
            return rng.choice(VALUES)
        inside, key = rng.choice(spots)
        what = rng.random()
        if what < 0.7:
            inside[key] = rng.choice(VALUES)
        elif what < 0.85:
            del inside[key]
        elif isinstance(inside, list):
            inside.append(copy.deepcopy(inside[key]))
        else:
            inside[f"{key}x"] = inside[key]
    return rng.choice(VALUES) if rng.random() < 0.01 else body


def check(value: Any, root: Path) -> None:
    """What a reader gives can be trained on, written and looked up."""
    if is_dataclass(value):
        for one in fields(value):
            check(getattr(value, one.name), root)
        if isinstance(value, regions.Scenery | regions.Grounding):
            phrases = getattr(value, "phrases", [value])  # a scenery has its boxes itself
            boxes = [box for phrase in phrases for box in phrase.boxes]
            for x, y, width, height in boxes:
                assert x >= 0
                assert y >= 0
                assert min(width, height) >= 1e-3
                assert x + width <= value.size[0] + 1e-6
                assert y + height <= value.size[1] + 1e-6
    elif isinstance(value, tuple):
        for one in value:
            check(one, root)
    elif isinstance(value, Path):
        assert value.is_relative_to(root)
        assert ".." not in value.parts
        value.exists() if len(value.name) < 256 else None  # no NUL, no half characters
    elif isinstance(value, str):
        value.encode()
    else:
        assert isinstance(value, bool | int) or math.isfinite(value)


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_gives_sound_data_or_one_message(name: str, root: Path) -> None:
    place, read = READERS[name]
    path = root / place
    whole = path.read_text()
    lines = name.startswith(("nlvr", "samples"))
    body = [json.loads(line) for line in whole.split("\n") if line] if lines else json.loads(whole)
    rng, refused = random.Random(name), 0
    before = read(root)
    check(tuple(before), root)
    try:
        for number in range(400):
            changed = mutated(body, rng)
            rows = changed if lines and isinstance(changed, list) else [changed]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else
                            json.dumps(changed))  # fmt: skip
            try:
                check(tuple(read(root)), root)
            except DataError as error:
                refused += 1
                text = str(error)
                assert len(text) < 600, number
                assert text.isprintable(), number
                assert path.name in text or "vg" in text or str(root) in text
    finally:
        path.write_text(whole)
    assert 20 < refused < 400  # it bites, and leaves alone what is not read
    assert read(root) == before


# -- one way into a file -------------------------------------------------------------------


def test_an_entry_opens_to_field_alone() -> None:
    ways = {"__getitem__", "__iter__", "__len__", "__contains__", "get", "items", "keys", "values"}
    assert not ways & {name for name in dir(kinds.Entry) if name in ways}
    for path in [*SOURCE.glob("*.py"), *(SOURCE / "datasets").glob("*.py")]:
        if path.name in ("kinds.py", "files.py", "shapes.py"):
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("_value", "_above", "_step"), (path.name, node.lineno)
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                untyped = names & {"json", "parse_json", "Any"}  # rows of a data set become entries
                assert not untyped or path.parent.name == "datasets", (path.name, node.lineno)


def written(tmp_path: Path, body: Any) -> Path:
    path = tmp_path / "f.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return path


def instances(**more: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [{"id": 3, "image_id": 7, "category_id": 1, "bbox": [1, 2, 10, 10]}],
        "categories": [{"id": 1, "name": "cat"}],
        **more,
    }


@pytest.mark.parametrize(
    ("bbox", "shown"),
    [
        (None, "null"), ("1 2 3 4", "'1 2 3 4'"), ([1, 2, "3", 4], "[1, 2, '3', 4]"),
        ([1, 2, 3], "[1, 2, 3]"), ([math.nan, 2, 3, 4], "[NaN, 2, 3, 4]"), ({}, "an object"),
        ([1, 2, -3, 4], "[1, 2, -3, 4]"), ([1, 2, math.inf, 4], "[1, 2, Infinity, 4]"),
        ([True, 2, 3, 4], "[true, 2, 3, 4]"), ([0] * 9, "a list of 9"),
        ([[1], 2, 3, 4], "[a list of 1, 2, 3, 4]"),
    ],
)  # fmt: skip
def test_a_message_names_file_entry_id_key_and_what_was_expected(
    tmp_path: Path, bbox: Any, shown: str
) -> None:
    body = instances()
    body["annotations"].append({"id": "x\x1b", "image_id": 7, "category_id": 1, "bbox": bbox})
    path = written(tmp_path, body)
    with pytest.raises(DataError) as caught:
        regions.read_coco_instances(path, ".")
    assert str(caught.value) == (
        f"{path}: entry 1 of 'annotations' (id 'x\\x1b'), 'bbox' must be [left, top, width, "
        f"height]: four finite numbers, the last two not negative, not {shown}"
    )


@pytest.mark.parametrize(
    "width", [None, 0, -1, 1.5, "64", True, 10**7, 10**400, math.nan, "\ud800"]
)
def test_sizes_are_whole_numbers_of_pixels(tmp_path: Path, width: Any) -> None:
    body = instances()
    body["images"][0]["width"] = 64.0  # as tables write it
    (scenery,) = regions.read_coco_instances(written(tmp_path, body), ".")
    assert scenery.size == (64, 48)
    body["images"][0]["width"] = width
    with pytest.raises(DataError, match=r"\(id 7\), 'width' must be a whole number from 1 to 1,0"):
        regions.read_coco_instances(written(tmp_path, body), ".")


def test_texts_can_be_written_and_messages_are_short(tmp_path: Path) -> None:
    body = instances(categories=[{"id": 1, "name": "\ud800"}])
    with pytest.raises(DataError, match=r"'name' must be text that is not blank, not '\\ud800'"):
        regions.read_coco_instances(written(tmp_path, body), ".")
    body = instances(images=[{"id": "n" * 10**6}])
    with pytest.raises(DataError, match=r"'n{40}…'\) has no 'width'"):
        regions.read_coco_instances(written(tmp_path, body), ".")


def test_ids_in_quotes_are_the_numbers_they_say(tmp_path: Path) -> None:
    def quoted(value: Any) -> Any:
        if isinstance(value, dict):
            ids = {"id", "image_id", "category_id", "question_id", "ann_id", "sent_id", "imageId"}
            return {
                k: str(v) if k in ids and isinstance(v, int) else quoted(v)
                for k, v in value.items()
            }
        return [quoted(one) for one in value] if isinstance(value, list) else value

    scenes = write_shapes(tmp_path / "s", train=2, test=2)
    for name, (place, read) in READERS.items():
        if not place.startswith((NOTES, "nlvr2")) or name == "nlvr2":
            continue
        path = scenes / place
        whole, before = path.read_text(), read(scenes)
        path.write_text(json.dumps(quoted(json.loads(whole))))
        assert quoted(json.loads(whole)) != json.loads(whole) or name in ("karpathy", "gqa")
        assert read(scenes) == before, name
        path.write_text(whole)


def test_words_are_ids_too(tmp_path: Path) -> None:
    body = json.loads(json.dumps(instances()).replace("7", '"img_7"'))
    (scenery,) = regions.read_coco_instances(written(tmp_path, body), ".")
    assert (scenery.id, scenery.boxes) == ("img_7", ((1, 2, 10, 10),))


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_id_that_occurs_twice_is_refused(tmp_path: Path, key: str) -> None:
    body = instances()
    body[key].append({**body[key][0], "id": str(body[key][0]["id"])})
    with pytest.raises(DataError, match=rf"entry 1 of '{key}' .*: the same 'id' as entry 0 of"):
        regions.read_coco_instances(written(tmp_path, body), ".")


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"f\.json: not valid JSON .*key '1' twice"):
        questions.read_gqa(written(tmp_path, '{"1": {}, "1": {}}'), ".")


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/passwd", "x/../../a.jpg", "", " ", ".", "a\0b", 3, None, ["a"]]
)
def test_paths_stay_in_the_folder_of_images(tmp_path: Path, name: Any) -> None:
    body = instances(images=[{"id": 7, "file_name": name, "width": 64, "height": 48}])
    with pytest.raises(DataError, match="'file_name' must be a path inside the folder of images"):
        regions.read_coco_instances(written(tmp_path, body), tmp_path)
    gqa = {"1": {"imageId": "../1", "question": "?", "answer": "a", "types": {"semantic": "obj"}}}
    with pytest.raises(DataError, match="'1', 'imageId' must be a number, or a name without fold"):
        questions.read_gqa(written(tmp_path, gqa), tmp_path)


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    texts = ["one\u2028two\u0085three\x0b", "four"]
    line = '{"identifier": "dev-1-0", "sentence": "%s", "label": "true"}'
    path = tmp_path / "l.json"
    path.write_bytes("\r\n".join(line % text.replace("\x0b", "\\u000b") for text in texts).encode())
    found = pairs.read_nlvr2(path, tmp_path)
    assert [one.text for one in found] == texts
    path.write_text(line % "a" + "\n\n" + "[" * 100_000)
    with pytest.raises(DataError, match=r"l\.json, line 3: brackets are nested too deeply"):
        pairs.read_nlvr2(path, tmp_path)


def test_large_files_are_read_and_pipes_are_not(tmp_path: Path) -> None:
    import os

    body = instances(info="x" * (70 * 2**20))  # more than a config may have
    assert len(regions.read_coco_instances(written(tmp_path, body), ".")) == 1
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        regions.read_coco_instances(tmp_path / "pipe", ".")


# -- what is left out is counted -----------------------------------------------------------


def test_boxes_that_cannot_be_meant_are_counted(tmp_path: Path) -> None:
    def box(bbox: Any, **more: Any) -> dict[str, Any]:
        return {"image_id": 7, "category_id": 1, "bbox": bbox, **more}

    body = instances(
        annotations=[
            box([1, 2, 10, 10]), box([1, 2, 0, 5]), box([70, 2, 5, 5]), box([-5, -5, 4, 4]),
            box([60, 40, 10, 10]), box([-0.2, 0, 64.3, 48.1]), box([1, 1, 1, 1], iscrowd=1),
            box([1, 1, 1, 1], image_id=8), box([1e300, 1, 1e300, 1]),
            box([0, 0, 9, 9], segmentation={"counts": "RLE", "size": [48, 64]}, iscrowd=None),
        ]
    )  # fmt: skip
    left = files.Left()
    (scenery,) = regions.read_coco_instances(written(tmp_path, body), ".", left)
    assert scenery.boxes == (
        (1, 2, 10, 10), (60, 40, 4, 8), (0, 0, 64, 48), (0, 0, 9, 9)
    )  # fmt: skip
    assert left == {
        "boxes without an area": 1,
        "boxes outside their picture": 3,
        "parts of boxes beyond their picture": 1,
        "boxes of crowds": 1,
        "boxes of images that the file does not list": 1,
    }


def test_captions_that_say_nothing_are_counted(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)]
    said = [(1, None), (1, " \n"), (1, "a cat"), (9, "a dog"), (2, "")]
    body = {
        "images": images,
        "annotations": [{"image_id": key, "caption": text} for key, text in said],
    }
    left = files.Left()
    (item,) = captions.read_coco_captions(written(tmp_path, body), ".", left)
    assert item.captions == ("a cat",)
    want = {
        "captions that are null or blank": 3,
        "captions of images that the file does not list": 1,
        "images without a caption": 1,
    }
    assert left == want
    del body["annotations"][2]
    with pytest.raises(DataError, match=r"no captioned image; left out were captions that are nu"):
        captions.read_coco_captions(written(tmp_path, body), ".")


def test_questions_without_answers_are_counted(tmp_path: Path) -> None:
    asked = [(1, "what?"), (2, " "), (3, "who?")]
    said = [(1, ["a cat", ""]), (2, ["x"]), (3, [" "]), (4, ["y"])]
    (tmp_path / "q.json").write_text(json.dumps({
        "data_subtype": "val2014",
        "questions": [{"question_id": k, "image_id": "042", "question": q} for k, q in asked],
    }))  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({
        "annotations": [
            {"question_id": str(k), "answers": [{"answer": a} for a in given]} for k, given in said
        ],
    }))  # fmt: skip
    left = files.Left()
    (item,) = questions.read_vqav2(tmp_path / "q.json", tmp_path / "a.json", tmp_path, left)
    assert item.image == tmp_path / "COCO_val2014_000000000042.jpg"
    assert left == {
        "questions that are blank": 1,
        "questions without an answer": 1,
        "answers to questions that the file does not ask": 1,
    }


@pytest.mark.parametrize(
    ("spans", "said"),
    [
        ([2, 5], "must be a list of pairs"), ([[5, 2]], "must be a list of pairs"),
        ([[-1, 2]], "must be a list of pairs"), ([["0", 2]], "must be a list of pairs"),
        ([[0, 9]], "characters that its caption lacks"), ([], "boxes that no words name (1)"),
        ([[1, 2]], "boxes that no words name (1)"),
    ],
)  # fmt: skip
def test_spans_name_words_of_the_caption(tmp_path: Path, spans: Any, said: str) -> None:
    image = {"id": 7, "file_name": "a.jpg", "width": 64, "height": 48, "caption": "a cat"}
    box = {"image_id": 7, "bbox": [1, 2, 3, 4], "tokens_positive": spans}
    with pytest.raises(DataError, match=re.escape(said)):
        regions.read_mdetr(written(tmp_path, {"images": [image], "annotations": [box]}), ".")


def test_an_expression_names_a_box_of_its_own_image(tmp_path: Path) -> None:
    body = instances()
    body["images"].append({**body["images"][0], "id": 8})
    boxes = written(tmp_path, body)
    for ref, said in [
        ({"image_id": 8, "ann_id": 3}, "its box 3 in .* is of another image"),
        ({"image_id": 7, "ann_id": 4}, "lacks its image 7 or its box 4"),
    ]:
        (tmp_path / "r.json").write_text(
            json.dumps([{"split": "val", "sentences": [{"sent_id": 1, "sent": "it"}], **ref}])
        )
        with pytest.raises(DataError, match=said):
            regions.read_refer(tmp_path / "r.json", boxes, ".", "val")


def test_a_split_is_train_or_test(tmp_path: Path) -> None:
    nlvr1(tmp_path)
    for read in (pairs.read_nlvr1, regions.read_nlvr1_objects):
        with pytest.raises(DataError, match="must be train or test, not 'val'"):
            read(tmp_path, "val")
