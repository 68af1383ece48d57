"""The checks and the pricing before a search starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..architectures import discover
from ..cutting.fsdp import is_sharded
from ..cutting.settle import (
    check_plain,
)
from ..cutting.sharing.rules import (
    shareable,
    similarity,
)
from ..errors import BudgetError, UnsupportedError
from ..methods import Method, Problem
from ..prices import cost
from ..prices.budget import (
    Budget,
)
from ..prices.clock import (
    conditions,
)
from ..prices.latency import (
    latency_prices,
)
from ..prices.prices import (
    Prices,
)
from ..prices.select import (
    select,
)
from ..structures.record import read_record
from ..structures.shards import shape_of
from ..structures.structure import AttentionUnit, Description, ExpertUnit, Structure
from ..structures.units import named_weights, owner_of, unit_squares

__all__ = [
    "Costs",
    "costs_of",
    "described",
    "problem_of",
    "refuse_unreachable",
    "widths",
    "without",
]


def described(
    model: nn.Module, attention: AttentionUnit, experts: ExpertUnit = "neuron"
) -> Description:
    """The description of a model that can be cut. Raises UnsupportedError for any other."""
    record = read_record(model)
    description = discover(model, attention, experts)
    if not description.structures:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention or FFN that the layout table knows: "
            "see vlprune.discover(model).dense for the reasons"
        )
    check_plain(model, description.structures)
    if record is not None:
        record.check(description.structures)
    return description


def without(structures: Sequence[Structure], skip: Sequence[str]) -> tuple[Structure, ...]:
    """The structures whose names match none of the patterns.

    Raises UnsupportedError if a pattern matches no name, or if nothing is left.
    """
    for pattern in skip:
        if not any(fnmatchcase(s.name, pattern) for s in structures):
            raise UnsupportedError(
                f"skip: no structure's name matches {pattern!r}; they look like "
                f"{structures[0].name!r}"
            )
    left = tuple(s for s in structures if not any(fnmatchcase(s.name, p) for p in skip))
    if not left:
        raise UnsupportedError("skip leaves nothing to prune")
    return left


def widths(structures: Sequence[Structure]) -> dict[str, str]:
    """Groups of structures that keep equally many units in a uniform plan, {structure: group}."""
    return {s.name: f"{s.tower}/{s.kind}/{s.size}" for s in structures}


@dataclass(frozen=True)
class Costs:
    """The costs of a model and of its units.

    ``prices`` are in the budget's currency, ``param_prices`` in parameters, ``params`` is the
    number of parameters before the cut. ``macs`` are None without example inputs. ``conditions``
    are those that a latency was measured under.
    """

    params: int
    param_prices: Prices
    macs: cost.MacsProfile | None
    prices: Prices
    conditions: Mapping[str, Any] = field(default_factory=dict)


def costs_of(
    model: nn.Module,
    structures: tuple[Structure, ...],
    budget: Budget,
    inputs: Mapping[str, Any] | None,
    attention: AttentionUnit,
    measured: Prices | None,
) -> Costs:
    """Price the units; ``measured`` is an earlier table of seconds.

    Raises BudgetError if the budget's currency needs inputs and ``inputs`` is None, or if it must
    be measured and the weights are sharded.
    """
    every = budget.what == "macs"  # of experts that all compute on every token
    if budget.what != "params" and any(
        s.kind == "experts" and not (every and s.core) for s in structures
    ):
        raise BudgetError(
            f"whole experts save no {budget.what}, as every token still goes to as many of them: "
            'ask for a budget in params, for experts="neuron", or leave them dense with '
            'skip=("*.whole",)'
        )
    params, param_prices = int(cost.params(model, structures)), cost.param_prices(model, structures)
    if inputs is None:
        if budget.what != "params":
            reason = {
                "macs": "MACs depend on the size of the input",
                "latency": "time depends on the input's size",
            }[budget.what]
            raise BudgetError(f"a budget in {budget.what} needs example_inputs: {reason}")
        return Costs(params, param_prices, None, param_prices)
    macs = cost.measure_macs(model, structures, inputs)
    if budget.what == "params":
        return Costs(params, param_prices, macs, param_prices)
    if budget.what == "macs":
        return Costs(params, param_prices, macs, macs.prices)
    if measured is None and is_sharded(model):
        raise BudgetError(
            "a latency is measured on copies of the whole model, and here the weights are spread "
            "over processes: make the Compressor before fully_shard or deepspeed.initialize, or "
            "give it prices="
        )
    where = conditions(model, inputs)
    prices = measured or latency_prices(model, structures, inputs, attention)
    return Costs(params, param_prices, macs, prices, where)


def problem_of(
    model: nn.Module,
    structures: tuple[Structure, ...],
    prices: Prices,
    fraction: float,
    groups: Mapping[str, str],
) -> Problem:
    """The problem of a method: values, and three functions that look at the model for it."""
    shapes = {name: shape_of(weight) for name, weight in named_weights(model).items()}

    def weight(name: str) -> Tensor:
        path, leaf = owner_of(name)
        return getattr(model.get_submodule(path), leaf)

    def squares() -> Mapping[str, Tensor]:
        return unit_squares(weight, structures)

    return Problem(
        structures,
        prices,
        fraction,
        squares=squares,
        shareable=lambda target, source: shareable(target, source, shapes),
        similarity=lambda target, source: similarity(model, target, source),
        groups=groups,
    )


def refuse_unreachable(
    method: Method,
    structures: Sequence[Structure],
    prices: Prices,
    fraction: float,
    groups: Mapping[str, str],
) -> None:
    """Raise BudgetError if no plan meets the budget, whatever the scores."""
    if getattr(method, "cost", "exact") == "exact":  # else the method has its own prices
        select(
            {structure.name: [0.0] * structure.size for structure in structures},
            prices,
            fraction,
            getattr(method, "round_to", 1),
            groups=groups,
        )
