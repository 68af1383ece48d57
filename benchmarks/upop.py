"""UPop against one-shot baselines, with the same number of training steps for each.

    python benchmarks/upop.py vqa-scenes retrieval-scenes easy-vqa digits -o upop-runs

For every experiment and seed a dense model is trained once. Every method then starts from it
and takes search + retrain optimizer steps in all, whatever it does with them: Random and
Magnitude cut at once and retrain all the while; Taylor watches the search steps, cuts, and
retrains the rest; UPop searches progressively and retrains the rest. ``dense`` goes on training
for as many steps without being cut. Seeds change the first weights of the dense model, the order
of the data and Random's choice: what survives a cut depends most on which dense model it is.
Results are added to OUT/results.jsonl as they come, so a run that is stopped goes on; the
table is printed at the end. ``easy-vqa`` and ``nlvr1`` are looked for in $VLPRUNE_DATA;
``digits`` needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import vlprune
from vlprune.commands.pipeline.compress import compress
from vlprune.commands.pipeline.evaluate import evaluate_folder
from vlprune.commands.pipeline.make import make_task
from vlprune.commands.pipeline.notes import DENSE_NOTE, basis_of, remember
from vlprune.recipe.spec import CalibrationSpec, DataSpec, ModelSpec, Recipe, Training
from vlprune.status import Progress
from vlprune.tasks import TASKS

DATA = os.environ.get("VLPRUNE_DATA", "")
SMALL = ModelSpec(width=96, heads=4, vision_layers=3, text_layers=1)


@dataclass(frozen=True)
class Experiment:
    """A recipe for the dense model; steps and learning rate of what follows."""

    recipe: Recipe
    search: int = 100
    retrain: int = 100
    rate: float = 1e-3


def dense_recipe(
    task: str, model: ModelSpec, data: DataSpec, steps: int, options: Any = None
) -> Recipe:
    """How the dense model is trained."""
    return Recipe(
        task=task,
        budget={"params": 1.0},
        method={"name": "random"},
        model=model,
        data=data,
        options=options or {},
        train=Training(steps=steps, learning_rate=1e-3),
    )


def scenes(train: int, test: int, root: Path) -> DataSpec:
    """Generated scenes, kept beside the results."""
    return DataSpec(train_items=train, test_items=test, folder=str(root / f"scenes-{train}-{test}"))


def digits(root: Path) -> DataSpec:
    """scikit-learn's 1,797 handwritten digits (8 x 8), written as an image folder."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
        split = "val" if number % 4 == 0 else "train"
        folder = root / "digits" / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number:04d}.png"
        if not path.exists():
            Image.fromarray((image * 255 / 16).astype("uint8")).resize((32, 32)).save(path)
    return DataSpec(format="image-folder", folder=str(root / "digits"))


def vqa_scenes(root: Path) -> Recipe:
    return dense_recipe("vqa", SMALL, scenes(4000, 600, root), 1200)


def retrieval_scenes(root: Path) -> Recipe:
    sizes = replace(SMALL, text_layers=2)
    return dense_recipe("retrieval", sizes, scenes(4000, 1000, root), 1200)


def easy_vqa(root: Path) -> Recipe:
    data = DataSpec(format="easy-vqa", folder=f"{DATA}/easy-vqa/train", test_items=1500)
    return dense_recipe("vqa", SMALL, data, 1500)


def nlvr1(root: Path) -> Recipe:
    return dense_recipe("reasoning", SMALL, DataSpec(format="nlvr1", folder=f"{DATA}/nlvr1"), 1500)


def scikit_digits(root: Path) -> Recipe:
    sizes = ModelSpec(width=96, heads=4, vision_layers=4, image_size=32, patch_size=8)
    options = {"mixup": 0.2, "flip": False}
    return dense_recipe("classification", sizes, digits(root), 800, options)


