"""One device, decided once: where models compute, and how their inputs get there.

:func:`choose` decides, from a recipe's ``device`` or a command's ``--device``. A model is placed
there once; whatever runs afterwards (training, counting, timing, evaluation) stays where the
model's weights are, and moves its inputs with :func:`moved_to`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .errors import RecipeError

__all__ = [
    "all_finite",
    "available",
    "choose",
    "device_name",
    "device_of",
    "moved_to",
    "place",
    "placed",
    "same_random_numbers",
    "use",
]


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of every tensor is finite; the host waits once for all of them."""
    each = [tensor.isfinite().all() for tensor in tensors]
    return not each or bool(torch.stack([one.to(each[0].device) for one in each]).all())


def available() -> tuple[str, ...]:
    """The devices of this machine, the CPU first, as a recipe may name them."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ("cpu",)
    return ("cpu", *(f"{found.type}:{i}" for i in range(torch.accelerator.device_count())))


def choose(wanted: str = "auto") -> torch.device:
    """The device that this process computes on.

    ``auto`` means a CUDA GPU if the machine has one, else the CPU; ``cpu``, ``cuda``, ``cuda:1``,
    ``mps`` and the like name one device. Where several processes run, each has a device of its
    own, so only its type may be named.

    Raises RecipeError if this machine has no such device, or if several processes run and
    ``wanted`` has a number or another type than their devices.
    """
    here = available()
    named = wanted
    if wanted == "auto":
        named = "cuda" if torch.cuda.is_available() else "cpu"
    if named not in here and f"{named}:0" not in here:
        raise RecipeError(
            f"device must be auto or a device of this machine ({', '.join(here)}), not "
            f"{wanted!r}: change it in the recipe, or with --device"
        )
    device = torch.device(named)
    processes = PartialState(cpu=device.type == "cpu")
    if processes.num_processes == 1:
        if device.type != "cpu":
            device = torch.device(device.type, device.index or 0)
        use(device)
        return device
    own = torch.device(processes.device)
    if device.index is not None or device.type != own.type:
        raise RecipeError(
            f"device {wanted!r} cannot be that of {processes.num_processes} processes, each of "
            f"which has one of its own ({own.type}): write auto"
        )
    return own


def use(device: torch.device) -> None:
    """Make accelerate and torch use this device rather than the first one.

    Where several processes run, accelerate has already given each its device: those stay.
    """
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        return
    state.device = device
    if device.type != "cpu" and torch.accelerator.device_count() > 1:
        torch.accelerator.set_device_index(device)


def device_of(model: Any) -> torch.device:
    """The device of the model's weights; an exported model, which shows none, names its own."""
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device(model.device) if weight is None else weight.device


def place(model: Any, device: torch.device) -> Any:
    """The same model object, its weights and buffers moved to ``device``; or a tensor moved."""
    return model.to(device)


@contextmanager
def placed(model: Any, device: torch.device) -> Iterator[None]:
    """The model on ``device`` while the block runs, and back where it was afterwards."""
    before = device_of(model)
    place(model, device)
    try:
        yield
    finally:
        place(model, before)


def moved_to(model: Any, inputs: Any) -> Any:
    """Inputs as the model takes them: on its device, and floating-point ones in its dtype.

    Tensors are moved at any depth of lists and mappings. The dtype changes only for the keywords
    of a forward pass, not for tensors nested in them, such as those of labels.
    """
    moved = send_to_device(inputs, device_of(model))
    if isinstance(moved, Mapping):
        return {name: _in_dtype_of(model, value) for name, value in moved.items()}
    return _in_dtype_of(model, moved)


def on_the_cpu(inputs: Any) -> Any:
    """Inputs with every tensor, at any depth of lists and mappings, on the CPU."""
    return send_to_device(inputs, "cpu")


def _in_dtype_of(model: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if not isinstance(model, nn.Module):  # an export shows no weights
        return value
    weights = (p for p in model.parameters() if p.is_floating_point())
    weight = next(weights, None)
    return value if weight is None else value.to(weight.dtype)


@contextmanager
def same_random_numbers(model: Any) -> Iterator[None]:
    """After the block, torch draws the random numbers that it would have drawn without it.

    A measurement must not change the training around it. Holds for the CPU and the model's GPU.
    """
    device = device_of(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def device_name(device: torch.device) -> str:
    """The name of a device in a report: that of a CUDA GPU, or the device type, as in ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
