"""One calibration: its batches, and all that is learnt and changed with them, step by step."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import discover
from ..cutting.gates import evaluating, gated
from ..cutting.settle import settle
from ..errors import UnsupportedError
from ..methods import Layer
from ..status import Progress
from ..structures.plan import Plan
from ..structures.structure import Structure
from .batches import Batches, TokenWeight, batches_of, processed
from .blocks import Block, blocks_of, callable_projections
from .consumers import consumers_of
from .fold import fold_layers
from .influence import Influence, influence_of, main_outputs, small_enough
from .moments import of_all_processes
from .passes import calls_of, kinds_of_calls, moments_by_block, weight_of
from .rotate import rotate_heads
from .store import Originals, Steps, lies_in, put

__all__ = ["Calibration", "OutputError", "Session", "fold", "rotate", "session_of"]


NOTHING = 1e-6
"""A relative error that needs no repair: a search that closes its gates leaves none to repair."""


NO_REPAIR = (
    "no repair follows whole experts, whose tokens go elsewhere when they are gone: leave the "
    'calibration out, or choose experts="neuron"'
)


@dataclass(frozen=True)
class Calibration:
    """What a calibration runs on, for ``Compressor(..., calibration=...)``.

    ``batches`` are keyword arguments of one forward pass each: a list, a DataLoader, anything that
    yields mappings. ``weigh`` gives each token's weight in the statistics, from the name of a tower
    and a batch, as (items, tokens), or None for equal weights; by default padding counts nothing,
    and image tokens in a language model together no more than its words. ``outputs`` picks the
    tensors that must stay near those of the dense model, {name: tensor}, from what the model
    returns; by default embeddings, else logits, else the last hidden state. With ``work``, a
    folder, finished steps are kept, and a later run with the same ``key`` goes on from them.
    """

    batches: Iterable[Mapping[str, Any]]
    weigh: TokenWeight | None = None
    outputs: Callable[[Any], Mapping[str, Tensor]] = main_outputs
    work: Path | None = None
    key: str = ""
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def of(
        cls,
        rows: Iterable[Mapping[str, Any]],
        processor: Callable[..., Mapping[str, Any]],
        columns: Mapping[str, str] = MappingProxyType({"images": "image"}),
        *,
        items: int = 256,
        batch_size: int = 8,
        **more: Any,
    ) -> Calibration:
        """A calibration on the rows of a Hugging Face dataset, or of any other iterable of rows.

        The first ``items`` rows are read. ``columns`` says which column goes to which keyword of
        the processor (or tokenizer, or image processor), as in ``{"images": "image", "text":
        "caption"}``. ``more`` are further fields of this class. Raises DataError if there are no
        rows, or a row lacks a column.
        """
        return cls(processed(rows, processor, items, batch_size, columns), **more)


@dataclass(frozen=True)
class OutputError:
    """The relative error of the model's outputs on held-out batches, {output: error}.

    An error is the root of the summed squared differences over that of the summed squares.
    ``kept`` is false where the repair was worse than none, and so was taken back.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    kept: bool = True


