"""The cut: a settled plan carried out in place, proved at once, undone if anything fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn

from ..device import on_the_cpu
from ..errors import UnsupportedError
from ..processes import all_or_none, first_value
from ..structures.plan import Plan
from ..structures.record import write_record
from ..structures.structure import Description, Structure
from .apply import Slices, apply_plan
from .fsdp import is_sharded, refuse_other_shards, reshard
from .gates import evaluating
from .joined import save_apart
from .proof import Verification, compare, run_masked, verification
from .settle import Cut, settle
from .sharing.ties import remember_ties, ties_in, untie
from .wrappers import unwrapped
from .zero import engine_aside

__all__ = ["HOW_TO_SHARE", "NO_SHARING", "carry_out", "perform", "rewrite"]

NO_SHARING = "layers cannot share weights that are spread over processes"
HOW_TO_SHARE = (
    "save the searched model from all processes by vlprune.save(model, FOLDER, "
    "extras={'searched.json': compressor.plan().to_json()}), and apply that plan in one process "
    "by vlprune.rewrite(model, vlprune.discover(model, plan.attention), plan)"
)


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

    A model whose weights FSDP2 or DeepSpeed ZeRO-3 has spread over processes is cut parameter by
    parameter, each gathered on its own, and stays spread. All processes must call this; the proof
    runs on the inputs of the first, and a cut that fails in one of them is undone in all. Such a
    model cannot share weights: UnsupportedError says how to apply the plan after gathering. A cut
    ends the DeepSpeed engine that trained the model (:mod:`vlprune.cutting.zero`).

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
    sharded = is_sharded(model)
    if sharded:
        refuse_other_shards(model)
        if cut.plan.share:
            raise UnsupportedError(f"{NO_SHARING}, so nothing was cut: {HOW_TO_SHARE}")
        # one forward pass in all processes, or they would wait for each other
        verify = first_value(on_the_cpu(verify))
    try:
        with engine_aside(model):
            return _performed(model, cut, verify, all_or_none if sharded else nullcontext)
    finally:
        if sharded:
            reshard(model)


def _performed(
    model: nn.Module,
    cut: Cut,
    verify: Mapping[str, Any] | None,
    agreeing: Callable[[], AbstractContextManager[None]],
) -> Verification | None:
    """The cut and its proof; what fails inside ``agreeing()`` fails in all processes."""
    if verify is None:
        with _undone_on_failure() as undo, agreeing():
            carry_out(model, cut, undo)
            write_record(model, cut.record, undo)
        return None
    with evaluating(model):
        with agreeing():
            masked = run_masked(model, cut, verify)
        reshard(model)
        with _undone_on_failure() as undo, agreeing():
            carry_out(model, cut, undo)
            proof = compare(model, masked)
            write_record(model, cut.record, undo)
    found = verification(proof, masked, cut)
    if found.unseen:
        _tell_unseen(found.unseen)
    return found


def _tell_unseen(names: Sequence[str]) -> None:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    warnings.warn(
        f"the batch of the proof does not use {names[0]}{more}, which were cut: it shows nothing "
        "about them; give example_inputs (verify) that use the whole model",
        stacklevel=4,
    )


def carry_out(model: nn.Module, cut: Cut, undo: ExitStack) -> Slices:
    """Untie shared weights, cut, and tie again the shared positions that are left.

    Returns what stays of each parameter. ``undo`` takes the calls that put the old state back.
    Works on a model without weights.
    """
    ties = ties_in(model)
    if ties:
        undo.callback(remember_ties(model))
        untie(model)
    save_apart(model, undo)
    return apply_plan(model, cut.structures, cut.plan, undo, ties)


@contextmanager
def _undone_on_failure() -> Iterator[ExitStack]:
    """A stack of calls, made last first if any exception ends the block."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()
