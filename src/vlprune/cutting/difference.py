"""How far two models' outputs lie apart: the one measure that every proof uses.

Cutting, exporting and the conformance suite all use this module, so that a gap in the comparison
needs closing only once. A place where only one side is a finite number is never skipped, and
values that cannot be compared are reported, not counted as equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import IncomparableError, VerificationError

__all__ = ["Difference", "difference", "tensors_of"]


@dataclass(frozen=True)
class Difference:
    """Two lists of outputs side by side.

    ``largest`` is the largest absolute difference, ``scale`` the largest absolute value expected,
    ``relative`` the largest difference of any output divided by its own scale (or by the floor,
    where the scale is smaller), ``compared`` the fraction of all values that are finite and so
    were compared.
    """

    largest: float
    scale: float
    relative: float
    compared: float


def difference(
    expected: Sequence[Tensor], found: Sequence[Tensor], floor: float = 1.0
) -> Difference:
    """Compare two lists of floating tensors, value by value.

    Places that are NaN on both sides, or the same infinity, are not compared (attention masks
    leave such places). The lowest number of a dtype is how a forward writes minus infinity, and
    counts as it: as a scale, it would make any difference small. ``floor`` is the smallest scale by
    which a difference is divided. Raises VerificationError if the number, shapes or finiteness of
    the outputs differ, and IncomparableError if there is nothing to compare: no output, or an
    output that is nowhere finite.
    """
    if len(expected) != len(found):
        raise VerificationError(f"{len(expected)} outputs became {len(found)}")
    largest = scale = relative = 0.0
    compared = total = 0
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            raise VerificationError(f"an output has shape {tuple(b.shape)}, not {tuple(a.shape)}")
        if not a.numel():
            continue
        a, b = _endless(a), _endless(b.to(a.device))
        finite = torch.isfinite(a)
        unlike = finite != torch.isfinite(b)
        if unlike.any():
            raise VerificationError(
                f"output {number} is NaN or infinite at {int(unlike.sum())} of its {a.numel()} "
                "places on one side only"
            )
        endless = a.isinf() & b.isinf()
        if not torch.equal(a[endless], b[endless]):
            raise VerificationError(f"output {number} has infinities of another sign")
        if not torch.equal(a.isnan(), b.isnan()):
            raise VerificationError(f"output {number} is NaN where the other side is infinite")
        if not finite.any():
            raise IncomparableError(f"output {number} is nowhere finite, on both sides")
        apart, size = float((a - b)[finite].abs().max()), float(a[finite].abs().max())
        largest, scale = max(largest, apart), max(scale, size)
        relative = max(relative, apart / max(floor, size))
        compared, total = compared + int(finite.sum()), total + a.numel()
    if not total:
        raise IncomparableError("there is no output to compare")
    return Difference(largest, scale, relative, compared / total)


ENDLESS = 1e30
"""Beyond this no output is a result: logits that a forward rules out have -3.4e38 or -1.8e308."""


def _endless(values: Tensor) -> Tensor:
    """``values``, with infinities for numbers as large as a dtype has them."""
    if not values.is_floating_point():
        return values
    limit = min(ENDLESS, torch.finfo(values.dtype).max)
    large = values.abs() >= limit
    return values if not large.any() else torch.where(large, values.sign() * torch.inf, values)


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating tensor in a model output, depth first, without attention maps.

    Attention maps have one entry per remaining head, so a cut changes their shape.
    """
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if is_dataclass(output) and not isinstance(output, Mapping | type):
        output = {part.name: getattr(output, part.name) for part in fields(output)}
    if isinstance(output, Mapping):
        output = [part for name, part in output.items() if "attentions" not in str(name)]
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []
