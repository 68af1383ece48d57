"""Every task on a Hugging Face dataset sees the batches that it sees on the same data in files."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets.packaged_modules.parquet.parquet import Parquet

from tables import parquet, pictures
from vlprune.commands.pipeline.fingerprint import of_data
from vlprune.data.datasets.records import captioned_image, conversation
from vlprune.data.datasets.sources import Asked, open_rows, open_stream
from vlprune.data.files import open_image
from vlprune.errors import DataError
from vlprune.recipe.columns import CAPTIONED
from vlprune.recipe.options import TASK_OPTIONS
from vlprune.recipe.spec import DataSpec, ModelSpec, Training
from vlprune.tasks import TASKS, ChatTask
from vlprune.training.loading import Items, Numbered, Seeded

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
    monkeypatch.setattr(Parquet, "SLEEP_ON_THREADS_SHUTDOWNS", False)  # five seconds


def stored(path: Any) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}


def parts(turn: Any) -> list[dict[str, str | None]]:
    """The content of a message, pictures without a name."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "text": None}
        for part in turn.parts
    ]


def row(item: Any) -> dict[str, Any]:
    """The item as a row whose columns have the names of the task."""
    kind = type(item).__name__
    if kind == "Statement":
        left, right = map(stored, item.images)
        return {"left_image": left, "right_image": right, "text": item.text, "label": item.truth}
    if kind == "Conversation":
        said = [{"role": turn.role, "content": parts(turn)} for turn in item.turns]
        return {"messages": said, "images": [stored(path) for path in item.images]}
    image = stored(item.image)
    if kind == "CaptionedImage":
        return {"image": image, "text": list(item.captions)}
    if kind == "Question":
        return {"image": image, "question": item.text, "answers": list(item.answers)}
    if kind == "TypedQuestion":
        return {"image": image, "question": item.text, "answer": item.answer, "type": item.kind}
    if kind == "LabelledImage":
        return {"image": image, "label": item.label}
    if kind == "MaskedImage":
        return {"image": image, "mask": stored(item.mask)}
    width, height = item.size
    size = {"width": width, "height": height}
    if kind == "Scenery":
        boxes = [list(box) for box in item.boxes]
        return {"image": image, "boxes": boxes, "labels": list(item.labels), **size}
    assert kind == "Grounding"
    named = [(list(box), [list(s) for s in p.spans]) for p in item.phrases for box in p.boxes]
    boxes, spans = [b for b, _ in named], [s for _, s in named]
    return {"image": image, "text": item.text, "boxes": boxes, "spans": spans, **size}


def as_tables(task: Any, folder: Path, **features: Any) -> DataSpec:
    """The data of a task in two Parquet files."""
    parts = {}
    for split, items in (("train", task.train), ("test", task.test)):
        rows = [row(item) for item in items]
        columns = {name: [one[name] for one in rows] for name in rows[0]}
        pictures = {n: datasets.Image() for n in columns if n.endswith(("image", "mask"))}
        if "images" in columns:
            pictures["images"] = datasets.List(datasets.Image())
        path = parquet(folder / f"{split}.parquet", columns, **{**pictures, **features})
        parts[split] = {"path": str(path)}
    return DataSpec("dataset", **parts)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_makes_the_same_batches_of_a_dataset(name: str, tmp_path: Path) -> None:
    if "dataset" not in TASK_OPTIONS[name].formats:
        pytest.skip(f"{name} does not read datasets of this kind")
    options: dict[str, Any] = {"queue": 8} if "retrieval" in name else {}
    like = "mdetr-captions" if name == "grounding" else ""  # where parts of a text name boxes
    scenes = DataSpec(like=like, train_items=8, test_items=4)
    files = TASKS[name](SMALL, scenes, tmp_path, options)
    spec = as_tables(files, tmp_path)
    table = TASKS[name](SMALL, spec, tmp_path, options)
    assert len(table.train) == len(files.train)
    for fact in ("classes", "answers"):
        assert getattr(table, fact, None) == getattr(files, fact, None)
    assert same(files.collate(list(files.train[:3])), table.collate(list(table.train[:3])))
    assert same(files.collate(list(files.test)), table.collate(list(table.test)))
    assert table.facts() == {
        "train": {"items": len(files.train), "left_out": {}},
        "test": {"items": len(files.test), "left_out": {}},
    }


