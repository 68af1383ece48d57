"""Paths of the files of a data set, for sets with one usual layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["GENERATED", "STANDARD", "splits"]

Split = Mapping[str, str]

STANDARD: dict[str, tuple[Split, Split]] = {
    "easy-vqa": ({"folder": ".", "split": "train"}, {"folder": ".", "split": "test"}),
    "coco2017": (
        {"instances": "annotations/instances_train2017.json", "images": "train2017"},
        {"instances": "annotations/instances_val2017.json", "images": "val2017"},
    ),
    "nlvr1-objects": ({"folder": ".", "split": "train"}, {"folder": ".", "split": "test"}),
    "nlvr1": ({"folder": ".", "split": "train"}, {"folder": ".", "split": "test"}),
    "image-folder": ({"folder": "train"}, {"folder": "val"}),
    "ade20k": (
        {"images": "images/training", "masks": "annotations/training"},
        {"images": "images/validation", "masks": "annotations/validation"},
    ),
}
"""Formats for which a recipe may give only the folder: (train, test), with paths below it."""


def _generated(split: str, subtype: str, pairs: str, part: str, classes: str) -> dict[str, Split]:
    return {
        "coco-captions": {
            "captions": f"annotations/captions_{subtype}.json",
            "images": f"images/{subtype}",
        },
        "karpathy": {
            "split_file": "annotations/dataset_shapes.json",
            "images": "images",
            "split": split,
        },
        "vqav2": {
            "questions": f"annotations/questions_{subtype}.json",
            "annotations": f"annotations/answers_{subtype}.json",
            "images": "images",
        },
        "mdetr": {
            "annotations": f"annotations/mdetr_{subtype}.json",
            "images": f"images/{subtype}",
        },
        "mdetr-captions": {
            "annotations": f"annotations/captions_mdetr_{subtype}.json",
            "images": f"images/{subtype}",
        },
        "refer": {
            "refs": f"annotations/refs_{subtype}.json",
            "instances": f"annotations/instances_{subtype}.json",
            "images": f"images/{subtype}",
            "split": split,
        },
        "coco-instances": {
            "instances": f"annotations/instances_{subtype}.json",
            "images": f"images/{subtype}",
        },
        "llava": {
            "conversations": f"annotations/conversations_{subtype}.json",
            "images": f"images/{subtype}",
        },
        "gqa": {
            "questions": f"annotations/gqa_{subtype}.json",
            "images": f"images/{subtype}",
        },
        "nlvr2": {"statements": f"nlvr2/{pairs}.json", "images": f"nlvr2/{pairs}"},
        "ade20k": {
            "images": f"ade20k/images/{part}",
            "masks": f"ade20k/annotations/{part}",
        },
        "image-folder": {"folder": f"classes/{classes}"},
    }


_TRAIN = _generated("train", "train2014", "train", "training", "train")
_TEST = _generated("test", "val2014", "dev", "validation", "val")
GENERATED: dict[str, tuple[Split, Split]] = {name: (_TRAIN[name], _TEST[name]) for name in _TRAIN}
"""Formats that :mod:`vlprune.data.shapes.write` writes: (train, test), paths below its folder."""


def splits(layout: tuple[Split, Split], root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The (train, test) splits of a layout, with ``root`` put before every path."""
    train, test = (
        {key: value if key == "split" else str(root / value) for key, value in split.items()}
        for split in layout
    )
    return train, test
