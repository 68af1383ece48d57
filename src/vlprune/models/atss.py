"""Dense detection with one anchor per place: anchors, their assignment, box codes, suppression.

The assignment is adaptive training sample selection (ATSS; Zhang et al., CVPR 2020, algorithm 1);
box code and centerness are those that GLIP trains with. Anchors and boxes are (left, top, right,
bottom) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.loss.loss_for_object_detection import box_iou

__all__ = ["anchors", "assign_places", "centerness", "decode", "encode", "suppress"]

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Factors that scale the four numbers of a box code."""

BLOCK = 256
"""Candidates suppressed at once; ``benchmarks/suppression.py`` measures the choice."""


def anchors(sizes: Sequence[tuple[int, int]], strides: Sequence[int], scale: float) -> list[Tensor]:
    """A square of ``scale`` strides around every place, per level: (places, 4).

    ``sizes`` are the (rows, columns) of the levels, ``strides`` their strides in pixels.
    """
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


def assign_places(
    levels: Sequence[Tensor], boxes: Tensor, closest: int = 9, inclusive: bool = False
) -> Tensor:
    """The index of the box that each anchor of all levels is trained on, or -1: (anchors,).

    ``levels`` are the anchors of each level, (places, 4). Of each level, the ``closest`` anchors to
    a box's centre are its candidates. A candidate is assigned the box if their IoU is at least
    the mean plus the standard deviation over all candidates, and if its centre lies in the box. An
    anchor that qualifies for several boxes takes the box with the highest IoU. ``inclusive``: the
    centre must lie half a pixel further inside, see :func:`centerness`.
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
    edge = torch.minimum(at - boxes[:, :2], boxes[:, 2:] - at).amin(-1)
    inside = edge > (0.51 if inclusive else 0.01)
    answers = (overlaps >= bar) & inside
    best = torch.full((len(every), len(boxes)), -1.0)
    places, which = answers.nonzero(as_tuple=True)
    best[candidates[places, which], which] = overlaps[places, which]
    value, box = best.max(1)
    return torch.where(value >= 0, box, owner)


def encode(anchor: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (n, 4) as scaled (shift x, shift y, log growth x, y) of their anchors: (n, 4)."""
    size, goal = anchor[:, 2:] - anchor[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (_centres(boxes) - _centres(anchor)) / size
    code = torch.cat([shift, (goal / size).log()], dim=1)
    return code * code.new_tensor(WEIGHTS)


def decode(anchor: Tensor, code: Tensor) -> Tensor:
    """The inverse of :func:`encode`: boxes (..., n, 4) from such codes and anchors (n, 4)."""
    plain = code / code.new_tensor(WEIGHTS)
    size = anchor[:, 2:] - anchor[:, :2]
    centre = _centres(anchor) + plain[..., :2] * size
    half = size * plain[..., 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def centerness(anchor: Tensor, boxes: Tensor, inclusive: bool = False) -> Tensor:
    """How central each anchor's centre is in its box, 1 in the middle, 0 at the edge: (n,).

    With ``inclusive``, pixels are points and a box ends at its last pixel: a box from 0 to 10 goes
    from pixel 0 to pixel 9, and the centre 4 of an anchor is the point 3.5. So all distances from
    the edges are half a pixel less.
    """
    near, far = _centres(anchor) - boxes[:, :2], boxes[:, 2:] - _centres(anchor)
    if inclusive:
        near, far = near - 0.5, far - 0.5
    low, high = torch.minimum(near, far), torch.maximum(near, far)
    return (low / high.clamp(min=1e-6)).clamp(min=0).prod(1).sqrt()


def suppress(
    boxes: Tensor,
    scores: Tensor,
    limit: float = 0.6,
    classes: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """Greedy, exact non-maximum suppression on any device: indices of the kept boxes, best first.

    A box (of ``boxes`` (n, 4), with ``scores`` (n,)) is dropped if its IoU with a better kept box
    is above ``limit`` and, with ``classes`` (n,), both are of one class. Equal scores are ordered
    by position. The search ends after ``most`` kept boxes.
    """
    if classes is None:
        classes = torch.zeros_like(scores, dtype=torch.long)
    most = len(scores) if most is None else most
    order = scores.argsort(descending=True, stable=True)
    stays = order[:0]
    for block in order.split(BLOCK):
        # classes are compared, since moving them apart by offsets would round the boxes
        alive = block[~_covered(stays, block, boxes, classes, limit).any(0)]
        covers = _covered(alive, alive, boxes, classes, limit).triu(1)
        stays = torch.cat([stays, alive[_uncovered(covers)]])
        if len(stays) >= most:
            break
    return stays[:most]


def _covered(better: Tensor, worse: Tensor, boxes: Tensor, classes: Tensor, limit: float) -> Tensor:
    """Whether each box of ``better``, if kept, suppresses each of ``worse``: (better, worse)."""
    alike = classes[better][:, None] == classes[worse]
    return (box_iou(boxes[better], boxes[worse])[0] > limit) & alike


def _uncovered(covers: Tensor) -> Tensor:
    """Mask of the boxes that greedy suppression keeps: (n,), from ``covers`` (n, n), best first.

    ``covers`` is False on and below its diagonal. The answer is the only fixed point of the rule
    that a box is kept if no kept box covers it. Each round settles at least the next box in
    order, and in practice a few rounds settle all boxes.
    """
    stays = torch.ones(len(covers), dtype=torch.bool, device=covers.device)
    while True:
        again = ~(covers & stays[:, None]).any(0)
        if torch.equal(again, stays):
            return stays
        stays = again


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2
