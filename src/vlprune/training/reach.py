"""Which structures the loss depends on, and the warnings about the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..errors import VlpruneError
from ..methods import Method, Search
from ..structures.structure import Structure

__all__ = ["Reach"]

PATIENCE = 0.1
"""The fraction of a search after which structures that no gradient has reached are reported."""
LAST_CALL = 0.5
"""The fraction after which a search that cannot meet its budget without them is ended."""


class Reach:
    """The structures that no gradient has reached so far, which the search leaves whole.

    A gradient of zeros reaches nothing: a loss that does not depend on a unit says nothing about
    it. ``every`` holds all structures of the model, skipped ones included.
    """

    def __init__(self, method: Method, search: Search, every: Sequence[Structure]) -> None:
        self.method, self.search, self.every = method, search, every
        self.unreached = set(search.decides_on) if method.needs_training else set[str]()
        self._told = False

    @property
    def nothing(self) -> bool:
        """Whether the search has learnt about no structure at all."""
        return self.unreached == self.search.decides_on

    @property
    def names(self) -> list[str]:
        """The structures that are not reached yet, in the order of the model."""
        return [s.name for s in self.search.problem.structures if s.name in self.unreached]

    @property
    def missing(self) -> str:
        """A sentence on the structures that are not reached; "" if there are none."""
        if not (names := self.names):
            return ""
        return (
            f"no gradient of the loss reached {len(names)} of "
            f"{len(self.search.problem.structures)} structures, which stay dense: "
            f"{', '.join(names)}"
        )

    def note(self, reached: Iterable[str], progress: float) -> None:
        """Take note of structures that the loss depends on.

        Where the method uses gates, warns once of structures that are still missing after
        :data:`PATIENCE`. Raises VlpruneError then if none at all is reached, and after
        :data:`LAST_CALL` if the budget cannot be met without the missing ones.
        """
        self.unreached -= set(reached)
        self._leave_whole()
        watched = self.method.uses_gates  # at every step, not on a few held-out batches
        if watched and self.unreached and progress >= PATIENCE:
            self._tell(progress)

    def _leave_whole(self) -> None:
        """Leave whole the structures that no gradient has reached, and all in their groups."""
        groups = self.search.problem.groups
        bound = {groups[name] for name in self.unreached if name in groups}
        whole = self.unreached | {name for name, group in groups.items() if group in bound}
        if self.search.whole != whole:
            self.search.leave_whole(frozenset(whole))

    def _tell(self, progress: float) -> None:
        if self._told and progress < LAST_CALL:
            return
        names = self.names
        more = f"{len(names) - 1} more structure{'s' if names[2:] else ''}"
        which = names[0] + (f" and {more}" if names[1:] else "")
        missing = (
            f"the loss reaches no gate of {which}: no gradient in the first {progress:.0%} of the "
            "search"
        )
        if self.nothing:
            raise VlpruneError(f"{missing}; train with a loss that depends on the model")
        patterns = _patterns_of(names, [s.name for s in self.every])
        listed = ", ".join(f'"{pattern}"' for pattern in patterns)
        if progress >= LAST_CALL and self.search.least_left() > self.search.problem.budget:
            raise VlpruneError(
                f"{missing}, and without them the budget cannot be reached: train with a loss that "
                "depends on them, or ask for a larger budget and leave them dense with "
                f"skip=({listed},)"
            )
        if not self._told:
            self._told = True
            warnings.warn(
                f"{missing}; they stay dense unless a later batch reaches them "
                f"(skip=({listed},) says so from the start)",
                stacklevel=4,
            )

    def state(self) -> Tensor:
        """Which structures are reached, one boolean per structure."""
        structures = self.search.problem.structures
        return torch.tensor([s.name not in self.unreached for s in structures])

    def restore(self, state: Tensor) -> None:
        """Go on from a result of :meth:`state`."""
        pairs = zip(self.search.problem.structures, state.tolist(), strict=True)
        self.unreached = {structure.name for structure, reached in pairs if not reached}
        self._leave_whole()


def _patterns_of(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Patterns for ``skip`` that match these names and no others of ``every``, each short."""
    others = set(every) - set(names)
    patterns: list[str] = []
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        parts = name.split(".")
        tried = [".".join(parts[:count]) + ".*" for count in range(1, len(parts))]
        fitting = (p for p in tried if not any(fnmatchcase(other, p) for other in others))
        patterns.append(next(fitting, name))
    return patterns
