"""Gates: one number per unit, multiplied into a running model without changing its weights."""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import PlanError, UnsupportedError, did_you_mean
from ..files import shown
from ..structures.plan import Plan
from ..structures.structure import Gate, Structure
from ..structures.units import spread
from .routers import routed
from .wrappers import uncompiled

__all__ = ["Gates", "evaluating", "gated", "has_gates", "ones", "plan_gates"]

Gates = Mapping[str, Tensor]
"""{structure: gate values (size,)}; a structure that is absent is not gated."""


def ones(structures: Sequence[Structure], requires_grad: bool = False) -> dict[str, Tensor]:
    """Gates that change nothing: float32 ones, {structure: (size,)}."""
    return {s.name: torch.ones(s.size, requires_grad=requires_grad) for s in structures}


def plan_gates(structures: Sequence[Structure], plan: Plan) -> dict[str, Tensor]:
    """The plan as float32 gates {structure: (size,)}: 1 for a unit that stays, 0 for the others."""
    gates = {}
    for structure in structures:
        values = torch.zeros(structure.size)
        values[torch.tensor(plan.kept(structure))] = 1
        gates[structure.name] = values
    return gates


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while the block runs; afterwards every module in its old mode.

    Modes are remembered by path, so that a module put in inside the block inherits the mode of
    the module that it replaces.
    """
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for path, module in model.named_modules():
            module.training = modes.get(path, module.training)


@contextmanager
def gated(
    model: nn.Module, structures: Sequence[Structure], values: Gates | Plan
) -> Iterator[nn.Module]:
    """The model with its units multiplied by ``values`` while the block runs.

    ``values`` are gates {structure: (size,)} or a plan. All ones give the untouched model
    bit for bit. Values may require gradients; they are read anew at every forward pass, so
    changing them in place takes effect at once. The gates are removed even if the block raises,
    and copies of the model have none.

    Raises PlanError for an unknown structure or a wrong number of values, UnsupportedError if the
    model is gated already or has a module that cannot be gated.
    """
    model = uncompiled(model)
    if isinstance(values, Plan):
        values.check(structures)
        values = plan_gates(structures, values)
    by_name = {s.name: s for s in structures}
    placed: dict[str, list[tuple[Gate, Tensor]]] = {}
    for name, gate_values in values.items():
        if name not in by_name:
            raise PlanError(f"no structure is called {shown(name)}.{did_you_mean(name, by_name)}")
        structure = by_name[name]
        if tuple(gate_values.shape) != (structure.size,):
            raise PlanError(
                f"{name!r} has {structure.size} units, but got gates of shape "
                f"{tuple(gate_values.shape)}"
            )
        for gate in structure.gates:
            placed.setdefault(gate.module, []).append((gate, gate_values))
    with ExitStack() as stack:
        for path, members in placed.items():
            stack.callback(_take_off, _put_on(model.get_submodule(path), path, members))
        yield model


def has_gates(model: nn.Module) -> bool:
    """Whether gates are in place anywhere in the model."""
    return any(GATES in module.__dict__ for module in model.modules())


# A gated module's class is a subclass made for the purpose. The module refers to no other module,
# and a copy or pickle of it, like the module itself once its gates are gone, is of the stock class
# again. So copies made during a search (momentum encoders, averages, checkpoints) compute with
# their own weights, without gates.

GATES = "_vlprune_gates"


@dataclass(frozen=True)
class _Gates:
    """The gates of a module, its stock class, and the ``forward`` of the instance, if any."""

    members: tuple[tuple[Gate, Tensor], ...]
    base: type[nn.Module]
    forward: Any = None


def _put_on(module: nn.Module, path: str, members: Sequence[tuple[Gate, Tensor]]) -> nn.Module:
    """Gate a module. Raises UnsupportedError if that is impossible."""
    if GATES in module.__dict__:
        raise UnsupportedError(
            f"{path} is gated already: another Compressor is at work on this model; finish() it, "
            "or call its detach(), first"
        )
    names = [name for gate, _ in members for name in gate.params]
    if any(parametrize.is_parametrized(module, name) for name in names):
        raise UnsupportedError(
            f"{path} ({type(module).__mro__[1].__name__}) shares weights that no layer of its own "
            "holds, so they cannot be gated: call vlprune.materialize on the model first, or skip "
            "this module"
        )
    base, own = type(module), module.__dict__.get("forward")
    module.__dict__[GATES] = _Gates(tuple(members), base, own)
    module.__class__ = _gated_class(base)
    if own is not None:  # accelerate sets one on a model that is spread over devices
        module.__dict__["forward"] = partial(_through_own_forward, module)
    return module


def _take_off(module: nn.Module) -> None:
    """Put the module back as it was, except for a class that other code gave it meanwhile."""
    gates: _Gates | None = module.__dict__.pop(GATES, None)
    if gates is None:
        return
    if type(module).__dict__.get("gated_base") is gates.base:
        module.__class__ = gates.base
    if gates.forward is not None:
        module.__dict__["forward"] = gates.forward


@contextmanager
def _bare(module: nn.Module) -> Iterator[None]:
    """The module without its gates while the block runs."""
    cls: Any = type(module)
    gates, own_forward = module.__dict__.get(GATES), module.__dict__.get("forward")
    _take_off(module)
    if type(module) is cls:  # its gates are gone already, but not its gated class
        module.__class__ = cls.__mro__[1]
    try:
        yield
    finally:
        module.__class__ = cls
        if gates is not None:
            module.__dict__[GATES] = gates
        if own_forward is not None:
            module.__dict__["forward"] = own_forward


def _gated_class(base: type[nn.Module]) -> Any:
    """A subclass of ``base`` that multiplies by gates, and leaves no trace in copies."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gates = getattr(self, GATES, None)
        if gates is None:
            return base.forward(self, *args, **kwargs)
        if base is nn.Linear and all(gate.at != "weight" for gate, _ in gates.members):
            return _through_weight(self, gates.members, *args, **kwargs)
        return _through(self, gates.members, partial(base.forward, self), args, kwargs)

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        with _bare(self):
            return copy.deepcopy(self, memo)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        with _bare(self):
            reduced: Any = self.__reduce_ex__(protocol)
            function, *parts = reduced
            if function is copyreg.__newobj__:  # type: ignore[attr-defined]
                function = object.__new__  # with __newobj__, pickle insists on the gated class
            return function, *(dict(part) if isinstance(part, dict) else part for part in parts)

    members = {
        "gated_base": base,
        "forward": forward,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (base,), members)