class Session:
    """A calibration at work on one model. Whatever it changes is undone if it fails."""

    def __init__(
        self, model: nn.Module, structures: Sequence[Structure], calibration: Calibration
    ) -> None:
        if any(p.is_meta for p in model.parameters()):
            raise UnsupportedError("the model has no weights (meta device): load them first")
        self.model, self.structures = model, tuple(structures)
        self.outputs, self.progress = calibration.outputs, calibration.progress
        self.batches: Batches = batches_of(model, calibration.batches, calibration.weigh)
        self.steps = Steps(calibration.work, calibration.key)
        self.refused: dict[str, str] = {}
        self.rotated = False
        self._empty: set[str] = set()
        self._influence: Influence | None = None
        self.errors: OutputError | None = None
        self.remark = ""
        self.layers_folded: dict[str, dict[str, float]] = {}

    @property
    def unreached(self) -> list[str]:
        """Structures that no calibration batch reaches; they stay dense."""
        if not hasattr(self, "_unreached"):
            reached = {c.structure for block in self._blocks() for c in block.consumers}
            self._unreached = [
                s.name
                for s in self.structures
                if consumers_of(self.model, s) and s.name not in reached
            ]
        return self._unreached

    @property
    def unread(self) -> list[str]:
        """Structures whose neurons no layer reads that a calibration could work on."""
        ffns = [s for s in self.structures if s.kind == "ffn"]
        return [s.name for s in ffns if not consumers_of(self.model, s)]

    def _blocks(self) -> list[Block]:
        """The blocks that the batches reach, in the order of a forward pass."""
        with evaluating(self.model), callable_projections(self.model, self.structures):
            kinds = kinds_of_calls(self.model, self.batches)
            return blocks_of(self.model, self.structures, kinds)

    def rotate(self, originals: Originals | None = None) -> None:
        """Turn every head to its free basis; ``refused`` says why some are left alone.

        ``originals`` get the parameters as they were, if the caller may want them back.
        """
        if self.rotated:
            return
        given = originals is not None
        originals = originals if originals is not None else Originals(self.model)
        if self._rotated_before(originals if given else None):
            return
        try:
            with self.progress.count("rotating", len(self.batches)) as advance:
                names, self.refused = rotate_heads(
                    self.model, self.batches, originals, advance, self.structures
                )
        except BaseException:
            originals.put_back()
            raise
        finally:
            if not given:
                originals.forget()
        self.rotated = True
        for number, name in enumerate(names):  # one by one: they may be more than memory holds
            step = f"rotated-{number}"
            self.steps.remember(step, {name: self.model.get_parameter(name)})
            lies_in(self.model, [name], self.steps.file(step))
        self.steps.remember("rotated", {}, {"refused": self.refused, "parts": len(names)})

    def _rotated_before(self, originals: Originals | None) -> bool:
        """Take over the heads that an earlier run has turned, if it has turned all of them."""
        done = self.steps.known("rotated")
        if done is None:
            return False
        parts = [f"rotated-{number}" for number in range(done[1]["parts"])]
        if any(self.steps.known(step) is None for step in parts):
            return False
        for step in parts:
            known = self.steps.known(step)
            assert known is not None
            if originals is not None:
                originals.keep(known[0])
            put(self.model, known[0], self.steps.file(step))
        self.refused, self.rotated = done[1]["refused"], True
        return True

    @property
    def influence(self) -> Influence:
        """What an error anywhere adds to the relative squared error of the outputs."""
        if self._influence is None:
            step = "influence-rotated" if self.rotated else "influence"
            done = self.steps.known(step)
            if done is not None:
                outputs, scores = (
                    {n[2:]: t for n, t in done[0].items() if n.startswith(mark)}
                    for mark in ("o/", "s/")
                )
                self._influence = Influence(outputs, scores)
                return self._influence
            batches = small_enough(self.model, self.batches, self.outputs)
            with self.progress.count("derivatives", len(batches)) as advance:
                self._influence = found = influence_of(
                    self.model, self.structures, batches, self.outputs, advance
                )
            flat = {f"o/{name}": tensor for name, tensor in found.outputs.items()}
            flat |= {f"s/{name}": tensor for name, tensor in found.scores.items()}
            self.steps.remember(step, flat)
        return self._influence

    def scores(self) -> Mapping[str, Tensor]:
        """See :meth:`vlprune.methods.Statistics.scores`."""
        return self.influence.scores

    def layers(self) -> Iterator[Layer]:
        """See :meth:`vlprune.methods.Statistics.layers`."""
        influence = self.influence
        blocks = self._blocks()
        with self.progress.count("statistics", len(blocks)) as advance:
            for block, moments in moments_by_block(
                self.model, self.structures, self.batches, advance
            ):
                to_come = Counter(consumer.module for consumer in block.consumers)
                for consumer in block.consumers:
                    layer: Any = self.model.get_submodule(consumer.module)
                    weight = weight_of(layer)
                    to_come[consumer.module] -= 1
                    last = not to_come[consumer.module]
                    found = (moments.pop if last else moments.__getitem__)(consumer.module)
                    if not found.xx.any():  # nothing but padding, or values that are not there
                        self._empty.add(consumer.structure)
                        continue
                    here = influence.outputs.get(consumer.module)
                    second = found.covariance(layer.bias is not None)
                    del found  # as large as what is made of it
                    yield Layer(
                        consumer.structure,
                        consumer.columns,
                        second,
                        weight,
                        torch.zeros(len(weight)) if here is None else here,
                    )

    def fold(self, plan: Plan, originals: Originals) -> OutputError:
        """Fold a plan into the weights; taken back where the outputs would be no nearer to dense.

        ``originals`` get the parameters as they were, and hold no others. Raises UnsupportedError
        for a plan that shares weights.
        """
        if any(plan.shared(s) for s in self.structures):
            raise UnsupportedError(
                "a plan that shares weights cannot be folded: the repair would pull shared weights "
                "apart. Cut it without calibration"
            )
        if any(s.kind == "experts" and len(plan.kept(s)) < s.size for s in self.structures):
            raise UnsupportedError(NO_REPAIR)
        wanted = self._outputs()
        with gated(self.model, self.structures, plan):
            before = self._apart(wanted)
        finite = all(t.isfinite().any() for outputs in wanted.values() for t in outputs.values())
        if finite and max(before.values(), default=0.0) <= NOTHING:  # a search closed its gates
            self.errors = OutputError(before, before)
            return self.errors
        steps = self.steps.below(hashlib.sha256(plan.to_json().encode()).hexdigest())
        with self.progress.count("repairing", len(self._blocks())) as advance:
            repairs = fold_layers(
                self.model, self.structures, plan, self.batches, originals, steps, advance
            )
        with gated(self.model, self.structures, plan):
            after = self._apart(wanted)
        self.layers_folded = {
            name: {"before": r.before, "after": r.after, "damping": r.damping}
            for name, r in repairs.items()
        }
        better = sum(v * v for v in after.values()) <= sum(v * v for v in before.values())
        if not better:
            originals.put_back()
        self.errors = OutputError(before, after if better else before, better)
        return self.errors

    def notes(self) -> list[str]:
        """Caveats that a reader of the report must know, one sentence each."""
        notes = [self.remark] if self.remark else []
        if self.unreached:
            notes.append(
                f"no calibration batch reached {len(self.unreached)} of {len(self.structures)} "
                f"structures: {', '.join(self.unreached)}"
            )
        if self._empty:
            notes.append(
                "the calibration batches bring nothing but zeros or padding to "
                f"{', '.join(sorted(self._empty))}, so OBS leaves them whole"
            )
        if self.unread:
            notes.append(
                f"the neurons of {', '.join(self.unread)} are read by no layer that could be "
                "watched or repaired: these experts are built unlike all others, so OBS leaves "
                "them whole, and no repair follows their cut by another method"
            )
        if any(s.kind == "experts" for s in self.structures):
            notes.append(
                "whole experts are not among the units that OBS can judge, so all of them stay"
            )
        wrong = max(self.errors.before.values(), default=0.0) if self.errors is not None else 0.0
        if self.errors is not None and not self.errors.kept and wrong > NOTHING:
            notes.append(
                "the repaired outputs were no nearer to the dense ones on held-out calibration "
                "batches, so the repair was taken back: give more batches, like those in use"
            )
        return notes

    def facts(self) -> dict[str, Any]:
        """What the calibration did, for a report."""
        towers: dict[str, list[dict[str, float]]] = {}
        for structure in self.structures:
            for consumer in consumers_of(self.model, structure):
                if consumer.module in self.layers_folded:
                    towers.setdefault(structure.tower, []).append(
                        self.layers_folded[consumer.module]
                    )
        return {
            "batches": len(self.batches),
            "rotated": self.rotated,
            "not_rotated": dict(self.refused),
            "outputs": asdict(self.errors) if self.errors else None,
            "towers": {
                tower: {
                    key: (sum(r[key] for r in rows) / len(rows)) ** 0.5
                    for key in ("before", "after")
                }
                for tower, rows in towers.items()
            },
        }

    # -- output errors -------------------------------------------------------------------

    @torch.no_grad()
    def _outputs(self) -> dict[int, dict[str, Tensor]]:
        """The outputs on the held-out batches, on the CPU."""
        chosen = [n for n in range(len(self.batches)) if self.batches.held_out(n)] or [0]
        calls = calls_of(self.model, self.batches)
        with evaluating(self.model):
            return {
                n: {name: t.float().cpu() for name, t in self.outputs(calls[n]()).items()}
                for n in chosen
            }

    def _apart(self, wanted: Mapping[int, Mapping[str, Tensor]]) -> dict[str, float]:
        """The relative error of each output against the wanted ones."""
        found = self._outputs()
        apart: dict[str, float] = {}
        whole: dict[str, float] = {}
        for number, tensors in wanted.items():
            for name, tensor in tensors.items():
                weights = (
                    self.batches.weights("text", number, tensor) if tensor.dim() == 3 else None
                )
                scale = 1.0 if weights is None else weights.reshape(*tensor.shape[:2], 1)
                usable = tensor.isfinite()  # masked places may be minus infinity
                moved = torch.where(usable, found[number][name] - tensor, 0.0) * scale
                own = torch.where(usable, tensor, 0.0) * scale
                apart[name] = apart.get(name, 0.0) + float(moved.square().sum())
                whole[name] = whole.get(name, 0.0) + float(own.square().sum())
        sums: dict[str, list[float]] = {}
        for theirs in of_all_processes([(name, apart[name], whole[name]) for name in apart]):
            for name, wrong_here, right_here in theirs:
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + wrong_here, pair[1] + right_here
        return {name: (wrong / (right or 1.0)) ** 0.5 for name, (wrong, right) in sums.items()}


