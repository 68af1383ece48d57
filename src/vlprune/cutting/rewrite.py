"""The cut: a settled plan carried out in place, proved at once, undone if anything fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..structures.plan import Plan
from ..structures.record import write_record
from ..structures.structure import Description, Structure
from .apply import Slices, apply_plan
from .gates import evaluating
from .proof import Verification, compare, run_masked, verification
from .settle import Cut, settle
from .sharing.ties import remember_ties, ties_in, untie
from .wrappers import unwrapped

__all__ = ["carry_out", "perform", "rewrite"]


def rewrite(
    model: nn.Module,
    structures: Description | Sequence[Structure],
    plan: Plan,
    verify: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The same model object, really smaller.

    Everything is checked before the first weight is touched. Units that the plan shares are
    stored once afterwards (:mod:`vlprune.cutting.sharing`). With ``verify`` (inputs for one forward
    pass) the masked and the cut model must give the same output, in float64 for models of
    up to 100 M parameters, in float32 above, and in the model's own dtype where its kernels
    support no wider one. If they differ, or anything else ends the cut early (Ctrl-C, out of
    memory), the model is put back as it was, so the old weights are held until the cut is done.

    Raises PlanError for a plan that does not fit, UnsupportedError for a model that carries
    another quantizer, adapters, gates, weights that are not ordinary parameters or a wrapper for
    parallel training, VerificationError if masked and cut model differ, and IncomparableError (a
    kind of VerificationError) if they could not be compared.
    """
    model = unwrapped(model)
    perform(model, settle(model, structures, plan), verify)
    return model


def perform(
    model: nn.Module, cut: Cut, verify: Mapping[str, Any] | None = None
) -> Verification | None:
    """Cut the model as :func:`rewrite` does; returns the proof, or None without ``verify``."""
    if verify is None:
        with _undone_on_failure() as undo:
            carry_out(model, cut, undo)
            write_record(model, cut.record, undo)
        return None
    with evaluating(model):
        masked, setting = run_masked(model, cut, verify)
        with _undone_on_failure() as undo:
            carry_out(model, cut, undo)
            proof = compare(model, masked, setting)
            write_record(model, cut.record, undo)
    return verification(proof, setting)


def carry_out(model: nn.Module, cut: Cut, undo: ExitStack) -> Slices:
    """Untie shared weights, cut, and tie again the shared positions that are left.

    Returns what stays of each parameter. ``undo`` takes the calls that put the old state back.
    Works on a model without weights.
    """
    ties = ties_in(model)
    if ties:
        undo.callback(remember_ties(model))
        untie(model)
    return apply_plan(model, cut.structures, cut.plan, undo, ties)


@contextmanager
def _undone_on_failure() -> Iterator[ExitStack]:
    """A stack of calls, made last first if any exception ends the block."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()