EXPERIMENTS: dict[str, tuple[Any, Any]] = {
    "vqa-scenes": (vqa_scenes, Experiment),
    "retrieval-scenes": (retrieval_scenes, Experiment),
    "easy-vqa": (easy_vqa, Experiment),
    "nlvr1": (nlvr1, Experiment),
    "digits": (scikit_digits, lambda recipe: Experiment(recipe, search=50, retrain=50)),
}
"""The recipe of the dense model, and what follows it."""

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {"method": {"name": "random"}},
    "magnitude": {"method": {"name": "magnitude"}},
    "taylor": {"method": {"name": "taylor"}, "watch": True},
    "upop": {"method": {"name": "upop"}, "watch": True},
    "upop-squared": {"method": {"name": "upop", "importance": "squared"}, "watch": True},
    "upop-product": {"method": {"name": "upop", "importance": "gradient_x_gate"}, "watch": True},
    "upop-teacher": {"method": {"name": "upop"}, "watch": True, "teacher": True},
    "taylor-teacher": {"method": {"name": "taylor"}, "watch": True, "teacher": True},
    "random-teacher": {"method": {"name": "random"}, "teacher": True},
    "obs": {"method": {"name": "obs"}, "items": 256},
    "obs-rotate": {"method": {"name": "obs", "rotate": True}, "items": 256},
    "obs-teacher": {"method": {"name": "obs", "rotate": True}, "items": 256, "teacher": True},
    "upop-rotate": {"method": {"name": "upop"}, "watch": True, "turned": True},
    "upop-rotate-teacher": {
        "method": {"name": "upop"},
        "watch": True,
        "turned": True,
        "teacher": True,
    },
    "scratch": {"method": {"name": "random", "scope": "uniform"}, "fresh": True},
}
"""``items`` calibrate; a model that is ``turned`` has its heads rotated first; a ``fresh`` one is
of the small size from the start, and trained from scratch for as long as all others together."""
TEACHER = {
    "retrieval": {"similarities": 1.0, "features": 1.0},
    "vqa": {"logits": 1.0, "features": 1.0},
    "reasoning": {"logits": 1.0, "features": 1.0},
    "classification": {"logits": 1.0, "features": 1.0},
}
FEW = ("magnitude", "taylor", "upop")
"""What is compared at the ratios of ``--few``."""


