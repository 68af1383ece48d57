"""Drop path and dropout for one training: put into a model, and taken out of it again.

A model that was published for use often has neither, though it was trained with both. Nothing of
them is written into the config or the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.padded import is_linear, stock_name
from ..errors import RecipeError, UnsupportedError
from ..processes import world
from ..structures.structure import Structure

__all__ = ["regularised"]

RATES = ("dropout", "attention_dropout", "activation_dropout", "dropout_prob")
"""Numbers on a module that its forward drops by, where it has no ``nn.Dropout`` for that."""


@contextmanager
def regularised(
    trainee: nn.Module,
    model: nn.Module,
    structures: Iterable[Structure],
    drop_path: Mapping[str, float],
    dropout: Mapping[str, float],
) -> Iterator[None]:
    """Train ``trainee``, a module around ``model``, with drop path and dropout inside the block.

    Both map patterns of module names to rates. Evaluation mode turns both off, as usual.

    ``drop_path`` is stochastic depth (Huang et al., ECCV 2016): a residual branch is left out for a
    whole sample, and divided by the probability that it is not. The rate rises evenly from 0 in the
    first layer to the given one in the last, as in timm. ``structures`` are those of the model
    before it was cut: the attention and FFN branches end in their output projections, or in the
    layer's own drop path where it has one. ``dropout`` replaces the rates of all dropout in the
    modules. Where several patterns match, the last one decides.

    Raises RecipeError with a line for every pattern without such branches or dropout,
    UnsupportedError for branches that hooks cannot reach.
    """
    structures, missing = list(structures), []
    with ExitStack() as undo:
        rates: dict[nn.Module, float] = {}
        for pattern, rate in drop_path.items():
            layers = [*_layers(model, structures, pattern).values()]
            if not layers:
                missing.append(f"drop_path: no attention or FFN branch matches {pattern!r}")
            for number, branches in enumerate(layers, 1):
                share = (number - 1) / (len(layers) - 1) if len(layers) > 1 else 1.0
                rates |= dict.fromkeys(branches.values(), rate * share)
        for branch, share in rates.items():
            _drop(branch, share, undo)
        for pattern, rate in dropout.items():
            found = [m for name, m in trainee.named_modules() if _matches(name, pattern)]
            if not sum(_set(module, rate, undo) for module in found):
                missing.append(f"dropout: nothing that matches {pattern!r} has dropout")
        if missing:
            raise RecipeError("\n".join(missing), tuple(missing))
        yield


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name, at any depth, as those of ``rates`` do."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


# -- drop path -------------------------------------------------------------------------


def _layers(
    model: nn.Module, structures: Iterable[Structure], pattern: str
) -> dict[str, dict[str, nn.Module]]:
    """The modules where branches end, by path, of every layer that matches, in order.

    A layer is what the last number in a path counts.
    """
    modules = dict(model.named_modules())
    layers: dict[str, dict[str, nn.Module]] = {}
    for path in _projections(modules, structures):
        if not _matches(path, pattern):
            continue
        counted = re.match(r"(.*\.)?\d+(?=\.)", path)
        layer = counted[0] if counted else path
        own = {name: modules[name] for name in modules if _is_drop_path(name, layer)}
        layers.setdefault(layer, {}).update(own or {path: modules[path]})
    return layers


def _projections(
    modules: Mapping[str, nn.Module], structures: Iterable[Structure]
) -> Iterator[str]:
    """The linear layers that read the units of a structure, whose output joins the residual."""
    for structure in structures:
        for slot in structure.slots:
            path, _, leaf = slot.param.rpartition(".")
            if leaf == "weight" and path in modules and is_linear(modules[path]):
                transposed = stock_name(modules[path]) == "Conv1D"
                if slot.axis == int(not transposed):
                    yield path


def _is_drop_path(name: str, layer: str) -> bool:
    """Some layers hold an ``nn.Identity`` in place of a drop path of rate 0."""
    return name.startswith(f"{layer}.") and name.rpartition(".")[2].startswith("drop_path")


def _drop(branch: nn.Module, rate: float, undo: ExitStack) -> None:
    if isinstance(branch, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise UnsupportedError(
            "drop_path needs branches that end in a module of their own, and nn.MultiheadAttention "
            "computes its projection by itself: leave its layers out of the pattern"
        )
    if hasattr(branch, "drop_prob"):
        _replace(branch, "drop_prob", rate, undo)
    elif rate:
        undo.callback(branch.register_forward_hook(DropPath(rate)).remove)


class DropPath:
    """A hook that leaves out what a module returns, for whole samples, while it trains.

    In a copy or a pickle of the model it does nothing.
    """

    def __init__(self, rate: float = 0.0) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if not (module.training and self.rate):
            return None
        if output.dim() < 3:
            raise UnsupportedError(
                f"drop_path needs one row per sample, and {type(module).__name__} gets all samples "
                "or tokens as rows: leave its layers out of the pattern"
            )
        stays = 1 - self.rate
        shape = (len(output), *[1] * (output.dim() - 1))
        processes, rank = world()  # which draw by one seed: each takes its own part
        drawn = torch.rand((processes, *shape), device=output.device)[rank]
        return output / stays * (drawn < stays)

    def __deepcopy__(self, memo: dict[int, Any]) -> DropPath:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


# -- dropout ---------------------------------------------------------------------------


def _set(module: nn.Module, rate: float, undo: ExitStack) -> int:
    """Set the rate of the dropout in the module itself; returns in how many places."""
    names = ("p",) if isinstance(module, nn.Dropout) else RATES
    found = [name for name in names if type(getattr(module, name, None)) in (float, int)]
    for name in found:
        _replace(module, name, rate, undo)
    return len(found)


def _replace(module: nn.Module, name: str, value: float, undo: ExitStack) -> None:
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, value)
