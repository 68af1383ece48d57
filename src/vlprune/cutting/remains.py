"""A parameter before its cut, in no more memory than the rows and columns that were cut away."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Remains"]


class Remains:
    """The old parameter, to be put together again if a cut is undone.

    Only the parts that go are kept, next to the new parameter, which has the others: a model that
    is cut never needs more memory than it had, and one layer. A parameter whose memory is not
    torch's own (a mapped file) or not its own (a view) is kept itself, as that costs nothing. So is
    one that the cut multiplies by a factor, which no division takes back to the bit.
    """

    def __init__(
        self, old: nn.Parameter, axes: Mapping[int, tuple[Tensor, int]], scaled: bool
    ) -> None:
        storage = None if old.is_meta else old.untyped_storage()
        own = storage is not None and storage.resizable() and storage.nbytes() == old.nbytes
        self._old = None if own and not scaled else old
        self._alive = weakref.ref(old)
        self._rest = list[tuple[int, Tensor, Tensor, Tensor]]()
        self._more = dict(old.__dict__)
        self._like = old.requires_grad
        part, axes = old.detach(), axes if self._old is None else {}
        for number, (axis, (stays, length)) in enumerate(axes.items(), 1):
            goes = torch.ones(length, dtype=torch.bool)
            goes[stays.cpu()] = False
            gone = goes.nonzero()[:, 0].to(part.device)
            stays = stays.to(part.device)
            self._rest.append((axis, stays, gone, part.index_select(axis, gone)))
            if number < len(axes):
                part = part.index_select(axis, stays)

    @torch.no_grad()
    def put_together(self, small: Tensor) -> nn.Parameter:
        """The old parameter, from the one that took its place.

        It is the same object if anybody, such as an optimizer, still has it.
        """
        old = self._old if self._old is not None else self._alive()
        if old is not None:
            return old
        whole = small.detach()
        for axis, stays, gone, part in reversed(self._rest):
            size = (*whole.shape[:axis], len(stays) + len(gone), *whole.shape[axis + 1 :])
            wider = whole.new_empty(size).index_copy(axis, stays, whole)
            whole = wider.index_copy_(axis, gone, part)
        made = nn.Parameter(whole, requires_grad=self._like)
        made.__dict__.update(self._more)
        return made
