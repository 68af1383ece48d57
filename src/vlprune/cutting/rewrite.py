"""The cut: real, smaller parameters in the modules of the model, proved on the spot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..device import device_of, same_random_numbers
from ..errors import IncomparableError, PlanError, UnsupportedError, VerificationError
from ..structures.plan import Plan
from ..structures.record import Record, read_record, record_of, write_record
from ..structures.structure import Description, Structure, fingerprint, unit_of
from ..structures.units import owner_of, plain_name, positions, span
from .difference import Difference, difference, tensors_of
from .first_batch import run_inputs
from .gates import evaluating, gated, has_gates
from .native import native_forward
from .padded import PaddedLinear, expect_index, is_linear, linear_axes
from .sharing import (
    Tie,
    check_shares,
    mixed,
    moved,
    remember_ties,
    settled,
    tie,
    ties_in,
    ties_of,
    untie,
)
from .wrappers import unwrapped

__all__ = ["Cut", "Verification", "apply_plan", "perform", "rewrite", "settle"]

SMALL_ENOUGH_FOR_FLOAT64 = 100_000_000
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Relative difference of masked and cut model that is rounding."""
HALF_TOLERANCE = 5e-2
"""The same where a kernel knows only half precision."""


@dataclass(frozen=True)
class Verification:
    """How the cut was proved.

    The largest ``difference`` between masked and cut model, the outputs' ``scale``, the ``dtype``
    it was measured in, the fraction of all values that was ``compared`` (the others are infinite
    or NaN on both sides), and the attention ``kernel`` that ran, "" for the model's own.
    """

    difference: float
    scale: float
    dtype: str
    compared: float = 1.0
    kernel: str = ""


@dataclass(frozen=True)
class Cut:
    """A plan, resolved for one model and checked once: what :func:`perform` makes true.

    ``structures`` are those that lose units, share or are shared; ``plan`` also says what follows
    from sharing that the model had before; ``record`` is what the model will remember.
    """

    description: Description
    plan: Plan
    structures: tuple[Structure, ...]
    record: Record


def settle(model: nn.Module, structures: Description | Sequence[Structure], plan: Plan) -> Cut:
    """The cut that ``plan`` means for ``model``.

    Raises PlanError for a plan that does not fit, UnsupportedError for a model that carries
    another quantizer, gates, or weights that are no plain parameters.
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

    Our own sharing aside, a weight that is computed from others (adapters, ``weight_norm``,
    ``torch.nn.utils.prune``) cannot be cut: what it is computed from would keep its size.
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
    """Whether a weight is numbers of its own: neither missing, nor packed, nor a quantized kind."""
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
    up to 100 M parameters, in float32 above, and in the model's own dtype where its kernels know
    no wider one. If they differ, or anything else ends the cut early (Ctrl-C, no memory), the
    model is put back as it was; so the old weights are held until the cut is done.

    Raises PlanError for a plan that does not fit, UnsupportedError for a model that
    carries another quantizer, VerificationError if masked and cut model differ, and its kind
    IncomparableError if they could not be compared.
    """
    model = unwrapped(model)
    perform(model, settle(model, structures, plan), verify)
    return model


def perform(
    model: nn.Module, cut: Cut, verify: Mapping[str, Any] | None = None
) -> Verification | None:
    """Cut the model as :func:`rewrite` does; returns the proof, None without ``verify``."""
    if verify is None:
        with _undone_on_failure() as undo:
            _apply(model, cut, undo)
            write_record(model, cut.record, undo)
        return None
    with evaluating(model), ExitStack() as setting:
        masked, inputs, dtype, kernel = _masked(model, cut, verify, setting)
        with _undone_on_failure() as undo:
            _apply(model, cut, undo)
            proof = _compared(model, masked, inputs, dtype)
            write_record(model, cut.record, undo)
    name = str(dtype).removeprefix("torch.")
    return Verification(proof.largest, proof.scale, name, proof.compared, kernel)


