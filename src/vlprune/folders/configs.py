"""Reads an untrusted ``config.json`` and checks it before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from ..files import MiB, plain, read_json

__all__ = ["check_config", "read_config"]


MOST_LAYERS = 1000


MOST = 2**20
"""The largest number that any config needs, except for vocabularies and positions."""


MOST_WORDS = 2**24
"""The largest number for vocabularies and positions."""


MOST_UNITS = 2**26
"""The most layers times the widest layer: the prices of their units alone take half a gigabyte."""


DEEPEST = 40


_LAYERS = re.compile(r"(layers?|blocks|depths?|stages)$")


_NO_SIZE = re.compile(
    r"seed|_ids?$|^id|token|length|window|flos|theta|base|bytes|version|params|index$"
)


_WORDS = re.compile(r"vocab|positions|max_seq")


_FACTOR = re.compile(r"ratio|factor|multipl|expan")


def read_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a folder. Raises CheckpointError, UnsupportedError."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {plain(folder)}")
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{plain(folder)} holds no config.json: it is not a model")
    config = read_json(path, most=16 * MiB)
    if not isinstance(config, dict):
        raise CheckpointError(f"{plain(path)} is not a JSON object")
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Raise CheckpointError for numbers that no model has, UnsupportedError for foreign code.

    Building a million layers takes minutes and gigabytes even without weights.
    """
    names = config.get("architectures")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise CheckpointError(f"{plain(where)}: architectures must be a list of class names")
    section = config.get("quantization_config")
    if section is not None and not isinstance(section, dict):
        raise CheckpointError(f"{plain(where)}: quantization_config must be an object")
    _check_part(config, plain(where), "", 0)


def _check_part(part: Mapping[str, Any], where: str, above: str, depth: int) -> None:
    """Check one object of a config and the objects nested in it."""
    if depth > DEEPEST:
        raise CheckpointError(f"{where}: {plain(above[:80])} is nested too deeply for a config")
    layers, widest, experts = 0, 0, 1
    for key, value in part.items():
        if key == "quantization_config":
            continue
        path = f"{above}{key}"
        values = value if isinstance(value, list) else [value]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        _check_numbers(key, numbers, where, path)
        if "implementation" in key:
            _check_kernels(value, where, path)
        whole = [n for n in numbers if isinstance(n, int)]
        if whole and not _NO_SIZE.search(key):
            most = max(whole)
            if _LAYERS.search(key):
                layers = max(layers, sum(whole))
            elif "expert" in key:
                experts = max(experts, most)
            elif not _WORDS.search(key):
                widest = max(widest, most)
        for inner in values:
            if isinstance(inner, list):
                inner = {"list": inner}
            if isinstance(inner, dict):
                _check_part(inner, where, f"{path}.", depth + 1)
    if layers > MOST_LAYERS or layers * widest > MOST_UNITS or layers * experts > 200 * MOST_LAYERS:
        raise CheckpointError(
            f"{where}: {plain(above)}{layers:,} layers of up to {widest:,} units are more than any "
            "model has: the config is damaged, or no config of a model"
        )


def _check_numbers(key: str, numbers: list[Any], where: str, path: str) -> None:
    most: float = MOST
    if _LAYERS.search(key):
        most = MOST_LAYERS
    elif _WORDS.search(key):
        most = MOST_WORDS
    for number in numbers:
        if isinstance(number, float):
            bad = bool(_FACTOR.search(key)) and not abs(number) <= 1e5
        else:
            bad = not _NO_SIZE.search(key) and abs(number) > most
        if bad:
            shown = f"{float(number):.3g}" if abs(number) < 1e300 else "a huge number"
            raise CheckpointError(
                f"{where}: {plain(path)} is {shown}, more than any model has: the config is "
                "damaged, or no config of a model"
            )


def _check_kernels(value: object, where: str, path: str) -> None:
    """Refuse a name with a slash: it is a repository whose code would be fetched and run."""
    values = value.values() if isinstance(value, dict) else [value]
    if any(isinstance(one, str) and "/" in one for one in values):
        raise UnsupportedError(
            f"{where}: {plain(path)} names a kernel of a repository, whose code would run: remove "
            "this entry, or load the model yourself and use the library"
        )
