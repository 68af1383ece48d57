"""Gates: one number a unit, multiplied into a running model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import PlanError, UnsupportedError, did_you_mean
from .plan import Plan
from .structure import Gate, Structure
from .units import spread

__all__ = ["Gates", "evaluating", "gated", "ones", "plan_gates"]

Gates = Mapping[str, Tensor]
"""{structure: gate values (size,)}; a structure that is absent is not gated."""


def ones(structures: Sequence[Structure], requires_grad: bool = False) -> dict[str, Tensor]:
    """Gates that change nothing, float32."""
    return {s.name: torch.ones(s.size, requires_grad=requires_grad) for s in structures}


def plan_gates(structures: Sequence[Structure], plan: Plan) -> dict[str, Tensor]:
    """The plan as gates: 1 for a unit that stays, 0 for one that goes."""
    gates = {}
    for structure in structures:
        values = torch.zeros(structure.size)
        values[torch.tensor(plan.kept(structure))] = 1
        gates[structure.name] = values
    return gates


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while the block runs; afterwards every module as it was.

    Modules are remembered by path, so that one replaced inside the block inherits the mode.
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
    changing them in place takes effect at once. No hook stays behind, whatever happens.

    Raises PlanError for an unknown structure or a wrong number of values.
    """
    if isinstance(values, Plan):
        values.check(structures)
        values = plan_gates(structures, values)
    by_name = {s.name: s for s in structures}
    scales: dict[str, list[_Scale]] = {}
    for name, gate_values in values.items():
        if name not in by_name:
            raise PlanError(f"no structure is called {name!r}.{did_you_mean(name, by_name)}")
        structure = by_name[name]
        if tuple(gate_values.shape) != (structure.size,):
            raise PlanError(
                f"{name!r} has {structure.size} units, but got gates of shape "
                f"{tuple(gate_values.shape)}"
            )
        for gate in structure.gates:
            scales.setdefault(gate.module, []).append((gate, gate_values))
    with ExitStack() as stack:
        for path, members in scales.items():
            module = model.get_submodule(path)
            if _takes_scaled_weights(module, members):
                stack.callback(_scale_weights(module, members))
                continue
            for gate, gate_values in members:
                for remove in _attach(module, gate, gate_values):
                    stack.callback(remove)
        yield model


_Scale = tuple[Gate, Tensor]


def _takes_scaled_weights(module: nn.Module, members: Sequence[_Scale]) -> bool:
    """Whether scaling rows or columns of the weight does what scaling the activations would.

    Not for subclasses, nor where somebody has replaced ``forward``: those keep the hooks.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and all(gate.at in ("output", "input") for gate, _ in members)
    )


def _scale_weights(module: nn.Module, members: Sequence[_Scale]) -> Callable[[], None]:
    """Let the layer multiply by its gated weight; returns the call that ends it.

    A weight is small beside the activations of a batch, so this costs a small fraction of
    what scaling activations costs in time, and next to no memory.
    """
    assert isinstance(module, nn.Linear)

    def scale(at: str, like: Tensor, size: int) -> Tensor | None:
        product = None
        for gate, values in members:
            if gate.at == at:
                one = spread(values, gate, size).to(like.device)
                product = one if product is None else product * one
        return product

    def forward(inputs: Tensor) -> Tensor:
        weight = module.weight
        rows = scale("output", weight, weight.shape[0])
        columns = scale("input", weight, weight.shape[1])
        result: Tensor = _GatedLinear.apply(inputs, weight, module.bias, rows, columns)
        return result

    module.forward = forward  # type: ignore[method-assign, assignment]
    return lambda: module.__dict__.pop("forward", None)


class _GatedLinear(torch.autograd.Function):
    """inputs @ (rows * weight * columns).T + rows * bias, without keeping the gated weight.

    inputs (..., in), weight (out, in), bias (out,), rows (out,), columns (in,); all but the
    first two may be None. The gated weight is made again in the backward pass.
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
        if weight.requires_grad and not torch.is_inference_mode_enabled():
            # torch's matmul picks its kernel by this flag; without it the last bit moves
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


def _gated_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """rows * weight * columns in the dtype of ``weight``: (out, in)."""
    if rows is not None:
        weight = weight * rows.to(weight.dtype)[:, None]
    if columns is not None:
        weight = weight * columns.to(weight.dtype)
    return weight


def _attach(module: nn.Module, gate: Gate, values: Tensor) -> list[Callable[[], None]]:
    """Install one gate; return the calls that take it away again."""
    if gate.at == "output":

        def scale_output(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            return output * _like(output, spread(values, gate, output.shape[-1]))

        return [module.register_forward_hook(scale_output).remove]

    if gate.at == "input":

        def scale_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *rest = args
            return (first * _like(first, spread(values, gate, first.shape[-1])), *rest)

        return [module.register_forward_pre_hook(scale_input).remove]

    if any(parametrize.is_parametrized(module, name) for name in gate.params):
        raise UnsupportedError(
            "the projections of an nn.MultiheadAttention share their weights, so they cannot be "
            "gated: call vlprune.materialize on the model first, or skip this module"
        )

    # at == "weight": shadow the parameter with its gated product for one forward pass. An
    # entry in __dict__ is found before nn.Module looks into _parameters, so the parameter
    # itself, its name and its order are never touched.
    def shadow(module: nn.Module, _args: Any) -> None:
        for name in gate.params:
            weight = getattr(module, name)
            scale = _like(weight, spread(values, gate, weight.shape[0]))
            product = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
            if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
                # torch's matmul picks its kernel by this flag; without it the last bit moves
                product.requires_grad_(weight.requires_grad)
            module.__dict__[name] = product

    def unshadow(module: nn.Module, _args: Any, _output: Any) -> None:
        for name in gate.params:
            module.__dict__.pop(name, None)

    return [
        module.register_forward_pre_hook(shadow).remove,
        module.register_forward_hook(unshadow, always_call=True).remove,
        lambda: unshadow(module, None, None),
    ]


def _like(tensor: Tensor, scale: Tensor) -> Tensor:
    """``scale`` on the device and in the dtype of ``tensor``."""
    return scale.to(device=tensor.device, dtype=tensor.dtype)
