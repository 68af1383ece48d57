"""The cut: real, smaller parameters in the modules of the model, proved on the spot."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .difference import tensors_of
from .errors import PlanError, VerificationError
from .gate import evaluating, gated
from .layers import PaddedLinear, is_linear, linear_axes
from .plan import Plan
from .record import read_record, record_of, write_record
from .registry import native_forward
from .share import Tie, check_shares, mixed, moved, settled, tie, ties_of, untie
from .structure import Description, Structure
from .units import owner_of, plain_name, positions, span

__all__ = ["Verification", "apply_plan", "rewrite"]

SMALL_ENOUGH_FOR_FLOAT64 = 100_000_000


@dataclass(frozen=True)
class Verification:
    """Largest difference between masked and cut model, the outputs' scale, and the dtype."""

    difference: float
    scale: float
    dtype: str


def rewrite(
    model: nn.Module,
    structures: Description | Sequence[Structure],
    plan: Plan,
    verify: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The same model object, really smaller.

    Everything is checked before the first weight is touched. Parameters are replaced one
    by one, so no second copy of the model is held. Units that the plan shares are stored once
    afterwards (:mod:`vlprune.share`). With ``verify`` (inputs for one forward
    pass) the masked and the cut model must give the same output, in float64 for models of
    up to 100 M parameters, in float32 above; otherwise the model is put back as it was and
    VerificationError is raised. Verifying holds on to the old weights until it is done.

    Raises PlanError for a plan that does not fit, UnsupportedError for a model that
    carries another quantizer.
    """
    description = (
        structures
        if isinstance(structures, Description)
        else Description(tuple(structures), attention=plan.attention)  # type: ignore[arg-type]
    )
    known = description.fingerprint if isinstance(structures, Description) else ""
    plan.check(description.structures, known)
    check_shares(model, description.structures, plan)
    plan = settled(model, description.structures, plan)
    before = read_record(model)
    sharing = {*plan.share, *(source for source, *_ in plan.share.values())}
    cut = [s for s in description if len(plan.kept(s)) < s.size or s.name in sharing]
    record = record_of(description, plan, before, cut)
    if verify is not None:
        verification = _verified_cut(model, description, plan, cut, verify)
        model._vlprune_verification = verification  # type: ignore[assignment]
    else:
        apply_plan(model, cut, plan, ties=untie(model))
    write_record(model, record)
    return model


def _verified_cut(
    model: nn.Module,
    description: Description,
    plan: Plan,
    cut: Sequence[Structure],
    inputs: Mapping[str, Any],
) -> Verification:
    """Cut, compare with the masked model, and put everything back if they differ.

    A model that shares already is cut on whole weights; what was tied is tied again.
    """
    count = sum(p.numel() for p in model.parameters())
    probe, tolerance = (
        (torch.float64, 1e-9) if count <= SMALL_ENOUGH_FOR_FLOAT64 else (torch.float32, 1e-3)
    )
    undo: list[Any] = []
    with evaluating(model), _in_dtype(model, probe):
        ties = untie(model)
        try:
            with mixed(model, cut, plan), gated(model, description.structures, plan):
                masked = _run(model, inputs, probe)
            apply_plan(model, cut, plan, undo, ties)
            result = _compare(masked, _run(model, inputs, probe), probe, tolerance)
        except Exception as error:
            _roll_back(model, undo)
            tie(model, ties)
            raise VerificationError(
                f"the cut was not proved right ({error}); the model was put back as it was: "
                "check the probe inputs, or report this architecture"
            ) from error
    return result


def _compare(
    masked: Sequence[Tensor], small: Sequence[Tensor], probe: torch.dtype, tolerance: float
) -> Verification:
    """How far apart two lists of outputs are. Raises VerificationError beyond ``tolerance``."""
    difference, scale, seen = 0.0, 0.0, False
    for a, b in zip(masked, small, strict=True):
        if a.shape != b.shape:
            raise VerificationError(f"an output has shape {tuple(b.shape)}, not {tuple(a.shape)}")
        finite = torch.isfinite(a) | torch.isfinite(b)
        if finite.any():
            seen = True
            difference = max(difference, float((a - b)[finite].abs().max()))
            scale = max(scale, float(a[finite].abs().max()))
    if not seen:
        raise VerificationError("the probe inputs give no finite output")
    if not difference <= tolerance * max(1.0, scale):
        raise VerificationError(
            f"masked and cut model differ by {difference:.2g} on outputs up to {scale:.2g}"
        )
    return Verification(difference, scale, str(probe).removeprefix("torch."))


def apply_plan(
    model: nn.Module,
    structures: Sequence[Structure],
    plan: Plan,
    undo: list[Any] | None = None,
    ties: Sequence[Tie] = (),
) -> None:
    """Cut and share without any check. Works on meta tensors, which is how loading uses it.

    ``structures`` are those that are cut, and those that share or are shared. ``ties`` are those
    that the model had before and that go on. With ``undo``, what was there before is appended
    to it.
    """
    log = undo if undo is not None else _Forget()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    ties = [*ties, *ties_of(structures, plan, shapes)]
    cut = [s for s in structures if len(plan.kept(s)) < s.size]
    for structure in cut:
        if structure.swap is not None:
            path, key = structure.swap
            module: Any = model.get_submodule(path)
            target = native_forward(key)
            if not isinstance(module, target):
                log.append(("class", module, type(module), dict(module.__dict__)))
                module.__class__ = target
                module.adopt()
    index = _axis_index(model, cut, plan)
    scale = {
        param: math.sqrt(len(plan.kept(s)) / s.size)
        for s in cut
        if s.layout == "native"
        for param in s.folds
    }
    padded: dict[str, dict[int, tuple[Tensor, int]]] = defaultdict(dict)
    for structure in cut:
        if structure.layout == "padded":
            for slot in structure.slots:
                path, leaf = owner_of(slot.param)
                if leaf == "weight":
                    padded[path][slot.axis] = index[slot.param][slot.axis]
    for name, axes in index.items():
        _cut_parameter(model, name, axes, scale.get(name, 1.0), log)
    for path, axes in padded.items():
        _pad(model, path, axes, log)
    for structure in cut:
        if structure.layout == "padded":
            continue
        for attr in structure.attrs:
            module = model.get_submodule(attr.module)
            log.append(("attr", module, attr.name, getattr(module, attr.name)))
            setattr(module, attr.name, attr.per_unit * len(plan.kept(structure)))
    if ties:
        log.append(("tie", model, "", None))
        tie(model, moved(ties, index, scale))


class _Forget(list[Any]):
    """An undo log that keeps nothing, so that old weights are freed at once."""

    def append(self, _item: Any) -> None:
        """Drop the item."""


def _axis_index(
    model: nn.Module, cut: Sequence[Structure], plan: Plan
) -> dict[str, dict[int, tuple[Tensor, int]]]:
    """{parameter: {axis: (positions that stay, old length)}}, for every parameter to be cut."""
    masks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for structure in cut:
        for slot in structure.slots:
            length = model.get_parameter(slot.param).shape[slot.axis]
            mask = masks[slot.param].setdefault(
                slot.axis, torch.ones(length, dtype=torch.bool, device="cpu")
            )
            mask[slot.start : slot.start + span(slot, structure.size)] = False
            mask[positions(slot, structure.size, plan.kept(structure))] = True
    return {
        name: {axis: (mask.nonzero().reshape(-1), mask.numel()) for axis, mask in axes.items()}
        for name, axes in masks.items()
    }


@torch.no_grad()
def _cut_parameter(
    model: nn.Module,
    name: str,
    axes: Mapping[int, tuple[Tensor, int]],
    scale: float,
    log: list[Any],
) -> None:
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
    log.append(("param", module, leaf, old))
    module._parameters[leaf] = nn.Parameter(data.contiguous(), requires_grad=old.requires_grad)
    if leaf == "weight" and is_linear(module):
        out_axis, in_axis = linear_axes(module)
        names = ("nf", "nx") if out_axis == 1 else ("out_features", "in_features")
        for attr, width in zip(names, (data.shape[out_axis], data.shape[in_axis]), strict=True):
            if hasattr(module, attr):
                log.append(("attr", module, attr, getattr(module, attr)))
                setattr(module, attr, width)


def _pad(
    model: nn.Module, path: str, axes: Mapping[int, tuple[Tensor, int]], log: list[Any]
) -> None:
    """Wrap an already cut projection so that its outside keeps the old width."""
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
    layer.train(module.training)
    parent_path, leaf = owner_of(path)
    parent = model.get_submodule(parent_path)
    log.append(("module", parent, leaf, module))
    setattr(parent, leaf, layer)


def _roll_back(model: nn.Module, log: list[Any]) -> None:
    """Undo a cut, last step first."""
    for kind, module, name, old in reversed(log):
        if kind == "param":
            module._parameters[name] = old
        elif kind == "module":
            module._modules[name] = old
        elif kind == "attr":
            setattr(module, name, old)
        elif kind == "tie":
            untie(module)
        else:
            module.__class__ = name
            module.__dict__.clear()
            module.__dict__.update(old)


class _in_dtype:
    """The model in a wider dtype while the block runs; widening and back is lossless.

    Parameters cut inside the block come back in the dtype they had.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.before = {
            plain_name(name): t.dtype for name, t in _floating(model) if t.dtype != dtype
        }

    def __enter__(self) -> None:
        if self.before:
            self.model.to(self.dtype)

    def __exit__(self, *_exc: object) -> None:
        for name, tensor in _floating(self.model):
            if plain_name(name) in self.before:
                tensor.data = tensor.data.to(self.before[plain_name(name)])


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in named if tensor.is_floating_point()]


@torch.no_grad()
def _run(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Every floating tensor of one forward pass."""
    device = next(model.parameters()).device

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return tensors_of(model(**{name: cast(value) for name, value in inputs.items()}))