def one_run(
    name: str, dense: Path, known: dict[str, float], what: Experiment, ratio: float, seed: int
) -> dict[str, Any]:
    """Compress the dense model, whose figures are ``known``, by the method ``name``."""
    chosen = dict(METHODS[name])
    watch, fresh = chosen.pop("watch", False), chosen.pop("fresh", False)
    recipe, search, retrain = what.recipe, what.search, what.retrain
    whole = Training(steps=search + retrain, learning_rate=what.rate, save_steps=0)
    start = replace(recipe, model=replace(recipe.model, path=str(dense)), seed=seed)
    calibration = CalibrationSpec(items=chosen.get("items", 0), batch_size=16)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        if chosen.get("turned"):
            dense = turned(start, Path(scratch) / "turned")
            start = replace(start, model=replace(recipe.model, path=str(dense)))
        if fresh:
            start = replace(start, model=recipe.model)
            whole = replace(whole, steps=whole.steps + recipe.train.steps)
            search, retrain = 0, whole.steps
        if name == "dense":
            trained = replace(start, train=whole)
            report = compress(trained, Path(scratch) / "out", Progress())
            accuracy = report["metrics"]["dense"]
            return {"metric": accuracy[report["metric"]], "seconds": time.monotonic() - began}
        method = chosen["method"]
        if method["name"] == "random":
            method = {**method, "seed": seed}
        this = replace(
            start,
            budget={"params": ratio},
            method=method,
            train=Training(),
            search=replace(whole, steps=search, decay="constant") if watch else Training(),
            retrain=replace(whole, steps=retrain if watch else search + retrain),
            teacher=TEACHER[recipe.task] if chosen.get("teacher") else {},
            calibration=calibration,
        )
        out = Path(scratch) / "out"
        if not fresh:  # with the dense model in it, it is not measured again
            shutil.copytree(dense, out / "dense")
            basis = basis_of(this, make_task(this, out / "data"))
            body = {"basis": asdict(basis), "metrics": known, "history": []}
            remember(out / "dense" / DENSE_NOTE, basis.key, body)
        report = compress(this, out, Progress())
    metric = report["metric"]
    return {
        "cut": report["metrics"]["cut"][metric],
        "metric": report["metrics"]["retrained"][metric],
        "reached": report["budget"]["reached"],
        "kept": {
            f"{g['tower']} {g['kind']}": round(g["kept"] / g["units"], 3) for g in report["groups"]
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def turned(recipe: Recipe, folder: Path) -> Path:
    """The dense model of the recipe with its heads in their free basis, saved in ``folder``."""
    task = make_task(recipe, folder / "data")
    model = task.load(Path(recipe.model.path))
    items = random.Random(recipe.seed).sample(list(task.train), min(256, len(task.train)))
    parts = [items[i : i + 16] for i in range(0, len(items), 16)]
    vlprune.rotate(model, [task.collate(part) for part in parts])
    vlprune.save(model, folder, processor=task.processor)
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a line for each method."""
    lines = []
    for name in dict.fromkeys(row["experiment"] for row in rows):
        mine = [row for row in rows if row["experiment"] == name]
        dense = [row["metric"] for row in mine if row["method"] == "dense"]
        start = {row["seed"]: row["start"] for row in mine if "start" in row}
        lines += [
            f"\n{name}: dense {_spread(list(start.values()))} %, after as many further steps "
            f"{_spread(dense)}\n",
            "| stays | method | right after the cut | retrained | seeds |",
            "|---|---|---|---|---|",
        ]
        for ratio in sorted({r["ratio"] for r in mine if r["method"] != "dense"}, reverse=True):
            for method in METHODS:
                found = [r for r in mine if (r["method"], r["ratio"]) == (method, ratio)]
                if found and method != "dense":
                    cut, end = [r["cut"] for r in found], [r["metric"] for r in found]
                    lines.append(
                        f"| {ratio:.2f} | {method} | {_spread(cut)} | {_spread(end)} | {len(end)} |"
                    )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="+")
    parser.add_argument("-o", "--out", type=Path, default=Path("upop-runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--few", nargs="*", type=float, default=[0.5], metavar="RATIO")
    parser.add_argument("--steps", type=int, default=0, help="in all; half of them searching")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "results.jsonl"
    for name in options.experiments:
        make, follow = EXPERIMENTS[name]
        what: Experiment = follow(make(options.out))
        if options.steps:
            half = options.steps // 2
            what = replace(what, search=half, retrain=options.steps - half)
        metric = TASKS[what.recipe.task].metric
        for seed in options.seeds:
            folder = options.out / f"dense-{make.__name__}-{seed}"
            if not (folder / "report.json").exists():
                compress(replace(what.recipe, seed=seed), folder)
            dense = folder / "dense"
            start = evaluate_folder(dense, what.recipe)
            for ratio in options.ratios:
                for method in FEW if ratio in options.few else options.methods:
                    told = f"{name}, {options.steps} steps" if options.steps else name
                    key = {"experiment": told, "method": method, "ratio": ratio, "seed": seed}
                    if method == "dense":
                        key["ratio"] = 1.0
                    done = [json.loads(line) for line in log.open()] if log.exists() else []
                    if any(key.items() <= row.items() for row in done):
                        continue
                    row = one_run(method, dense, start, what, ratio, seed)
                    with log.open("a") as file:
                        file.write(json.dumps({**key, "start": start[metric], **row}) + "\n")
                    print(name, method, ratio, seed, f"{row['metric']:.3f}", flush=True)
    print(table([json.loads(line) for line in log.open()]))


if __name__ == "__main__":
    main()
