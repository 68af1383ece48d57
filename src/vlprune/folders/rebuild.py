"""Rebuilding: a freshly built model is cut to the shapes that a folder holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ..architectures import discover_apart, discover_recorded
from ..cutting.apply import apply_plan
from ..errors import CheckpointError, VlpruneError
from ..files import plain
from ..structures.record import Record
from ..structures.structure import Structure
from .opening import (
    check_memory,
)
from .place import CONFIG
from .weights import check_digest, is_weights

__all__ = ["naming", "rebuild_shapes"]


def rebuild_shapes(
    model: Any, section: Mapping[str, Any], files: Sequence[str | Path] | None = None
) -> Record:
    """Cut a freshly built, still empty model to the shapes that ``section`` describes.

    Returns the record, with this model's names for its structures. The weights will be read from
    ``files``, which must have the digest that the section states, if any. Raises CheckpointError
    if section, model and weights do not belong together.
    """
    paths = [Path(file) for file in files or ()]
    with naming(paths[0].parent / CONFIG if paths else Path(CONFIG)):
        cut, record = _matched(model, Record.from_section(section))
        apply_plan(model, cut, record.plan)
    if paths and all(is_weights(path.name) for path in paths):  # others are variants, with a dtype
        check_memory(model, sum(path.stat().st_size for path in paths), paths[0].parent)
        if section.get("weights"):
            check_digest(paths, section["weights"])
    return record


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make errors raised in the block name the file ``path``, which they are about."""
    try:
        yield
    except VlpruneError as error:
        raise type(error)(f"{plain(path)}: {error}") from error


def _renamings(model: Any) -> list[Any]:
    """How transformers changes the names of weights that another class of this model wrote."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in rules if isinstance(rule, WeightRenaming)]


def _matched(model: Any, record: Record) -> tuple[list[Structure], Record]:
    """The model's structures that the record cut, and the record in the model's own names.

    A folder may be opened by a class one level up or down (AutoModel on a folder written by
    a head class), whose module names lack or gain the base model's prefix, or another prefix that
    transformers changes as it reads the weights.
    """
    recorded = discover_recorded(model, record.plan.attention, record.plan.keep)
    own = {structure.name: structure for structure in recorded}
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    cut, keep, unknown = [], {}, []

    @cache
    def renamings() -> list[Any]:
        return _renamings(model)

    def find(name: str) -> Structure | None:
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            if candidate in own:
                return own[candidate]
        inside = [n for n in own if n.endswith(f".{name}")]  # a class around a plain tower
        if len(inside) == 1:
            return own[inside[0]]
        for renaming in renamings():
            name, _ = renaming.rename_source_key(name)
        return own.get(name)

    @cache
    def apart() -> dict[str, Structure]:
        described = discover_apart(model, record.plan.attention)
        return {structure.name: structure for structure in described}

    for name, units in record.plan.keep.items():
        found = find(name)
        if found is None:
            unknown.append(name)
            continue
        if found.size != record.sizes[name]:
            found = apart().get(found.name, found)
        if found.size != record.sizes[name]:
            raise CheckpointError(
                f"describes {name} with {found.size} units, its vlprune section with "
                f"{record.sizes[name]}: the folder mixes files of two models, copy it again"
            )
        cut.append(replace(found, layout=record.layouts[name]))  # type: ignore[arg-type]
        keep[found.name] = units
    if unknown and type(model).__name__ in (getattr(model.config, "architectures", None) or []):
        raise CheckpointError(
            f"its vlprune section cuts {plain(repr(unknown[0]))}, which a {type(model).__name__} "
            "does not have: the file is damaged, or was written by another version of "
            "transformers or vlprune; use that one"
        )
    share: dict[str, tuple[Any, ...]] = {}
    for name, (source, *paired) in record.plan.share.items():
        target, giver = find(name), find(source)
        if target is not None and giver is None:
            raise CheckpointError(
                f"{name} takes weights from {source}, which a {type(model).__name__} does not "
                "have: load the whole model, call vlprune.materialize on it, and save that"
            )
        if target is not None and giver is not None:
            share[target.name] = (giver.name, *paired)
    return cut, Record(
        replace(record.plan, keep=keep, share=share),
        {structure.name: structure.size for structure in cut},
        {structure.name: structure.layout for structure in cut},
    )
