"""The base classes of methods, which are frozen configs, and of the searches that they start.

A method sees structures, prices, gates and progress, but never a module path or the model. To add a
method, write a class with its options in ``recipe/options.py`` (so that a recipe is checked without
importing torch), a file with a subclass of those options and a :class:`Search`, and a line in
``methods/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..prices.prices import Prices, least
from ..prices.select import select
from ..recipe.options import OneShotOptions
from ..structures.structure import Structure
from .vectors import Vectors

__all__ = [
    "Alignment",
    "Layer",
    "Look",
    "Method",
    "OneShot",
    "Problem",
    "Search",
    "Statistics",
    "Weights",
    "family",
    "standardised",
]


@dataclass(frozen=True)
class Problem:
    """The input of a search.

    ``budget`` is the fraction of ``prices.total`` that stays. Three functions look at the model,
    which a search never sees: ``squares()`` gives the sum of squared weights of every unit,
    {structure: (size,)}; ``shareable(target, source)`` gives the reason why units of ``target``
    cannot take the weights of ``source``, "" if they can; ``similarity(target, source)`` gives the
    cosines of their weights, (target's units, source's units). Structures of the same group in
    ``groups`` {structure: group} must keep equally many units.
    """

    structures: tuple[Structure, ...]
    prices: Prices
    budget: float
    squares: Callable[[], Mapping[str, Tensor]]
    shareable: Callable[[Structure, Structure], str] = lambda target, source: ""
    similarity: Callable[[Structure, Structure], Tensor] = lambda target, source: torch.eye(
        target.size, source.size
    )
    groups: Mapping[str, str] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> Problem:
        """The problem that is left if the structures in ``names`` stay whole."""
        if not names:
            return self
        return replace(
            self,
            structures=tuple(s for s in self.structures if s.name not in names),
            prices=self.prices.fixing(names),
            groups={name: group for name, group in self.groups.items() if name not in names},
        )


@dataclass(frozen=True)
class Alignment:
    """The structure that the weights are drawn to, and how strongly.

    ``strength`` times the distance (:func:`vlprune.methods.vectors.alignment`) joins the loss;
    then the distance is multiplied by ``factor`` (:func:`vlprune.methods.vectors.draw_near`).
    """

    vectors: Vectors
    strength: float
    factor: float = 1.0


@dataclass(frozen=True)
class Look:
    """The loss of a held-out batch: ``masked`` with vectors, ``full`` without, if it was asked for.

    ``keep`` and ``share`` are the gradients of ``masked`` by the vectors' values of the same name,
    {structure: (size,)}, averaged over all processes; empty if the search does not learn.
    """

    masked: float
    full: float | None
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    share: Mapping[str, Tensor] = field(default_factory=dict)


class Weights(Protocol):
    """The access to the weights for a search that learns in turn with them."""

    def align(self, wanted: Alignment) -> None:
        """Draw the weights towards a structure, by their gradients and directly."""

    def look(self, vectors: Vectors, learns: bool, compares: bool) -> Look:
        """Compute the loss of the next held-out batch, with gradients if the search ``learns``.

        Also without the vectors, if it ``compares``.
        """


@dataclass(frozen=True)
class Layer:
    """A layer that reads units of ``structure``, with the statistics of its calibration batches.

    ``columns`` (units, columns per unit) are the units' places in its input, ``second`` (width,
    width) the second moments of that input (about the mean where the layer has a bias that can make
    up for it), ``weight`` (out, width), ``influence`` (out,) what a squared error in each output
    channel adds to the relative squared error of the model's outputs.
    """

    structure: str
    columns: Tensor
    second: Tensor
    weight: Tensor
    influence: Tensor


class Statistics(Protocol):
    """What calibration batches tell about a model, for methods that set ``uses_calibration``."""

    def layers(self) -> Iterator[Layer]:
        """Every layer that reads units, one at a time: hold none of them."""

    def scores(self) -> Mapping[str, Tensor]:
        """What the loss of each query-key dimension adds to the error of the outputs.

        {structure: (size,)}, in the unit of :attr:`Layer.influence`.
        """


class Search(ABC):
    """The state of one search."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.whole: frozenset[str] = frozenset()

    @property
    def decides_on(self) -> frozenset[str]:
        """The names of the structures that the search may take units from."""
        return frozenset(s.name for s in self.problem.structures)

    def leave_whole(self, names: frozenset[str]) -> None:
        """Take no units from these structures, which the search knows too little about (yet)."""
        self.whole = names

    @property
    def open(self) -> Problem:
        """The problem without the structures that stay whole."""
        return self.problem.without(self.whole)

    def least_left(self) -> float:
        """The smallest fraction that a plan could reach now."""
        return least(self.open.prices)

    def reprice(self, prices: Prices) -> None:
        """Go on with these prices, such as a measured table that a checkpoint holds."""
        self.problem = replace(self.problem, prices=prices)

    def gates(self, progress: float) -> Mapping[str, Tensor]:
        """Gate values for the next step, {structure: (size,)}; absent ones stay as they are."""
        return {}

    def after_backward(self, progress: float, gradients: Mapping[str, Tensor]) -> None:
        """Take note of the gate gradients of one step, {structure: (size,)}."""
        return

    def expect(self, steps: int) -> None:
        """Raise RecipeError if the search could learn nothing in a training of ``steps`` steps."""
        return

    def turn(self, progress: float, weights: Weights) -> None:
        """Learn in turn with the weights; called once after each backward pass.

        Called only for methods that set ``uses_held_out``.
        """
        return

    def calibrate(self, statistics: Statistics) -> None:
        """Learn from calibration batches, before :meth:`keep`.

        Called only for methods that set ``uses_calibration``.
        """
        return

    @abstractmethod
    def keep(self) -> dict[str, tuple[int, ...]]:
        """The units that stay, {structure: units}, within the budget."""

    def share(self) -> dict[str, tuple[Any, ...]]:
        """The units that take another unit's weights, in the form of :class:`vlprune.Plan`."""
        return {}

    def prunable(self, kept: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """``{"p", "removed"}`` where the budget is no fraction of the model, as in UPop's paper.

        ``p`` is the share of the prunable cost that is to go, ``removed`` what goes when the units
        ``kept`` stay. Empty where the budget is a fraction of the whole model.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold for :meth:`restore` to go on exactly from here."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a result of :meth:`state`."""
        return

    def facts(self) -> dict[str, float]:
        """Figures about the search as it stands, for logs and the report."""
        return {}

    def history(self) -> list[dict[str, float]]:
        """Figures noted while the search ran, oldest first."""
        return []


class Method(ABC):
    """A config that can start a search."""

    uses_gates: ClassVar[bool] = False
    """Whether training must run with gates, whose gradients are passed to the search."""
    uses_held_out: ClassVar[bool] = False
    """Whether the search learns in turn with the weights, on batches that are not trained on."""
    uses_calibration: ClassVar[bool] = False
    """Whether the search learns from statistics of calibration batches, without training."""

    @property
    def needs_training(self) -> bool:
        """Whether the search must watch a training; if not, a plan can be made at any time."""
        return self.uses_gates or self.uses_held_out

    @abstractmethod
    def start(self, problem: Problem) -> Search:
        """A fresh search for this problem."""


class OneShot(OneShotOptions, Method):
    """The base class of the baselines, which score every unit once and keep the best.

    ``scope="global"`` ranks all units of the model together, after bringing the scores of each kind
    of structure to zero mean and unit variance (not from a paper; modelled on UPop, section 3.2);
    ``scope="uniform"`` removes the same share of every structure. ``round_to=8`` keeps multiples of
    8 units.
    """

    def best(self, problem: Problem, scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """The units with the highest scores that fit the budget."""
        comparable = (
            {name: _ranks(values) for name, values in scores.items()}
            if self.scope == "uniform"
            else standardised(problem.structures, scores)
        )
        plain = {name: values.tolist() for name, values in comparable.items()}
        return select(plain, problem.prices, problem.budget, self.round_to, groups=problem.groups)


def family(structure: Structure) -> str:
    """``"ffn"``, ``"experts"`` or ``"attention"``: a family's scores are standardised together."""
    return structure.kind if structure.kind in ("ffn", "experts") else "attention"


def standardised(
    structures: tuple[Structure, ...], scores: Mapping[str, Tensor], correction: int = 0
) -> dict[str, Tensor]:
    """Scores with zero mean and unit variance over all units of a kind, all towers together.

    The variance of n units is a sum over n - ``correction``. Source: UPop, section 3.2: one mean
    and spread for attention, one for FFN. Whole experts, and single dimensions of heads beside
    pairs, which weigh half as much, have their own (not from the paper).
    """
    kinds: dict[str, list[str]] = {}
    for structure in structures:
        kind = structure.kind if structure.kind == "attention_unturned" else family(structure)
        kinds.setdefault(kind, []).append(structure.name)
    result = {}
    for names in kinds.values():
        together = torch.cat([scores[name].double() for name in names])
        mean = together.mean()
        spread = together.std(correction=correction if len(together) > 1 else 0)
        for name in names:
            centred = scores[name].double() - mean
            result[name] = centred / spread if spread > 0 else centred
    return {structure.name: result[structure.name] for structure in structures}


def _ranks(values: Tensor) -> Tensor:
    """Each unit's rank in its structure, from 0 (lowest) towards 1."""
    order = torch.argsort(values, stable=True)
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[order] = torch.arange(len(values), dtype=torch.float64) / len(values)
    return ranks