def rotate(model: nn.Module, batches: Iterable[Mapping[str, Any]] | Calibration) -> dict[str, str]:
    """Turn every attention head of ``model`` to its free basis, in place.

    The model computes what it did before (proved block by block, in float64); afterwards the
    dimensions of each head are in the order of their worth on ``batches``, so that the same
    dimension of every head, which is one unit, means the same. Call it before any method; weights
    in half precision are rounded anew. Returns {structure: the reason why it was left alone}, with
    structures named as in ``vlprune.discover(model, "qk_vo")``. If it fails, the model is put back.

    Raises DataError for batches that cannot be used. Not from the papers (docs/calibration.md).
    """
    session = Session(model, (), _calibration(batches))
    session.rotate()
    return session.refused


def fold(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]] | Calibration,
) -> OutputError:
    """Fold any plan into the weights of ``model``, in place; cut it afterwards with the same plan.

    Layer by layer, the units that stay learn to do the work of those that go. Then
    ``vlprune.rewrite(model, vlprune.discover(model, plan.attention), plan)`` cuts. Returns the
    error of the outputs on held-out batches, before and after; if it is not smaller afterwards, the
    fold is taken back. If it fails, the model is put back.

    Raises PlanError for a plan that does not fit, UnsupportedError for one that shares weights,
    DataError for batches that cannot be used. Sources: docs/calibration.md.
    """
    described = discover(model, plan.attention, plan.experts)  # type: ignore[arg-type]
    cut = settle(model, described, plan)
    session = Session(model, cut.description.structures, _calibration(batches))
    originals = Originals(model)
    try:
        return session.fold(plan, originals)
    except BaseException:
        originals.put_back()
        raise
    finally:
        originals.forget()


def session_of(model: nn.Module, structures: Sequence[Structure], given: Any) -> Session:
    """The session of batches, or of a :class:`Calibration`. Raises DataError for no batches."""
    return Session(model, structures, _calibration(given))


def _calibration(given: Any) -> Calibration:
    return given if isinstance(given, Calibration) else Calibration(given)
