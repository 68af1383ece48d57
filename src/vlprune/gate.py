"""Gates: one number a unit, multiplied into a running model without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PlanError, did_you_mean
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
    with ExitStack() as stack:
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
                for remove in _attach(model.get_submodule(gate.module), gate, gate_values):
                    stack.callback(remove)
        yield model


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
