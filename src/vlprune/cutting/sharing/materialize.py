"""Plain weights in place of shared ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...structures.record import read_record, write_record
from .ties import untie

__all__ = ["materialize"]


def materialize(model: Any) -> Any:
    """The same model object with plain dense layers in place of shared weights.

    The model gives the same outputs, faster (no weight is put together any more) and with more
    memory; from here on each unit is trained, saved and cut on its own.
    """
    record = read_record(model)
    untie(model)
    if record is not None and record.plan.share:
        plan = replace(record.plan, keep=record.alive(), share={})
        write_record(model, replace(record, plan=plan))
    return model
