"""The state of a search, as a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..prices.prices import (
    Prices,
)

__all__ = ["SearchState", "priced_again", "seconds_of_prices"]


@dataclass(frozen=True)
class SearchState:
    """All that a search needs to go on exactly from a step, and its form as named tensors.

    ``search`` is the method's own; ``gates`` {structure: (size,)}; ``reached`` one boolean per
    structure; ``seconds`` is a measured table of prices as curves, where that of ``""`` is the cost
    that always stays. The table is saved because a second measurement would differ.
    """

    search: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]
    reached: Tensor
    progress: float
    held_out_seen: int
    seconds: Mapping[str, tuple[float, ...]]

    def tensors(self) -> dict[str, Tensor]:
        """The state as a flat dictionary."""
        seconds = {n: torch.tensor(c, dtype=torch.float64) for n, c in self.seconds.items()}
        return {
            **{f"search/{name}": value for name, value in self.search.items()},
            **{f"gate/{name}": gate.detach().cpu() for name, gate in self.gates.items()},
            "reached": self.reached,
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "held_out_seen": torch.tensor(self.held_out_seen),
            **{f"seconds/{name}": curve for name, curve in seconds.items()},
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> SearchState:
        """The state that gave these :meth:`tensors`."""
        seconds = _below("seconds/", tensors)
        return cls(
            search=_below("search/", tensors),
            gates=_below("gate/", tensors),
            reached=tensors["reached"],
            progress=float(tensors.get("progress", torch.tensor(0.0))),
            held_out_seen=int(tensors.get("held_out_seen", torch.tensor(0))),
            seconds={name: tuple(curve.tolist()) for name, curve in seconds.items()},
        )


def seconds_of_prices(prices: Prices) -> dict[str, tuple[float, ...]]:
    """A measured table as curves; empty for prices that were not measured."""
    return {"": (prices.fixed,), **prices.curve} if prices.curve else {}


def priced_again(prices: Prices, seconds: Mapping[str, tuple[float, ...]]) -> Prices:
    """The prices with a table from :func:`seconds_of_prices` in place of their own."""
    if not seconds:
        return prices
    # in the order of the prices: sums depend on it, and a file is read in any order
    curve = {name: seconds[name] for name in prices.unit if name in seconds}
    unit = {name: values[-1] / (len(values) - 1) for name, values in curve.items()}
    (fixed,) = seconds[""]
    return replace(prices, fixed=fixed, curve=curve, unit=unit)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
