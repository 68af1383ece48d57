"""Pruning and int8 together: accuracy and speed of one trained model, four ways.

    python benchmarks/int8.py -o FOLDER

A ViT (DeiT's architecture) learns to classify generated scenes, is cut by UPop to a third of its
parameters and retrained; then dense and small are exported to ONNX, and to ONNX with int8 by ONNX
Runtime's dynamic quantizer (and to OpenVINO with NNCF's where it is installed), and all are
evaluated on the same test data and timed, dense and small in turns, batch 16, two threads.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vlprune.commands.pipeline.compress import compress
from vlprune.commands.pipeline.evaluate import evaluate_folder
from vlprune.commands.pipeline.exports import export_folder
from vlprune.commands.pipeline.make import make_task
from vlprune.folders.exported.model import Exported
from vlprune.measuring.bench import seconds_exported
from vlprune.prices.clock import seconds_of, take_turns
from vlprune.recipe.spec import load_recipe

RECIPE = """
task: classification
data: {train_items: 4000, test_items: 2000}
model: {width: 192, heads: 3, vision_layers: 6, image_size: 64, patch_size: 8}
train: {steps: 1200, batch_size: 32, learning_rate: 5e-4}
budget: {params: 0.33}
method: {name: upop, round_to: 8}
search: {steps: 150, batch_size: 32, learning_rate: 5e-4, decay: constant}
retrain: {steps: 100, batch_size: 32, learning_rate: 3e-4}
"""


def main(out: Path) -> None:
    torch.set_num_threads(2)
    out.mkdir(parents=True, exist_ok=True)
    (out / "int8.yaml").write_text(RECIPE)
    recipe = load_recipe(out / "int8.yaml", [])
    small = out / "small"
    compress(recipe, small)
    task = make_task(recipe, small / "data")
    batch = task.example_inputs(16)
    batch.pop("labels", None)
    rows: dict[str, tuple[float, float]] = {}
    timers: dict[str, Any] = {}
    for label, folder in (("dense", small / "dense"), ("cut", small)):
        model = task.load(folder).eval()
        accuracy = evaluate_folder(folder, recipe)[task.metric]
        rows[f"{label}, PyTorch"] = (accuracy, (folder / "model.safetensors").stat().st_size)
        timers[f"{label}, PyTorch"] = partial(seconds_of, model, batch)
        for to in ("onnx", "openvino"):
            for int8 in (False, True):
                if to == "openvino" and int8 and not find_spec("nncf"):
                    continue
                place = out / f"{label}-{to}-{int8}"
                facts = export_folder(folder, to, place, int8=int8, recipe=recipe)
                key = f"{label}, {to}{' int8' if int8 else ''}"
                model_of = Exported(place)
                accuracy = task.evaluate(model_of, lambda done: None)[task.metric]
                rows[key] = (accuracy, sum(facts["files"].values()))
                timers[key] = partial(seconds_exported, model_of, batch)
    timed: dict[str, list[float]] = {}
    for engine in dict.fromkeys(key.partition(", ")[2] for key in timers):  # one pool of threads
        pair = {key: timer for key, timer in timers.items() if key.endswith(f", {engine}")}
        timed |= take_turns(pair, 31, warm_up=3)
    print("| model | accuracy | MB | ms | times as fast as dense, PyTorch |")
    print("|---|---|---|---|---|")
    for key, (accuracy, size) in rows.items():
        seconds = statistics.median(timed[key])
        times = statistics.median(timed["dense, PyTorch"]) / seconds
        print(
            f"| {key} | {100 * accuracy:.1f} % | {size / 1e6:.2f} | {1000 * seconds:.1f} | "
            f"{times:.2f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder for the runs")
    main(parser.parse_args().output)
