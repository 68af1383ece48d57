"""Models that a DeepSpeed engine trains.

ZeRO-1 and ZeRO-2 leave weights whole, ZeRO-3 splits them over the processes: each module's hooks
gather its weights while it runs. A cut takes these hooks off, gathers one weight at a time and has
DeepSpeed split its smaller successor. The engine itself cannot go on: its optimizer owns copies of
the old weights. So a cut ends it, and leaves the model ready for a new one. A training of a recipe
has an engine of its own, which ends with it and leaves whole weights.

The calls are DeepSpeed's own (``GatheredParameters``, ``convert_to_zero_parameters``, ``destroy``).
What is found by the way it is built are its optimizer, through the hooks on gradients, and the
names under which it leaves things in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..structures.shards import is_zero, whole
from .layerwise import held_weights, layerwise

__all__ = [
    "end_engine",
    "engine_aside",
    "is_split",
    "loss_scale",
    "optimizer_of",
    "running",
    "split_again",
]

NEW_ENGINE = (
    "give the small model to a new engine (deepspeed.initialize, a new Accelerator or a new "
    "Trainer), or save it by vlprune.save and go on from the folder in a new process"
)


def is_split(model: nn.Module) -> bool:
    """Whether DeepSpeed's ZeRO-3 has split the model's weights over processes."""
    return any(map(is_zero, model.parameters()))


def optimizer_of(model: nn.Module) -> Any:
    """DeepSpeed's optimizer that the gradients of the model's weights go to; None without one."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
            found = (_owner(hook) for hook in hooks.values())
            return next((one for one in found if one is not None), None)
    return None


def _owner(function: Any, depth: int = 3) -> Any:
    """The ZeRO optimizer that a function refers to, itself or through one that it wraps."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if any(cls.__name__ == "ZeROOptimizer" for cls in type(inside).__mro__):
            return inside
        if depth and callable(inside) and (found := _owner(inside, depth - 1)) is not None:
            return found
    return None


def loss_scale(model: nn.Module) -> float:
    """The factor that DeepSpeed multiplies the loss by before its next backward pass."""
    return float(getattr(optimizer_of(model), "loss_scale", 1.0))


def split_again(old: nn.Parameter, new: nn.Parameter) -> bool:
    """Split the whole parameter ``new`` as ``old`` is; False if ``old`` is whole."""
    if not is_zero(old):
        return False
    old.convert_to_zero_parameters([new])  # type: ignore[attr-defined]
    return True


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Let a model run whose weights ZeRO-3 has split, whether or not an engine gathers them.

    Every layer gets its weights when it is called, and gives them back.
    """
    if not is_split(model):
        yield
        return
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    put_back = _take_hooks(model)
    try:
        with layerwise(model, dtype, held_weights(model)):
            yield
    finally:
        put_back()


@contextmanager
def engine_aside(model: nn.Module) -> Iterator[None]:
    """A cut of the model, without its DeepSpeed engine, which ends unless the block raises."""
    optimizer, split = optimizer_of(model), is_split(model)
    put_back = _take_hooks(model)
    try:
        yield
    except BaseException:
        put_back()
        raise
    if optimizer is not None:
        optimizer.destroy()
        optimizer.step = optimizer.backward_prologue = _refuse_training
    if split:
        _forget_engine(model)
        model.register_forward_pre_hook(_refuse_forward)


@torch.no_grad()
def end_engine(model: nn.Module) -> None:
    """End the engine that trains the model, which then has its own weights again.

    They are whole in every process and as precise as the engine knew them: in float32 where it kept
    a copy in float32. ZeRO-3's split parameters give way to new ones; all processes must call this.
    Does nothing to a model without an engine.
    """
    optimizer, split = optimizer_of(model), is_split(model)
    if optimizer is None and not split:
        return
    _take_hooks(model)
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is None:
                continue
            if id(own) not in known:
                known[id(own)] = _whole_again(own)
            module._parameters[name] = known[id(own)]
    if optimizer is not None:
        optimizer.destroy()
    _forget_engine(model)


def _whole_again(own: nn.Parameter) -> nn.Parameter:
    """The parameter with its whole weight: itself, or a new one if ZeRO-3 has split it."""
    from deepspeed.utils import safe_get_full_fp32_param

    copied = own.requires_grad and (hasattr(own, "_z3_optimizer") or hasattr(own, "_hp_mapping"))
    copy: Tensor | None = safe_get_full_fp32_param(own) if copied else None
    if is_zero(own):
        value = whole(own) if copy is None else copy.detach().clone()
        return nn.Parameter(value, requires_grad=own.requires_grad)
    own.grad = None
    if copy is not None:
        own.data = copy.detach().clone()
    return own


def _refuse_training(*_args: Any, **_kwargs: Any) -> None:
    raise UnsupportedError(
        f"this DeepSpeed engine took the model's weights over before they were cut, so it would "
        f"train weights that are gone: {NEW_ENGINE}"
    )


def _refuse_forward(module: nn.Module, _args: Any) -> None:
    if is_split(module) and not any(map(_is_deepspeeds, module._forward_pre_hooks.values())):
        raise UnsupportedError(
            "this model was cut while DeepSpeed ZeRO-3 held its weights, and nothing gathers them "
            f"now: {NEW_ENGINE}"
        )


def _is_deepspeeds(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def _take_hooks(model: nn.Module) -> Callable[[], None]:
    """Take DeepSpeed's hooks off the model; returns the call that puts them back."""
    before: list[tuple[Any, dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            taken = [number for number, hook in hooks.items() if _is_deepspeeds(hook)]
            if taken:
                before.append((hooks, dict(hooks)))
            for number in taken:
                del hooks[number]

    def put_back() -> None:
        for hooks, members in before:  # in their old order, without others that have gone since
            now = dict(hooks)
            hooks.clear()
            hooks.update({n: h for n, h in members.items() if n in now or _is_deepspeeds(h)})
            hooks.update(now)

    return put_back


def _forget_engine(model: nn.Module) -> None:
    """Take away what an ended ZeRO-3 engine has left in a model, and a new one would use."""
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "_external_params", "_original_parameters"):
            module.__dict__.pop(name, None)
        if type(module._parameters).__name__ == "ZeROOrderedDict":
            module._parameters = dict(module._parameters)
    for parameter in model.parameters():
        parameter.__dict__.pop("_z3_optimizer", None)
