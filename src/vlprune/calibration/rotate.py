"""The free basis of a head: another basis of its query-key and of its value-output dimensions.

Scores depend on q and k only through q^T k, and the output on v only through W_o v, so each head
may use any basis for either. In the one chosen here, keeping the first r dimensions is the best
approximation of rank r on the calibration batches, and dimension j means the same in every head:
its j-th most important one. The model computes what it did before. Derived here from the singular
value decomposition of the scores and of the head's output; not taken from a paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import discover
from ..cutting.difference import difference, tensors_of
from ..cutting.padded import linear_axes
from ..cutting.paged import resident
from ..cutting.proof import in_dtype
from ..device import device_of
from ..errors import VerificationError
from ..processes import add_up
from ..structures.structure import Structure
from ..structures.units import owner_of
from .batches import Batches
from .blocks import hooked
from .consumers import Rows, consumers_of, rows_of
from .landing import Replay
from .moments import check_finite, flat, of_all_processes
from .passes import calls_of, input_hook, kinds_of_calls, ready
from .store import Originals, Shelf, put
from .streams import streams

__all__ = ["Turn", "rotate_heads", "turns_of"]

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The largest relative difference between a block's answers before and after a turn."""

FLOOR = 1e-6
"""Directions whose second moment is below this part of the largest count as if they had it."""


@dataclass(frozen=True)
class Turn:
    """What can be turned in one attention block.

    ``kind`` is ``attention_qk`` (``left`` are q's rows, ``right`` k's) or ``attention_vo``
    (``left`` are the values' rows, ``columns`` is the path of the projection that reads them).
    """

    structure: Structure
    kind: str
    left: Rows
    right: Rows | None
    columns: str = ""


def turns_of(model: nn.Module) -> list[Turn]:
    """Every pair of projections whose heads have a free basis, if nothing stands between them."""
    turns = []
    for structure in discover(model, "qk_vo"):
        rows = rows_of(model, structure)
        if _is_read_elsewhere(structure):
            continue
        if structure.kind == "attention_qk" and len(rows) == 2:
            turns.append(Turn(structure, structure.kind, *rows))
        elif structure.kind != "ffn":
            readers = consumers_of(model, structure)
            if len(rows) == len(readers):
                turns += [
                    Turn(structure, "attention_vo", row, None, reader.module)
                    for row, reader in zip(rows, readers, strict=True)
                ]
    return turns


def _is_read_elsewhere(structure: Structure) -> bool:
    """Whether values from elsewhere reach its output projection: a gate of its own is there."""
    return {"input", "output"} <= {gate.at for gate in structure.gates}


