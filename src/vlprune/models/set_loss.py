"""Losses of a set of predicted boxes against the boxes that a text names.

These are the losses of MDETR (Kamath et al., ICCV 2021, section 2.2): soft token prediction,
contrastive alignment, L1 and generalised IoU, after Hungarian matching. Boxes are (centre x,
centre y, width, height) as fractions of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_transforms import center_to_corners_format

from ..errors import UnsupportedError

__all__ = [
    "SetWeights",
    "assign",
    "focal_loss",
    "focal_set_losses",
    "masked_focal_loss",
    "paired_giou",
    "set_losses",
]

Targets = Sequence[Mapping[str, Tensor]]
"""For each image ``boxes`` (n, 4) and ``tokens`` (n, positions), whose rows sum to 1 over the
tokens of the phrase that names the box."""

Pairs = list[tuple[np.ndarray, np.ndarray]]
"""For each image the matched queries and their targets, both (n,)."""


@dataclass(frozen=True)
class SetWeights:
    """Weights of the losses and of the same terms in matching; MDETR's by default."""

    tokens: float = 1.0
    alignment: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    no_object: float = 0.1
    temperature: float = 0.07


@torch.no_grad()
def assign(
    logits: Tensor, boxes: Tensor, targets: Targets, weights: SetWeights, focal: bool = False
) -> Pairs:
    """The cheapest one-to-one pairs of queries and targets of every image.

    ``logits`` (batch, queries, positions), ``boxes`` (batch, queries, 4). The cost of a pair is the
    weighted sum of three terms: the negative probability of the phrase's tokens (with ``focal``,
    the change of focal loss on these tokens), the L1 distance of the boxes, and their negative
    GIoU. Raises UnsupportedError without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UnsupportedError(
            "matching boxes needs scipy: pip install 'vlprune[grounding]'"
        ) from None
    fit = _focal_fit(logits.float()) if focal else logits.float().softmax(-1)
    # NaN must not fail here: it is for the caller to notice in the loss
    placed = boxes.float().nan_to_num(0.5)
    counts, place = [len(target["boxes"]) for target in targets], _padded(targets)
    place = place.to(logits.device)
    wanted = torch.cat([target["boxes"] for target in targets]).float()[place]
    tokens = torch.cat([target["tokens"] for target in targets]).float()[place]
    cost = (
        -weights.tokens * fit @ tokens.transpose(1, 2)
        + weights.l1 * torch.cdist(placed, wanted, p=1)
        - weights.giou * paired_giou(placed[:, :, None], wanted[:, None])
    )
    costs = cost.nan_to_num(1e6).cpu().numpy()  # at once: a GPU is waited for each time
    return [linear_sum_assignment(own[:, :n]) for own, n in zip(costs, counts, strict=True)]


def _padded(targets: Targets) -> Tensor:
    """Where each image's targets lie among those of all, (batch, most of an image).

    A row goes on with any number where an image has fewer.
    """
    counts = torch.tensor([len(target["boxes"]) for target in targets])
    places = (counts.cumsum(0) - counts)[:, None] + torch.arange(int(counts.max()))
    return places.clamp(max=max(0, int(counts.sum()) - 1))


@dataclass(frozen=True)
class _Matched:
    """The matched queries of a batch, and what they should say: one row for each."""

    image: Tensor
    query: Tensor
    boxes: Tensor
    tokens: Tensor


def _matched(pairs: Pairs, targets: Targets, device: torch.device) -> _Matched:
    sizes = [len(target["boxes"]) for target in targets]
    starts = np.cumsum([0, *sizes[:-1]])
    image = np.repeat(np.arange(len(pairs)), [len(queries) for queries, _ in pairs])
    query = np.concatenate([queries for queries, _ in pairs])
    which = np.concatenate([own + start for (_, own), start in zip(pairs, starts, strict=True)])
    image, query, which = torch.as_tensor(np.stack([image, query, which])).to(device)
    boxes, tokens = (torch.cat([target[n] for target in targets]) for n in ("boxes", "tokens"))
    return _Matched(image, query, boxes[which].float(), tokens[which].float())


def paired_giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of pairs of boxes: (..., 4) and (..., 4) to (...), as they broadcast.

    The function of transformers compares all of one image with all, and takes no batch.
    """
    a, b = center_to_corners_format(first), center_to_corners_format(second)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    inter, hull = (high - low).clamp(min=0).prod(-1), around.prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - inter
    return inter / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def set_losses(
    outputs: Mapping[str, Any], targets: Targets, weights: SetWeights, count: float | Tensor
) -> dict[str, Tensor]:
    """``{"tokens", "l1", "giou", "alignment"}``, weighted and divided by ``count`` boxes.

    ``outputs`` holds ``logits`` (batch, queries, positions; the last one means "no object"),
    ``boxes`` (batch, queries, 4) and, for the alignment, ``queries`` (batch, queries, size) and
    ``text`` (batch, tokens, size), both of unit length.
    """
    logits, boxes = outputs["logits"], outputs["boxes"]
    found = _matched(assign(logits, boxes, targets, weights), targets, logits.device)
    losses = {"tokens": weights.tokens * _token_loss(logits, found, weights) / count}
    losses |= _box_losses(boxes, found, weights, count)
    if outputs.get("queries") is not None:
        loss = _alignment_loss(outputs["queries"], outputs["text"], found, weights)
        losses["alignment"] = weights.alignment * loss / count
    return losses


