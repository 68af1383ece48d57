"""Pictures and masks as people have them are opened as they are seen, or refused in one message."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlprune.data.files import Left
from vlprune.data.images import TURNS, open_image, size_of
from vlprune.data.pictures import IGNORE, open_mask, read_ade20k, read_image_folder
from vlprune.errors import DataError

RAMP = np.arange(64).reshape(8, 8)


def levels(picture: Image.Image) -> list[int]:
    values = np.asarray(picture)
    assert picture.mode == "RGB"
    assert (values == values[..., :1]).all()
    return values[..., 0].flatten().tolist()


@pytest.mark.parametrize(
    ("name", "values", "white"),
    [
        ("16.png", (RAMP * 1000).astype(np.uint16), 65535),
        ("16.tif", (RAMP * 1000).astype(np.uint16), 65535),
        ("dark16.png", RAMP.astype(np.uint16), 65535),
        ("dark16.tif", RAMP.astype(np.uint16), 65535),
        ("16.pgm", (RAMP * 1000).astype(np.uint16), 65535),
        ("32.tif", (RAMP * 1000).astype(np.int32), 65535),
        ("small32.tif", (RAMP * 4).astype(np.int32), 255),
        ("one.tif", (RAMP / 63).astype(np.float32), 1),
        ("float.tif", (RAMP * 4).astype(np.float32), 255),
        ("large.tif", (RAMP * 1000).astype(np.float32), 65535),
        ("8.png", (RAMP * 4).astype(np.uint8), 255),
    ],
)
def test_grey_levels_are_scaled_not_cut_off(
    tmp_path: Path, name: str, values: Any, white: float
) -> None:
    Image.fromarray(values).save(tmp_path / name)
    want = np.rint(values.astype(np.float64) * 255 / white).astype(int)
    assert levels(open_image(tmp_path / name)) == want.flatten().tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 1e6])
def test_grey_levels_of_no_scale_are_refused(tmp_path: Path, value: float) -> None:
    values = RAMP.astype(np.float32)
    values[3, 3] = value
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif has grey levels from .* between 0 and 65535"):
        open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "webp"])
def test_pictures_are_turned_as_cameras_say(tmp_path: Path, turn: int, suffix: str) -> None:
    """As ImageOps.exif_transpose does; the picture's corner says which way is up."""
    from PIL import ImageOps

    path = tmp_path / f"x.{suffix}"
    picture = Image.new("RGB", (32, 16))
    picture.paste("white", (0, 0, 8, 8))
    exif = picture.getexif()
    exif[0x0112] = turn
    picture.save(path, exif=exif)
    with Image.open(path) as stored:
        want = ImageOps.exif_transpose(stored).convert("RGB")
    got = open_image(path)
    assert got.size == want.size == ((16, 32) if turn > 4 else (32, 16))
    assert got.tobytes() == want.tobytes()
    assert size_of(path) == got.size
    assert len(TURNS) == 7


