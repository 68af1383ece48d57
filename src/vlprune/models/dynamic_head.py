"""Blocks of the dynamic head: deformable convolutions, mixed across the levels of a pyramid.

The dynamic head (Dai et al., CVPR 2021) is built as in GLIP. The deformable convolution is
torchvision's where it can be loaded, and elsewhere a slower one with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DynamicBlock", "deformable_convolution", "sampled_convolution"]


def sampled_convolution(
    inputs: Tensor, weight: Tensor, offsets: Tensor, mask: Tensor, stride: int = 1, padding: int = 1
) -> Tensor:
    """Modulated deformable convolution (Zhu et al., CVPR 2019, equation 1), by sampling.

    ``inputs`` (batch, channels, height, width), ``weight`` (out, channels, k, k), ``offsets``
    (batch, 2 k k, rows, columns) as (y, x) pairs and ``mask`` (batch, k k, rows, columns) give
    (batch, out, rows, columns). Values outside ``inputs`` count as 0. There is one bilinear look-up
    per kernel position, so the function runs, and has gradients, wherever torch does.
    """
    batch, _, height, width = inputs.shape
    kernel = weight.shape[-1]
    rows, columns = offsets.shape[-2:]
    steps = {"device": inputs.device, "dtype": inputs.dtype}
    top = torch.arange(rows, **steps)[:, None] * stride - padding  # type: ignore[call-overload]
    left = torch.arange(columns, **steps)[None] * stride - padding  # type: ignore[call-overload]
    moved = offsets.unflatten(1, (kernel * kernel, 2))
    framed = F.pad(inputs, (1, 1, 1, 1))  # so that look-ups just outside the inputs fade to 0
    total = inputs.new_zeros(batch, weight.shape[0], rows, columns)
    for number in range(kernel * kernel):
        y = top + number // kernel + moved[:, number, 0] + 1
        x = left + number % kernel + moved[:, number, 1] + 1
        # grid_sample expects -1 to 1 between the centres of the outermost pixels
        grid = torch.stack([2 * x / (width + 1) - 1, 2 * y / (height + 1) - 1], dim=-1)
        taken = F.grid_sample(framed, grid, padding_mode="zeros", align_corners=True)
        part = weight[:, :, number // kernel, number % kernel]
        taken = taken * mask[:, number : number + 1]
        total = total + torch.einsum("oc,bcyx->boyx", part, taken)
    return total


def deformable_convolution(
    inputs: Tensor, weight: Tensor, offsets: Tensor, mask: Tensor, stride: int = 1
) -> Tensor:
    """As :func:`sampled_convolution` with a padding of 1, by torchvision if it can be loaded."""
    operator: Any = _torchvision()
    if operator is None or inputs.is_meta:
        return sampled_convolution(inputs, weight, offsets, mask, stride)
    result: Tensor = operator(inputs, offsets, weight, stride=stride, padding=1, mask=mask)
    return result


def _torchvision() -> Any:
    """torchvision's deform_conv2d, or None if torchvision is missing or does not fit this torch."""
    try:
        from torchvision.ops import deform_conv2d

        return deform_conv2d if hasattr(torch.ops.torchvision, "deform_conv2d") else None
    except (ImportError, RuntimeError, AttributeError):
        return None


class DeformableNorm(nn.Module):
    """A 3 x 3 deformable convolution and a group norm."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.weight = nn.Parameter(torch.empty(width, width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm = nn.GroupNorm(16, width)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, features: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """(batch, width, rows, columns), with the rows and columns of ``offsets``."""
        moved = deformable_convolution(features, self.weight, offsets, mask, self.stride)
        normed: Tensor = self.norm(moved + self.bias[:, None, None])
        return normed


class DynamicRelu(nn.Module):
    """The larger of two lines per channel, which depend on the picture (DyReLU-B)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = max(4, width // 4)
        self.lines = nn.Sequential(
            nn.Linear(width, squeezed), nn.ReLU(), nn.Linear(squeezed, 4 * width)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Features (batch, channels, height, width) to the same shape."""
        told = F.hardsigmoid(self.lines(features.mean((2, 3)))) - 0.5
        slope, shift, second, other = (x[..., None, None] for x in told.chunk(4, dim=1))
        first = features * (2 * slope + 1) + shift
        return torch.maximum(first, features * 2 * second + other)


class DynamicBlock(nn.Module):
    """One block of the dynamic head over a pyramid, with attention over levels, places, channels.

    Each level reads itself, the next finer level (stride 2) and the next coarser level, all with
    offsets computed from itself. For the coarser level these offsets are resized to its size. With
    ``published`` they are read as they lie in memory, as the authors' operator does, which cannot
    be intended.
    """

    def __init__(self, width: int, published: bool = False) -> None:
        super().__init__()
        self.published = published
        self.coarser, self.same = DeformableNorm(width, 1), DeformableNorm(width, 1)
        self.finer = DeformableNorm(width, 2)
        self.offset = nn.Conv2d(width, 27, 3, padding=1)
        self.attention = nn.Conv2d(width, 1, 1)
        self.relu = DynamicRelu(width)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """One feature map (batch, channels, height, width) per level, finest first, to the same."""
        result = []
        for number, own in enumerate(levels):
            told = self.offset(own)
            offsets, mask = told[:, :18], told[:, 18:].sigmoid()
            seen = [self.same(own, offsets, mask)]
            if number > 0:
                seen.append(self.finer(levels[number - 1], offsets, mask))
            if number + 1 < len(levels):
                above = levels[number + 1]
                moved = [self._moved(x, above.shape[-2:]) for x in (offsets, mask)]
                up = self.coarser(above, *moved)
                seen.append(F.interpolate(up, own.shape[-2:], mode="bilinear", align_corners=True))
            together = torch.stack(seen)  # (levels read, batch, channels, height, width)
            weights = torch.stack(
                [F.relu(self.attention(x.mean((2, 3), keepdim=True))) for x in seen]
            )
            result.append(self.relu((together * F.hardsigmoid(weights)).mean(0)))
        return result

    def _moved(self, told: Tensor, size: torch.Size) -> Tensor:
        """Offsets or masks of a level for places of the next coarser one, of ``size``."""
        if not self.published:
            return F.interpolate(told, size, mode="bilinear")
        count = told.shape[1] * size.numel()  # the first numbers of each picture
        return told.flatten(1)[:, :count].unflatten(1, (told.shape[1], *size))
