"""A plan, checked once against its model before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import PlanError, UnsupportedError
from ..structures.plan import Plan
from ..structures.record import Record, read_record, record_of
from ..structures.structure import Description, Structure, fingerprint, unit_of
from ..structures.units import owner_of
from .gates import has_gates
from .sharing.rules import check_shares, settled
from .sharing.ties import ties_in

__all__ = ["Cut", "settle"]


@dataclass(frozen=True)
class Cut:
    """A plan, resolved for one model and checked, for :func:`perform` to carry out.

    ``structures`` are those that lose units, share or are shared. ``plan`` includes the
    consequences of any sharing that the model had before. ``record`` is the record that the model
    will keep of the cut.
    """

    description: Description
    plan: Plan
    structures: tuple[Structure, ...]
    record: Record


def settle(model: nn.Module, structures: Description | Sequence[Structure], plan: Plan) -> Cut:
    """The cut that ``plan`` means for ``model``.

    Raises PlanError for a plan that does not fit, UnsupportedError for a model that carries
    another quantizer, gates, or weights that are not ordinary parameters.
    """
    if isinstance(structures, Description):
        description = structures
    else:
        unit = unit_of(structures) or plan.attention
        description = Description(tuple(structures), attention=unit)  # type: ignore[arg-type]
    if plan.attention != description.attention:
        raise PlanError(
            f"the plan counts attention in {plan.attention!r}, the description in "
            f"{description.attention!r}: describe the model with "
            f"vlprune.discover(model, attention={plan.attention!r})"
        )
    if isinstance(structures, Description) and plan.experts != description.experts:
        raise PlanError(
            f"the plan counts experts in {plan.experts!r}, the description in "
            f"{description.experts!r}: describe the model with vlprune.discover(model, "
            f"attention={plan.attention!r}, experts={plan.experts!r})"
        )
    plan.check(description.structures, fingerprint(plan.attention, description.structures))
    if has_gates(model):
        raise UnsupportedError(
            "a search is running on this model: call finish() or detach() of its Compressor, then "
            "cut"
        )
    check_plain(model, description.structures)
    before = read_record(model)
    if before is not None:
        before.check(description.structures)
    check_shares(model, description.structures, plan)
    plan = settled(model, description.structures, plan)
    sharing = {*plan.share, *(source for source, *_ in plan.share.values())}
    cut = tuple(s for s in description if len(plan.kept(s)) < s.size or s.name in sharing)
    return Cut(description, plan, cut, record_of(description, plan, before, cut))


def check_plain(model: nn.Module, structures: Sequence[Structure]) -> None:
    """Raise UnsupportedError unless all weights of the structures are ordinary parameters.

    Except for vlprune's own sharing, a weight that is computed from others (adapters,
    ``weight_norm``, ``torch.nn.utils.prune``) cannot be cut: the tensors behind it would keep their
    size.
    """
    shared = {one.target for one in ties_in(model)}
    for structure in structures:
        for slot in structure.slots:
            path, leaf = owner_of(slot.param)
            try:
                module = model.get_submodule(path)
            except AttributeError:
                raise UnsupportedError(f"the model has no {path} (any more){_REMEDY}") from None
            if not _is_plain(module._parameters.get(leaf)) and slot.param not in shared:
                raise UnsupportedError(f"{slot.param} is not an ordinary parameter{_REMEDY}")


def _is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary parameter: neither missing, nor packed, nor quantized."""
    return (
        isinstance(weight, nn.Parameter)
        and weight.is_floating_point()
        and (type(weight.data) is Tensor or hasattr(weight, "to_local"))
    )


_REMEDY = (
    ": adapters, torch.nn.utils.prune, weight_norm or a quantizer have replaced it. Undo that "
    "first (merge_and_unload(), prune.remove(), remove_parametrizations()), compress, and put it "
    "on the small model"
)
