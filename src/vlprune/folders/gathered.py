"""The weights of a sharded model, gathered one at a time, for the one process that saves them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..structures.shards import whole

__all__ = ["forget", "gather"]

PLACE = "gathered"


def gather(model: Any, folder: Path | None) -> dict[str, Tensor]:
    """The model's whole state; all processes must call this, and all but one give no ``folder``.

    That one writes each tensor into a file in ``folder``, and its state is read from there as it is
    used: no process ever holds more than one whole tensor. The others get nothing. Raises OSError
    or SafetensorError if a file cannot be written, once everything has been gathered.
    """
    state: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    problem: Exception | None = None
    if folder is not None:
        (folder / PLACE).mkdir()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # a tied weight
            state[name] = seen[id(tensor)]
            continue
        full = whole(tensor).detach()
        if folder is None or problem is not None:  # goes on, because the others wait for its part
            continue
        try:
            state[name] = seen[id(tensor)] = _through_disk(full, folder / PLACE / f"{len(state)}")
        except (OSError, SafetensorError) as error:
            problem = error
    if problem is not None:
        raise problem
    return state


def _through_disk(tensor: Tensor, path: Path) -> Tensor:
    save_file({"": tensor.cpu().contiguous()}, path)
    return load_file(path)[""]


def forget(folder: Path) -> None:
    """Remove the files of :func:`gather`."""
    shutil.rmtree(folder / PLACE, ignore_errors=True)