def _apply(model: nn.Module, cut: Cut, undo: ExitStack) -> None:
    """Cut, whole weights first: what was tied is tied again, as far as it is left."""
    ties = ties_in(model)
    if ties:
        undo.callback(remember_ties(model))
        untie(model)
    apply_plan(model, cut.structures, cut.plan, undo, ties)


@contextmanager
def _undone_on_failure() -> Iterator[ExitStack]:
    """A list of calls that are made, last first, if the block is left by any exception."""
    with ExitStack() as undo:
        yield undo
        undo.pop_all()


# -- the proof -------------------------------------------------------------------------


def _masked(
    model: nn.Module, cut: Cut, inputs: Mapping[str, Any], setting: ExitStack
) -> tuple[list[Tensor], Mapping[str, Any], torch.dtype, str]:
    """The masked model's outputs, the inputs and dtype of that pass, and the kernel that ran.

    Tried are the wide dtype with the kernels that the model has, then without labels (a loss may
    hold numbers of another dtype), with other kernels that may know that dtype (flash attention
    does not), and last the model's own dtype. ``setting`` keeps what worked until the cut model
    has run in it, too.
    """
    problems: list[str] = []
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    (first, *others) = [(inputs, dtype, kernel) for dtype, kernel in _settings(model)]
    labelled = [(unlabelled, *first[1:])] if "labels" in inputs else []
    for inputs, dtype, kernel in (first, *labelled, *others):
        with ExitStack() as tried:
            try:
                if kernel:
                    tried.enter_context(_kernels(model, kernel))
                tried.enter_context(_in_dtype(model, dtype))
                with (
                    _untied(model),
                    mixed(model, cut.structures, cut.plan),
                    gated(model, cut.description.structures, cut.plan),
                ):
                    outputs = _run(model, inputs, dtype)
                difference(outputs, outputs)
            except Exception as error:
                problems.append(f"{str(dtype).removeprefix('torch.')}: {_first_line(error)}")
                continue
            setting.enter_context(tried.pop_all())
            return outputs, inputs, dtype, kernel
    raise IncomparableError(
        f"the masked model could not be run for the proof ({'; '.join(dict.fromkeys(problems))}), "
        "so nothing was cut: give other example_inputs, or cut without proof by "
        "finish(verify=False)"
    )


def _compared(
    model: nn.Module, masked: Sequence[Tensor], inputs: Mapping[str, Any], dtype: torch.dtype
) -> Difference:
    """How far the cut model is from the masked one. Raises VerificationError."""
    advice = (
        "the model was put back as it was: report this architecture, or, if you know better, "
        "cut without proof by finish(verify=False)"
    )
    try:
        found = _run(model, inputs, dtype)
    except Exception as error:
        raise VerificationError(
            f"the cut model does not run ({_first_line(error)}); {advice}"
        ) from error
    try:
        apart = difference(masked, found)
    except VerificationError as error:
        raise VerificationError(f"masked and cut model differ: {error}; {advice}") from None
    if not apart.relative <= TOLERANCE.get(dtype, HALF_TOLERANCE):
        raise VerificationError(
            f"masked and cut model differ by {apart.largest:.2g} on outputs up to "
            f"{apart.scale:.2g}; {advice}"
        )
    return apart


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _settings(model: Any) -> Iterator[tuple[torch.dtype, str]]:
    """Dtypes and kernels to try the proof in, best first."""
    count = sum(p.numel() for p in model.parameters())
    wide = torch.float64 if count <= SMALL_ENOUGH_FOR_FLOAT64 else torch.float32
    yield wide, ""
    if hasattr(model, "set_attn_implementation"):
        yield wide, "sdpa"
        yield wide, "eager"
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), wide)
    if own != wide:
        yield own, ""


