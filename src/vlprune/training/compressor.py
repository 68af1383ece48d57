"""One compression as an object: describe, watch the training, plan, cut, report."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..calibration.session import Calibration, Session
from ..cutting.fsdp import is_sharded, refuse_other_shards, reshard
from ..cutting.proof import Verification
from ..cutting.rewrite import HOW_TO_SHARE, NO_SHARING, perform
from ..cutting.settle import check_plain, settle
from ..cutting.sharing.rules import settled, with_followers
from ..cutting.sharing.ties import is_shared
from ..cutting.wrappers import unwrapped
from ..cutting.zero import optimizer_of
from ..device import device_of
from ..errors import UnsupportedError, VlpruneError
from ..methods import Method, Search
from ..prices import cost
from ..prices.budget import parse_budget
from ..prices.prices import Prices
from ..structures.plan import Plan
from ..structures.structure import AttentionUnit, ExpertUnit
from .calibrated import calibrated_by
from .callback import CompressorCallback, callback_for
from .ending import measured_seconds, unfinished, untested
from .gating import Gating
from .optimizers import exchange, replaced
from .pricing import costs_of, described, problem_of, refuse_unreachable, widths, without
from .ranks import check_same_plan, mean_gradients
from .reach import Reach
from .state import SearchState, priced_again, seconds_of_prices
from .summary import figures, summary
from .turns import refuse_split, turns_of

__all__ = ["Compressor", "CompressorCallback"]


class Compressor:
    """A compression of ``model`` by ``method`` to ``budget``.

    ``budget`` is the fraction of the whole model that stays: ``{"params": 0.5}``, ``{"macs": 0.5}``
    or ``{"latency": 0.5}``; the latter two need ``example_inputs`` (keywords of one forward pass),
    because they depend on the input. A latency is measured on the model's device, with these inputs
    and torch's present number of threads: choose them as in production. Structures whose names
    match a pattern in ``skip`` stay dense, as in ``("text_model.*",)``. With ``uniform`` all layers
    of a tower keep equally many units of a kind, so that an ordinary config may be able to describe
    the result (:func:`vlprune.ordinary`). ``attention`` and ``experts`` are the units, as in
    :func:`vlprune.discover`. ``prices`` is a table of seconds that
    :func:`vlprune.latency_prices` measured earlier.

    Its life::

        Compressor(model, ...)  describes and prices; refuses what cannot be done; leaves no trace
        with compressor:        gates are put in place: here, by callback() for a Trainer, or by
            step(progress)      the first step() of a loop of your own; the search learns
        plan()                  the plan of a cut that were made now
        finish()                takes the gates away and cuts; the same object, really smaller
        report()                the figures asked for and reached

    Gates stay until :meth:`finish` cuts, :meth:`detach` is called, the ``with`` block ends, or the
    Compressor is deleted. Copies and pickles of the model that are made meanwhile have no gates.

    A method that learns in turn with the weights (``JSP``) needs ``held_out``: a list or any other
    sequence of batches (keywords of one forward pass) that are not trained on. ``loss`` turns a
    batch into its loss; the default is the ``loss`` that the model's own forward returns.

    ``calibration`` is batches like those that the model is used with, without labels (a list, a
    DataLoader, or a :class:`vlprune.Calibration` with more choices). A method that needs no
    training but statistics (``OBS``) learns from them, and :meth:`finish` repairs the plan of any
    method with them before it cuts (:func:`vlprune.fold`).

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
        experts: ExpertUnit = "neuron",
        example_inputs: Mapping[str, Any] | None = None,
        skip: Sequence[str] = (),
        uniform: bool = False,
        held_out: Sequence[Mapping[str, Any]] = (),
        loss: Callable[[Mapping[str, Any]], Tensor] | None = None,
        prices: Prices | None = None,
        calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    ) -> None:
        if not isinstance(method, Method):
            raise UnsupportedError(
                f"method must be one such as vlprune.Magnitude(), not {method!r}"
            )
        self.budget = parse_budget(budget)
        self.given, self.model, self.method = model, unwrapped(model), method
        model = self.model
        refuse_split(model, method)
        self.description = described(model, attention, experts)
        self.example_inputs = dict(example_inputs) if example_inputs else None
        self.structures = without(self.description.structures, skip)
        self._groups = widths(self.structures) if uniform else {}
        self.costs = costs_of(
            model, self.structures, self.budget, self.example_inputs, attention, prices
        )
        self.params_before = self.costs.params
        self.search = self._new_search()
        refuse_unreachable(method, self.structures, self.prices, self.budget.fraction, self._groups)
        self._shared = is_shared(model)
        self.calibrated = calibrated_by(calibration, method, model, self.structures)
        self.turns = turns_of(method, self.search, model, self.structures, held_out, loss)
        self.progress, self.finished = 0.0, False
        self.verification: Verification | None = None
        self.seconds: float | None = None
        self.params_after = 0
        self._plan: Plan | None = None
        self._reach = Reach(self.method, self.search, self.description.structures)
        self._gating = Gating(model, self.structures, self.method.uses_gates)
        self._gating.set(self.search.gates(0.0))
        self._callback: weakref.ref[CompressorCallback] | None = None
        self._optimizer: Any = None
        weakref.finalize(self, self._gating.detach).atexit = False

    @property
    def prices(self) -> Prices:
        """The costs of units, in the currency of the budget."""
        return self.costs.prices

    @property
    def session(self) -> Session | None:
        """The calibration at work, if there is one."""
        return self.calibrated.session if self.calibrated is not None else None

    @property
    def gates(self) -> Mapping[str, Tensor]:
        """The gates as they stand, {structure: (size,)}; empty where the method uses no gates."""
        return self._gating.gates

    def _new_search(self) -> Search:
        return self.method.start(
            problem_of(self.model, self.structures, self.prices, self.budget.fraction, self._groups)
        )

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
            refuse_other_shards(self.model)
            refuse_split(self.model, self.method)
            if self.turns is not None and is_sharded(self.model) and self.progress == 0:
                warnings.warn(
                    f"{NO_SHARING}: the search itself runs, and finish() works where its plan "
                    f"only removes units; otherwise, after the search, {HOW_TO_SHARE}",
                    stacklevel=3,
                )
            self._gating.attach()

    def detach(self) -> None:
        """Remove gates and hooks; the search keeps what it has learnt."""
        self._gating.detach()
        if self.turns is not None:
            self.turns.let_go()

    def begin(self, steps: int) -> None:
        """Get ready for a search of ``steps`` steps; :meth:`callback` does this.

        Raises RecipeError if the steps are too few for the method, UnsupportedError if weights have
        been replaced (by an adapter, say) since the Compressor was made.
        """
        self.attach()
        self.search.expect(steps)
        self._gating.follow()  # an objective may never call the model's own forward

    def end(self) -> None:
        """Zero the weights of units whose removal is final; gates stay until :meth:`finish`.

        The model can then be evaluated and saved between the search and the cut.
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
        """Start the search anew, and open all gates."""
        self.search = self._new_search()
        if self.calibrated is not None:
            self.calibrated.learnt = False
        if self.turns is not None:
            self.turns.restart(self.search)
        self.progress, self._reach = (
            0.0,
            Reach(self.method, self.search, self.description.structures),
        )
        self._gating.set({s.name: torch.ones(s.size) for s in self._gating.structures})
        self._gating.set(self.search.gates(0.0))

    def train_in(self, dtype: torch.dtype | None) -> None:
        """Set the dtype that training, and so held-out batches, compute in; None: the model's."""
        if self.turns is not None:
            self.turns.autocast = dtype

    def step(self, progress: float, scale: float = 1.0, weight_scale: float | None = None) -> None:
        """Tell the search that one backward pass is done; call before ``optimizer.step()``.

        ``progress`` runs from 0 to 1 over the search. ``scale`` is the factor that the loss was
        multiplied by before the backward pass: ``scaler.get_scale()`` where a GradScaler is in use,
        and ``weight_scale`` is that factor where the weights' gradients still carry it, 1 after
        ``scaler.unscale_(optimizer)`` (default: ``scale``).

        If nothing has put the gates in place yet, the first call does, and learns nothing from the
        pass before it. Raises VlpruneError if ``progress`` is outside [0, 1], if the model has been
        cut, or if no gate has a gradient.
        """
        if abs(progress - 1) < 1e-6:
            progress = 1.0  # a sum of fractions may end slightly off 1
        if not 0 <= progress <= 1:
            raise VlpruneError(f"progress runs from 0 to 1, not {progress!r}")
        if self.finished:
            raise VlpruneError("the model has been cut: train the small model without step()")
        if not self._gating.attached:
            self.attach()
            if self.method.uses_gates:
                if progress >= 1:
                    raise VlpruneError(
                        "no gate was in place before the last step: put the training loop into a "
                        "'with compressor:' block"
                    )
                return
        if self.progress == 0:  # an adapter may have been added since the gates were put in place
            check_plain(self.model, self.structures)
        if self.method.uses_gates:
            self._learn(progress, scale)
        self.progress = progress
        gates = self.search.gates(progress)
        self._gating.set(with_followers(self.model, gates) if self._shared else gates)
        if self.turns is not None:
            self.turns.take(progress, scale if weight_scale is None else weight_scale)
            self._reach.note(self.turns.reached, progress)

    def _learn(self, progress: float, scale: float) -> None:
        """Hand the gates' gradients to the search."""
        own = self._gating.take_gradients(scale)
        gradients = mean_gradients(self.structures, own, device_of(self.model))
        if not gradients:
            check_plain(self.model, self.structures)
            raise VlpruneError(
                "no gate has a gradient: call compressor.step after loss.backward(), with the "
                "model that the compressor was made for"
            )
        waiting = sorted(self._reach.unreached & gradients.keys())
        seen = torch.stack([gradients[n].any() for n in waiting]).tolist() if waiting else []
        self._reach.note({name for name, any_ in zip(waiting, seen, strict=True) if any_}, progress)
        self.search.after_backward(progress, gradients)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold for :meth:`restore` to go on exactly from here."""
        return SearchState(
            search=self.search.state(),
            gates=self._gating.gates,
            reached=self._reach.state(),
            progress=self.progress,
            held_out_seen=self.turns.seen if self.turns is not None else 0,
            seconds=seconds_of_prices(self.prices),
        ).tensors()

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a result of :meth:`state`; puts the gates in place.

        Raises VlpruneError if the state belongs to another model or attention unit.
        """
        saved = SearchState.of(state)
        sizes = {name: gate.shape for name, gate in self._gating.gates.items()}
        if {name: gate.shape for name, gate in saved.gates.items()} != sizes:
            raise VlpruneError(
                "this checkpoint's search belongs to another model or attention unit"
            )
        self._reach.restore(saved.reached)
        self.search.restore(saved.search)
        self._gating.set(saved.gates)
        if saved.seconds:
            self.costs = replace(self.costs, prices=priced_again(self.prices, saved.seconds))
            self.search.reprice(self.prices)
        self.progress = saved.progress
        if self.turns is not None:
            self.turns.seen = saved.held_out_seen
            self.turns.reached = set(self.search.decides_on) - self._reach.unreached
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
        """Add :meth:`callback` to a Trainer so that the search's figures reach its loggers.

        The Trainer calls its loggers before the callbacks it is given, so this one is put in front:
        TensorBoard, Weights & Biases or MLflow (``report_to``) show ``search/remains`` and more.
        """
        callback = self.callback()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def remember_optimizer(self, optimizer: Any) -> None:
        """Note the optimizer that trains the model, so that it can go on after the cut.

        That of a DeepSpeed engine cannot.
        """
        if optimizer is not None and optimizer_of(self.model) is None:
            self._optimizer = optimizer

    def figures(self) -> dict[str, float]:
        """Figures of the search as it stands, for a log.

        ``remains`` is the fraction of the budget's currency that is left, gates between 0 and 1
        counting in proportion; the others are the search's own.
        """
        return figures(self)

    # -- the end -------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan as the search sees it now. Raises VlpruneError if the search knows nothing.

        A method that learns from calibration batches does so now, and may rotate heads; the model
        goes on computing what it did.
        """
        plan = self._planned()
        if self.calibrated is not None:
            self.calibrated.keep()
        return plan

    def _planned(self) -> Plan:
        if self._plan is not None:
            return self._plan
        check_plain(self.model, self.structures)
        if self.calibrated is not None:
            self.calibrated.learn(self.search)
        learnt = self.turns is None or bool(self.search.facts().get("structure_steps"))
        if self.progress > 0 and learnt and self._reach.nothing:
            raise VlpruneError(
                "every gradient that the search has seen was zero, so it knows nothing: train with "
                "a loss that depends on the model"
            )
        plan = Plan(
            keep=self.search.keep(),
            share=self.search.share(),
            attention=self.description.attention,
            fingerprint=self.description.fingerprint,
            experts=self.description.experts,
        )
        return settled(self.model, self.description.structures, plan)

    def repaired(self) -> Plan:
        """The plan, folded into the weights as :meth:`finish` does, for a cut that others make."""
        plan = self._planned()
        self.detach()
        if self.calibrated is not None:
            self.calibrated.repair(plan, self._gating)
            self.calibrated.keep()
        self._plan = plan
        return plan

    def finish(self, verify: bool = True) -> Any:
        """Cut the given model in place, and return the same object.

        With calibration batches the plan is first folded into the weights, unless the method says
        otherwise.

        With ``verify`` the masked and the cut model are compared on ``example_inputs``, or on the
        first batch seen in training; :meth:`report` says how far apart they were, or that there was
        nothing to compare on. If an error is raised, the model stays as it was. A Trainer's
        optimizer goes on with the new parameters; in a loop of your own, make a new optimizer.
        Raises VerificationError if masked and cut model differ, VlpruneError if processes disagree
        on the plan.

        Where FSDP2 or DeepSpeed ZeRO-3 has spread the weights over processes, all of them must
        call this. Weights are gathered and cut one at a time, and the small model stays spread:
        with FSDP2 ready to train on, with DeepSpeed ready for a new engine.
        """
        if self.finished:
            return self.given
        reshard(self.model)
        inputs: Mapping[str, Any] | None = self.example_inputs or self._gating.first_batch
        before = dict(self.model.named_parameters()) if self._optimizer is not None else {}
        attached = self._gating.attached
        try:
            plan = self._planned()
            check_same_plan(plan)
            if early := unfinished(self.method, self.search, self.progress):
                warnings.warn(early, stacklevel=2)
            after = int(cost.params(self.model, self.description.structures, plan))
            self.detach()
            cut = settle(self.model, self.description, plan)
            if self.calibrated is not None:
                self.calibrated.repair(plan, self._gating)
                inputs = inputs or self.calibrated.session.batches.given[0]
            self.verification = perform(self.model, cut, inputs if verify else None)
        except BaseException:
            if self.calibrated is not None and self.calibrated.put_back():
                self.search = self._new_search()
            if attached:
                self.attach()
            raise
        if self.calibrated is not None:
            self.calibrated.keep()
        if self._optimizer is not None:
            exchange(self._optimizer, replaced(before, self.model))
        self._plan, self.finished, self.params_after = plan, True, after
        self._gating.first_batch = None
        if self.budget.what == "latency":
            self.seconds = measured_seconds(self.model, self.example_inputs or {})
        return self.given

    def notes(self) -> list[str]:
        """Caveats that a reader of the report must know, one sentence each."""
        early = unfinished(self.method, self.search, self.progress) if self.finished else ""
        reached = self._reach.missing if self.progress > 0 else ""
        calibrated = self.calibrated.session.notes() if self.calibrated is not None else []
        unproved = untested(self.verification)
        return [note for note in (early, reached, unproved, *calibrated) if note]

    def report(self) -> dict[str, Any]:
        """Figures asked for and reached, by tower and kind: plain values, ready for JSON."""
        return summary(self)
