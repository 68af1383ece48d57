"""One compression as an object: describe, watch the training, plan, cut, report."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, is_dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from math import isclose
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from . import cost
from .architectures import discover
from .budget import Prices, parse_budget
from .cutting import rewrite
from .errors import BudgetError, UnsupportedError, VlpruneError
from .gate import evaluating, gated
from .latency import conditions, latency_prices, moved_to, seconds_of, take_turns
from .methods import Alternating, Method, Problem
from .plan import Plan
from .record import read_record
from .share import is_shared, mixed, settled, shareable, similarity
from .structure import AttentionUnit, Structure
from .units import named_weights, unit_squares
from .vectors import Vectors, alignment, draw_near

__all__ = ["Compressor", "CompressorCallback"]

ROUNDS = 9
"""Forward passes of which the median is the reached latency."""
PATIENCE = 0.1
"""The fraction of a search in which every gate must have had a gradient."""


class Compressor:
    """A compression of ``model`` by ``method`` to ``budget``.

    ``budget`` is the fraction of the whole model that stays: ``{"params": 0.5}``,
    ``{"macs": 0.5}`` or ``{"latency": 0.5}``; the latter two need ``example_inputs`` (keywords of
    one forward pass), because they depend on the input. A latency is measured where the model
    lies, with these inputs and torch's present number of threads: choose them as in production.
    In a Trainer, pass :meth:`callback`; in a loop of your own, call :meth:`step` after every
    backward. Then :meth:`finish` cuts. ``skip`` leaves structures dense whose names match one of
    these patterns, as in ``("text_model.*",)``. With ``uniform`` all layers of a tower keep
    equally many units of a kind, so that an ordinary config may be able to say it
    (:func:`vlprune.ordinary`). ``prices`` is a table of seconds that
    :func:`vlprune.latency_prices` has measured before.

    A method that learns in turn with the weights (``JSP``) needs ``held_out``: a list or any other
    sequence of batches (keywords of one forward pass) that are not trained on. ``loss`` turns
    one into its loss; by default it is what the model's own forward returns as ``loss``.

    Raises BudgetError, UnsupportedError (nothing to prune, another quantizer).
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
        read_record(model)  # a sentence now rather than after hours of training
        self.model, self.method = model, method
        self.description = discover(model, attention)
        if not self.description.structures:
            raise UnsupportedError(
                f"{type(model).__name__} has no attention or FFN that the layout table knows: "
                "see vlprune.discover(model).dense for the reasons"
            )
        self.example_inputs = dict(example_inputs) if example_inputs else None
        structures = self.structures = _without(self.description.structures, skip)
        self._params_before = int(cost.params(model, structures))
        self._param_prices = cost.param_prices(model, structures)
        self._macs = (
            cost.measure_macs(model, structures, self.example_inputs)
            if self.example_inputs
            else None
        )
        if self.budget.what == "macs":
            if self._macs is None:
                raise BudgetError(
                    "a budget in macs needs example_inputs: MACs depend on the size of the input"
                )
            self.prices = self._macs.prices
        elif self.budget.what == "latency":
            if self.example_inputs is None:
                raise BudgetError(
                    "a budget in latency needs example_inputs: time depends on the input's size"
                )
            self._conditions = conditions(model, self.example_inputs)
            self.prices = prices or latency_prices(
                model, structures, self.example_inputs, attention
            )
        else:
            self.prices = self._param_prices
        shapes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
        self.search = method.start(
            Problem(
                structures,
                self.prices,
                self.budget.fraction,
                squares=lambda: unit_squares(model, structures),
                shareable=lambda target, source: shareable(target, source, shapes),
                similarity=lambda target, source: similarity(model, target, source),
                groups={s.name: f"{s.tower}/{s.kind}/{s.size}" for s in structures if uniform},
            )
        )
        self.held_out, self._loss = held_out, loss or self._own_loss
        self.autocast: torch.dtype | None = None
        self._held_out_seen = 0
        if self.search.alternates and is_shared(model):
            raise UnsupportedError(
                "this model shares weights already: call vlprune.materialize on it before it is "
                f"searched by {type(method).__name__} again"
            )
        self._after = 0
        self._plan: Plan | None = None
        self._finished = False
        self._verification: Any = None
        self._seconds: float | None = None
        self._gates: dict[str, Tensor] = {}
        self._unreached = {s.name for s in structures} if self.search.uses_gates else set()
        self._hooks, self._gating = ExitStack(), ExitStack()
        self._seen: dict[str, Any] | None = None
        self._attached = False
        self.attach()

    # -- while training ------------------------------------------------------------------

    def attach(self) -> None:
        """Put the gates in place; done on construction, and again by the callback."""
        if self._attached or self._finished:
            return
        self._attached = True
        watcher = self.model.register_forward_pre_hook(self._remember, with_kwargs=True)
        self._hooks.callback(watcher.remove)
        if self.search.uses_gates:
            device = next(self.model.parameters()).device
            for structure in self.structures:
                gate = torch.ones(structure.size, device=device, requires_grad=True)
                self._gates.setdefault(structure.name, gate)
            self._hooks.callback(self._gating.close)
            self._gating.enter_context(gated(self.model, self.structures, self._gates))
            self._set_gates(0.0)

    def detach(self) -> None:
        """Take every hook away again; what the search has learnt stays."""
        self._hooks.close()
        self._attached = False

    def step(self, progress: float, scale: float = 1.0, weight_scale: float | None = None) -> None:
        """Tell the search that one backward pass is done; call before ``optimizer.step()``.

        ``progress`` runs from 0 to 1 over the search. ``scale`` is what the loss was multiplied
        with before the backward pass: ``scaler.get_scale()`` where a GradScaler is in use, and
        ``weight_scale`` is that factor where the weights' gradients still carry it, 1 after
        ``scaler.unscale_(optimizer)`` (default: ``scale``).
        """
        weight_scale = scale if weight_scale is None else weight_scale
        if not 0 <= progress <= 1:
            raise VlpruneError(f"progress runs from 0 to 1, not {progress!r}")
        if self.search.uses_gates:
            gradients = {
                name: gate.grad.detach() / scale if scale != 1 else gate.grad.detach()
                for name, gate in self._gates.items()
                if gate.grad is not None
            }
            if not gradients:
                raise VlpruneError(
                    "no gate has a gradient: call compressor.step after loss.backward(), with the "
                    "model that the compressor was made for"
                )
            self._unreached -= gradients.keys()
            if self._unreached and progress >= PATIENCE:
                self._refuse_unreached()
            self.search.after_backward(progress, _averaged(gradients))
            for gate in self._gates.values():
                gate.grad = None
        self._set_gates(progress)
        if isinstance(self.search, Alternating):
            self._align(self.search, progress, weight_scale)
            if self.search.due(progress):
                self._look(self.search, progress)

    def _align(self, search: Alternating, progress: float, scale: float) -> None:
        """Draw the weights towards the wanted structure, by their gradients and directly."""
        wanted = search.alignment(progress)
        if wanted is None:
            return
        if wanted.strength > 0:
            distance = alignment(self.model, self.structures, wanted.vectors)
            if distance.requires_grad:
                (wanted.strength * scale * distance).backward()
        if wanted.factor < 1:
            draw_near(self.model, self.structures, wanted.vectors, wanted.factor)

    def _look(self, search: Alternating, progress: float) -> None:
        """The loss of a held-out batch with and without the vectors; and let the search learn.

        The weights are constants here, the model is in eval mode, and training's random numbers
        are left alone.
        """
        batch = self._next_held_out()
        vectors = search.draw(progress)
        learns = search.learns(progress)
        keep = {n: v.detach().clone().requires_grad_(learns) for n, v in vectors.keep.items()}
        share = {
            n: (source, values.detach().clone().requires_grad_(learns), units)
            for n, (source, values, units) in vectors.share.items()
        }
        device = next(self.model.parameters()).device
        live = Vectors(keep, share)
        with (
            evaluating(self.model),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self._autocast(device),
        ):
            with torch.no_grad():
                full = float(self._loss(batch))
            with (
                torch.set_grad_enabled(learns),
                mixed(self.model, self.structures, live.share),
                gated(self.model, self.structures, live.alive()),
            ):
                loss = self._loss(batch)
            if learns:
                leaves = [*keep.values(), *(values for _, values, _ in share.values())]
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        search.watch(progress, float(loss.detach()), full)
        if learns:
            names = [*(f"keep/{n}" for n in keep), *(f"share/{n}" for n in share)]
            found = {
                name: torch.zeros_like(leaf) if grad is None else grad.float()
                for name, leaf, grad in zip(names, leaves, grads, strict=True)
            }
            found = _averaged(found)
            search.learn(
                progress,
                {n: found[f"keep/{n}"].cpu() for n in keep},
                {n: found[f"share/{n}"].cpu() for n in share},
            )

    def _next_held_out(self) -> Any:
        """The next held-out batch, on the model's device; another one in every process."""
        if not len(self.held_out):
            raise VlpruneError(
                f"{type(self.method).__name__} learns on batches that are not trained on: give "
                "Compressor(..., held_out=[batch, ...]) some"
            )
        if any(hasattr(parameter, "to_local") for parameter in self.model.parameters()):
            raise UnsupportedError(
                f"the weights are sharded (FSDP), which {type(self.method).__name__} cannot search "
                "yet: use DistributedDataParallel"
            )
        several = dist.is_available() and dist.is_initialized()
        world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
        number = (self._held_out_seen * world + rank) % len(self.held_out)
        self._held_out_seen += 1
        return send_to_device(self.held_out[number], next(self.model.parameters()).device)

    def _own_loss(self, batch: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self.model(**batch)["loss"]
        return loss

    def _autocast(self, device: torch.device) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def _refuse_unreached(self) -> None:
        names = [s.name for s in self.structures if s.name in self._unreached]
        raise VlpruneError(
            f"the loss reaches no gate of {names[0]}"
            + (f" and {len(names) - 1} more structures" if len(names) > 1 else "")
            + f": no gradient in the first {PATIENCE:.0%} of the search. Leave them dense with "
            f'skip=("{names[0].split(".")[0]}.*",), or train with a loss that depends on them'
        )

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold for :meth:`restore` to go on exactly from here."""
        reached = [s.name not in self._unreached for s in self.structures]
        return {
            **{f"search/{name}": value for name, value in self.search.state().items()},
            **{f"gate/{name}": gate.detach().cpu() for name, gate in self._gates.items()},
            "reached": torch.tensor(reached),
            "held_out_seen": torch.tensor(self._held_out_seen),
            **{
                f"seconds/{name}": torch.tensor(curve, dtype=torch.float64)
                for name, curve in {"": (self.prices.fixed,), **self.prices.curve}.items()
                if self.prices.curve
            },
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned. Raises VlpruneError if it is another model's."""
        gates = {name for name in state if name.startswith("gate/")}
        if gates and gates != {f"gate/{s.name}" for s in self.structures}:
            raise VlpruneError(
                "this checkpoint's search belongs to another model or attention unit"
            )
        self.search.restore(
            {n.removeprefix("search/"): t for n, t in state.items() if n.startswith("search/")}
        )
        for name, gate in self._gates.items():
            gate.copy_(state[f"gate/{name}"])
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
        self._held_out_seen = int(state["held_out_seen"])
        self._unreached = {
            s.name
            for s, reached in zip(self.structures, state["reached"].tolist(), strict=True)
            if not reached
        }

    @torch.no_grad()
    def _set_gates(self, progress: float) -> None:
        for name, values in self.search.gates(progress).items():
            self._gates[name].copy_(values)

    def _remember(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first batch as the probe for the proof at the end; gates follow the model."""
        self._follow()
        if self._seen is None and not args:
            self._seen = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in kwargs.items()
            }

    def _follow(self) -> None:
        """Move the gates to where the model is now: a Trainer moves it after we have seen it."""
        device = next(self.model.parameters()).device
        if all(gate.device == device for gate in self._gates.values()):
            return
        self._gating.close()
        self._gates = {
            name: gate.detach().to(device).requires_grad_() for name, gate in self._gates.items()
        }
        self._gating.enter_context(gated(self.model, self.structures, self._gates))

    def callback(self) -> TrainerCallback:
        """The same as :meth:`step`, for the Hugging Face Trainer."""
        return CompressorCallback(self)

    def watch(self, trainer: Any) -> TrainerCallback:
        """As ``callbacks=[compressor.callback()]``, and the search's figures reach its loggers.

        The Trainer calls loggers before callbacks it is given, so this one is put in front:
        TensorBoard, Weights & Biases or MLflow (``report_to``) show ``search/remains`` and more.
        """
        callback = self.callback()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def figures(self) -> dict[str, float]:
        """Figures of the search as it stands, for a log.

        ``remains`` is the fraction of the budget's currency that is left, gates between 0 and 1
        counting in proportion; the others are the search's own.
        """
        figures = {name: float(value) for name, value in self.search.facts().items()}
        if self._gates and "remains" not in figures:
            left = {name: float(gate.detach().sum()) for name, gate in self._gates.items()}
            unit = self.prices.unit
            gone = sum(unit[s.name] * (s.size - left[s.name]) for s in self.structures)
            figures["remains"] = 1 - gone / self.prices.total
        return figures

    # -- the end -------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan as the search sees it now."""
        if self._plan is not None:
            return self._plan
        plan = Plan(
            keep=self.search.keep(),
            share=self.search.share(),
            attention=self.description.attention,
            fingerprint=self.description.fingerprint,
        )
        return settled(self.model, self.description.structures, plan)

    def finish(self, verify: bool = True) -> Any:
        """The same model object, really smaller.

        With ``verify`` the masked and the cut model are compared on ``example_inputs``, or on
        the first batch seen in training; :meth:`report` says how far apart they were, or that
        there was nothing to compare on. Raises VerificationError if they differ.
        """
        if self._finished:
            return self.model
        plan = self.plan()
        _check_same_on_every_rank(plan)
        if any(hasattr(parameter, "to_local") for parameter in self.model.parameters()):
            raise UnsupportedError(
                "the weights are sharded (FSDP), which cannot be cut: save compressor.plan(), "
                "gather the full weights into an unsharded model of the same class, and cut that "
                "with vlprune.rewrite(model, vlprune.discover(model), plan)"
            )
        self.detach()
        self._after = int(cost.params(self.model, self.description.structures, plan))
        probe = self.example_inputs or self._seen
        rewrite(self.model, self.description, plan, verify=probe if verify else None)
        self._verification = self.model.__dict__.pop("_vlprune_verification", None)
        if self.budget.what == "latency":
            self._seconds = self._measured_seconds()
        self._plan, self._finished = plan, True
        self._gates, self._seen = {}, None
        return self.model

    def _measured_seconds(self) -> float:
        """Median seconds of a forward pass of the model as it is now, on the example inputs."""
        inputs = moved_to(self.model, self.example_inputs or {})
        with evaluating(self.model):
            timer = partial(seconds_of, self.model, inputs)
            return median(take_turns({"small": timer}, ROUNDS, warm_up=2)["small"])

    @staticmethod
    def _group_cost(prices: Prices, members: Sequence[Structure], plan: Plan) -> dict[str, int]:
        """What these structures cost before and after the cut."""
        after = 0.0
        for s in members:
            borrowed = (prices.unit[s.name] - prices.borrowed[s.name]) * len(plan.shared(s))
            after += float(prices.of(s.name)[list(plan.kept(s))].sum()) - borrowed
        before = sum(prices.whole(s.name) for s in members)
        return {"before": round(before), "after": round(after)}

    def _materialised(self, plan: Plan, stored: int) -> int:
        """Parameters of the small model when shared units are plain copies again."""
        borrowed, unit = self._param_prices.borrowed, self._param_prices.unit
        saved = sum(
            (unit[s.name] - borrowed[s.name]) * len(plan.shared(s)) for s in self.structures
        )
        return stored + round(saved)

    def report(self) -> dict[str, Any]:
        """What was asked and reached, by tower and kind: plain values, ready for JSON."""
        plan = self.plan()
        structures = self.structures
        units = {s.name: plan.kept(s) for s in structures}
        kept = {name: len(listed) for name, listed in units.items()}
        groups: dict[tuple[str, str], list[Structure]] = defaultdict(list)
        for structure in structures:
            groups[structure.tower, structure.kind].append(structure)
        total = self._params_before
        after = self._after or int(cost.params(self.model, self.description.structures, plan))
        reached = (
            after / total
            if self.budget.what == "params"
            else self.prices.cost(units) / self.prices.total
        )
        seconds = {}
        if self.budget.what == "latency":
            dense = self.prices.total
            seconds = {**self._conditions, "dense": dense, "expected": reached * dense}
            if self._seconds is not None:
                seconds["small"] = self._seconds
                reached = self._seconds / dense
        shared = any(plan.shared(s) for s in structures)
        report: dict[str, Any] = {
            "method": type(self.method).__name__,
            "options": asdict(self.method) if is_dataclass(self.method) else {},
            "attention": self.description.attention,
            "budget": {
                "what": self.budget.what,
                "asked": self.budget.fraction,
                "reached": reached,
                **({"seconds": seconds} if seconds else {}),
            },
            "params": {
                "before": total,
                "after": after,
                **({"materialised": self._materialised(plan, after)} if shared else {}),
            },
            "groups": [
                {
                    "tower": tower,
                    "kind": kind,
                    "structures": len(members),
                    "units": sum(s.size for s in members),
                    "kept": sum(kept[s.name] for s in members),
                    "shared": sum(len(plan.shared(s)) for s in members),
                    "padded": sum(s.layout == "padded" for s in members),
                    "params": self._group_cost(self._param_prices, members, plan),
                }
                for (tower, kind), members in groups.items()
            ],
            "layers": [
                {
                    "name": s.name,
                    "tower": s.tower,
                    "kind": s.kind,
                    "units": s.size,
                    "kept": kept[s.name],
                    "shared": len(plan.shared(s)),
                    "source": plan.share[s.name][0] if plan.shared(s) else None,
                }
                for s in structures
            ],
            "verified": asdict(self._verification) if self._verification else None,
            "search": self.search.facts(),
            "search_history": self.search.history(),
        }
        if self._macs is not None:
            report["macs"] = {
                "before": self._macs.total,
                "after": cost.macs_of(self._macs, structures, plan),
                "not_counted": list(self._macs.not_counted),
            }
        return report


def _averaged(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over all processes, so that every rank makes the same plan.

    Gates are no parameters of the model, so DDP does not average their gradients.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return gradients
    names = sorted(gradients)
    together = torch.cat([gradients[name] for name in names])
    dist.all_reduce(together)
    together /= dist.get_world_size()
    parts = together.split([len(gradients[name]) for name in names])
    return dict(zip(names, parts, strict=True))


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter that lies in this process."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def _check_same_on_every_rank(plan: Plan) -> None:
    """Raise unless all processes are about to make the same cut."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    plans: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(plans, plan.to_json())
    if len(set(plans)) > 1:
        raise VlpruneError(
            "the processes have made different plans, so nothing was cut: every rank needs the "
            "same seed, the same dense weights and the same number of compressor.step calls"
        )


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


class CompressorCallback(TrainerCallback, ExportableState):
    """Feeds a Compressor from a Trainer; its state is a part of the Trainer's checkpoints."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def state(self) -> dict[str, Any]:
        """What goes into ``trainer_state.json``."""
        packed = base64.b64encode(pack(self.compressor.state())).decode()
        return {"args": {}, "attributes": {"search": packed, "weights": self._weights()}}

    def _weights(self) -> float:
        """A figure by which the weights that this process holds are known again."""
        parameters = self.compressor.model.parameters()
        return sum(float(p.detach().double().abs().sum()) for p in map(_local, parameters))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.compressor.attach()
        if isinstance(self.compressor.search, Alternating):
            self.compressor.search.expect(state.max_steps)
        half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.compressor.autocast = half
        self.compressor._follow()  # an objective may never call the model's own forward
        if state.global_step > 0:  # the Trainer goes on from a checkpoint
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:
                raise VlpruneError(
                    "this checkpoint holds no search: it was saved without compressor.callback(), "
                    "so start again without resume_from_checkpoint"
                )
            saved = saved["attributes"]
            if state.is_world_process_zero and not isclose(
                saved["weights"], self._weights(), rel_tol=1e-9
            ):
                raise VlpruneError(
                    "the weights of the checkpoint have not been loaded into the model: some are "
                    "saved under names that the Trainer does not find again, so give it "
                    "vlprune.trainee.Trainee(model) in place of the model, from the start"
                )
            self.compressor.restore(unpack(base64.b64decode(saved["search"])))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        self.compressor.step(
            min(1.0, (state.global_step + 1) / max(1, state.max_steps)),
            scale=scale,
            # clipping has unscaled the weights' gradients before this is called
            weight_scale=1.0 if args.max_grad_norm else scale,
        )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        figures = {f"search/{name}": v for name, v in self.compressor.figures().items()}
        logs.update(figures)
        if state.log_history:  # a copy of these logs, made before
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.compressor.detach()
