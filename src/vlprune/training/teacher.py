"""Distillation: terms of the loss that make a model imitate the dense model.

Not from a paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cutting.heads import output_heads
from ..device import moved_to, place
from ..errors import UnsupportedError
from ..recipe.options import TeacherOptions
from ..structures.structure import Structure
from .objective import Trainee

__all__ = ["Taught", "last_blocks"]


class Taught(Trainee):
    """``trainee`` with an extra loss for imitating ``teacher``, the dense model.

    ``weights`` holds the weight of each term: ``logits`` is KL(teacher || student) over the last
    axis of the output head; ``features`` the squared distance of the hidden states after each
    tower's last block, relative to the teacher's, where both have one shape (RT-DETR has more
    queries while it trains); ``similarities`` KL over the rows and columns of the image-text
    similarity matrix. A forward pass raises UnsupportedError for a term that the
    model has no tensors for. The teacher takes no gradient, is no part of checkpoints, and sees the
    same batch.
    """

    def __init__(
        self,
        trainee: nn.Module,
        student: nn.Module,
        teacher: nn.Module,
        weights: Mapping[str, float],
        structures: Sequence[Structure],
    ) -> None:
        super().__init__(trainee)
        TeacherOptions(**weights)
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}
        self.blocks = last_blocks(structures)
        self._pair = (student, teacher.eval())  # in a tuple: neither trained nor saved here
        for parameter in teacher.parameters():
            parameter.requires_grad_(False)

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """The trainee's loss plus the weighted terms: {"loss": ()}."""
        student, teacher = self._pair
        place(teacher, self.device)  # nothing to do, unless a Trainer has moved the student since
        with _watched(student, self.blocks) as mine:
            output = self.model(**batch)
        teach = getattr(self.model, "teach", None)
        batch = moved_to(teacher, batch)  # DeepSpeed gives it in the dtype that it trains in
        with torch.no_grad(), _watched(teacher, self.blocks) as theirs:
            taught = teach(teacher, batch) if teach is not None else teacher(**batch)
        pairs = {
            "logits": (_get(output, "logits", mine), _get(taught, "logits", theirs)),
            "similarities": (_of(output, "logits_per_image"), _of(taught, "logits_per_image")),
        }
        loss = output["loss"]
        for name, weight in self.weights.items():
            if name == "features":
                names = [path for path in self.blocks if _alike(mine.get(path), theirs.get(path))]
                terms = [_distance(mine[path], theirs[path]) for path in names]
                term = sum(terms) / len(terms) if terms else None
            else:
                ours, truth = pairs[name]
                term = None
                if ours is not None and truth is not None and _alike(ours, truth):
                    term = _TERM[name](ours, truth, batch.get("labels"))
            if term is None:
                raise UnsupportedError(
                    f"teacher.{name}: this model's forward pass shows no {name} to imitate; "
                    f"leave teacher.{name} out"
                )
            loss = loss + weight * term
        return {"loss": loss}


def last_blocks(structures: Sequence[Structure]) -> tuple[str, ...]:
    """The path of the last block of each tower: the module around its last structures."""
    towers: dict[str, list[str]] = {}
    for structure in structures:
        towers.setdefault(structure.tower, []).append(structure.gates[0].module)
    blocks: dict[str, None] = {}
    for modules in towers.values():
        shared = modules[-1].split(".")
        if len(modules) > 1:
            before = modules[-2].split(".")
            shared = [a for a, b in zip(shared, before, strict=False) if a == b]
        numbered = [i for i, part in enumerate(shared) if part.isdigit()]
        if numbered:
            blocks[".".join(shared[: numbered[-1] + 1])] = None
    return tuple(blocks)


@contextmanager
def _watched(model: Any, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The first output of each block, and of the output head, in the forward passes inside."""
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            seen.setdefault(name, first)

        return hook

    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in blocks]
    for head in output_heads(model)[:1]:
        handles.append(head.register_forward_hook(note("logits")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _of(output: Any, name: str) -> Tensor | None:
    value = output.get(name) if hasattr(output, "get") else getattr(output, name, None)
    return value if isinstance(value, Tensor) else None


def _get(output: Any, name: str, seen: Mapping[str, Tensor]) -> Tensor | None:
    value = _of(output, name)
    return value if value is not None else seen.get(name)


def _alike(ours: Tensor | None, truth: Tensor | None) -> bool:
    return ours is not None and truth is not None and ours.shape == truth.shape


def _distance(ours: Tensor, truth: Tensor) -> Tensor:
    """Mean squared distance, in units of the teacher's mean square."""
    truth = truth.float()
    return F.mse_loss(ours.float(), truth) / truth.square().mean().clamp_min(1e-6)


def _divergence(ours: Tensor, truth: Tensor, axis: int = -1) -> Tensor:
    """KL(truth || ours) of the softmax over ``axis``, one value per position on the other axes."""
    log_ours, log_truth = ours.float().log_softmax(axis), truth.float().log_softmax(axis)
    return (log_truth.exp() * (log_truth - log_ours)).sum(axis)


def _logits(ours: Tensor, truth: Tensor, labels: Any) -> Tensor:
    """The mean divergence, over labelled positions only if there is one label per position."""
    if ours.dim() == 4:  # (batch, classes, height, width)
        ours, truth = ours.movedim(1, -1), truth.movedim(1, -1)
    apart = _divergence(ours, truth)
    if isinstance(labels, Tensor) and labels.shape == apart.shape and apart.dim() > 1:
        wanted = labels != -100
        return apart[wanted].mean()
    return apart.mean()


def _similarities(ours: Tensor, truth: Tensor, _labels: Any) -> Tensor:
    rows, columns = _divergence(ours, truth, 1), _divergence(ours, truth, 0)
    return (rows.mean() + columns.mean()) / 2


_TERM = {"logits": _logits, "similarities": _similarities}