def test_every_caption_of_a_dataset_is_an_item(tmp_path: Path) -> None:
    scenes, options = DataSpec(train_items=8, test_items=4), {"every_caption": True}
    files = TASKS["captioning"](SMALL, scenes, tmp_path, options)
    plain = TASKS["captioning"](SMALL, scenes, tmp_path)
    spec = as_tables(plain, tmp_path)
    table = TASKS["captioning"](SMALL, spec, tmp_path, options)
    assert len(table.train) == len(files.train) > 8
    assert same(files.collate(files.first_train(9)), table.collate(table.first_train(9)))
    assert [one.captions for one in table.train] == [one.captions for one in files.train]
    assert table.facts()["train"]["items"] == len(files.train)
    whole = TASKS["captioning"](SMALL, spec, tmp_path)
    assert of_data(table.train) == of_data(whole.train)  # no picture is read more than once


ASKED = [("human", "<image> and <image>?"), ("gpt", "two"), ("human", "sure?"), ("gpt", "yes")]
CHATS: dict[str, Any] = {
    "from": [{"from": who, "value": text} for who, text in ASKED],
    "role": [{"role": "user", "content": "both?"}, {"role": "assistant", "content": "two"}],
    "user": [{"user": "both?", "assistant": "two"}, {"user": "sure?", "assistant": "yes"}],
}


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_of_every_format(kind: str, streaming: bool, tmp_path: Path) -> None:
    images = datasets.List(datasets.Image())
    columns = {"talk": [CHATS[kind]] * 3, "pictures": [pictures(2)] * 3}
    path = parquet(tmp_path / "chats.parquet", columns, pictures=images)
    asked = Asked("train", str(path), columns={"messages": "talk", "images": "pictures"})
    left: Counter[str] = Counter()
    if streaming:
        found = open_stream(asked, ChatTask.takes.columns, conversation).first(3, left)
    else:
        found = [*open_rows(asked, ChatTask.takes.columns, conversation, left)]
    assert len(found) == 3
    for one in found:
        assert one.turns[1].parts == ("two",)
        assert [open_image(image).size for image in one.images] == [(16, 12)] * 2
        first, second = (open_image(image).tobytes() for image in one.images)
        assert first != second
        shown = [isinstance(part, str) for part in one.turns[0].parts]
        assert shown == ([False, True, False, True] if kind == "from" else [False, False, True])


def test_a_picture_too_many_is_told(tmp_path: Path) -> None:
    images = datasets.List(datasets.Image())
    columns = {"messages": [CHATS["from"]], "images": [pictures(3)]}
    path = parquet(tmp_path / "chats.parquet", columns, images=images)
    with pytest.raises(DataError, match=r"chats.parquet, row 0.*2 times <image>.* 3 pictures"):
        open_rows(Asked("train", str(path)), ChatTask.takes.columns, conversation, Counter())


def test_classes_are_numbered_as_the_dataset_numbers_them(tmp_path: Path) -> None:
    made = TASKS["classification"](SMALL, DataSpec(train_items=8, test_items=4), tmp_path)
    names = [*reversed(made.classes), "none of these"]
    for split in (made.train, made.test):
        for item in split:
            object.__setattr__(item, "label", names.index(item.label))
    spec = as_tables(made, tmp_path, label=datasets.ClassLabel(names=names))
    table = TASKS["classification"](SMALL, spec, tmp_path)
    assert table.classes == names
    numbers = [item.label for item in made.train]
    assert table.collate(list(table.train))["labels"].tolist() == numbers
    assert table.new_model().config.num_labels == len(names)
    for split in (made.train, made.test):
        for item in split:
            object.__setattr__(item, "label", 6 * item.label)
    spec = as_tables(made, tmp_path, label=datasets.Value("int64"))
    table = TASKS["classification"](SMALL, spec, tmp_path)
    assert table.classes == [str(6 * number) for number in sorted(set(numbers))]
    assert "12" in table.classes  # which text would sort before the 6


