"""The hand-written backward pass of a gated linear layer, against finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlprune.cutting.gates import _GatedLinear, gated
from vlprune.structures.structure import Gate, Structure

OUT, IN = 3, 4
NAMES = ("inputs", "weight", "bias", "rows", "columns")


def arguments(shape: tuple[int, ...], absent: tuple[str, ...] = ()) -> dict[str, Tensor | None]:
    """Inputs, weight, bias, rows and columns in float64, without those that are absent."""
    g = torch.Generator().manual_seed(0)
    sizes = {"inputs": (*shape, IN), "weight": (OUT, IN), "bias": (OUT,), "rows": (OUT,)}
    sizes["columns"] = (IN,)
    return {
        name: None if name in absent else torch.randn(size, generator=g, dtype=torch.float64)
        for name, size in sizes.items()
    }


def plain(
    inputs: Tensor, weight: Tensor, bias: Any = None, rows: Any = None, columns: Any = None
) -> Tensor:
    """The same by autograd alone."""
    rows = torch.ones(len(weight), dtype=inputs.dtype) if rows is None else rows
    weight = weight if columns is None else weight * columns
    return nn.functional.linear(
        inputs, rows[:, None] * weight, None if bias is None else rows * bias
    )


ABSENT = [
    names for n in range(4) for names in itertools.combinations(("bias", "rows", "columns"), n)
]


@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=["2-D", "3-D"])
@pytest.mark.parametrize("absent", ABSENT, ids=lambda names: "no " + " ".join(names))
def test_every_gradient_agrees_with_finite_differences(
    absent: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    """Whatever is absent, and whichever of what is there asks for a gradient."""
    values = arguments(shape, absent)
    present = [name for name in NAMES if name not in absent]
    for n in range(1, len(present) + 1):
        for asking in itertools.combinations(present, n):
            given = [
                None if x is None else x.clone().requires_grad_(name in asking)
                for name, x in values.items()
            ]
            assert torch.autograd.gradcheck(_GatedLinear.apply, given), asking


@pytest.mark.parametrize("absent", ABSENT, ids=lambda names: "no " + " ".join(names))
def test_only_what_asks_gets_a_gradient(absent: tuple[str, ...]) -> None:
    values = arguments((2, 3), absent)
    present = [name for name in NAMES if name not in absent]
    for n in range(1, len(present) + 1):
        for asking in itertools.combinations(present, n):
            sides = []
            for function in (_GatedLinear.apply, plain):
                given = {
                    name: None if x is None else x.clone().requires_grad_(name in asking)
                    for name, x in values.items()
                }
                function(*given.values()).square().sum().backward()
                sides.append({k: None if x is None else x.grad for k, x in given.items()})
            for name in NAMES:
                ours, theirs = (side[name] for side in sides)
                assert (ours is None) == (theirs is None) == (name not in asking), (name, asking)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_used_twice_adds_its_gradients_up() -> None:
    """The output of the first use is the input of the second; all leaves are the same."""
    g = torch.Generator().manual_seed(0)
    sizes = ((2, IN), (IN, IN), (IN,), (IN,), (IN,))
    given = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in sizes]

    def twice(inputs: Tensor, *rest: Tensor) -> Tensor:
        return _GatedLinear.apply(torch.tanh(_GatedLinear.apply(inputs, *rest)), *rest)

    assert torch.autograd.gradcheck(twice, given)

    def rows_as_columns(inputs: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        return _GatedLinear.apply(inputs, weight, bias, gate, gate)

    assert torch.autograd.gradcheck(rows_as_columns, given[:4])


@pytest.mark.parametrize("frozen", [(), ("bias",), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("at", [("output",), ("input",), ("output", "input")])
def test_a_gated_layer_called_twice_has_the_gradients_of_the_plain_product(
    at: tuple[str, ...], frozen: tuple[str, ...]
) -> None:
    """Through ``gated``, with a bias that may be frozen and rows that may be absent."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN)).double()
    for name in frozen:
        getattr(model[0], name).requires_grad_(False)
    structures = [Structure(a, "ffn", IN, "text", (), (Gate("0", a),)) for a in at]  # type: ignore[arg-type]
    inputs = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    sides = []
    for hand_written in (True, False):
        gates = {a: torch.rand(IN, generator=torch.Generator().manual_seed(1)) for a in at}
        gates = {a: gate.double().requires_grad_() for a, gate in gates.items()}
        leaves = [inputs, *gates.values(), *(p for p in model.parameters() if p.requires_grad)]
        if hand_written:
            with gated(model, structures, gates):
                loss = model(model(inputs).tanh()).square().sum()
        else:
            layer: Any = model[0]
            rest = (layer.weight, layer.bias, gates.get("output"), gates.get("input"))
            loss = plain(plain(inputs, *rest).tanh(), *rest).square().sum()
        sides.append(torch.autograd.grad(loss, leaves))
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