def _box_losses(
    boxes: Tensor, found: _Matched, weights: SetWeights, count: float | Tensor
) -> dict[str, Tensor]:
    """``{"l1", "giou"}`` of matched boxes, weighted and divided by ``count`` boxes."""
    said = boxes[found.image, found.query].float()
    apart = F.l1_loss(said, found.boxes, reduction="sum")
    return {
        "l1": weights.l1 * apart / count,
        "giou": weights.giou * (1 - paired_giou(said, found.boxes)).sum() / count,
    }


def focal_loss(logits: Tensor, goal: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017), elementwise; ``goal`` is 0 or 1."""
    plain = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    missed = (logits.sigmoid() - goal).abs()
    return (alpha * goal + (1 - alpha) * (1 - goal)) * missed**gamma * plain


def focal_set_losses(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    text_mask: Tensor,
    weights: SetWeights,
    count: float,
) -> dict[str, Tensor]:
    """``{"tokens", "l1", "giou"}`` as in Grounding DINO, with focal loss on each token.

    The losses are weighted and divided by ``count`` boxes. ``logits`` (batch, queries, positions),
    ``boxes`` (batch, queries, 4); ``text_mask`` (batch, positions) or (batch, queries, positions)
    is True where tokens exist.
    """
    pairs = assign(logits, boxes, targets, weights, focal=True)
    found = _matched(pairs, targets, logits.device)
    goal = torch.zeros_like(logits, dtype=torch.float32)
    goal[found.image, found.query] = (found.tokens > 0).float()
    there = text_mask if text_mask.dim() == 3 else text_mask[:, None]
    tokens = masked_focal_loss(logits, goal, there)
    return {
        "tokens": 2 * weights.tokens * tokens / count,
        **_box_losses(boxes, found, weights, count),
    }


def masked_focal_loss(logits: Tensor, goal: Tensor, there: Tensor) -> Tensor:
    """The sum of the focal loss where ``there`` is True; elsewhere logits may be infinite.

    To choose them by the mask alone would have a GPU waited for.
    """
    loss = focal_loss(logits.float().masked_fill(~there, 0), goal)
    return loss.masked_fill(~there, 0).sum()


def _focal_fit(logits: Tensor, alpha: float = 0.25) -> Tensor:
    """How much lower a token's focal loss is with the goal 1 than with the goal 0."""
    p = logits.sigmoid()
    yes = alpha * (1 - p) ** 2 * -(p + 1e-8).log()
    no = (1 - alpha) * p**2 * -(1 - p + 1e-8).log()
    return no - yes


def _token_loss(logits: Tensor, found: _Matched, weights: SetWeights) -> Tensor:
    """Cross-entropy with the uniform distribution over a phrase's tokens, summed over queries."""
    goal = torch.zeros_like(logits, dtype=torch.float32)
    goal[..., -1] = 1
    goal[found.image, found.query] = found.tokens
    weight = torch.full(logits.shape[:2], weights.no_object, device=logits.device)
    weight[found.image, found.query] = 1
    return -((logits.float().log_softmax(-1) * goal).sum(-1) * weight).sum()


def _alignment_loss(queries: Tensor, text: Tensor, found: _Matched, weights: SetWeights) -> Tensor:
    """InfoNCE between matched queries and the tokens of their phrases, both ways, halved."""
    scores = queries.float() @ text.float().transpose(1, 2) / weights.temperature
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[found.image, found.query] = found.tokens[:, : text.shape[1]] > 0
    total = scores.new_zeros(())
    for axis in (1, 2):  # over queries: each token's loss; over tokens: each query's loss
        count = positive.sum(axis)
        near = -scores.masked_fill(~positive, 0).sum(axis) / count.clamp(min=1)
        total = total + ((near + scores.logsumexp(axis)) * (count > 0)).sum()
    return total / 2
