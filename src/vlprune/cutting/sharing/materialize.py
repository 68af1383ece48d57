"""Plain weights in place of shared ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...structures.record import read_record, write_record
from .ties import untie

__all__ = ["materialize"]


def materialize(model: Any) -> Any:
    """The same model object with plain dense layers in place of shared weights.

    It gives the same outputs, faster (nothing is put together any more) and with more memory;
    from here on its units are trained, saved and cut each for itself.
    """
    record = read_record(model)
    untie(model)
    if record is not None and record.plan.share:
        plan = replace(record.plan, keep=record.alive(), share={})
        write_record(model, replace(record, plan=plan))
    return model
