"""A model that computes with the weights of one layer at a time.

While a proof runs, no module holds its own weights. A layer gets them when it is called, in the
dtype of the proof, and gives them back when it returns. So a pass in float64 needs no second copy
of the model, and a pass of a model that is larger than memory needs one layer of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..structures.shards import is_part, shape_of, whole
from .widened import as_asked

__all__ = ["Pieces", "Weights", "held_weights", "layerwise"]

Weights = Callable[[str], Tensor]
"""Gives the parameter or buffer of a name, from memory or from a file."""

Pieces = Literal["layers", "modules", "model"]
"""What gets its weights at a time. ``layers``: the members of the outermost lists of layers, and
large modules outside of them. ``modules``: every module by itself, for layers that are not called
as modules. ``model``: everything, for modules that read the weights of others."""

LARGE = 2**20
"""Numbers in a module outside of all layers, such as a table of words, that comes and goes."""


def held_weights(model: nn.Module) -> Weights:
    """The weights that the model holds now, also after its modules have lost them.

    Those that lie in parts are gathered when they are asked for.
    """
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    held = {name: tensor if is_part(tensor) else tensor.detach() for name, tensor in named}
    return lambda name: whole(held[name]).detach()


@contextmanager
def layerwise(
    model: nn.Module, dtype: torch.dtype, weights: Weights, pieces: Pieces = "layers"
) -> Iterator[None]:
    """The model computing in ``dtype`` while the block runs, with the given weights.

    Modules that have not been called hold NaN in place of every weight: what is computed from one
    that was not there is seen in the outputs. Parameters are the same objects afterwards.
    """
    with ExitStack() as undo:
        for path, module in model.named_modules():
            _empty(module, path, dtype, weights, undo)
        resident = {path: module for path, module in model.named_modules() if module._parameters}
        for path, layer in _layers(model, pieces):
            inside = {
                f"{path}.{name}" if name else path: module for name, module in layer.named_modules()
            }
            if pieces == "modules" or isinstance(layer, nn.Embedding | nn.Linear):
                inside = {path: layer}
            inside = {name: resident.pop(name) for name in inside if name in resident}
            placeholders = [(module, dict(module._parameters)) for module in inside.values()]
            fill = partial(_fill, inside, dtype, weights)
            give_back = partial(_give_back, placeholders)
            undo.callback(layer.register_forward_pre_hook(fill, prepend=True).remove)
            undo.callback(layer.register_forward_hook(give_back, always_call=True).remove)
        _fill(resident, dtype, weights)
        yield


def _layers(model: nn.Module, pieces: Pieces) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what comes and goes, outermost first."""
    if pieces == "model":
        return
    if pieces == "modules":
        yield from ((path, m) for path, m in model.named_modules() if any(_floating(m)))
        return
    waiting, seen = [("", model)], set[int]()
    while waiting:
        path, module = waiting.pop()
        is_list = isinstance(module, nn.ModuleList)
        is_list = is_list and not isinstance(module, parametrize.ParametrizationList)
        for name, child in module.named_children():
            place = f"{path}.{name}".lstrip(".")
            if id(child) in seen:
                continue
            seen.add(id(child))
            large = sum(math.prod(shape_of(p)) for p in child.parameters(recurse=False)) >= LARGE
            if is_list or (large and isinstance(child, nn.Embedding | nn.Linear)):
                yield place, child
            else:
                waiting.append((place, child))


def _floating(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.is_floating_point():
            yield leaf, parameter


def _empty(
    module: nn.Module, path: str, dtype: torch.dtype, weights: Weights, undo: ExitStack
) -> None:
    """Take a module's weights away; its buffers, which are small, are widened at once."""
    for leaf, parameter in list(_floating(module)):
        undo.callback(module._parameters.__setitem__, leaf, parameter)
        device = "cpu" if parameter.is_meta else parameter.device
        nothing = torch.full((), torch.nan, dtype=dtype, device=device).expand(shape_of(parameter))
        module._parameters[leaf] = nn.Parameter(nothing, parameter.requires_grad)
    for leaf, buffer in list(module._buffers.items()):
        if buffer is None:
            continue
        undo.callback(module._buffers.__setitem__, leaf, buffer)
        name = f"{path}.{leaf}".lstrip(".")
        real = weights(name) if buffer.is_meta else buffer
        module._buffers[leaf] = real.to(dtype) if real.is_floating_point() else real


@torch.no_grad()
def _fill(modules: dict[str, nn.Module], dtype: torch.dtype, weights: Weights, *_: Any) -> None:
    """Give modules {path: module} their weights."""
    for path, module in modules.items():
        for leaf, parameter in list(_floating(module)):
            with as_asked():
                weight = weights(f"{path}.{leaf}".lstrip(".")).to(dtype)
            module._parameters[leaf] = nn.Parameter(weight, parameter.requires_grad)


def _give_back(placeholders: list[tuple[nn.Module, dict[str, Any]]], *_: Any) -> None:
    for module, empty in placeholders:
        module._parameters.update(empty)
