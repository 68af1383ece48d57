"""The blocks of a model (its repeated layers), in the order of a forward pass, and what is in each.

Statistics are gathered, and repairs made, one block at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.native import native_forward
from ..cutting.padded import stock_name
from ..structures.plan import Plan
from ..structures.structure import Structure
from ..structures.units import owner_of
from .consumers import Consumer, consumers_of
from .moments import of_all_processes
from .taken_apart import called_at, taken_apart

__all__ = ["Block", "blocks_of", "callable_projections", "columns_left", "hooked", "members_of"]


@dataclass(frozen=True)
class Block:
    """A layer at ``path`` with its structures, and their consumers in the order they are called.

    ``again`` is true for a block that a forward pass calls more than once.
    """

    path: str
    structures: tuple[Structure, ...]
    consumers: tuple[Consumer, ...]
    again: bool = False


def blocks_of(
    model: nn.Module, structures: Sequence[Structure], calls: Sequence[Callable[[], Any]]
) -> list[Block]:
    """The blocks that hold the structures, in the order in which forward passes reach them.

    ``calls`` are forward passes, which together reach whatever the batches reach. Blocks that none
    of them reaches, in any process, are left out.
    """
    members = members_of(model, structures)
    consumers = {s.name: consumers_of(model, s) for s in structures}
    called: Counter[str] = Counter()  # keeps the order of first calls
    again: set[str] = set()
    orders: list[list[str]] = []

    def note(path: str, *_: Any) -> None:
        called[path] += 1

    watched = {*members, *(called_at(c.module) for own in consumers.values() for c in own)}
    hooks = ((model.get_submodule(p).register_forward_pre_hook, partial(note, p)) for p in watched)
    with hooked(hooks), torch.no_grad():
        for call in calls:
            called.clear()
            call()
            again |= {path for path, count in called.items() if count > 1}
            orders.append(list(called))
    everywhere = of_all_processes((orders, again))
    again = set().union(*(theirs for _, theirs in everywhere))
    merged = _merged([order for theirs, _ in everywhere for order in theirs])
    order = {path: number for number, path in enumerate(merged)}
    blocks = []
    for path in sorted(order.keys() & members.keys(), key=order.__getitem__):
        own = [c for s in members[path] for c in consumers[s.name] if called_at(c.module) in order]
        own.sort(key=lambda c: order[called_at(c.module)])
        blocks.append(Block(path, tuple(members[path]), tuple(own), path in again))
    return blocks


def columns_left(block: Block, plan: Plan) -> dict[str, Tensor]:
    """{layer: whether each of its columns stays}; several structures may have columns there."""
    by_name, stays = {s.name: s for s in block.structures}, dict[str, Tensor]()
    for c in block.consumers:
        here = stays.setdefault(c.module, torch.ones(c.width, dtype=torch.bool))
        left = c.kept(plan.kept(by_name[c.structure]))
        stays[c.module] = here & torch.zeros_like(here).index_fill(0, left, True)
    return stays


def members_of(model: nn.Module, structures: Sequence[Structure]) -> dict[str, list[Structure]]:
    """The structures of every block, {path of the block: structures}, in no order of execution."""
    members: dict[str, list[Structure]] = defaultdict(list)
    for structure in structures:
        members[_block_of(model, structure)].append(structure)
    for path in sorted(members, key=len):  # a block inside another one belongs to it
        outer = next((p for p in members if p != path and _inside(path, p)), None)
        if outer is not None:
            members[outer] += members.pop(path)
    return members


def _merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order that agrees with all of them, if they agree with each other."""
    merged: list[str] = []
    for order in orders:
        place = 0
        for path in order:
            if path in merged:
                place = merged.index(path)
            else:
                merged.insert(place, path)
            place += 1
    return merged


@contextmanager
def hooked(hooks: Any) -> Iterator[None]:
    """Hooks, given as (register, hook) pairs, that stay while the block runs."""
    handles = []
    try:
        for register, hook in hooks:
            handles.append(register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def callable_projections(model: nn.Module, structures: Sequence[Structure]) -> Iterator[None]:
    """Every nn.MultiheadAttention calls its output projection as a module while the block runs.

    The stock forward passes the projection's weight to one function, so no hook would see its
    input; vlprune's own forward computes the same. Experts get a layer each.
    """
    swapped: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    cores = {s.core for s in structures if s.core}
    try:
        for path in cores:
            module: Any = model.get_submodule(path)
            if type(module) is nn.MultiheadAttention:
                swapped.append((module, type(module), dict(module.__dict__)))
                module.__class__ = native_forward(f"multihead:{stock_name(module)}", type(module))
                adopt: Any = module.adopt
                adopt()
        with taken_apart(model, structures):
            yield
    finally:
        for module, cls, attributes in swapped:
            module.__class__ = cls
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]


def _block_of(model: nn.Module, structure: Structure) -> str:
    """The innermost member of a list of layers that holds the structure, else what holds it."""
    paths = [owner_of(slot.param)[0].split(".") for slot in structure.slots]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if any(common == path for path in paths) and len(paths) > 1 and structure.kind == "ffn":
        common = common[:-1]
    for length in range(len(common), 0, -1):
        holder = model.get_submodule(".".join(common[: length - 1]))
        if isinstance(holder, nn.ModuleList):
            return ".".join(common[:length])
    return ".".join(common)


def _inside(path: str, outer: str) -> bool:
    return not outer or path.startswith(outer + ".")
