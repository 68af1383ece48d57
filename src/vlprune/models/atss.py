"""Dense detection: one anchor per place, and which places answer for which box.

Adaptive training sample selection (Zhang et al., CVPR 2020, algorithm 1), the box code and the
centerness that GLIP trains with. Anchors and boxes are (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.loss.loss_for_object_detection import box_iou

__all__ = ["anchors", "assign_places", "centerness", "decode", "encode", "suppress"]

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""By which the four numbers of a box code are scaled."""

BLOCK = 256
"""Candidates that are suppressed at once; measured by ``benchmarks/suppression.py``."""


def anchors(sizes: Sequence[tuple[int, int]], strides: Sequence[int], scale: float) -> list[Tensor]:
    """A square of ``scale`` strides around every place of every level: (places, 4) each."""
    found = []
    for (rows, columns), stride in zip(sizes, strides, strict=True):
        half = scale * stride / 2
        y, x = torch.meshgrid(
            (torch.arange(rows) + 0.5) * stride,
            (torch.arange(columns) + 0.5) * stride,
            indexing="ij",
        )
        x, y = x.reshape(-1), y.reshape(-1)
        found.append(torch.stack([x - half, y - half, x + half, y + half], dim=1))
    return found


def assign_places(levels: Sequence[Tensor], boxes: Tensor, closest: int = 9) -> Tensor:
    """For every anchor of all levels the box it answers for, -1 for none: (anchors,).

    Of each level, the ``closest`` anchors to a box's centre are candidates; those whose IoU is
    at least the mean plus the deviation over all candidates, and whose centre lies in the box,
    answer for it; an anchor that could answer for several takes the one it overlaps most.
    """
    every = torch.cat([*levels])
    owner = torch.full((len(every),), -1)
    if not len(boxes):
        return owner
    overlap, _ = box_iou(every, boxes)
    middle, centre = _centres(every), _centres(boxes)
    distance = torch.cdist(middle, centre)
    chosen, start = [], 0
    for level in levels:
        count = min(closest, len(level))
        nearest = distance[start : start + len(level)].topk(count, dim=0, largest=False).indices
        chosen.append(nearest + start)
        start += len(level)
    candidates = torch.cat(chosen)  # (candidates, boxes)
    overlaps = overlap.gather(0, candidates)
    bar = overlaps.mean(0) + overlaps.std(0)
    at = middle[candidates]  # (candidates, boxes, 2)
    inside = torch.minimum(at - boxes[:, :2], boxes[:, 2:] - at).amin(-1) > 0.01
    answers = (overlaps >= bar) & inside
    best = torch.full((len(every), len(boxes)), -1.0)
    places, which = answers.nonzero(as_tuple=True)
    best[candidates[places, which], which] = overlaps[places, which]
    value, box = best.max(1)
    return torch.where(value >= 0, box, owner)


def encode(anchor: Tensor, boxes: Tensor) -> Tensor:
    """Boxes as (shift x, shift y, growth x, growth y) of their anchors: (n, 4)."""
    size, goal = anchor[:, 2:] - anchor[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (_centres(boxes) - _centres(anchor)) / size
    code = torch.cat([shift, (goal / size).log()], dim=1)
    return code * code.new_tensor(WEIGHTS)


def decode(anchor: Tensor, code: Tensor) -> Tensor:
    """The boxes that :func:`encode` has encoded; (..., n, 4) codes of (n, 4) anchors."""
    plain = code / code.new_tensor(WEIGHTS)
    size = anchor[:, 2:] - anchor[:, :2]
    centre = _centres(anchor) + plain[..., :2] * size
    half = size * plain[..., 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def centerness(anchor: Tensor, boxes: Tensor) -> Tensor:
    """How central an anchor's centre lies in its box, 1 in the middle, 0 at the edge: (n,)."""
    near, far = _centres(anchor) - boxes[:, :2], boxes[:, 2:] - _centres(anchor)
    low, high = torch.minimum(near, far), torch.maximum(near, far)
    return (low / high.clamp(min=1e-6)).clamp(min=0).prod(1).sqrt()


def suppress(
    boxes: Tensor,
    scores: Tensor,
    limit: float = 0.6,
    classes: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """Non-maximum suppression: which boxes stay, best first. Greedy, exact, on any device.

    A box goes if its IoU with a better one that stays is above ``limit``; with ``classes`` (n,)
    only if both are of one class. Equal scores are settled by position. With ``most`` only so many
    of the boxes that stay are looked for.
    """
    if classes is None:
        classes = torch.zeros_like(scores, dtype=torch.long)
    most = len(scores) if most is None else most
    order = scores.argsort(descending=True, stable=True)
    stays = order[:0]
    for block in order.split(BLOCK):
        # classes are compared, not moved apart by offsets, which would round the boxes
        alive = block[~_covered(stays, block, boxes, classes, limit).any(0)]
        covers = _covered(alive, alive, boxes, classes, limit).triu(1)
        stays = torch.cat([stays, alive[_uncovered(covers)]])
        if len(stays) >= most:
            break
    return stays[:most]


def _covered(better: Tensor, worse: Tensor, boxes: Tensor, classes: Tensor, limit: float) -> Tensor:
    """Whether a box of ``better``, if it stays, suppresses one of ``worse``: (better, worse)."""
    alike = classes[better][:, None] == classes[worse]
    return (box_iou(boxes[better], boxes[worse])[0] > limit) & alike


def _uncovered(covers: Tensor) -> Tensor:
    """Which boxes stay when the best is asked first: (n,), from the (n, n) above the diagonal.

    The answer is the only one that agrees with itself: a box stays if no box that stays covers
    it. Each round settles at least the next box in line, and in practice a few settle all.
    """
    stays = torch.ones(len(covers), dtype=torch.bool, device=covers.device)
    while True:
        again = ~(covers & stays[:, None]).any(0)
        if torch.equal(again, stays):
            return stays
        stays = again


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2
