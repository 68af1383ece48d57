"""Small data sets as people have them, in every shape that the package datasets reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image


def png(number: int, size: tuple[int, int] = (16, 12)) -> bytes:
    """A picture of its own grey, with a pattern by which another one cannot pass for it."""
    pixels = np.full((size[1], size[0], 3), (number * 37) % 256, dtype=np.uint8)
    pixels[number % size[1], :, 0] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pictures(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"bytes": png(i, **more), "path": f"picture_{i:012d}.png"} for i in range(count)]


def table(columns: dict[str, list[Any]], **features: Any) -> datasets.Dataset:
    """A data set of these columns; ``features`` are those that are not inferred."""
    inferred = datasets.Dataset.from_dict(
        {name: values for name, values in columns.items() if name not in features}
    ).features
    every = datasets.Features({n: features.get(n, inferred.get(n)) for n in columns})
    return datasets.Dataset.from_dict(columns, features=every)


def parquet(path: Path, columns: dict[str, list[Any]], **features: Any) -> Path:
    """A Parquet file of these columns, ``image`` among them as pictures."""
    if "image" in columns and "image" not in features:
        features["image"] = datasets.Image()
    table(columns, **features).to_parquet(path)
    return path


def captioned(count: int) -> dict[str, list[Any]]:
    return {"image": pictures(count), "text": [f"a thing number {i}" for i in range(count)]}


def image_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Pictures in files, and a metadata.jsonl with a row for each."""
    folder.mkdir(parents=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            (folder / f"{i}.png").write_bytes(png(i))
            file.write(json.dumps({"file_name": f"{i}.png", **row}, ensure_ascii=False) + "\n")
    return folder


def json_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """An archive in WebDataset's form: files of one stem are one row."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path
