"""One compression as an object: describe, watch the training, plan, cut, report."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..architectures import discover
from ..cutting.gates import evaluating
from ..cutting.proof import Verification
from ..cutting.rewrite import perform
from ..cutting.settle import check_plain, settle
from ..cutting.sharing.rules import (
    settled,
    shareable,
    similarity,
    with_followers,
)
from ..cutting.sharing.ties import is_shared
from ..cutting.wrappers import unwrapped
from ..device import device_of, moved_to
from ..errors import BudgetError, UnsupportedError, VlpruneError
from ..methods import Alternating, Method, Problem, Search
from ..prices import cost
from ..prices.budget import parse_budget
from ..prices.clock import conditions, seconds_of, take_turns
from ..prices.latency import latency_prices
from ..prices.prices import Prices
from ..prices.select import select
from ..structures.plan import Plan
from ..structures.record import read_record
from ..structures.structure import AttentionUnit, Structure
from ..structures.units import named_weights, unit_squares
from .callback import CompressorCallback, callback_for
from .gating import Gating
from .optimizers import exchange, replaced
from .ranks import check_same_plan, mean_gradients
from .summary import summary
from .turns import Turns

__all__ = ["Compressor", "CompressorCallback"]

ROUNDS = 9
"""Forward passes of which the median is the reached latency."""
PATIENCE = 0.1
"""The fraction of a search after which structures that no gradient has reached are spoken of."""
LAST_CALL = 0.5
"""The fraction after which a search is ended that cannot meet its budget without them."""


class Compressor:
    """A compression of ``model`` by ``method`` to ``budget``.

    ``budget`` is the fraction of the whole model that stays: ``{"params": 0.5}``,
    ``{"macs": 0.5}`` or ``{"latency": 0.5}``; the latter two need ``example_inputs`` (keywords of
    one forward pass), because they depend on the input. A latency is measured where the model
    lies, with these inputs and torch's present number of threads: choose them as in production.
    ``skip`` leaves structures dense whose names match one of these patterns, as in
    ``("text_model.*",)``. With ``uniform`` all layers of a tower keep equally many units of a
    kind, so that an ordinary config may be able to say it (:func:`vlprune.ordinary`). ``prices``
    is a table of seconds that :func:`vlprune.latency_prices` has measured before.

    Its life: constructing it describes and prices the model, refuses what cannot be done, and
    leaves no trace in the model. Gates are put in place by ``with compressor:``, by
    :meth:`callback` for a Trainer, or by the first :meth:`step` of a loop of your own; they stay
    until :meth:`finish` cuts, :meth:`detach` is called, the ``with`` block ends, or the Compressor
    is deleted. Copies and pickles of the model that are made meanwhile have no gates.

    A method that learns in turn with the weights (``JSP``) needs ``held_out``: a list or any other
    sequence of batches (keywords of one forward pass) that are not trained on. ``loss`` turns
    one into its loss; by default it is what the model's own forward returns as ``loss``.

    Raises BudgetError for a budget that cannot be reached, UnsupportedError for a model with
    nothing to prune, with another quantizer, with adapters, or inside a wrapper that would not
    survive the cut (``torch.compile`` does).
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        budget: Mapping[str, float],
        *,
        attention: AttentionUnit = "head_dim",
        example_inputs: Mapping[str, Any] | None = None,
        skip: Sequence[str] = (),
        uniform: bool = False,
        held_out: Sequence[Mapping[str, Any]] = (),
        loss: Callable[[Mapping[str, Any]], Tensor] | None = None,
        prices: Prices | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise UnsupportedError(
                f"method must be one such as vlprune.Magnitude(), not {method!r}"
            )
        self.budget = parse_budget(budget)
        self.given, self.model, self.method = model, unwrapped(model), method
        model = self.model
        record = read_record(model)  # a sentence now rather than after hours of training
        self.description = discover(model, attention)
        if not self.description.structures:
            raise UnsupportedError(
                f"{type(model).__name__} has no attention or FFN that the layout table knows: "
                "see vlprune.discover(model).dense for the reasons"
            )
        check_plain(model, self.description.structures)
        if record is not None:
            record.check(self.description.structures)
        self.example_inputs = dict(example_inputs) if example_inputs else None
        self.structures = _without(self.description.structures, skip)
        self._uniform = uniform
        self._price(prices)
        self.search = self._new_search()
        self._refuse_unreachable()
        self._shared = is_shared(model)
        if self.search.alternates and self._shared:
            raise UnsupportedError(
                "this model shares weights already: call vlprune.materialize on it before it is "
                f"searched by {type(method).__name__} again"
            )
        self.turns = (
            Turns(model, self.structures, self.search, held_out, loss)
            if isinstance(self.search, Alternating)
            else None
        )
        self.progress = 0.0
        self.finished = False
        self.verification: Verification | None = None
        self.seconds: float | None = None
        self.params_after = 0
        self._plan: Plan | None = None
        self._unreached = self._not_yet_reached()
        self._told = False
        self._gating = Gating(model, self.structures, self.search.uses_gates)
        self._gating.set(self.search.gates(0.0))
        self._callback: weakref.ref[CompressorCallback] | None = None
        self._optimizer: Any = None
        weakref.finalize(self, self._gating.detach).atexit = False

    def _price(self, prices: Prices | None) -> None:
        """What units cost, in the budget's currency and in parameters. Raises BudgetError."""
        model, structures, inputs = self.model, self.structures, self.example_inputs
        what = self.budget.what
        self.params_before = int(cost.params(model, structures))
        self.param_prices = cost.param_prices(model, structures)
        if what != "params" and inputs is None:
            reason = {
                "macs": "MACs depend on the size of the input",
                "latency": "time depends on the input's size",
            }[what]
            raise BudgetError(f"a budget in {what} needs example_inputs: {reason}")
        self.macs = cost.measure_macs(model, structures, inputs) if inputs else None
        self.prices, self.conditions = self.param_prices, dict[str, Any]()
        if what == "macs" and self.macs is not None:
            self.prices = self.macs.prices
        elif what == "latency" and inputs is not None:
            self.conditions = conditions(model, inputs)
            self.prices = prices or latency_prices(
                model, structures, inputs, self.description.attention
            )

    def _new_search(self) -> Search:
        model, structures = self.model, self.structures
        shapes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
        return self.method.start(
            Problem(
                structures,
                self.prices,
                self.budget.fraction,
                squares=lambda: unit_squares(model, structures),
                shareable=lambda target, source: shareable(target, source, shapes),
                similarity=lambda target, source: similarity(model, target, source),
                groups=self._groups(),
            )
        )

    def _refuse_unreachable(self) -> None:
        """Raise BudgetError if no plan meets the budget, whatever the scores."""
        if getattr(self.method, "cost", "exact") == "exact":  # else the method has its own prices
            select(
                {structure.name: [0.0] * structure.size for structure in self.structures},
                self.prices,
                self.budget.fraction,
                getattr(self.method, "round_to", 1),
                groups=self._groups(),
            )

    def _groups(self) -> dict[str, str]:
        """The structures that must keep equally many units, {structure: group}."""
        if not self._uniform:
            return {}
        return {s.name: f"{s.tower}/{s.kind}/{s.size}" for s in self.structures}

    # -- while training ------------------------------------------------------------------

    def __enter__(self) -> Compressor:
        self.attach()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the gates in place. Raises UnsupportedError if another Compressor has done so."""
        if not self.finished:
            check_plain(self.model, self.structures)
            self._gating.attach()

    def detach(self) -> None:
        """Take gates and hooks away again; what the search has learnt stays."""
        self._gating.detach()

    def begin(self, steps: int) -> None:
        """Get ready for a search of so many steps; :meth:`callback` does this.

        Raises RecipeError if they are too few for the method, UnsupportedError if somebody has
        replaced weights (an adapter, say) since the Compressor was made.
        """
        self.attach()
        if isinstance(self.search, Alternating):
            self.search.expect(steps)
        self._gating.follow()  # an objective may never call the model's own forward

    def end(self) -> None:
        """What is removed for good is emptied; gates stay in place until :meth:`finish`.

        So the model can be evaluated and saved between the search and the cut.
        """
        if self.finished:
            self.detach()
        elif self.progress >= 1 and self._gating.attached:
            self._gating.empty_removed_units()

    def retrain(self) -> None:
        """Let a Trainer load checkpoints of the small model, until :meth:`end` or ``detach``."""
        if self.finished:
            self._gating.translate_names()

    def restart(self) -> None:
        """Forget what the search has seen, and open all gates."""
        self.search = self._new_search()
        if self.turns is not None and isinstance(self.search, Alternating):
            self.turns.search, self.turns.seen, self.turns.reached = self.search, 0, set()
        self.progress, self._told, self._unreached = 0.0, False, self._not_yet_reached()
        self._gating.set({s.name: torch.ones(s.size) for s in self._gating.structures})
        self._gating.set(self.search.gates(0.0))

    def train_in(self, dtype: torch.dtype | None) -> None:
        """The dtype that training computes in, for looks at held-out batches; None: the model's."""
        if self.turns is not None:
            self.turns.autocast = dtype

    def step(self, progress: float, scale: float = 1.0, weight_scale: float | None = None) -> None:
        """Tell the search that one backward pass is done; call before ``optimizer.step()``.

        ``progress`` runs from 0 to 1 over the search. ``scale`` is what the loss was multiplied
        with before the backward pass: ``scaler.get_scale()`` where a GradScaler is in use, and
        ``weight_scale`` is that factor where the weights' gradients still carry it, 1 after
        ``scaler.unscale_(optimizer)`` (default: ``scale``).

        If nothing has put the gates in place yet, the first call does, and learns nothing from
        the pass before it.
        """
        if abs(progress - 1) < 1e-6:
            progress = 1.0  # a sum of fractions may end a little beside it
        if not 0 <= progress <= 1:
            raise VlpruneError(f"progress runs from 0 to 1, not {progress!r}")
        if self.finished:
            raise VlpruneError("the model has been cut: train the small model without step()")
        if not self._gating.attached:
            self.attach()
            if self.search.uses_gates:
                if progress >= 1:
                    raise VlpruneError(
                        "no gate was in place before the last step: put the training loop into a "
                        "'with compressor:' block"
                    )
                return
        if self.progress == 0:  # an adapter may have come since the gates were put in place
            check_plain(self.model, self.structures)
        if self.search.uses_gates:
            self._learn(progress, scale)
        self.progress = progress
        gates = self.search.gates(progress)
        self._gating.set(with_followers(self.model, gates) if self._shared else gates)
        if self.turns is not None:
            self.turns.take(progress, scale if weight_scale is None else weight_scale)
            self._reached(self.turns.reached, progress)

    def _learn(self, progress: float, scale: float) -> None:
        """Hand the gates' gradients to the search."""
        own = self._gating.take_gradients()
        gradients = mean_gradients(
            self.structures,
            {n: g / scale if scale != 1 else g for n, g in own.items()},
            device_of(self.model),
        )
        if not gradients:
            check_plain(self.model, self.structures)
            raise VlpruneError(
                "no gate has a gradient: call compressor.step after loss.backward(), with the "
                "model that the compressor was made for"
            )
        # exact zeros reach nothing: a loss that does not depend on a unit says nothing about it
        effective = {n for n in self._unreached & gradients.keys() if bool(gradients[n].any())}
        self._reached(effective, progress)
        self.search.after_backward(progress, gradients)

    def _not_yet_reached(self) -> set[str]:
        return set(self.search.decides_on) if self.search.needs_training else set()

    def _reached(self, names: set[str], progress: float) -> None:
        """Note which structures the loss depends on; the search leaves the others whole."""
        self._unreached -= names
        if self.search.whole != (whole := self._must_stay_whole()):
            self.search.leave_whole(whole)
        watched = self.search.uses_gates  # at every step, not on a few held-out batches
        if watched and self._unreached and progress >= PATIENCE:
            self._tell_unreached(progress)

    def _must_stay_whole(self) -> frozenset[str]:
        """What no gradient has reached, and what must keep as many units as that."""
        groups = self._groups()
        bound = {groups[name] for name in self._unreached if name in groups}
        return frozenset(self._unreached | {n for n, group in groups.items() if group in bound})

    def _tell_unreached(self, progress: float) -> None:
        """Warn once; raise if the search has waited for long and what is left cannot suffice."""
        if self._told and progress < LAST_CALL:
            return
        names = [s.name for s in self.structures if s.name in self._unreached]
        more = f"{len(names) - 1} more structure{'s' if names[2:] else ''}"
        which = names[0] + (f" and {more}" if names[1:] else "")
        told = f"the loss reaches no gate of {which}: no gradient in the first {progress:.0%}"
        if self._unreached == self.search.decides_on:
            raise VlpruneError(f"{told} of the search; train with a loss that depends on the model")
        patterns = _patterns_of(names, [s.name for s in self.description.structures])
        listed = ", ".join(f'"{pattern}"' for pattern in patterns)
        if progress >= LAST_CALL and self.search.least_left() > self.budget.fraction:
            raise VlpruneError(
                f"{told} of the search, and without them the budget cannot be reached: train with "
                "a loss that depends on them, or ask for a larger budget and leave them dense with "
                f"skip=({listed},)"
            )
        if not self._told:
            self._told = True
            warnings.warn(
                f"{told} of the search; they stay dense unless a later batch reaches them "
                f"(skip=({listed},) says so from the start)",
                stacklevel=4,
            )

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold for :meth:`restore` to go on exactly from here."""
        reached = [s.name not in self._unreached for s in self.structures]
        gates = self._gating.gates
        return {
            **{f"search/{name}": value for name, value in self.search.state().items()},
            **{f"gate/{name}": gate.detach().cpu() for name, gate in gates.items()},
            "reached": torch.tensor(reached),
            "progress": torch.tensor(self.progress, dtype=torch.float64),
            "held_out_seen": torch.tensor(self.turns.seen if self.turns is not None else 0),
            **{
                f"seconds/{name}": torch.tensor(curve, dtype=torch.float64)
                for name, curve in {"": (self.prices.fixed,), **self.prices.curve}.items()
                if self.prices.curve
            },
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned; puts the gates in place.

        Raises VlpruneError if it is another model's.
        """
        gates = {n.removeprefix("gate/"): t for n, t in state.items() if n.startswith("gate/")}
        if gates.keys() != self._gating.gates.keys() or any(
            gates[name].shape != gate.shape for name, gate in self._gating.gates.items()
        ):
            raise VlpruneError(
                "this checkpoint's search belongs to another model or attention unit"
            )
        reached = state["reached"].tolist()
        self._unreached = {s.name for s, r in zip(self.structures, reached, strict=True) if not r}
        self.search.leave_whole(self._must_stay_whole())
        self.search.restore(
            {n.removeprefix("search/"): t for n, t in state.items() if n.startswith("search/")}
        )
        self._gating.set(gates)
        curve = {
            name.removeprefix("seconds/"): tuple(values.tolist())
            for name, values in state.items()
            if name.startswith("seconds/")
        }
        if curve:  # measured before the interruption; measured again it would not be the same
            (fixed,) = curve.pop("")
            unit = {name: values[-1] / (len(values) - 1) for name, values in curve.items()}
            self.prices = replace(self.prices, fixed=fixed, curve=curve, unit=unit)
            self.search.reprice(self.prices)
        self.progress = float(state.get("progress", torch.tensor(0.0)))
        if self.turns is not None:
            self.turns.seen = int(state["held_out_seen"])
            self.turns.reached = set(self.search.decides_on) - self._unreached
        self.attach()

    def callback(self) -> TrainerCallback:
        """The same as :meth:`step`, for the Hugging Face Trainer; puts the gates in place."""
        callback = self._callback() if self._callback is not None else None
        if callback is None:
            callback = callback_for(self)
            self._callback = weakref.ref(callback)
        self.attach()
        return callback

    def watch(self, trainer: Any) -> TrainerCallback:
        """As ``callbacks=[compressor.callback()]``, and the search's figures reach its loggers.

        The Trainer calls loggers before callbacks it is given, so this one is put in front:
        TensorBoard, Weights & Biases or MLflow (``report_to``) show ``search/remains`` and more.
        """
        callback = self.callback()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def remember_optimizer(self, optimizer: Any) -> None:
        """The optimizer that trains the model now, so that it can go on after the cut."""
        if optimizer is not None:
            self._optimizer = optimizer

    def figures(self) -> dict[str, float]:
        """Figures of the search as it stands, for a log.

        ``remains`` is the fraction of the budget's currency that is left, gates between 0 and 1
        counting in proportion; the others are the search's own.
        """
        figures = {name: float(value) for name, value in self.search.facts().items()}
        if self._gating.gates and "remains" not in figures:
            left = {name: float(gate.detach().sum()) for name, gate in self._gating.gates.items()}
            unit = self.prices.unit
            gone = sum(unit[s.name] * (s.size - left[s.name]) for s in self.structures)
            figures["remains"] = 1 - gone / self.prices.total
        return figures

    # -- the end -------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan as the search sees it now. Raises VlpruneError if it has seen nothing."""
        if self._plan is not None:
            return self._plan
        check_plain(self.model, self.structures)
        learnt = self.turns is None or bool(self.search.facts().get("structure_steps"))
        if self.progress > 0 and learnt and self._unreached == self.search.decides_on:
            raise VlpruneError(
                "every gradient that the search has seen was zero, so it knows nothing: train with "
                "a loss that depends on the model"
            )
        plan = Plan(
            keep=self.search.keep(),
            share=self.search.share(),
            attention=self.description.attention,
            fingerprint=self.description.fingerprint,
        )
        return settled(self.model, self.description.structures, plan)

    def finish(self, verify: bool = True) -> Any:
        """The model that was given, really smaller: the same object.

        With ``verify`` the masked and the cut model are compared on ``example_inputs``, or on
        the first batch seen in training; :meth:`report` says how far apart they were, or that
        there was nothing to compare on. Whatever goes wrong, the model stays as it was. A
        Trainer's optimizer goes on with the new parameters; in a loop of your own, make a new
        optimizer. Raises VerificationError if masked and cut model differ.
        """
        if self.finished:
            return self.given
        plan = self.plan()
        check_same_plan(plan)
        if any(hasattr(parameter, "to_local") for parameter in self.model.parameters()):
            raise UnsupportedError(
                "the weights are sharded (FSDP), which cannot be cut: save compressor.plan(), "
                "gather the full weights into an unsharded model of the same class, and cut that "
                "with vlprune.rewrite(model, vlprune.discover(model), plan)"
            )
        if self.search.needs_training and self.progress < 1:
            warnings.warn(self._unfinished(), stacklevel=2)
        after = int(cost.params(self.model, self.description.structures, plan))
        inputs = self.example_inputs or self._gating.first_batch
        before, attached = dict(self.model.named_parameters()), self._gating.attached
        self.detach()
        try:
            cut = settle(self.model, self.description, plan)
            self.verification = perform(self.model, cut, inputs if verify else None)
        except BaseException:
            if attached:
                self.attach()
            raise
        if self._optimizer is not None:
            exchange(self._optimizer, replaced(before, self.model))
        self._plan, self.finished, self.params_after = plan, True, after
        self._gating.first_batch = None
        if self.budget.what == "latency":
            self.seconds = self._measured_seconds()
        return self.given

    def _unfinished(self) -> str:
        fading = f", and removed units still count {self._fading():.0%}" if self._fading() else ""
        return (
            f"the search ended at {self.progress:.0%} of its steps{fading}: the cut is made all "
            "the same, but the model has not learnt to do without what goes, so expect a loss of "
            "accuracy"
        )

    def _fading(self) -> float:
        """The gate of units that are on their way out; 0 where there are none."""
        gate = float(self.search.facts().get("gate_of_fading_units", 1.0))
        return gate if gate < 1 else 0.0

    def _measured_seconds(self) -> float:
        """Median seconds of a forward pass of the model as it is now, on the example inputs."""
        inputs = moved_to(self.model, self.example_inputs or {})
        with evaluating(self.model):
            timer = partial(seconds_of, self.model, inputs)
            return median(take_turns({"small": timer}, ROUNDS, warm_up=2)["small"])

    def notes(self) -> list[str]:
        """What a reader of the report must know: sentences."""
        notes = []
        if self.search.needs_training and self.progress < 1 and self.finished:
            notes.append(self._unfinished())
        if self._unreached and self.search.needs_training and self.progress > 0:
            names = [s.name for s in self.structures if s.name in self._unreached]
            notes.append(
                f"no gradient of the loss reached {len(names)} of {len(self.structures)} "
                f"structures, which stay dense: {', '.join(names)}"
            )
        return notes

    def report(self) -> dict[str, Any]:
        """What was asked and reached, by tower and kind: plain values, ready for JSON."""
        return summary(self)


def _without(structures: Sequence[Structure], skip: Sequence[str]) -> tuple[Structure, ...]:
    """The structures whose names match none of the patterns. Raises UnsupportedError."""
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


def _patterns_of(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """Patterns for ``skip`` that match these names and no others of ``every``, as few as simple."""
    others = set(every) - set(names)
    patterns: list[str] = []
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        parts = name.split(".")
        tried = [".".join(parts[:count]) + ".*" for count in range(1, len(parts))]
        fitting = (p for p in tried if not any(fnmatchcase(other, p) for other in others))
        patterns.append(next(fitting, name))
    return patterns
