"""A calibration's part in a compression: what a search learns from it, and the repair of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..calibration.session import NO_REPAIR, Session, session_of
from ..calibration.store import Originals
from ..cutting.fsdp import is_sharded
from ..errors import UnsupportedError, VlpruneError
from ..folders.notes import hashed
from ..methods import Method, Search
from ..structures.plan import Plan
from ..structures.structure import Structure
from .gating import Gating

__all__ = ["Calibrated", "calibrated_by", "refuse_sharded"]


def calibrated_by(
    given: Any, method: Method, model: nn.Module, structures: Sequence[Structure]
) -> Calibrated | None:
    """The calibration on these batches; None without any.

    Raises VlpruneError if the method needs batches and ``given`` is None, DataError for batches
    that cannot be used, UnsupportedError if the weights are sharded.
    """
    if given is not None:
        refuse_sharded(model)
        if not method.uses_calibration and any(s.kind == "experts" for s in structures):
            raise UnsupportedError(NO_REPAIR)
        return Calibrated(session_of(model, structures, given), method)
    if method.uses_calibration:
        raise VlpruneError(
            f"{type(method).__name__} learns from calibration batches: give "
            "Compressor(..., calibration=[batch, ...]) some"
        )
    return None


def refuse_sharded(model: nn.Module) -> None:
    """Raise UnsupportedError if processes share the weights out among them."""
    if is_sharded(model):
        raise UnsupportedError(
            "calibration works on whole weights, and these are spread over processes (FSDP or "
            "DeepSpeed ZeRO-3): compress before fully_shard or deepspeed.initialize (each process "
            "may bring its own part of the batches), then spread the small model"
        )


class Calibrated:
    """A session and the method that it serves. What it does to the model can be taken back."""

    def __init__(self, session: Session, method: Method) -> None:
        self.session, self.method = session, method
        self.learnt = False
        # in the order of the changes: rotation, gates written into weights, repair
        self._originals = [Originals(session.model) for _ in range(3)]

    def learn(self, search: Search) -> None:
        """Let the search learn from the batches, once; heads are rotated if the method says so."""
        if self.learnt or not self.method.uses_calibration:
            return
        refuse_sharded(self.session.model)
        if getattr(self.method, "rotate", False):
            self.session.rotate(self._originals[0])
        steps, step = self.session.steps, f"errors-{hashed(repr(self.method))}"
        known = steps.known(step)
        if known is not None:
            search.restore(known[0])
        else:
            search.calibrate(self.session)
            steps.remember(step, search.state())
        self.learnt = True

    def repair(self, plan: Plan, gating: Gating) -> None:
        """Fold the plan into the weights of the model as it was trained, with its gates."""
        if plan.share:
            self.session.remark = "the plan shares weights, so it was not repaired"
        elif getattr(self.method, "fold", True):
            refuse_sharded(self.session.model)
            gating.write_into_weights(self._originals[1])
            self.session.fold(plan, self._originals[2])

    def put_back(self) -> bool:
        """Take back all changes since :meth:`keep`; whether the search must learn again."""
        for originals in reversed(self._originals):
            originals.put_back()
        turned_back = self.session.rotated and bool(self._originals[0])
        if turned_back:
            self.session.rotated, self.learnt = False, False
        self.keep()
        return turned_back

    def keep(self) -> None:
        """From here on the changes so far are part of the model."""
        for originals in self._originals:
            originals.forget()
