"""The search's half of each training step, where it learns in turn with the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.fsdp import is_sharded, reshard
from ..cutting.gates import evaluating, gated
from ..cutting.sharing.mixed import (
    mixed,
)
from ..cutting.sharing.ties import (
    is_shared,
)
from ..cutting.zero import is_split, loss_scale, optimizer_of
from ..device import device_of, moved_to, same_random_numbers
from ..errors import UnsupportedError, VlpruneError
from ..methods import Alignment, Look, Method, Search
from ..methods.vectors import Move, Vectors, add_gradients, distances, draw_near, moves_to
from ..processes import world
from ..structures.structure import Structure
from .ranks import averaged

__all__ = ["Turns", "refuse_split", "turns_of"]


def turns_of(
    method: Method,
    search: Search,
    model: nn.Module,
    structures: Sequence[Structure],
    held_out: Sequence[Mapping[str, Any]],
    loss: Callable[[Mapping[str, Any]], Tensor] | None,
) -> Turns | None:
    """The search's half of each step; None if the search does not learn in turn.

    Raises UnsupportedError if the model shares weights, which such a search cannot go on from.
    """
    if not method.uses_held_out:
        return None
    if is_shared(model):
        raise UnsupportedError(
            "this model shares weights already: call vlprune.materialize on it before it is "
            f"searched by {type(method).__name__} again"
        )
    return Turns(model, structures, search, held_out, loss)


def refuse_split(model: nn.Module, method: Method) -> None:
    """Raise UnsupportedError if a search that changes weights meets those of DeepSpeed ZeRO-3."""
    if method.uses_held_out and is_split(model):
        raise UnsupportedError(
            f"{type(method).__name__} changes weights in turn with training and shares them "
            "between layers, which DeepSpeed ZeRO-3 allows for neither: train with ZeRO stage 2, "
            "or shard by FSDP2 (fully_shard)"
        )


class _Pull:
    """A gradient that joins that of the next backward pass of its weight, once."""

    def __init__(self, weight: Tensor, pull: Tensor, scale: Callable[[], float]) -> None:
        self.pull, self.scale = pull, scale
        self.hook = weight.register_hook(self)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.hook.remove()
        return gradient + (self.scale() * self.pull).to(gradient.dtype)


class Turns:
    """Access to the weights that a search takes turns with (:class:`vlprune.methods.Weights`).

    ``loss`` turns a batch into its loss; ``autocast`` is the dtype that training runs in, if any;
    ``seen`` counts the batches looked at by all processes; ``reached`` are the structures whose
    vectors had an effect on any of them.
    """

    def __init__(
        self,
        model: nn.Module,
        structures: Sequence[Structure],
        search: Search,
        held_out: Sequence[Mapping[str, Any]],
        loss: Callable[[Mapping[str, Any]], Tensor] | None,
    ) -> None:
        self.model, self.structures, self.search = model, structures, search
        self.held_out, self.loss = held_out, loss or self._own_loss
        self.autocast: torch.dtype | None = None
        self.weight_scale = 1.0
        self.seen = 0
        self.reached: set[str] = set()
        self._waiting: list[_Pull] = []
        self._sharded: bool | None = None
        self._moves: tuple[Vectors, list[Move]] | None = None

    def restart(self, search: Search) -> None:
        """Go on with a new search, from the first held-out batch."""
        self.search, self.seen, self.reached = search, 0, set()
        self._sharded = self._moves = None

    def take(self, progress: float, weight_scale: float) -> None:
        """The search's turn, after a backward pass whose loss was scaled by ``weight_scale``."""
        self.weight_scale = weight_scale
        self.search.turn(progress, self)
        if self.sharded:  # what a look gathered would hide the parts' gradients from zero_grad
            reshard(self.model)

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights out: asked of the model again after each look."""
        if self._sharded is None:
            self._sharded = is_sharded(self.model)
        return self._sharded

    def align(self, wanted: Alignment) -> None:
        """Draw the weights towards the wanted structure, by their gradients and directly."""
        strength = wanted.strength * self.weight_scale / len(self.structures)
        if strength:
            self._draw(wanted.vectors, strength)
        if wanted.factor < 1:
            if self.sharded:
                reshard(self.model)
            draw_near(self.model, self.structures, wanted.vectors, wanted.factor)

    def _draw(self, vectors: Vectors, strength: float) -> None:
        """Add the gradients of the distance from the structure, times ``strength``."""
        if self._moves is None or self._moves[0] is not vectors:
            self._moves = vectors, moves_to(self.model, self.structures, vectors)
        if not self.sharded:
            self._pull(self._moves[1], strength)
            return
        reshard(self.model)  # gradients belong to the parts
        for term in distances(self.model, self._moves[1]):
            (strength * term).backward()

    def _pull(self, moves: Sequence[Move], strength: float) -> None:
        """Add the gradients of the moves, the same in all processes, to those of the weights.

        DeepSpeed takes gradients away as the backward pass makes them, and accelerate lets it step
        right after. There they join those of the next backward pass, multiplied as its loss is.
        """
        self.let_go()
        weights = dict(self.model.named_parameters())
        touched = {rows.slot.param for move in moves for rows in (*move.mine, *move.theirs)}
        learning = {name: weights[name] for name in sorted(touched) if weights[name].requires_grad}
        waits = optimizer_of(self.model) is not None
        into = {
            name: torch.zeros_like(weight) if waits or weight.grad is None else weight.grad
            for name, weight in learning.items()
        }
        add_gradients(weights, moves, strength, into)
        for name, weight in learning.items():
            if waits:
                self._waiting.append(_Pull(weight, into[name], partial(loss_scale, self.model)))
            else:
                weight.grad = into[name]

    def let_go(self) -> None:
        """Drop gradients that wait for the next backward pass."""
        for pull in self._waiting:
            pull.hook.remove()
        self._waiting.clear()

    def look(self, vectors: Vectors, learns: bool, compares: bool) -> Look:
        """The loss of the next held-out batch with the vectors, and without if it ``compares``.

        The weights are constants here, the model is in eval mode, and training's random numbers are
        left alone. Of a sharded model, each process gathers the weights that are to be shared.
        Raises VlpruneError without held-out batches.
        """
        batch, self._sharded = self._next_batch(), None
        keep = {n: v.detach().clone().requires_grad_(learns) for n, v in vectors.keep.items()}
        share = {
            n: (source, values.detach().clone().requires_grad_(learns), units)
            for n, (source, values, units) in vectors.share.items()
        }
        live = Vectors(keep, share)
        leaves = {f"keep/{name}": values for name, values in keep.items()}
        leaves |= {f"share/{name}": values for name, (_, values, _) in share.items()}
        with (
            evaluating(self.model),
            same_random_numbers(self.model),
            self._autocast(),
        ):
            full = None
            if compares:
                with torch.no_grad():
                    full = float(self.loss(batch))
            with (
                torch.set_grad_enabled(learns),
                mixed(self.model, self.structures, live.share),
                gated(self.model, self.structures, live.alive()),
            ):
                loss = self.loss(batch)
            if not learns:
                return Look(float(loss.detach()), full)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        pulls = averaged(
            {
                name: torch.zeros_like(leaf) if grad is None else grad.float()
                for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
            }
        )
        seen = torch.stack([grad.any() for grad in pulls.values()]).tolist()
        self.reached |= {n.partition("/")[2] for n, any_ in zip(pulls, seen, strict=True) if any_}
        return Look(
            float(loss.detach()),
            full,
            {name: pulls[f"keep/{name}"].cpu() for name in keep},
            {name: pulls[f"share/{name}"].cpu() for name in share},
        )

    def _next_batch(self) -> Any:
        """The next held-out batch, on the model's device; every process gets another batch."""
        if not len(self.held_out):
            raise VlpruneError(
                "this method learns on batches that are not trained on: give "
                "Compressor(..., held_out=[batch, ...]) some"
            )
        size, rank = world()
        number = (self.seen + rank) % len(self.held_out)
        self.seen += size
        return moved_to(self.model, self.held_out[number])

    def _own_loss(self, batch: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self.model(**batch)["loss"]
        return loss

    def _autocast(self) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device_of(self.model).type, dtype=self.autocast)
