"""Hugging Face datasets as a source: each kind of file, folder and archive gives the same items."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from tables import captioned, image_folder, json_lines, parquet, pictures, png, table, tar
from vlprune.data.datasets.records import (
    captioned_image,
    labelled_image,
    masked_image,
    question,
    scenery,
)
from vlprune.data.datasets.sources import Asked, class_names, open_rows, open_stream
from vlprune.data.files import Left
from vlprune.data.images import open_image, open_mask, size_of
from vlprune.errors import DataError, UnsupportedError
from vlprune.recipe.columns import CAPTIONED, LABELLED, MASKED, OBJECTS, QUESTIONS


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
    monkeypatch.setattr(Parquet, "SLEEP_ON_THREADS_SHUTDOWNS", False)  # five seconds


def source(tmp_path: Path, kind: str) -> tuple[str, dict[str, str]]:
    """A data set of four captioned pictures: its path, and its names for columns."""
    columns = captioned(4)
    rows = [{"text": text} for text in columns["text"]]
    if kind == "parquet":
        return str(parquet(tmp_path / "a.parquet", columns)), {}
    if kind == "pattern":
        for part, some in enumerate((slice(0, 3), slice(3, 4))):
            parquet(tmp_path / f"p-{part}.parquet", {n: v[some] for n, v in columns.items()})
        return str(tmp_path / "p-*.parquet"), {}
    if kind == "saved":
        table(columns, image=datasets.Image()).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved"), {}
    if kind == "saved splits":
        one = table(columns, image=datasets.Image())
        datasets.DatasetDict(train=one, validation=one.select([0])).save_to_disk(tmp_path / "dict")
        return str(tmp_path / "dict"), {}
    if kind == "arrow":
        table(columns, image=datasets.Image()).save_to_disk(tmp_path / "saved")
        (file,) = (tmp_path / "saved").glob("*.arrow")
        return str(file), {}
    if kind == "imagefolder":
        return str(image_folder(tmp_path / "f", rows)), {}
    if kind in ("jsonl", "csv"):
        image_folder(tmp_path / "f", rows)
        named = [{"file": f"f/{i}.png", **row} for i, row in enumerate(rows)]
        if kind == "jsonl":
            return str(json_lines(tmp_path / "a.jsonl", named)), {"image": "file"}
        datasets.Dataset.from_list(named).to_csv(tmp_path / "a.csv")
        return str(tmp_path / "a.csv"), {"image": "file"}
    assert kind == "tar"
    files = {f"{i}.{end}": content for i, text in enumerate(columns["text"])
             for end, content in (("png", png(i)), ("txt", text.encode()))}  # fmt: skip
    return str(tar(tmp_path / "a.tar", files)), {"image": "png", "text": "txt"}


KINDS = [
    "parquet",
    "pattern",
    "saved",
    "saved splits",
    "arrow",
    "imagefolder",
    "jsonl",
    "csv",
    "tar",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_items(tmp_path: Path, kind: str) -> None:
    path, columns = source(tmp_path, kind)
    asked = Asked("train", path, columns=columns)
    rows = open_rows(asked, CAPTIONED, captioned_image, Left())
    stream = open_stream(asked, CAPTIONED, captioned_image)
    assert len(rows) == 4
    for items in (list(rows), [rows[i] for i in range(4)], stream.first(9), list(rows[0:4])):
        assert [item.captions for item in items] == [(f"a thing number {i}",) for i in range(4)]
        for number, item in enumerate(items):
            want = np.asarray(Image.open(io.BytesIO(png(number))))
            assert (np.asarray(open_image(item.image)) == want).all()
            assert size_of(item.image) == (16, 12)


# -- what the rows hold ----------------------------------------------------------------------


def rows_of(path: Path, wanted: Any, make: Any, left: Left | None = None, **columns: str) -> Any:
    left = Left() if left is None else left
    return open_rows(Asked("train", str(path), columns=columns), wanted, make, left)


def test_only_pictures_that_are_opened_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = rows_of(parquet(tmp_path / "a.parquet", captioned(5)), CAPTIONED, captioned_image)
    opened = []
    monkeypatch.setattr(
        type(items.table), "open_bytes", lambda self, column, row: opened.append(row)
    )
    assert sorted({c for item in items for c in item.captions})[0] == "a thing number 0"
    assert len({item.image for item in items}) == 5
    assert items[2].image == items[2].image == next(iter(items[2:])).image
    assert not opened


def test_rows_that_are_not_items_are_left_out_and_counted(tmp_path: Path) -> None:
    columns = {
        "image": [*pictures(5), None],
        "question": ["a?", None, " ", "d?", "e?", "f?"],
        "answers": [["x", "x", "y"], ["x"], ["x"], [], ["ä", None, "ö"], ["x"]],
    }
    path, left = parquet(tmp_path / "a.parquet", columns), Left()
    with pytest.raises(DataError, match=r"row 4: entry 1 of 'answers' must be text or a number"):
        rows_of(path, QUESTIONS, question, left)
    columns["answers"][4] = ["ä", "ä", "ö"]
    path, left = parquet(tmp_path / "b.parquet", columns), Left()
    items = rows_of(path, QUESTIONS, question, left)
    assert [(q.id, q.text, q.answers) for q in items] == [
        (0, "a?", ("x", "x", "y")),
        (4, "e?", ("ä", "ä", "ö")),
    ]
    assert items[1] == [*items][1]
    assert items[-1].text == "e?"
    assert +left == Left(
        {
            "questions that are blank": 2,
            "questions without an answer": 1,
            "rows without a picture": 1,
        }
    )
    (limited,) = open_rows(Asked("train", str(path)), QUESTIONS, question, Left(), most=1)
    assert limited == items[0] or limited.text == "a?"


def test_columns_below_others_and_lists_of_objects(tmp_path: Path) -> None:
    answers = [[{"answer": "yes", "id": 1}, {"answer": "no", "id": 2}], [{"answer": 3, "id": 3}]]
    for one in answers[1]:
        one["answer"] = "3"
    columns = {"image": pictures(2), "q": ["a?", "b?"], "answers": answers, "n": [7, 8]}
    items = rows_of(
        parquet(tmp_path / "a.parquet", columns), QUESTIONS, question,
        question="q", answers="answers.answer", id="n",
    )  # fmt: skip
    assert [(q.id, q.answers) for q in items] == [(7, ("yes", "no")), (8, ("3",))]


LABELS = datasets.ClassLabel(names=["zebra", "ape", "élan"])


def test_class_labels_have_their_names_and_hidden_ones_are_left_out(tmp_path: Path) -> None:
    columns = {"image": pictures(5), "label": [1, 0, -1, None, 2]}
    left = Left()
    items = rows_of(parquet(tmp_path / "a.parquet", columns, label=LABELS), LABELLED,
                    labelled_image, left)  # fmt: skip
    assert [item.label for item in items] == ["ape", "zebra", "élan"]
    assert +left == Left({"rows without a label": 2})
    assert class_names(items, "label") == ["zebra", "ape", "élan"]
    plain = parquet(tmp_path / "b.parquet", {**columns, "label": [3, 10, -1, None, 2]})
    items = rows_of(plain, LABELLED, labelled_image)
    assert [item.label for item in items] == ["3", "10", "2"]
    assert class_names(items, "label") is None


@pytest.mark.parametrize("as_list", [False, True])
def test_boxes_in_objects(tmp_path: Path, as_list: bool) -> None:
    """As the package's image folders have them: an object of lists; or a list of objects."""
    boxes, kinds = [[1, 2, 5, 4], [0, 0, 99, 3]], [2, 0]
    several = {"bbox": boxes, "category": kinds}
    objects = [dict(zip(several, pair, strict=True)) for pair in zip(boxes, kinds, strict=True)]
    none: Any = [] if as_list else {"bbox": [], "category": []}
    rows = [{"objects": objects if as_list else several}, {"objects": none}]
    folder, left = image_folder(tmp_path / "f", rows), Left()
    items = rows_of(folder, OBJECTS, scenery, left, boxes="objects.bbox", labels="objects.category")
    assert items[0].boxes == ((1, 2, 5, 4), (0, 0, 16, 3))
    assert [item.labels for item in items] == [("2", "0"), ()]
    assert [item.size for item in items] == [(16, 12)] * 2
    assert +left == Left({"parts of boxes beyond their picture": 1})
    for name, more in (("g", {"width": 32, "height": 24}), ("h", {})):
        kinds = kinds if more else [1]
        row = {"objects": {"bbox": boxes, "category": kinds}, **more}
        folder = image_folder(tmp_path / name, [row])
        if more:
            found = rows_of(
                folder, OBJECTS, scenery, boxes="objects.bbox", labels="objects.category"
            )
            assert found[0].size == (32, 24)
            assert found[0].boxes[1] == (0, 0, 32, 3)
    with pytest.raises(DataError, match="row 0: there are 2 boxes and 1 labels"):
        rows_of(folder, OBJECTS, scenery, boxes="objects.bbox", labels="objects.category")


