"""What is damaged: small folders, recipes and data sets, made once, all in order."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vlprune.data.layouts import GENERATED
from vlprune.recipe.options import TASK_OPTIONS

DENSE = {"train": {"steps": 2, "batch_size": 4}, "retrain": {"steps": 2, "batch_size": 4}}
SMALL: dict[str, Any] = {
    "model": {"width": 32, "heads": 2, "vision_layers": 2, "text_layers": 2, "image_size": 32},
    "budget": {"params": 0.8},
    **DENSE,
    "search": {"steps": 4, "batch_size": 4},
    "seed": 1,
    "threads": 1,
}
TRAIN_ITEMS, TEST_ITEMS = 12, 6
METHODS: dict[str, dict[str, Any]] = {
    "upop": {"name": "upop", "interval": 2, "cost": "exact"},
    "jsp": {"name": "jsp", "every": 1, "learning_rate": 0.05, "mismatch": "skip"},
    "taylor": {"name": "taylor", "round_to": 2},
    "magnitude": {"name": "magnitude"},
    "random": {"name": "random", "seed": 3},
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "vqa": ("upop", {"attention": "head"}),
    "retrieval": ("jsp", {"options": {"queue": 32, "momentum": 0.9}}),
    "blip-retrieval": ("upop", {"teacher": {"similarities": 1, "features": 1}}),
    "classification": ("magnitude", {"options": {"mixup": 0.5, "smoothing": 0.1}}),
    "segmentation": ("taylor", {"options": {"classes": 5}, "uniform": True}),
    "captioning": ("random", {"options": {"prompt": "a picture of", "beams": 2}}),
    "reasoning": ("upop", {"teacher": {"logits": 1.0}, "skip": ["*text*0*"]}),
    "detection": ("magnitude", {"options": {"model": "glip", "queries": 5}}),
    "grounding": ("jsp", {"options": {"model": "mdetr", "queries": 5}}),
    "chat": ("upop", {"options": {"new_tokens": 4, "longest": 4000}}),
    "zero-shot": ("magnitude", {"options": {"templates": ["a {}.", "one {}."]}}),
    "gqa": ("taylor", {"options": {"model": "mdetr", "queries": 5}}),
}


def recipe_of(task: str, form: str = "", root: str = "../user/scenes") -> dict[str, Any]:
    """A recipe of a task on the seeds' scenes; without a format, on scenes of its own."""
    method, more = SETTINGS[task]
    body = {"task": task, "method": METHODS[method], **SMALL, **more}
    sizes = {"train_items": TRAIN_ITEMS, "test_items": TEST_ITEMS}
    body["data"] = {"format": "shapes", **sizes}
    if form:
        train, test = parts_of(form, root)
        body["data"] = {"format": form, "train": train, "test": test}
    if "skip" in more:
        body["budget"] = {"params": 0.95}
    return body


def parts_of(form: str, root: str) -> tuple[dict[str, str], dict[str, str]]:
    """The two splits of a format, its paths below ``root``."""
    layout = OTHER[form] if form in OTHER else GENERATED[form]
    train, test = (
        {k: v if k == "split" else f"{root}/{v}" for k, v in part.items()} for part in layout
    )
    return train, test


OTHER: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "coco2017": GENERATED["coco-instances"],  # type: ignore[dict-item]
    "easy-vqa": ({"folder": "easy", "split": "train"}, {"folder": "easy", "split": "test"}),
    "messages": (
        {"messages": "messages.json", "images": "images/train2014"},
        {"messages": "messages.json", "images": "images/train2014"},
    ),
    "nlvr1": ({"folder": "nlvr1", "split": "train"}, {"folder": "nlvr1", "split": "test"}),
    "nlvr1-objects": ({"folder": "nlvr1", "split": "train"}, {"folder": "nlvr1", "split": "test"}),
    "visual-genome": (
        {"questions": "vg/questions.json", "image_data": "vg/image_data.json", "images": "vg"},
        {"questions": "vg/questions.json", "image_data": "vg/image_data.json", "images": "vg"},
    ),
}
"""Formats that are not generated: written by :func:`scenes`."""

FORMATS = [
    (task, form)
    for task, takes in TASK_OPTIONS.items()
    for form in takes.formats
    if form in OTHER or form in GENERATED
]
"""Every task with every format that it reads, but for datasets (tests/data/test_datasets.py)."""