@contextmanager
def _kernels(model: Any, name: str) -> Iterator[None]:
    """The model with other attention kernels, and plain ones for experts, while the block runs."""
    fields = ("_attn_implementation_internal", "_experts_implementation_internal")
    before = {
        place: (config, {f: config.__dict__[f] for f in fields if f in config.__dict__})
        for place, config in _configs(model).items()
    }
    try:
        model.set_attn_implementation(name)
        with suppress(Exception):  # only models with experts can
            model.set_experts_implementation("eager")
        yield
    finally:
        now = _configs(model)  # those of a cut model are new ones
        for place, (config, values) in before.items():
            config.__dict__.update(values)
            now.get(place, config).__dict__.update(values)


def _configs(model: nn.Module) -> dict[tuple[str, str], Any]:
    """{(module, sub-config): config} of all configs that the model refers to."""
    found = {}
    for path, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            found[path, ""] = config
            parts = {name: getattr(config, name, None) for name in config.sub_configs}
            found |= {(path, n): part for n, part in parts.items() if hasattr(part, "model_type")}
    return found


@contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """The model with whole weights in place of shared ones while the block runs."""
    tie_again = remember_ties(model)
    try:
        untie(model)
        yield
    finally:
        tie_again()


@contextmanager
def _in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model in another dtype while the block runs; widening and back is lossless.

    Parameters cut inside the block come back in the dtype they had.
    """
    before = {plain_name(name): t.dtype for name, t in _floating(model) if t.dtype != dtype}
    try:
        if before:
            model.to(dtype)
        yield
    finally:
        for name, tensor in _floating(model):
            if plain_name(name) in before:
                tensor.data = tensor.data.to(before[plain_name(name)])


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Every floating tensor of one forward pass."""
    with same_random_numbers(model):
        torch.manual_seed(0)
        return tensors_of(model(**run_inputs(model, inputs, device_of(model), dtype)))


# -- surgery ---------------------------------------------------------------------------


def apply_plan(
    model: nn.Module,
    structures: Sequence[Structure],
    plan: Plan,
    undo: ExitStack | None = None,
    ties: Sequence[Tie] = (),
) -> None:
    """Cut and share without any check. Works on meta tensors, which is how loading uses it.

    ``structures`` are those that are cut, and those that share or are shared. ``ties`` are those
    that the model had before and that go on. ``undo`` takes the calls that put back what was
    there before; without it old weights are freed one by one.
    """
    undo = undo if undo is not None else _Forget()
    kept = {s.name: plan.kept(s) for s in structures}
    cut = [s for s in structures if len(kept[s.name]) < s.size]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ties = [*ties, *ties_of(structures, plan, shapes)]
    index = _positions_that_stay(model, cut, kept)
    scale = {
        param: math.sqrt(len(kept[s.name]) / s.size)
        for s in cut
        if s.layout == "native"
        for param in s.folds
    }
    _swap_forwards(model, cut, undo)
    for name, axes in index.items():
        _narrow(model, name, axes, scale.get(name, 1.0), undo)
    _pad(model, cut, index, undo)
    _follow(model, cut, kept, undo)
    if ties:
        undo.callback(untie, model)
        tie(model, moved(ties, index, scale))


class _Forget(ExitStack):
    """An undo list that keeps nothing."""

    def callback(self, callback: Any, /, *_args: Any, **_kwds: Any) -> Any:
        """Drop the call."""
        return callback


Axes = Mapping[int, tuple[Tensor, int]]
"""{axis: (positions that stay, old length)} of one parameter."""


def _positions_that_stay(
    model: nn.Module, cut: Sequence[Structure], kept: Mapping[str, Sequence[int]]
) -> dict[str, Axes]:
    """For every parameter to be cut."""
    masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for structure in cut:
        for slot in structure.slots:
            length = model.get_parameter(slot.param).shape[slot.axis]
            mask = masks[slot.param].setdefault(
                slot.axis, torch.ones(length, dtype=torch.bool, device="cpu")
            )
            mask[slot.start : slot.start + span(slot, structure.size)] = False
            mask[positions(slot, structure.size, kept[structure.name])] = True
    return {
        name: {axis: (mask.nonzero().reshape(-1), mask.numel()) for axis, mask in axes.items()}
        for name, axes in masks.items()
    }