# -- what is refused -------------------------------------------------------------------------


def refused(call: Any) -> str:
    """The one message that refuses it."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    return text


def test_all_columns_that_do_not_fit_are_told_at_once(tmp_path: Path) -> None:
    columns = {"image": [1, 2], "ask\x1bed": ["a", "b"], "answers": [[["x"]], [["y"]]]}
    path = parquet(tmp_path / "a.parquet", columns, image=datasets.Value("int64"))
    text = refused(lambda: rows_of(path, QUESTIONS, question, id="number"))
    for part in (
        "a.parquet does not fit",
        "'image' for image must hold pictures, or texts that name their files, not int64",
        "there is no column 'question' for question, texts",
        "'answers' for answers must hold a text or a list of texts per row, not lists of lists of",
        "there is no column 'number' for id",
        "its columns are image (int64), ask\\x1bed (string), answers (lists of lists of string)",
        "data.columns.image=NAME",
    ):
        assert part in text, part


def test_files_outside_the_data_set_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    (tmp_path / "d").mkdir()
    rows = [{"image": "../secret.png", "text": "a"}]
    path = json_lines(tmp_path / "d" / "a.jsonl", rows)
    said = "row 0: 'image' must be a path inside the folder of images"
    assert said in refused(lambda: [*rows_of(path, CAPTIONED, captioned_image)])
    for place in (str(tmp_path / "secret.png"), "../secret.png", "https://example.org/a.png"):
        held = {"image": [{"bytes": None, "path": place}], "text": ["a"]}
        features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
        path = tmp_path / "d" / f"{len(place)}.parquet"
        pq.write_table(pa.Table.from_pydict(held, schema=features.arrow_schema), path)
        asked = Asked("train", str(path))
        said = f"names the picture {place}, which is not part of the data set"
        assert said in refused(lambda path=path: [*rows_of(path, CAPTIONED, captioned_image)])
        stream = open_stream(asked, CAPTIONED, captioned_image)
        assert said in refused(lambda stream=stream: stream.first(1))


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_cannot_be_decoded(tmp_path: Path, streaming: bool) -> None:
    columns = captioned(3)
    columns["image"][1]["bytes"] = png(1)[:60]
    columns["image"][2]["bytes"] = b"no picture at all"
    path = parquet(tmp_path / "a.parquet", columns)
    asked = Asked("train", str(path))
    if streaming:
        items = open_stream(asked, CAPTIONED, captioned_image).first(3)
    else:
        items = list(open_rows(asked, CAPTIONED, captioned_image, Left()))
    open_image(items[0].image)
    text = refused(lambda: open_image(items[1].image))
    assert "a.parquet, row 1, image cannot be decoded" in text
    text = refused(lambda: open_image(items[2].image))
    assert "row 2, image cannot be decoded (it is none of BMP" in text


def test_a_picture_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "a.parquet", captioned(1))
    (item,) = rows_of(path, CAPTIONED, captioned_image)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16 * 12 // 2 - 1)
    assert "more pixels than Pillow decodes" in refused(lambda: open_image(item.image))


def test_masks_in_a_table(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).save(file, "PNG")
    both = {"image": pictures(1, size=(3, 2)), "mask": [{"bytes": file.getvalue(), "path": None}]}
    path = parquet(tmp_path / "a.parquet", both, mask=datasets.Image())
    (item,) = rows_of(path, MASKED, masked_image)
    assert open_mask(item.mask, (3, 2)).tolist() == [[255, 0, 1], [2, 3, 4]]
    assert "row 0, mask is 3 x 2 pixels" in refused(lambda: open_mask(item.mask, (4, 2)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: str(p / "nothing.parquet"), "there is no file or folder"),
        (lambda p: str(p / "no-*.parquet"), "no file matches"),
        (lambda p: "nobody/has-such-a-set", "the hub cannot be asked for a data set of that name"),
        (lambda p: written(p / "a.parquet", b"PAR1 is not all of it"), "cannot read"),
        (lambda p: written(p / "a.json", b'{"a": '), "cannot read"),
        (lambda p: written(p / "a.csv", b""), "cannot read"),
        (
            lambda p: written(p / "a.pkl", b"\x80\x04."),
            "files ending in .pkl: they must",
        ),
        (lambda p: str(written_folder(p, "a.pkl")), "cannot open the data set"),
        (lambda p: str(written_folder(p, "a.txt")), "text: a data set must be one of parquet"),
        (lambda p: str(written_folder(p, "script.py")), "cannot open the data set"),
        (lambda p: written(p / "script.py", b"raise SystemExit"), "files ending in .py"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_data_set_is_one_message(
    tmp_path: Path, make: Any, says: str, streaming: bool
) -> None:
    asked = Asked("train", make(tmp_path))

    def use() -> None:
        if streaming:
            open_stream(asked, CAPTIONED, captioned_image).first(1)
        else:
            open_rows(asked, CAPTIONED, captioned_image, Left())

    assert says in refused(use)


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def written_folder(tmp_path: Path, name: str) -> Path:
    (tmp_path / "folder").mkdir()
    written(tmp_path / "folder" / name, b"import os; os._exit(3)")
    return tmp_path / "folder"


def test_splits(tmp_path: Path) -> None:
    path = str(parquet(tmp_path / "a.parquet", captioned(10)))
    for split, want in (("", 10), ("train[:70%]", 7), ("train[70%:]", 3), ("a", 10)):
        asked = Asked("test", path, split=split)
        assert len(open_rows(asked, CAPTIONED, captioned_image, Left())) == want
    text = refused(
        lambda: open_rows(Asked("test", path, name="x"), CAPTIONED, captioned_image, Left())
    )
    assert "data.test.name is for folders and the hub" in text
    for split in ("train", "val"):
        image_folder(tmp_path / "f" / split, [{"text": f"{split} {i}"} for i in range(2)])
    folder = str(tmp_path / "f")
    for part, split, first in (
        ("train", "", "train"),
        ("test", "", "val"),
        ("test", "train", "train"),
    ):
        items = open_rows(Asked(part, folder, split=split), CAPTIONED, captioned_image, Left())
        assert items[0].captions == (f"{first} 0",)
    text = refused(
        lambda: open_rows(Asked("test", folder, split="dev"), CAPTIONED, captioned_image, Left())
    )
    assert "cannot read the split dev" in text
    one = table(captioned(2), image=datasets.Image())
    datasets.DatasetDict(first=one).save_to_disk(tmp_path / "d")
    text = refused(
        lambda: open_rows(Asked("train", str(tmp_path / "d")), CAPTIONED, captioned_image, Left())
    )
    assert "has no split train, but first: give data.train.split" in text


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "a.parquet", captioned(0), text=datasets.Value("string"))
    assert "corresponds to no data" in refused(lambda: rows_of(empty, CAPTIONED, captioned_image))
    none = {"image": pictures(2), "text": ["", None]}
    path = parquet(tmp_path / "b.parquet", none)
    text = refused(lambda: rows_of(path, CAPTIONED, captioned_image))
    assert "captions that are null or blank (1), images without a caption (2)" in text
    stream = open_stream(Asked("train", str(path)), CAPTIONED, captioned_image)
    assert "holds no row that can be used" in refused(lambda: next(stream.endless()))


def test_without_the_package_the_message_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "a.parquet", captioned(1))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vlprune\[data\]'"):
        rows_of(path, CAPTIONED, captioned_image)


# -- streams ---------------------------------------------------------------------------------


def test_a_stream_is_shuffled_by_its_seed_and_never_ends(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", captioned(6))

    def order(seed: int, buffer: int, count: int, most: int = 0) -> list[str]:
        stream = open_stream(Asked("train", str(path)), CAPTIONED, captioned_image, buffer, most)
        return [item.captions[0][-1] for item in itertools.islice(stream.endless(seed), count)]

    assert order(0, 0, 14) == [*"01234501234501"]
    assert order(3, 0, 5, most=2) == [*"01010"]
    one = order(1, 4, 12)
    assert one == order(1, 4, 12)
    assert sorted(one[:6]) == sorted(one[6:]) == [*"012345"]
    assert one[:6] != one[6:]  # every pass has another order
    assert order(2, 4, 6) != one[:6]


def test_the_first_row_of_a_stream_need_not_be_whole(tmp_path: Path) -> None:
    """JSON lines say what their columns are by their rows alone."""
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [{"image": None, "text": "a"}, {"image": "0.png", "text": "b"}]
    path = json_lines(tmp_path / "a.jsonl", rows)
    left = Left()
    stream = open_stream(Asked("train", str(path)), CAPTIONED, captioned_image)
    (item,) = stream.first(5, left)
    assert (item.image, item.captions) == (tmp_path / "0.png", ("b",))
    assert +left == Left({"rows without a picture": 1})


def test_a_data_set_of_the_hub_is_found_in_the_cache(tmp_path: Path) -> None:
    """As an earlier run with a network has left it there."""
    source = datasets.load_dataset("parquet", data_files=str(parquet(tmp_path / "a.parquet",
                                   captioned(3))), cache_dir=str(tmp_path / "made"))  # fmt: skip
    (file,) = source["train"].cache_files
    there = Path(file["filename"]).parent
    place = datasets.config.HF_DATASETS_CACHE / "owner___things" / "default" / "0.0.0" / ("a" * 40)
    shutil.copytree(there, place)
    for path in place.glob("*.arrow"):
        path.rename(place / "things-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    info |= {"builder_name": "parquet", "dataset_name": "things", "config_name": "default"}
    (place / "dataset_info.json").write_text(json.dumps(info))
    items = open_rows(Asked("train", "owner/things"), CAPTIONED, captioned_image, Left())
    assert [item.captions[0][-1] for item in items] == ["0", "1", "2"]
    assert size_of(items[1].image) == (16, 12)
    text = refused(
        lambda: open_rows(Asked("test", "owner/things"), CAPTIONED, captioned_image, Left())
    )
    assert "has no split test or validation, but train: give data.test.split" in text


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    rows = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(rows, tmp_path / "a.parquet")
    assert "cannot read" in refused(
        lambda: rows_of(tmp_path / "a.parquet", CAPTIONED, captioned_image)
    )


def test_a_stream_refuses_what_needs_all_of_it(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", captioned(2))
    stream: Any = open_stream(Asked("train", str(path)), CAPTIONED, captioned_image)
    for use in (len, iter, lambda s: s[0]):
        assert "give data.streaming=false" in refused(lambda use=use: use(stream))
