"""Samples without labels: folders of pictures, rows of a file, texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unlabelled import pictures
from vlprune.data.files import Left
from vlprune.data.samples import Sample, check_pictures, left_out, read_samples
from vlprune.errors import DataError


def rows(path: Path, *bodies: Any) -> Path:
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    return path


def test_a_folder_is_searched_at_any_depth(tmp_path: Path) -> None:
    folder, left = pictures(tmp_path / "p", 5), Left()
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("left behind")
    found = read_samples(folder, left)
    assert [one.image.name for one in found if one.image] == [
        "1.png", "2.png", "4.png", "0.png", "3.png",
    ]  # fmt: skip
    assert {one.text for one in found} == {None}
    assert "files that are no pictures (1)" in left_out(left)
    check_pictures(found)


def test_rows_name_images_and_texts(tmp_path: Path) -> None:
    far = tmp_path / "far.png"
    file = rows(
        tmp_path / "rows.jsonl",
        {"image": "a.png", "text": "one", "label": 3},
        {"file_name": "b/c.png", "caption": "two"},
        {"image": str(far), "text": "three"},
    )
    expected = [
        Sample(tmp_path / "a.png", "one"),
        Sample(tmp_path / "b" / "c.png", "two"),
        Sample(far, "three"),
    ]
    assert read_samples(file) == expected
    file.rename(tmp_path / "metadata.jsonl")  # an image folder, as on the Hub
    assert read_samples(tmp_path) == expected


def test_samples_are_alike(tmp_path: Path) -> None:
    """Rows that lack what most have are left out; what few have is not used."""
    left = Left()
    two = [{"image": f"{n}.png", "text": "t"} for n in range(3)]
    found = read_samples(rows(tmp_path / "a.jsonl", *two, {"image": "3.png", "text": " "}), left)
    assert [one.text for one in found] == ["t"] * 3
    assert dict(left) == {"rows without an image": 0, "rows without a text": 1}
    assert left_out(left).endswith("rows without a text (1)")
    bare = [{"image": f"{n}.png"} for n in range(3)]
    found = read_samples(rows(tmp_path / "b.jsonl", *bare, two[0]))
    assert [one.text for one in found] == [None] * 4
    found = read_samples(rows(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"}))
    assert found == [Sample(text="a"), Sample(text="b")]
    (tmp_path / "d.txt").write_text("a\n\n b \n")
    assert read_samples(tmp_path / "d.txt") == found
    assert left_out(Left()) == ""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"image": "../a.png"}, "'image' must be a path inside"),
        ({"image": 3}, "line 1: 'image' must be text that is not blank, not 3"),
        ({"text": ["a"]}, "line 1: 'text' must be text"),
        ([1], "must be an object"),
        ({"label": 3}, "holds no rows with image or file_name or text or caption"),
        ({}, "holds no rows with"),
    ],
)
def test_a_wrong_row_is_named(body: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_samples(rows(tmp_path / "r.jsonl", body))
    assert says in str(caught.value)
    assert "r.jsonl" in str(caught.value)


def test_other_places_are_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", 4)
    for place, says in (
        (tmp_path / "none", "there is no folder or file"),
        (folder / "1.png", "give the folder around it"),
        (tmp_path / "table.csv", "calibration reads a folder, a .jsonl or a .txt file"),
        (tmp_path / "empty", "holds no pictures"),
        (tmp_path / "empty.txt", "holds no texts"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        for name in ("table.csv", "empty.txt"):
            (tmp_path / name).touch()
        with pytest.raises(DataError, match=says):
            read_samples(place)
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        check_pictures(read_samples(folder), most=1)
    text = str(caught.value)
    assert text.startswith("2 of 4 pictures cannot be read: the image ")
    assert text.endswith("; and 1 more")