# -- streams ---------------------------------------------------------------------------------


def streamed(spec: DataSpec, **more: Any) -> DataSpec:
    return DataSpec(
        "dataset", train=spec.train, test=spec.test, streaming=True, test_items=3, **more
    )


def test_facts_that_a_stream_has_not_are_refused(tmp_path: Path) -> None:
    made = TASKS["classification"](SMALL, DataSpec(train_items=8, test_items=4), tmp_path)
    spec = streamed(as_tables(made, tmp_path))
    with pytest.raises(DataError, match=r"does not list its classes.*data\.streaming=false"):
        TASKS["classification"](SMALL, spec, tmp_path)
    made = TASKS["segmentation"](SMALL, DataSpec(train_items=8, test_items=4), tmp_path)
    task = TASKS["segmentation"](SMALL, streamed(as_tables(made, tmp_path)), tmp_path)
    with pytest.raises(DataError, match=r"not counted: give options\.classes"):
        task.new_model()


def test_the_test_split_of_a_stream_is_a_list(tmp_path: Path) -> None:
    made = TASKS["segmentation"](SMALL, DataSpec(train_items=8, test_items=4), tmp_path)
    options = {"classes": made.found_classes}
    spec = streamed(as_tables(made, tmp_path), shuffle_buffer=0)
    task = TASKS["segmentation"](SMALL, spec, tmp_path, options)
    assert len(task.test) == 3
    assert same(task.collate(list(task.test)), made.collate(list(made.test[:3])))
    assert same(task.collate(task.first_train(2)), made.collate(list(made.train[:2])))
    assert task.facts()["train"]["items"] is None


def test_pictures_of_a_stream_are_not_kept(tmp_path: Path) -> None:
    made = TASKS["captioning"](SMALL, DataSpec(train_items=8, test_items=4), tmp_path)
    spec = as_tables(made, tmp_path)
    table = TASKS["captioning"](SMALL, spec, tmp_path)
    table.collate(list(table.train))
    assert len(table.pixels.kept) == len({item.image for item in table.train})
    rows = open_stream(Asked("train", spec.train["path"]), CAPTIONED, captioned_image).first(4)
    table.pixels.kept.clear()
    table.collate(rows)
    assert not table.pixels.kept
    none = dataclasses.replace(spec, pixel_cache=0)
    table = TASKS["captioning"](SMALL, none, tmp_path)
    table.collate(list(table.train))
    assert not table.pixels.kept


def test_a_task_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    """Where processes are not forked, a loader pickles it, without the pictures that it keeps."""
    made = TASKS["captioning"](SMALL, DataSpec(train_items=8, test_items=4), tmp_path)
    spec = as_tables(made, tmp_path)
    task = TASKS["captioning"](SMALL, spec, tmp_path)
    want = task.collate(list(task.train[:3]))
    items, collated = pickle.loads(pickle.dumps((Items(task.train), Seeded(task.collate, 0))))
    again = collated.collate.__self__
    assert not again.pixels.kept
    assert again.pixels.room == again.pixels.limit
    assert same(again.collate([items[i][1] for i in range(3)]), want)
    stream = open_stream(Asked("train", spec.train["path"]), CAPTIONED, captioned_image, 3)
    sent = pickle.loads(pickle.dumps(Numbered(stream, 0, Training(batch_size=2), 1)))
    first, *_ = next(iter(sent))[1].captions
    assert first == next(stream.endless()).captions[0]
