"""Experts that are one parameter, with a layer for each expert while a calibration is at work.

A calibration works on the layers that read the units of a structure: on their inputs, their
weights and their outputs. Experts have one parameter in place of such layers. While they are taken
apart, each expert calls a layer of its own, whose weight is its part of that parameter; the
forward is what transformers' own implementations compute, by the flags that they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..structures.structure import Slot, Structure
from ..structures.units import owner_of
from .batches import Batches

__all__ = ["called_at", "parts_of", "reads_experts", "taken_apart", "token_weights"]

PARTS = "vlprune_parts"
"""The name of the layers in their experts' module."""


def reads_experts(model: nn.Module, structure: Structure, slot: Slot) -> int:
    """How many experts read the structure by ``slot`` and can be taken apart; 0 for other slots."""
    path, leaf = owner_of(slot.param)
    module: Any = model.get_submodule(path)
    gate = structure.gates[0]
    if gate.at != "weight" or (path, leaf, slot.axis) != (gate.module, *gate.params, gate.axis):
        return 0
    return len(getattr(module, leaf)) if hasattr(module, "has_gate") else 0


def parts_of(path: str, experts: int) -> list[str]:
    """The paths of the layers of the experts at ``path``, while they are taken apart."""
    return [f"{path}.{PARTS}.{number}" for number in range(experts)]


def called_at(path: str) -> str:
    """The module that a forward pass always calls for the layer at ``path``: a token may choose
    other experts."""
    return path.partition(f".{PARTS}.")[0]


def token_weights(batches: Batches, tower: str, number: int, layer: Any, x: Tensor) -> Any:
    """One weight per token of the input ``x`` of a layer, flat; None where all count 1."""
    if not isinstance(layer, Part):
        return batches.weights(tower, number, x)
    chosen, total = layer.tokens
    weights = batches.weights(tower, number, x.new_empty(total, 1))
    return None if weights is None else weights[chosen]


class Part(nn.Linear):
    """The last projection of one expert: its part of a parameter, which stays where it is.

    ``tokens`` are the places of the tokens of the latest call, and the number of all tokens.
    """

    def __init__(self, experts: Any, number: int) -> None:
        nn.Module.__init__(self)
        self.experts, self.number = (experts,), number  # in a tuple: it is no child
        self.tokens: tuple[Tensor, int] = (torch.zeros(0), 0)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in), a view."""
        (experts,) = self.experts
        own: Tensor = experts.down_proj[self.number]
        return own.T if experts.is_transposed else own

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """(out,), a view; None without biases."""
        (experts,) = self.experts
        return experts.down_proj_bias[self.number] if experts.has_bias else None

    @property
    def device(self) -> torch.device:
        """Where the weight lies; torch finds no parameter here that would say so."""
        return self.weight.device

    def extra_repr(self) -> str:
        """The text inside the parentheses when the model is printed."""
        return f"expert {self.number}"


def _forward(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """hidden (tokens, width), chosen experts and their weights (tokens, top k) -> as hidden."""
    total = torch.zeros_like(hidden)
    first = self.gate_up_proj if self.has_gate else self.up_proj
    held = self.down_proj  # where weights come and go, read once for all experts
    bias = None
    if self.has_bias:
        bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
    for number, part in enumerate(getattr(self, PARTS)):
        tokens, place = torch.where(chosen == number)
        if not len(tokens):
            continue
        rows = first[number].T if self.is_transposed else first[number]
        up = nn.functional.linear(hidden[tokens], rows, None if bias is None else bias[number])
        part.tokens = tokens, len(hidden)
        down = part(self._apply_gate(up) if self.has_gate else self.act_fn(up))
        if self.has_post_expert_norm:
            down = self.post_expert_norm(down)
        down = down * weights[tokens, place, None]
        total = total.index_add(0, tokens, down.to(total.dtype))
    del held
    return total


@contextmanager
def taken_apart(model: nn.Module, structures: Sequence[Structure]) -> Iterator[None]:
    """The experts of the structures with a layer for each expert, while the block runs."""
    apart: list[tuple[Any, type[nn.Module]]] = []
    try:
        for structure in structures:
            count = reads_experts(model, structure, structure.slots[-1])
            if count:
                module: Any = model.get_submodule(structure.name)
                apart.append((module, type(module)))
                module.add_module(PARTS, nn.ModuleList(Part(module, n) for n in range(count)))
                module.__class__ = type(
                    type(module).__name__, (type(module),), {"forward": _forward}
                )
        yield
    finally:
        for module, cls in apart:
            module.__class__ = cls
            del module._modules[PARTS]
