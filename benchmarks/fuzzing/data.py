"""The data sets that tasks read: annotations and pictures."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import seeds
from .cases import ODD_NAMES, Case, Maker


def data(make: Maker) -> Case:
    """Damaged annotations of every format, read by the task."""
    task, form = make.rng.choice(seeds.FORMATS)
    root = make.copy("scenes")
    files = sorted(
        {path for part in seeds.parts_of(form, str(root)) for path in _annotations(part)}
    )
    if not files:
        return images(make)
    path = make.rng.choice(files)
    lines = form in ("nlvr2", "nlvr1", "nlvr1-objects")
    what, names = make.hurt(path, "jsonl" if lines else "json")
    return _read(make, task, form, root, f"{form} {path.name}: {what}", names)


def images(make: Maker) -> Case:
    """Damaged pictures, opened by the task."""
    task, form = make.rng.choice(
        [("classification", "image-folder"), ("segmentation", "ade20k"), ("vqa", "easy-vqa"),
         ("retrieval", "coco-captions"), ("detection", "coco-instances")]
    )  # fmt: skip
    root = make.copy("scenes")
    part = seeds.parts_of(form, str(root))[0]
    places = [Path(place) for place in part.values() if Path(place).is_dir()]
    pictures = [
        p for place in places for p in sorted(place.rglob("*")) if p.suffix in (".jpg", ".png")
    ]
    path = make.rng.choice(pictures)
    if make.rng.random() < 0.06:
        odd = make.rng.choice(ODD_NAMES).replace("/", "")[:100]
        path.rename(path.with_name(odd + path.suffix))
        what, names = "odd name", [path.name, str(path.parent)]
    else:
        what, names = make.hurt(path, "image")
    return _read(make, task, form, root, f"{form} {path.name}: {what}", names)


def _annotations(part: Mapping[str, str]) -> list[Path]:
    found = [Path(value) for key, value in part.items() if key != "split"]
    files = [path for path in found if path.is_file()]
    return files + [p for path in found if path.is_dir() for p in path.rglob("*.json")]


def _read(make: Maker, task: str, form: str, root: Path, what: str, names: list[str]) -> Case:
    def call() -> list[str]:
        from vlprune.recipe.spec import DataSpec, ModelSpec
        from vlprune.tasks import TASKS

        train, test = seeds.parts_of(form, str(root))
        model = ModelSpec(**seeds.SMALL["model"])
        options = seeds.SETTINGS[task][1].get("options", {})
        read = TASKS[task](
            model, DataSpec(format=form, train=train, test=test), make.room.out, options
        )
        made = []
        for items in (read.train, read.test):
            for start in range(0, len(items), 4):
                made += _not_finite(read.collate(list(items[start : start + 4]), random.Random(0)))
        return made

    def wrong(found: list[str]) -> str:
        return f"numbers that are not finite in {found[0]}" if found else ""

    return Case(call, what, names, wrong=wrong)


def _not_finite(batch: Any, name: str = "") -> list[str]:
    import torch

    if isinstance(batch, torch.Tensor):
        bad = batch.is_floating_point() and not bool(batch.isfinite().all())
        return [name] if bad else []
    pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    if isinstance(batch, Mapping | list | tuple):
        return [bad for key, value in pairs for bad in _not_finite(value, f"{name}.{key}")]
    return []
