"""Non-maximum suppression of one image: all classes in one call, beside one class at a time.

    python benchmarks/suppression.py [--classes 80] [--candidates 1000] [--rounds 5]

Random candidates in heaps around random objects, sorted as detection sorts them, one CPU thread.
"One at a time" is the loop that vlprune had before: every class by itself, box by box. Both must
find the same 100 detections, in the same order.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_for_object_detection import box_iou

from vlprune.models.atss import suppress

MOST = 100
SCENES = {"1 tight heap": (1, 0.01), "3 heaps": (3, 0.03), "7 heaps": (7, 0.1), "none": (1000, 1.0)}
"""Objects of each class, and how far candidates lie from their object, in widths of it."""


def candidates(classes: int, count: int, objects: int, apart: float) -> tuple[Tensor, Tensor]:
    """Boxes (classes, count, 4) in pixels and their scores (classes, count), best first."""
    g = torch.Generator().manual_seed(0)
    centre = torch.rand(classes, objects, 2, generator=g) * 600
    size = torch.rand(classes, objects, 2, generator=g) * 200 + 20
    which = torch.randint(objects, (classes, count), generator=g)[..., None].expand(-1, -1, 2)
    centre, size = centre.gather(1, which), size.gather(1, which)
    centre = centre + torch.randn(centre.shape, generator=g) * size * apart
    size = size * (torch.randn(size.shape, generator=g) * apart).exp()
    scores = torch.rand(classes, count, generator=g).pow(3).sort(1, descending=True).values
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1), scores


def one_at_a_time(boxes: Tensor, scores: Tensor) -> list[int]:
    """The loop of before: the numbers of the best detections among all candidates."""
    found: list[tuple[float, int]] = []
    for number, (own, values) in enumerate(zip(boxes, scores, strict=True)):
        order = values.argsort(descending=True, stable=True)
        overlap = box_iou(own[order], own[order])[0] > 0.6
        gone = torch.zeros(len(order), dtype=torch.bool)
        for place in range(len(order)):
            if not gone[place]:
                gone[place + 1 :] |= overlap[place, place + 1 :]
        stays = order[~gone][:MOST]
        places = (number * len(own) + stays).tolist()
        found += zip(values[stays].tolist(), places, strict=True)
    return [place for _, place in sorted(found, key=lambda one: -one[0])[:MOST]]


def in_one_call(boxes: Tensor, scores: Tensor) -> list[int]:
    """The same by one call."""
    classes = torch.arange(len(scores))[:, None].expand_as(scores).reshape(-1)
    stays = suppress(boxes.reshape(-1, 4), scores.reshape(-1), classes=classes, most=MOST)
    return stays.tolist()


def clock(run: Callable[..., Any], *arguments: Tensor) -> tuple[float, Any]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - began, result


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.classes} classes x {options.candidates} candidates")
    print("| objects per class | one at a time, s | in one call, s | times as fast |")
    print("|---|---|---|---|")
    for name, (objects, apart) in SCENES.items():
        boxes, scores = candidates(options.classes, options.candidates, objects, apart)
        seconds: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            (slow, expected), (fast, found) = (
                clock(run, boxes, scores) for run in (one_at_a_time, in_one_call)
            )
            if found != expected:
                raise SystemExit(f"{name}: the two disagree")
            seconds[0].append(slow)
            seconds[1].append(fast)
        before, now = (statistics.median(values) for values in seconds)
        print(f"| {name} | {before:.2f} | {now:.4f} | {before / now:.0f} |")


if __name__ == "__main__":
    main()
