"""Losses of a set of predicted boxes against the boxes that a text names.

These are the losses of MDETR (Kamath et al., ICCV 2021, section 2.2): soft token prediction,
contrastive alignment, L1 and generalised IoU, after Hungarian matching. Boxes are (centre x,
centre y, width, height) as fractions of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import generalized_box_iou

from ..errors import UnsupportedError

__all__ = [
    "SetWeights",
    "assign",
    "focal_loss",
    "focal_set_losses",
    "paired_giou",
    "set_losses",
]

Targets = Sequence[Mapping[str, Tensor]]
"""For each image ``boxes`` (n, 4) and ``tokens`` (n, positions), whose rows sum to 1 over the
tokens of the phrase that names the box."""

Pairs = list[tuple[Tensor, Tensor]]
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
    pairs = []
    # NaN must not fail here: it is for the caller to notice in the loss
    placed = boxes.float().nan_to_num(0.5)
    for own, found, target in zip(fit, placed, targets, strict=True):
        wanted = target["boxes"].float()
        cost = (
            -weights.tokens * own @ target["tokens"].float().T
            + weights.l1 * torch.cdist(found, wanted, p=1)
            - weights.giou
            * generalized_box_iou(center_to_corners_format(found), center_to_corners_format(wanted))
        )
        queries, matched = linear_sum_assignment(cost.nan_to_num(1e6).cpu().numpy())
        pairs.append((torch.as_tensor(queries), torch.as_tensor(matched)))
    return pairs


def paired_giou(first: Tensor, second: Tensor) -> Tensor:
    """Generalised IoU of pairs of boxes: (n, 4) and (n, 4) to (n,).

    The function of transformers compares all with all, which takes n times the memory.
    """
    a, b = center_to_corners_format(first), center_to_corners_format(second)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    around = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    inter, hull = overlap.prod(1), around.prod(1)
    union = first[:, 2:].prod(1) + second[:, 2:].prod(1) - inter
    return inter / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def set_losses(
    outputs: Mapping[str, Any], targets: Targets, weights: SetWeights, count: float
) -> dict[str, Tensor]:
    """``{"tokens", "l1", "giou", "alignment"}``, weighted and divided by ``count`` boxes.

    ``outputs`` holds ``logits`` (batch, queries, positions; the last one means "no object"),
    ``boxes`` (batch, queries, 4) and, for the alignment, ``queries`` (batch, queries, size) and
    ``text`` (batch, tokens, size), both of unit length.
    """
    logits, boxes = outputs["logits"], outputs["boxes"]
    pairs = assign(logits, boxes, targets, weights)
    losses = {"tokens": weights.tokens * _token_loss(logits, targets, pairs, weights) / count}
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)]).to(logits.device)
    query = torch.cat([q for q, _ in pairs]).to(logits.device)
    found = boxes[image, query].float()
    wanted = torch.cat([t["boxes"][m] for t, (_, m) in zip(targets, pairs, strict=True)]).float()
    losses["l1"] = weights.l1 * F.l1_loss(found, wanted, reduction="sum") / count
    losses["giou"] = weights.giou * (1 - paired_giou(found, wanted)).sum() / count
    if outputs.get("queries") is not None:
        loss = _alignment_loss(outputs["queries"], outputs["text"], targets, pairs, weights)
        losses["alignment"] = weights.alignment * loss / count
    return losses


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
    goal = torch.zeros_like(logits, dtype=torch.float32)
    for i, (target, (queries, matched)) in enumerate(zip(targets, pairs, strict=True)):
        goal[i, queries.to(goal.device)] = (target["tokens"][matched] > 0).float().to(goal.device)
    there = (text_mask if text_mask.dim() == 3 else text_mask[:, None]).expand_as(logits)
    tokens = focal_loss(logits[there].float(), goal[there]).sum()
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)]).to(logits.device)
    query = torch.cat([q for q, _ in pairs]).to(logits.device)
    found = boxes[image, query].float()
    wanted = torch.cat([t["boxes"][m] for t, (_, m) in zip(targets, pairs, strict=True)]).float()
    return {
        "tokens": 2 * weights.tokens * tokens / count,
        "l1": weights.l1 * F.l1_loss(found, wanted, reduction="sum") / count,
        "giou": weights.giou * (1 - paired_giou(found, wanted)).sum() / count,
    }


def _focal_fit(logits: Tensor, alpha: float = 0.25) -> Tensor:
    """How much lower a token's focal loss is with the goal 1 than with the goal 0."""
    p = logits.sigmoid()
    yes = alpha * (1 - p) ** 2 * -(p + 1e-8).log()
    no = (1 - alpha) * p**2 * -(1 - p + 1e-8).log()
    return no - yes


def _token_loss(logits: Tensor, targets: Targets, pairs: Pairs, weights: SetWeights) -> Tensor:
    """Cross-entropy with the uniform distribution over a phrase's tokens, summed over queries."""
    goal = torch.zeros_like(logits, dtype=torch.float32)
    goal[..., -1] = 1
    weight = torch.full(logits.shape[:2], weights.no_object, device=logits.device)
    for i, (target, (queries, matched)) in enumerate(zip(targets, pairs, strict=True)):
        goal[i, queries.to(goal.device)] = target["tokens"][matched].float()
        weight[i, queries.to(goal.device)] = 1
    return -((logits.float().log_softmax(-1) * goal).sum(-1) * weight).sum()


def _alignment_loss(
    queries: Tensor, text: Tensor, targets: Targets, pairs: Pairs, weights: SetWeights
) -> Tensor:
    """InfoNCE between matched queries and the tokens of their phrases, both ways, halved."""
    scores = queries.float() @ text.float().transpose(1, 2) / weights.temperature
    positive = torch.zeros_like(scores, dtype=torch.bool)
    for i, (target, (chosen, matched)) in enumerate(zip(targets, pairs, strict=True)):
        named = target["tokens"][matched][:, : text.shape[1]] > 0
        positive[i, chosen.to(scores.device)] = named.to(scores.device)
    total = scores.new_zeros(())
    for axis in (1, 2):  # over queries: each token's loss; over tokens: each query's loss
        count = positive.sum(axis)
        near = -scores.masked_fill(~positive, 0).sum(axis) / count.clamp(min=1)
        total = total + ((near + scores.logsumexp(axis)) * (count > 0)).sum()
    return total / 2