def _swap_forwards(model: nn.Module, cut: Sequence[Structure], undo: ExitStack) -> None:
    """Give modules our forward where the stock one does not take narrower weights."""
    for structure in cut:
        if structure.swap is None:
            continue
        path, key = structure.swap
        module: Any = model.get_submodule(path)
        target = native_forward(key)
        if not isinstance(module, target):
            undo.callback(_become, module, type(module), dict(module.__dict__))
            module.__class__ = target
            module.adopt()


def _become(module: Any, cls: type[nn.Module], attributes: Mapping[str, Any]) -> None:
    module.__class__ = cls
    module.__dict__.clear()
    module.__dict__.update(attributes)


@torch.no_grad()
def _narrow(model: nn.Module, name: str, axes: Axes, scale: float, undo: ExitStack) -> None:
    """Replace one parameter by its kept rows and columns, times ``scale``."""
    path, leaf = owner_of(name)
    module = model.get_submodule(path)
    old = module._parameters[leaf]
    if old is None:
        raise PlanError(f"the model has no parameter {name!r}")
    data = old.detach()
    for axis, (index, _length) in axes.items():
        data = data.index_select(axis, index.to(data.device))
    if scale != 1.0:
        data = data * scale
    undo.callback(module._parameters.__setitem__, leaf, old)
    module._parameters[leaf] = nn.Parameter(data.contiguous(), requires_grad=old.requires_grad)
    if leaf == "weight" and is_linear(module):
        out_axis, in_axis = linear_axes(module)
        names = ("nf", "nx") if out_axis == 1 else ("out_features", "in_features")
        for attr, width in zip(names, (data.shape[out_axis], data.shape[in_axis]), strict=True):
            if hasattr(module, attr):
                _set(module, attr, width, undo)


def _pad(
    model: nn.Module, cut: Sequence[Structure], index: Mapping[str, Axes], undo: ExitStack
) -> None:
    """Wrap cut projections so that their outside keeps the old width, where none is native."""
    padded: dict[str, dict[int, tuple[Tensor, int]]] = defaultdict(dict)
    for structure in cut:
        for slot in structure.slots if structure.layout == "padded" else ():
            path, leaf = owner_of(slot.param)
            if leaf == "weight":
                padded[path][slot.axis] = index[slot.param][slot.axis]
    for path, axes in padded.items():
        module: Any = model.get_submodule(path)
        device = module.weight.device
        out_axis, in_axis = linear_axes(module)
        rows, columns = axes.get(out_axis), axes.get(in_axis)
        layer = PaddedLinear(
            module.weight,
            module.bias,
            rows[0].to(device) if rows else None,
            columns[0].to(device) if columns else None,
            full_out=rows[1] if rows else module.weight.shape[out_axis],
            full_in=columns[1] if columns else module.weight.shape[in_axis],
            transposed=out_axis == 1,
        )
        if device.type == "meta":
            for name, kept in (("rows", rows), ("columns", columns)):
                if kept:
                    expect_index(layer, name, kept[0])
        layer.train(module.training)
        parent_path, leaf = owner_of(path)
        parent = model.get_submodule(parent_path)
        undo.callback(parent._modules.__setitem__, leaf, module)
        setattr(parent, leaf, layer)


def _follow(
    model: nn.Module,
    cut: Sequence[Structure],
    kept: Mapping[str, Sequence[int]],
    undo: ExitStack,
) -> None:
    """Let the numbers that forwards read follow the cut."""
    for structure in cut:
        for attr in structure.attrs if structure.layout == "native" else ():
            module = model.get_submodule(attr.module)
            _set(module, attr.name, attr.per_unit * len(kept[structure.name]), undo)


def _set(module: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