def head_moments(
    model: nn.Module,
    turns: Sequence[Turn],
    batches: Batches,
    calls: Sequence[Callable[[], Any]],
    advance: Callable[..., None] = lambda done: None,
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Second moments per head that decide the basis: {number of the turn: (left, right)}.

    For query-key dimensions (heads, size, size) of q, and of k about its mean in each sequence:
    adding one number to all scores of a query changes nothing. For values, those of the input of
    the output projection, and None.
    """
    found: dict[Any, Tensor] = {}
    hooks = []
    number = [0]

    def add(key: Any, heads: int, tower: str, centred: bool, x: Tensor) -> None:
        x = x.detach()
        weights = batches.weights(tower, number[0], x)
        if centred and x.dim() == 3:
            w = x.new_ones(x.shape[:2]) if weights is None else weights.reshape(x.shape[:2]).to(x)
            w = w[..., None]
            mean = torch.where(w > 0, x * w, 0.0).sum(1, True) / w.sum(1, True).clamp(min=1e-12)
            x = x - mean
        x = flat(x).double()
        if weights is not None:
            x = x[weights > 0]
            weights = weights[weights > 0]
        check_finite(x)
        if weights is not None:
            x = x * weights.to(x.dtype).sqrt()[:, None]
        per_head = x.unflatten(-1, (heads, -1)).transpose(0, 1)
        total = per_head.transpose(1, 2) @ per_head
        found[key] = found[key] + total if key in found else total

    for number_of_turn, turn in enumerate(turns):
        tower = turn.structure.tower
        sides = [(turn.left, False), (turn.right, True)] if turn.right is not None else []
        for rows, centred in sides:
            key = (number_of_turn, centred)
            take = partial(add, key, rows.heads, tower, centred)
            hooks.append(_rows_hook(model, rows, take))
        if turn.right is None:
            reader: Any = model.get_submodule(turn.columns)
            width = reader.weight.shape[linear_axes(reader)[1]]
            heads = width // turn.left.size
            take = partial(add, (number_of_turn, False), heads, tower, False)
            hooks.append(input_hook(reader, take))
    with hooked(hooks):
        for index, call in enumerate(calls):
            number[0] = index
            call()
            advance(1)
    keys = sorted(set().union(*of_all_processes([(k, tuple(v.shape)) for k, v in found.items()])))
    zeros = partial(torch.zeros, dtype=torch.float64, device=device_of(model))
    totals = {key: add_up(found.get(key, zeros(shape))) for key, shape in keys}
    reached = [n for n in range(len(turns)) if (n, False) in totals]
    return {n: (totals[n, False], totals.get((n, True))) for n in reached}


def _rows_hook(model: nn.Module, rows: Rows, take: Callable[[Tensor], None]) -> tuple[Any, Any]:
    """The hook that hands the rows' outputs to ``take``: (..., heads * size)."""
    if rows.module:

        def after(_module: nn.Module, _args: Any, output: Tensor) -> None:
            take(rows.of(output))

        return model.get_submodule(rows.module).register_forward_hook, after
    owner: Any = model.get_submodule(owner_of(rows.weight)[0])
    which = rows.start // (rows.heads * rows.size)

    def before(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
        bias = rows.of(module.in_proj_bias) if rows.bias else None
        x = (
            given[which]
            if module.batch_first or given[which].dim() < 3
            else given[which].transpose(0, 1)
        )
        take(nn.functional.linear(x, rows.of(module.in_proj_weight, 0), bias))

    return partial(owner.register_forward_pre_hook, with_kwargs=True), before


def rotate_heads(
    model: nn.Module,
    batches: Batches,
    originals: Originals,
    advance: Callable[..., None] = lambda done: None,
    structures: Sequence[Structure] = (),
) -> tuple[list[str], dict[str, str]]:
    """Turn every head that has a free basis, in place, each proved on the spot.

    With ``structures``, only heads of attention blocks that are among them are turned.

    Returns the parameters that changed, and {structure: the reason why it was left alone}.
    ``originals`` gets every parameter before it changes. Each turn is proved on one batch: the
    block around it must answer as before, in float64.
    """
    wanted = {_block_name(s) for s in structures}
    turns = [t for t in turns_of(model) if not wanted or _block_name(t.structure) in wanted]
    names: list[str] = []
    every = {s.name: s for s in discover(model, "qk_vo") if s.kind != "ffn"}
    fixed = {name for name in every if not wanted or _without_part(name) in wanted}
    left = fixed - {t.structure.name for t in turns}
    refused = {n: READ_ELSEWHERE if _is_read_elsewhere(every[n]) else UNLIKE for n in left}
    reached: set[str] = set()
    with ExitStack() as stack:
        blocks = ready(stack, model, [t.structure for t in turns], batches)
        calls = calls_of(model, batches)
        found = head_moments(model, turns, batches, calls, advance)
        shelf = Shelf.beside(model, batches.given)
        kinds = kinds_of_calls(model, batches.split(1))  # one item proves as much as many
        passes = stack.enter_context(streams(model, [b.path for b in blocks], kinds, shelf))
        for block in blocks:
            own = {s.name for s in block.structures}
            here = {n: m for n, m in found.items() if turns[n].structure.name in own}
            at = next((one for one in passes if one.advance(block.path)), None)
            module = model.get_submodule(block.path)
            replay = Replay.of(module, at) if at is not None else None
            for number, moments in here.items():
                turn = turns[number]
                reached.add(turn.structure.name)
                changed = _parameters_of(model, turn)
                originals.keep(changed)
                with resident(module):
                    before = {n: model.get_parameter(n).detach().clone() for n in changed}
                    with at.awake() if at is not None else nullcontext():
                        why = _turned(model, module, replay, turn, moments)
                    refusals = [reason for reason in of_all_processes(why) if reason]
                    if refusals:
                        refused[turn.structure.name] = refusals[0]
                        put(model, before)
                    else:
                        names += changed
    fixed -= reached | refused.keys()
    refused |= dict.fromkeys(fixed, "no calibration batch reaches it")
    return list(dict.fromkeys(names)), dict(sorted(refused.items()))


def _block_name(structure: Structure) -> str:
    return _without_part(structure.name)


def _without_part(name: str) -> str:
    return name.removesuffix(".qk").removesuffix(".vo")


def _parameters_of(model: nn.Module, turn: Turn) -> list[str]:
    rows = [turn.left, *([turn.right] if turn.right is not None else [])]
    names = [name for row in rows for name in (row.weight, row.bias) if name]
    return names + ([f"{turn.columns}.weight"] if turn.columns else [])


BETWEEN = {
    "attention_qk": "its queries or keys pass through something on the way to the scores, such as "
    "a rotary embedding or a norm",
    "attention_vo": "its values pass through something on the way to the output projection, such "
    "as a norm",
}


READ_ELSEWHERE = "its keys and values lie in a cache that another part of the model reads, too"


UNLIKE = "it is not one pair of projections, such as queries and keys, with a basis of its own"


def _turned(
    model: nn.Module,
    block: nn.Module,
    replay: Replay | None,
    turn: Turn,
    moments: tuple[Tensor, Tensor | None],
) -> str:
    """Turn, and return the reason why it must be put back: "" if the block answers as before.

    Without a replay, in a process whose batches do not reach the block, the others decide.
    """
    for dtype in (torch.float64, torch.float32):
        with in_dtype(block, dtype):
            if replay is None:
                _turn(model, turn, *moments)
                return ""
            cast = replay.in_dtype(dtype)
            try:
                before = tensors_of(cast())
            except Exception:  # a forward that is written for one dtype
                continue
            _turn(model, turn, *moments)
            try:
                apart = difference(before, tensors_of(cast())).relative
            except VerificationError:
                apart = float("inf")
        return "" if apart <= ROUNDING[dtype] else BETWEEN[turn.kind]
    return "its block runs neither in float64 nor in float32 alone"


def _turn(model: nn.Module, turn: Turn, left: Tensor, right: Tensor | None) -> None:
    if turn.right is not None:
        assert right is not None
        _turn_qk(model, turn.left, turn.right, left, right)
    else:
        _turn_vo(model, turn.left, turn.columns, left)


@torch.no_grad()
def _turn_qk(model: nn.Module, q: Rows, k: Rows, of_q: Tensor, of_k: Tensor) -> None:
    """q <- U^T q, k <- V^T k with U V^T = 1, singular values descending."""
    group = q.heads // k.heads
    of_q = of_q.unflatten(0, (k.heads, group)).sum(1)
    root_q, back_q = _roots(of_q)
    root_k, back_k = _roots(of_k)
    r, s, st = torch.linalg.svd(root_q @ root_k)
    half = s.clamp(min=torch.finfo(s.dtype).tiny).sqrt()
    u = back_q @ r * half[:, None, :]
    v = back_k @ st.mT * half[:, None, :]
    _rows_times(model, q, u.mT.repeat_interleave(group, 0))
    _rows_times(model, k, v.mT)


@torch.no_grad()
def _turn_vo(model: nn.Module, v: Rows, reader: str, of_c: Tensor) -> None:
    """v <- M v, W_o <- W_o M^-1, so that W_o's columns come in the order of what they add."""
    layer: Any = model.get_submodule(reader)
    weight = layer.weight if linear_axes(layer) == (0, 1) else layer.weight.T
    heads, group = len(of_c), len(of_c) // v.heads
    per_head = weight.double().unflatten(1, (heads, v.size)).transpose(0, 1)  # heads, out, size
    gram = (per_head.mT @ per_head).unflatten(0, (v.heads, group)).sum(1)
    root_w, _ = _roots(gram)
    root_c, back_c = _roots(of_c.unflatten(0, (v.heads, group)).sum(1))
    _, s, st = torch.linalg.svd(root_w @ root_c)
    half = s.clamp(min=FLOOR * s.amax(1, keepdim=True)).sqrt()
    into = half[:, :, None] * (st @ back_c)
    out_of = root_c @ st.mT / half[:, None, :]
    _rows_times(model, v, into)
    new = per_head @ out_of.repeat_interleave(group, 0)
    weight.copy_(new.transpose(0, 1).flatten(1).to(weight.dtype))


def _roots(second: Tensor) -> tuple[Tensor, Tensor]:
    """The square root and its inverse of symmetric matrices, small eigenvalues raised."""
    values, vectors = torch.linalg.eigh(second)
    largest = values.amax(-1, keepdim=True)
    largest = torch.where(largest > torch.finfo(torch.float32).tiny, largest, 1.0)  # always 0
    root = values.maximum(FLOOR * largest).sqrt()
    return (vectors * root[:, None, :]) @ vectors.mT, (vectors / root[:, None, :]) @ vectors.mT


def _rows_times(model: nn.Module, rows: Rows, by: Tensor) -> None:
    """Multiply each head's rows, weight and bias, by its matrix (heads, size, size)."""
    weight: Tensor = model.get_parameter(rows.weight)
    owner = model.get_submodule(rows.module) if rows.module else None
    if owner is not None and linear_axes(owner) == (1, 0):
        weight = weight.T
    for tensor in (weight, *([model.get_parameter(rows.bias)] if rows.bias else [])):
        part = rows.of(tensor, 0)
        new = by @ part.double().unflatten(0, (rows.heads, rows.size)).reshape(
            rows.heads, rows.size, -1
        )
        rows.put(tensor, new.reshape(part.shape))