def scenes(folder: Path) -> None:
    """Every format that a task reads, on a few generated scenes."""
    from vlprune.data.shapes.write import write_shapes

    write_shapes(folder, TRAIN_ITEMS, TEST_ITEMS)
    pictures = sorted((folder / "images" / "train2014").iterdir())
    easy, genome = folder / "easy", folder / "vg"
    (easy / "images").mkdir(parents=True)
    (genome / "VG_100K").mkdir(parents=True)
    for number, picture in enumerate(pictures):
        shutil.copy(picture, easy / "images" / f"{number}.png")
        shutil.copy(picture, genome / "VG_100K" / f"{number}.jpg")
    asked = [[f"what colour is {n}?", ("red", "blue")[n % 2], n] for n in range(len(pictures))]
    _dump(easy / "questions.json", asked)
    numbers = range(len(pictures))
    urls = [{"image_id": n, "url": f"https://x.org/VG_100K/{n}.jpg"} for n in numbers]
    _dump(genome / "image_data.json", urls)
    answers = [
        {"id": n, "qas": [{"image_id": n, "qa_id": n, "question": "what is it?", "answer": "Red."}]}
        for n in numbers
    ]
    _dump(genome / "questions.json", answers)
    talks = [
        {
            "images": [picture.name],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
                {"role": "assistant", "content": "red"},
            ],
        }
        for picture in pictures
    ]
    _dump(folder / "messages.json", talks)
    for start, part in ((0, "dev"), (12, "hidden")):
        (folder / "nlvr1" / part / "images").mkdir(parents=True)
        lines = []
        for n in range(start, start + 12):
            name = folder / "nlvr1" / part / "images" / f"{part}-{n}-0.png"
            with Image.open(pictures[n % len(pictures)]) as image:
                image.resize((400, 100)).save(name)
            things = [{"x_loc": 5, "y_loc": 7, "size": 20, "type": "square", "color": "Yellow"}]
            line = {"identifier": str(n), "sentence": f"there are {n} boxes", "label": "true"}
            lines.append(json.dumps(line | {"structured_rep": [things, things, []]}))
        (folder / "nlvr1" / part / f"{part}.json").write_text("\n".join(lines))


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def small(folder: Path) -> None:
    """A folder of ``compress``, with timings and an export beside it."""
    _compressed("vqa", "vqav2", folder, {"params": 0.6})
    conditions = {"device": "cpu", "threads": 1, "dtype": "float32", "torch": "2"}
    facts = {"params": 9, "macs": 9, "disk_bytes": 9, "load_seconds": 1.0, "peak_bytes": 9}
    row = {"engine": "eager", "batch": 1, "low": 1.0, "high": 2.0}
    runs = [
        {**row, "model": name, "median": 1.5, "rounds": 7, "items_per_second": 0.7}
        for name in ("dense", "small")
    ]
    bench = {
        "folders": {"small": "small", "dense": "small/dense"},
        "conditions": conditions,
        "models": {name: facts | {"peak_batch": 8} for name in ("dense", "small")},
        "runs": [*runs, {"engine": "onnx", "batch": 8, "failed": "no"}],
        "faster": [{**row, "times": 1.5, "ideal": 2.0, "of_ideal": 0.75}],
    }
    _dump(folder / "bench.json", bench)
    checked = [{"shapes": {"input_ids": [1, 8]}, "difference": 1e-6, "compared": 1.0}]
    export = {"format": "onnx", "int8": False, "model": "Blip", "files": {"model.onnx": 1000}}
    (folder / "told").mkdir()
    _dump(folder / "told" / "vlprune-export.json", export | {"checked": checked, "seconds": 1.0})


def shared(folder: Path) -> None:
    """A folder whose model shares weights between its towers."""
    _compressed("retrieval", "karpathy", folder, {"params": 0.8})


def sharded(folder: Path) -> None:
    """A cut model in several files of weights, with an index."""
    import vlprune

    model = vlprune.load(folder.parent / "small")
    model.save_pretrained = partial(model.save_pretrained, max_shard_size="100KB")
    vlprune.save(model, folder)


def exported(folder: Path) -> None:
    """A model's folder with its ONNX export inside."""
    from vlprune.commands.pipeline.exports import export_folder

    _compressed("classification", "image-folder", folder, {"params": 0.6})
    export_folder(folder, "onnx")


def stopped(folder: Path) -> None:
    """A run that was killed in its search, as ``cwd`` was then."""
    _start(folder)
    pid = os.fork()
    if not pid:
        from transformers.trainer_callback import CallbackHandler

        begun, real = [], CallbackHandler.on_step_begin

        def on_step_begin(self: Any, args: Any, state: Any, control: Any) -> Any:
            begun.append(state.global_step)
            if state.global_step == 5 and args.max_steps == 6:  # the search
                os._exit(9)
            return real(self, args, state, control)

        CallbackHandler.on_step_begin = on_step_begin
        _went(folder)
        os._exit(0)
    os.waitpid(pid, 0)


def whole(folder: Path) -> None:
    """The same run, never killed."""
    _start(folder)
    _went(folder)


def _start(folder: Path) -> None:
    scenes(folder / "scenes")
    body = recipe_of("vqa", "vqav2", "scenes") | {"budget": {"params": 0.6}}
    body |= {"search": {"steps": 6, "batch_size": 4, "save_steps": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body))


def _went(folder: Path) -> None:
    from vlprune.commands.pipeline.compress import compress
    from vlprune.recipe.spec import load_recipe

    with contextlib.chdir(folder):
        compress(load_recipe("recipe.yaml"), Path("out"))


def _compressed(task: str, form: str, folder: Path, budget: dict[str, float]) -> None:
    from vlprune.commands.pipeline.compress import compress
    from vlprune.recipe.spec import load_recipe

    path = folder.with_suffix(".yaml")
    body = recipe_of(task, form, str(folder.parent / "scenes")) | {"budget": budget}
    path.write_text(yaml.safe_dump(body))
    compress(load_recipe(path), folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "scenes": scenes, "small": small, "shared": shared, "sharded": sharded,
    "exported": exported, "stopped": stopped, "whole": whole,
}  # fmt: skip


WEIGHED = ("small", "shared", "sharded")
"""Seeds whose weights are known by :func:`digest_of`."""


def digest_of(folder: Path) -> dict[str, str]:
    """Digests of the weights, by name, as ``vlprune.load`` gives them."""
    import hashlib

    import vlprune

    model = vlprune.load(folder)
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }
