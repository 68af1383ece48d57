"""Agreement between processes, which must all decide on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..errors import VlpruneError
from ..processes import add_up, world
from ..structures.plan import Plan
from ..structures.structure import Structure

__all__ = ["agreed", "averaged", "check_same_plan", "mean_gradients"]


Value = TypeVar("Value")


def agreed(find: Callable[[], Value]) -> Value:
    """The first process's result of ``find``, in all processes; ``find`` runs in the first only."""
    shared = [find() if PartialState().is_main_process else None]
    first: Value = broadcast_object_list(shared)[0]
    return first


def mean_gradients(
    structures: Sequence[Structure], gradients: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """The mean over all processes, for the structures that any process has reached.

    Gates are no parameters of the model, so DDP does not average their gradients. A process whose
    batch did not reach a structure (no picture in it, say) counts as zero there, and every process
    sends the same numbers whatever its batch was.
    """
    if world()[0] == 1:
        return dict(gradients)
    parts = [
        gradients[s.name].float() if s.name in gradients else torch.zeros(s.size, device=device)
        for s in structures
    ]
    reached = torch.tensor([float(s.name in gradients) for s in structures], device=device)
    together = add_up(torch.cat([*parts, reached]))
    *means, reached = together.split([*(s.size for s in structures), len(structures)])
    return {
        s.name: mean / world()[0]
        for s, mean, count in zip(structures, means, reached.tolist(), strict=True)
        if count
    }


def averaged(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over all processes of tensors that each of them has."""
    if world()[0] == 1:
        return dict(values)
    names = sorted(values)
    together = add_up(torch.cat([values[name] for name in names])) / world()[0]
    parts = together.split([len(values[name]) for name in names])
    return dict(zip(names, parts, strict=True))


def check_same_plan(plan: Plan) -> None:
    """Raise VlpruneError unless all processes are about to make the same cut."""
    if world()[0] == 1:
        return
    plans: list[str] = [""] * world()[0]
    dist.all_gather_object(plans, plan.to_json())
    if len(set(plans)) > 1:
        raise VlpruneError(
            "the processes have made different plans, so nothing was cut: every rank needs the "
            "same seed, the same dense weights and the same number of compressor.step calls"
        )
