"""The one solve of a repair, in float64 on the device of the statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Moments

__all__ = ["DAMPING", "Repair", "repair"]

DAMPING = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Fractions of the mean diagonal of the second moments that a repair may be damped by."""

ROUNDING = 1e-12
"""What is added to every damping, as a part of the mean square of the input: the covariance of an
input that does not vary is rounding errors."""


@dataclass(frozen=True)
class Repair:
    """A repaired layer: ``weight`` (out, kept columns), ``bias`` (out,) or None.

    ``before`` and ``after`` are its squared errors per token on the held-out tokens, in units of
    the wanted outputs' mean square: without and with the repair. ``damping`` is 0 where the repair
    was no better than none.
    """

    weight: Tensor
    bias: Tensor | None
    before: float
    after: float
    damping: float


def repair(
    fitted: Moments,
    held_out: Moments,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor,
) -> Repair:
    """The kept columns of ``weight`` (out, width), refitted so that the outputs come near y.

    The least-squares change of the columns that stay, shrunk towards none: damping is the one of
    ``DAMPING`` that does best on ``held_out``, and no repair is made where none of them beats doing
    nothing there. The held-out tokens stay out of the fit, so that errors on them are true
    (unless there are no others). The bias is refitted exactly, where there is one.
    """
    if not fitted.weight:
        fitted, held_out = held_out, fitted
    weight = weight.double()[:, kept]
    shift = None if bias is None else bias.double()
    checked = held_out if held_out.weight else fitted
    base = _error(checked, kept, weight, shift)
    scale = checked.yy / checked.weight or 1.0
    best = Repair(weight, shift, base / scale, base / scale, 0.0)
    for damping in DAMPING:
        tried = _solved(fitted, kept, weight, shift, damping)
        if tried is None:
            continue
        error = _error(checked, kept, *tried) / scale
        if error < best.after:
            best = Repair(*tried, best.before, error, damping)
    return best


def _solved(
    moments: Moments, kept: Tensor, weight: Tensor, bias: Tensor | None, damping: float
) -> tuple[Tensor, Tensor | None] | None:
    """The damped least-squares solution; None where rounding errors are larger than the damping."""
    total = moments.weight
    second = moments.xx[kept][:, kept] / total
    cross = moments.yx[:, kept] / total
    rounding = ROUNDING * second.diagonal().mean()
    if bias is not None:
        x, y = moments.x[kept] / total, moments.y / total
        second = second - torch.outer(x, x)
        cross = cross - torch.outer(y, x)
    residual = cross - weight @ second
    ridge = damping * second.diagonal().mean().clamp(min=0) + rounding
    second.diagonal().add_(ridge if ridge > 0 else 1.0)  # an input that is always 0
    lower, failed = torch.linalg.cholesky_ex(second)
    if failed:
        return None
    new = weight + torch.cholesky_solve(residual.T, lower).T
    return new, None if bias is None else y - new @ x


def _error(moments: Moments, kept: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """The mean squared length of y - weight x - bias."""
    total = moments.weight
    second = moments.xx[kept][:, kept] / total
    error = moments.yy / total - 2 * (weight * (moments.yx[:, kept] / total)).sum()
    error = error + ((weight @ second) * weight).sum()
    if bias is not None:
        x, y = moments.x[kept] / total, moments.y / total
        error = error - 2 * bias @ y + 2 * bias @ (weight @ x) + bias @ bias
    return max(0.0, float(error))  # a difference of large numbers