def test_boxes_decide_whether_a_picture_is_turned(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    picture = Image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    assert open_image(path, (20, 40)).size == (20, 40)  # drawn on what a viewer shows
    assert open_image(path, (200, 401)).size == (20, 40)  # and made smaller since
    assert open_image(path, (40, 20)).size == (40, 20)  # drawn on what is stored
    with pytest.raises(DataError, match="is 20 x 40 pixels, and its boxes are for a picture of 40"):
        open_image(path, (40, 40))


def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    for number, exif in enumerate(
        (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0")
    ):
        for suffix in ("jpg", "png", "webp"):
            path = tmp_path / f"{number}.{suffix}"
            Image.new("RGB", (40, 20)).save(path, exif=exif)
            assert open_image(path).size == size_of(path) == (40, 20)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    clear.putpixel((1, 0), (0, 0, 0, 127))
    clear.save(tmp_path / "rgba.png")
    got = open_image(tmp_path / "rgba.png")
    assert [got.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [
        (255, 0, 0), (128, 128, 128), (255, 255, 255), (255, 255, 255)
    ]  # fmt: skip
    grey = Image.new("LA", (2, 2), (0, 0))
    grey.save(tmp_path / "la.png")
    assert levels(open_image(tmp_path / "la.png")) == [255] * 4
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=1)
    assert levels(open_image(tmp_path / "p.png")) == [0, 255, 255, 255]
    Image.new("L", (2, 2), 7).save(tmp_path / "l.png", transparency=7)
    assert levels(open_image(tmp_path / "l.png")) == [255] * 4


def test_other_kinds_of_pictures(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert open_image(tmp_path / "cmyk.tif").getpixel((0, 0)) == (255, 0, 0)
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert levels(open_image(tmp_path / "bits.png")) == [255] * 4
    frames = [Image.new("L", (8, 8), value) for value in (0, 100, 200)]
    for suffix in ("gif", "png", "webp", "tif"):
        options = {} if suffix == "tif" else {"duration": 10}
        path = tmp_path / f"moves.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert max(levels(open_image(path))) < 5, suffix
    for suffix in ("BMP", "WebP", "TIFF", "JPeG", "ppm"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"x.{suffix}")
        assert open_image(tmp_path / f"x.{suffix}").size == (8, 8)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("opens", [open_image, open_mask, size_of])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        (png(2**31 - 1, 2**31 - 1), "more pixels than Pillow decodes"),
        (png(30_000, 30_000), "more pixels than Pillow decodes"),
        (png(0, 8), "has no pixels|cannot be decoded"),
        (png(100_000, 1), "one side may be at most 200 times"),
        (b"", "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", "it is none of BMP, GIF"),
        (b"GIF89a" + bytes(3), "cannot be decoded"),
    ],
)
def test_what_is_no_picture_is_one_message(
    tmp_path: Path, opens: Any, body: bytes, said: str
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(body)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=said) as caught:
            opens(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_bomb_is_opened_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (12, 12)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "x.png").size == (12, 12)


def test_pipes_folders_and_missing_files_are_no_pictures(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    for name, said in [
        ("pipe.png", "not a regular file"), ("folder.png", "Is a directory"),
        ("link.png", "there is no file"), ("none\x1b.png", r"there is no image .*none\\x1b"),
        ("nul\0.png", "there is no image"), ("long" * 100, "there is no image|too long"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=said):
            open_image(tmp_path / name)


def test_every_damage_to_a_picture_is_one_message_or_a_picture(tmp_path: Path) -> None:
    """Single bytes changed, and files cut off, of every format that is read."""
    import random

    rng, refused = random.Random(0), 0
    picture = Image.effect_noise((24, 16), 90).convert("RGB")
    exif = picture.getexif()
    exif[0x0112] = 6
    path = tmp_path / "x"
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        picture.save(path, form, **({"exif": exif} if form in ("PNG", "JPEG", "TIFF") else {}))
        whole = path.read_bytes()
        for _ in range(150):
            body = bytearray(whole)
            for _ in range(rng.choice((1, 1, 4))):
                body[rng.randrange(min(len(body), 300))] = rng.randrange(256)
            path.write_bytes(body if rng.random() < 0.7 else body[: rng.randrange(len(body))])
            for opens in (open_image, open_mask, size_of):
                try:
                    opens(path)
                except DataError:
                    refused += 1
    assert 500 < refused < 3000


# -- masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, "P"])
def test_masks_of_every_kind_hold_classes(tmp_path: Path, kind: Any) -> None:
    values = np.array([[0, 1, 2], [254, 255, 255]])
    if kind == "P":
        mask = Image.fromarray(values.astype(np.uint8))
        mask = mask.convert("L")
        mask.putpalette([n // 3 for n in range(768)])
        assert mask.mode == "P"
    else:
        mask = Image.fromarray(values.astype(kind))
    name = "m.tif" if kind is np.int32 else "m.png"
    mask.save(tmp_path / name)
    assert open_mask(tmp_path / name).tolist() == [[IGNORE, 0, 1], [253, IGNORE, IGNORE]]
    Image.fromarray(np.eye(3, dtype=bool)).save(tmp_path / "bits.png")
    assert set(open_mask(tmp_path / "bits.png").flatten().tolist()) == {0, IGNORE}


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.full((2, 3), 256, np.uint16), "holds the value 256"),  # 255 as a class means "void"
        (np.full((2, 3), -1, np.int32), "holds the value -1"),
        (np.full((2, 3), 0.5, np.float32), "has fractions"),
        (np.zeros((2, 3, 3), np.uint8), "has colours"),
        (np.zeros((3, 2), np.uint8), "is 2 x 3 pixels, its picture 3 x 2"),
    ],
)
def test_masks_that_are_none_are_refused_at_reading_or_opening(
    tmp_path: Path, mask: Any, said: str
) -> None:
    for name in ("i", "m"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "i" / "a.jpg")
    Image.fromarray(mask).save(tmp_path / "m" / "a.TIF")

    def read_and_open() -> None:
        (item,) = read_ade20k(tmp_path / "i", tmp_path / "m")
        open_mask(item.mask, (3, 2))

    with pytest.raises(DataError, match=said):
        read_and_open()


# -- folders ---------------------------------------------------------------------------------


def test_folders_of_images_hold_what_systems_leave_there(tmp_path: Path) -> None:
    for name in (
        "cat/a.png", "cat/B.TIF", "cat/more/deep/c.webp", "dog.s/d.bmp", "cat/e.PNG",
        ".ipynb_checkpoints/a.png", "cat/.ipynb_checkpoints/a-checkpoint.png", "__MACOSX/cat/a.png",
        "@eaDir/a.png",
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    for name in ("cat/._a.png", "cat/Thumbs.db", ".DS_Store", "cat/desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "cat" / "more" / "loop").symlink_to(tmp_path / "cat")
    for name in ("cat/labels.csv", "dog.s/d.svg", "list.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    left = Left()
    found = read_image_folder(tmp_path, left)
    assert [(str(i.image.relative_to(tmp_path)), i.label) for i in found] == [
        ("cat/B.TIF", "cat"), ("cat/a.png", "cat"), ("cat/e.PNG", "cat"),
        ("cat/more/deep/c.webp", "cat"), ("dog.s/d.bmp", "dog.s"),
    ]  # fmt: skip
    assert left == {
        "files that are no pictures": 3,
        "files outside the folders of classes": 1,
        "folders of classes without a picture": 1,
    }


def test_a_folder_of_masks_is_matched_by_names(tmp_path: Path) -> None:
    for name in ("i", "m"):
        (tmp_path / name).mkdir()
    for name in "ab":
        Image.new("RGB", (3, 2)).save(tmp_path / "i" / f"{name}.JPG")
        Image.new("L", (3, 2), 1).save(tmp_path / "m" / f"{name}.PNG")
    Image.new("L", (2, 3)).save(tmp_path / "m" / "b.PNG")
    with pytest.raises(DataError, match=r"b\.PNG is 2 x 3 pixels, its picture 3 x 2"):
        read_ade20k(tmp_path / "i", tmp_path / "m")  # not in the middle of training
    Image.new("L", (3, 2)).save(tmp_path / "m" / "b.PNG")
    Image.new("L", (3, 2)).save(tmp_path / "m" / "c.png")
    (tmp_path / "i" / ".DS_Store").write_text("x")
    (tmp_path / "i" / "notes.txt").write_text("x")
    left = Left()
    assert [i.mask.name for i in read_ade20k(tmp_path / "i", tmp_path / "m", left)] == [
        "a.PNG", "b.PNG"
    ]  # fmt: skip
    assert left == {"files that are no pictures": 1, "masks without an image": 1}
    (tmp_path / "m" / "a.PNG").unlink()
    (tmp_path / "m" / "b.PNG").unlink()
    with pytest.raises(DataError, match=r"a\.JPG has no mask .*a\.png, nor have 1 others theirs"):
        read_ade20k(tmp_path / "i", tmp_path / "m")
