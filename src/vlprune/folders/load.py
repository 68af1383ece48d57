"""Loads and checks the model in a folder that vlprune wrote, with the model's own class."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import plain
from ..structures.record import METHOD, Record
from .configs import read_config
from .opening import (
    from_folder,
    guarded,
    model_class,
)
from .place import CONFIG, is_being_saved
from .rebuild import naming

__all__ = ["load"]


def load(folder: str | Path, **kwargs: Any) -> Any:
    """The model in a folder that :func:`save` (or ``save_pretrained`` of a cut model) wrote.

    Its class is the one named in ``config.json``; ``kwargs`` go to ``from_pretrained``. Nothing is
    written. While another process saves into the folder, loading is retried for some seconds.

    Raises CheckpointError for a folder that is missing, incomplete, damaged or without a plan, with
    a clear message where ``from_pretrained`` would raise from deep inside; UnsupportedError for a
    class that is not known or a config that names foreign code.
    """
    folder = Path(folder)
    for seconds in (*WAITS, None):
        before = _version(folder)
        try:
            model = _loaded(folder, kwargs)
        except CheckpointError:
            saving = is_being_saved(folder)
            if seconds is None and saving:
                raise CheckpointError(
                    f"{plain(folder)} is being saved by another process: load it when that has "
                    "ended"
                ) from None
            if seconds is None or (not saving and _version(folder) == before):
                raise
        else:
            if seconds is None or _version(folder) == before:
                return model
        time.sleep(seconds)
    raise AssertionError


WAITS = (0.1, 0.3, 1.0, 2.0, 4.0)
"""Seconds between tries of :func:`load` while the folder changes."""


def _version(folder: Path) -> tuple[int, int, int] | None:
    """A value that changes whenever a save puts another config in place."""
    try:
        facts = (folder / CONFIG).stat()
    except (OSError, ValueError):
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _loaded(folder: Path, kwargs: Mapping[str, Any]) -> Any:
    if folder.is_dir() and not (folder / CONFIG).exists() and is_being_saved(folder) is False:
        raise CheckpointError(f"a save into {plain(folder)} was stopped before its end: save again")
    config = read_config(folder)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{plain(folder)}/config.json has no vlprune section, so the plan of this model is not "
            "known: restore config.json from where the folder was saved, or load an uncut model "
            "with from_pretrained"
        )
    with naming(folder / CONFIG):
        Record.from_section(section)
    with guarded(folder, "load"):
        cls = model_class(config, folder)
        model, info = from_folder(cls, folder, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(
            f"{plain(folder)} lacks the weights of {plain(missing[0])} and {len(missing) - 1} "
            "more: copy the folder again"
        )
    return model
