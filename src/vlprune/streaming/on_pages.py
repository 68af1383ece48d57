"""A model that runs while its weights lie in its folder: two blocks of it are in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ..calibration.blocks import members_of
from ..cutting.paged import Pages, paged
from ..structures.structure import Structure
from .source import Source

__all__ = ["LEAST", "on_pages"]

LEAST = 64 * 2**20
"""Bytes of weights in memory, however small the blocks are."""


@contextmanager
def on_pages(
    source: Source,
    structures: Sequence[Structure],
    folder: Path,
    device: torch.device | None = None,
) -> Iterator[Pages]:
    """The model of ``source`` as if it were in memory while the block runs.

    The two largest blocks that hold ``structures`` have room: the one at hand, and the one that a
    pass comes from. Changed weights are written to ``folder``, which is removed at the end. The
    model computes on ``device`` (default: the CPU).
    """
    paths = members_of(source.model, structures)
    blocks = (source.model.get_submodule(path) for path in paths)
    room = max((2 * sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)
    stored = source.weights.__getitem__
    pages = Pages(source.model, stored, max(LEAST, room), folder, device or torch.device("cpu"))
    with paged(source.model, pages):
        yield pages