def _through_own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Like the gated class's forward, for an instance that has a ``forward`` of its own."""
    gates = module.__dict__[GATES]
    return _through(module, gates.members, gates.forward, args, kwargs)


def _through(
    module: nn.Module,
    members: Sequence[tuple[Gate, Tensor]],
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """``forward`` with its first input, its weights and its output multiplied by gates."""
    by_place: dict[str, list[tuple[Gate, Tensor]]] = {"input": [], "weight": [], "output": []}
    for gate, values in members:
        if gate.at == "router":  # the only gate there
            every = spread(values, gate, gate.repeat * len(values))
            return routed(module, every, forward, args, kwargs)
        by_place[gate.at].append((gate, values))
    for gate, values in by_place["input"]:
        first, *rest = args
        args = (first * _like(first, spread(values, gate, first.shape[-1])), *rest)
    shadowed: list[tuple[str, Any]] = []
    try:
        for gate, values in by_place["weight"]:
            for name in gate.params:
                # An entry in __dict__ is found before nn.Module looks into _parameters, so the
                # parameter itself, its name and its order are never touched.
                shadowed.append((name, module.__dict__.get(name)))
                module.__dict__[name] = _product(getattr(module, name), gate, values)
        output = forward(*args, **kwargs)
    finally:
        for name, before in reversed(shadowed):
            module.__dict__[name] = before  # a mixture with another layer
            if before is None:
                del module.__dict__[name]
    for gate, values in by_place["output"]:
        output = output * _like(output, spread(values, gate, output.shape[-1]))
    return output


def _product(weight: Tensor, gate: Gate, values: Tensor) -> Tensor:
    """A weight times the gates along their axis, in the weight's shape."""
    scale = _like(weight, spread(values, gate, weight.shape[gate.axis]))
    product = weight * scale.reshape(-1, *[1] * (weight.dim() - 1 - gate.axis))
    if not torch.is_grad_enabled() and _flag_counts():
        product.requires_grad_(weight.requires_grad)
    return product


def _through_weight(module: Any, members: Sequence[tuple[Gate, Tensor]], inputs: Tensor) -> Tensor:
    """A linear layer with its gated weight.

    A weight is small compared with the activations of a batch, so scaling the weight takes a
    small fraction of the time that scaling the activations would, and next to no memory.
    """

    def scale(at: str, like: Tensor, size: int) -> Tensor | None:
        product = None
        for gate, values in members:
            if gate.at == at:
                one = spread(values, gate, size).to(like.device)
                product = one if product is None else product * one
        return product

    weight = module.weight
    rows = scale("output", weight, weight.shape[0])
    columns = scale("input", weight, weight.shape[1])
    result: Tensor = _GatedLinear.apply(inputs, weight, module.bias, rows, columns)
    return result


class _GatedLinear(torch.autograd.Function):
    """inputs @ (rows * weight * columns).T + rows * bias, without keeping the gated weight.

    inputs (..., in), weight (out, in), bias (out,), rows (out,), columns (in,); all but the
    first two may be None. The backward pass computes the gated weight again.
    """

    @staticmethod
    def forward(
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
    ) -> Tensor:
        gated_weight = _gated_weight(weight, rows, columns)
        if weight.requires_grad and _flag_counts():
            gated_weight.requires_grad_()
        gated_bias = bias if bias is None or rows is None else (rows * bias).to(bias.dtype)
        return nn.functional.linear(inputs, gated_weight, gated_bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients  # (..., out), in the dtype of the matmul
        inputs, weight, bias, rows, columns = ctx.saved_tensors
        to_inputs = to_weight = to_bias = to_rows = to_columns = None
        if ctx.needs_input_grad[0]:
            gated_weight = _gated_weight(weight, rows, columns).to(upstream.dtype)
            to_inputs = (upstream @ gated_weight).to(inputs.dtype)
        flat = upstream.reshape(-1, upstream.shape[-1])
        if any(ctx.needs_input_grad[1:]):
            # d loss / d (gated weight), in the dtype of the weight from here on
            outer = (flat.T @ inputs.reshape(-1, inputs.shape[-1]).to(flat.dtype)).to(weight.dtype)
            to_weight = _gated_weight(outer, rows, columns)
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
                products = outer * weight
                if ctx.needs_input_grad[3]:
                    by_column = products if columns is None else products * columns
                    to_rows = by_column.sum(1).to(rows.dtype)
                if ctx.needs_input_grad[4]:
                    by_row = products if rows is None else products * rows[:, None]
                    to_columns = by_row.sum(0).to(columns.dtype)
        if bias is not None:
            to_bias = flat.sum(0).to(bias.dtype)
            if rows is not None:
                if to_rows is not None:
                    to_rows = to_rows + (to_bias * bias).to(rows.dtype)
                to_bias = (to_bias * rows).to(bias.dtype)
        return to_inputs, to_weight, to_bias, to_rows, to_columns


def _flag_counts() -> bool:
    """Whether a gated weight must require gradients as the weight does.

    torch's matmul picks its kernel by this flag; without it the last bit differs. Tensors of the
    inference mode cannot have it, and a compiled graph has kernels of its own.
    """
    return not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled()


def _gated_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """rows * weight * columns in the dtype of ``weight``: (out, in)."""
    if rows is not None:
        weight = weight * rows.to(weight.dtype)[:, None]
    if columns is not None:
        weight = weight * columns.to(weight.dtype)
    return weight


def _like(tensor: Tensor, scale: Tensor) -> Tensor:
    """``scale`` on the device and in the dtype of ``tensor``."""
    return scale.to(device=tensor.device, dtype=tensor.dtype)
