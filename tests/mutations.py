"""JSON with one thing wrong, for tests of whatever reads it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from vlprune.errors import VlpruneError


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, inner in pairs:
        yield from leaves(inner, (*path, key))


WRONG = [None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "x", "", [], {}, [[]], "DEL"]


def mutated(body: Any, rng: random.Random) -> tuple[Any, str]:
    """The same JSON with one wrong or missing value, and where."""
    body = json.loads(json.dumps(body))
    path = rng.choice([p for p in leaves(body) if p])
    wrong = rng.choice(WRONG)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    if wrong == "DEL":
        del inner[path[-1]]
    else:
        inner[path[-1]] = wrong
    return body, f"{path} = {wrong!r}"


def check_message(error: Exception, what: str, names: str = "") -> None:
    """Fail unless it is one message of ours, which names a file."""
    if not isinstance(error, VlpruneError):
        raise AssertionError(what) from error
    assert "\n" not in str(error), what
    assert (names or ".json") in str(error) or (not names and "/m" in str(error)), (
        what,
        str(error),
    )
