"""Reads a recipe's YAML as plain values, bounded, and reports keys that would silently be lost.

PyYAML's safe loader makes only plain values, but it shares the values that an alias repeats (so a
kilobyte can stand for a terabyte), recurses as deep as the text is nested, and takes the last of
two equal keys. So nodes are counted and checked before any value is made from them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import RecipeError
from ..files import MiB, plain, read_text
from .checks import Mistake

__all__ = ["override", "read"]

MOST_VALUES = 10_000
DEEPEST = 20
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in "str int float bool null map seq".split()}
TEXT, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Refused(Exception):
    """The reason why a text is not read, in words."""


class _Loader(yaml.SafeLoader):
    """The safe loader, ended early by too many or too deeply nested values. Dates stay text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rows if not tag.endswith(":timestamp")]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.count = self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.count, self.depth = self.count + 1, self.depth + 1
        if self.count > MOST_VALUES or self.depth > DEEPEST:
            raise _Refused(TOO_MUCH)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


TOO_MUCH = f"it holds more than {MOST_VALUES:,} values, or more than {DEEPEST} levels of them"


def read(path: str | Path) -> tuple[dict[str, Any], list[Mistake]]:
    """The values in a YAML file, and the mistakes in its keys.

    Raises RecipeError for a file that cannot be read, is not valid YAML or holds no mapping.
    """
    name = plain(path)
    if not os.path.lexists(path):
        raise RecipeError(f"there is no recipe {name}")
    try:
        value, wrong = _parse(read_text(path, RecipeError, most=MiB))
    except _Refused as reason:
        raise RecipeError(f"{name} is not a recipe: {reason}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{name} must be a mapping of keys to values, as in task: vqa")
    return value, wrong


def override(body: dict[str, Any], text: str) -> tuple[str, list[Mistake]]:
    """Set ``a.b=value``, the value being YAML, in nested mappings; returns the key and mistakes."""
    key, equals, given = text.partition("=")
    name = plain(key)
    *parents, leaf = key.split(".")
    if not equals or not all([*parents, leaf]):
        said = f"{plain(text)[:60]!r} is not of the form key=value, as in budget.params=0.3"
        return text, [Mistake(text, said)]
    try:
        value, wrong = _parse(given)
    except _Refused as reason:
        return name, [Mistake(name, f"the value of {name}= is no value: {reason}")]
    for parent in parents:
        body = body.setdefault(parent, {})
        if not isinstance(body, dict):
            return name, [
                Mistake(name, f"{name}: {plain(parent)} has a value and no keys below it")
            ]
    body[leaf] = value
    return name, [Mistake(f"{name}.{one.key}", f"{name}: {one.line}") for one in wrong]


def _parse(text: str) -> tuple[Any, list[Mistake]]:
    """The value of a YAML text, with no part shared, and the mistakes in its keys."""
    wrong: list[Mistake] = []
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, wrong
        _look_at(node, "", wrong, {})
        return _unshared(loader.construct_document(node)), wrong
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _Refused(f"{place}not valid YAML ({plain(error.problem)})") from None
    except yaml.reader.ReaderError as error:
        raise _Refused(
            f"not valid YAML (the character {error.character!r} at position {error.position})"
        ) from None
    except RecursionError:
        raise _Refused(TOO_MUCH) from None
    except (ValueError, LookupError, TypeError, AttributeError):  # such as for "!!int ''"
        raise _Refused("not valid YAML (a value is not what its tag says)") from None


def _look_at(
    node: Any, key: str, wrong: list[Mistake], seen: dict[int, int], depth: int = 1
) -> int:
    """The number of values in a node, with aliases expanded; records and drops wrong keys."""
    if id(node) in seen:
        return seen[id(node)]
    if depth > DEEPEST:
        raise _Refused(TOO_MUCH)
    count = 1
    if node.tag not in TAGS:
        line = f"line {node.start_mark.line + 1}"
        raise _Refused(f"{line}: the tag {plain(node.tag)} is not read, only plain values are")
    if isinstance(node, yaml.SequenceNode):
        count += sum(_look_at(entry, key, wrong, seen, depth + 1) for entry in node.value)
    elif isinstance(node, yaml.MappingNode):
        node.value = _named(node, key, wrong)
        for name, value in node.value:
            count += _look_at(value, _below(key, name.value), wrong, seen, depth + 1)
    if count > MOST_VALUES:
        raise _Refused(TOO_MUCH)
    seen[id(node)] = count
    return count


def _named(node: Any, key: str, wrong: list[Mistake]) -> list[Any]:
    """The pairs of a mapping whose keys are text, each key once; merges are kept."""
    first: dict[str, Any] = {}
    pairs = []
    for name, value in node.value:
        line = name.start_mark.line + 1
        if name.tag == MERGE:
            pairs.append((name, value))
        elif name.tag != TEXT:
            word = plain(name.value) if isinstance(name, yaml.ScalarNode) else "of several values"
            place = f" of {key}" if key else ""
            text = f"line {line}: the key {word}{place} is not text: put it in quotes"
            wrong.append(Mistake(f"{key}.{word}", text))
        elif name.value in first:
            place = _below(key, name.value)
            wrong.append(
                Mistake(place, f"{place} is there twice, on lines {first[name.value]} and {line}")
            )
        else:
            first[name.value] = line
            pairs.append((name, value))
    return pairs


def _below(key: str, name: str) -> str:
    return plain(f"{key}.{name}" if key else name)


def _unshared(value: Any) -> Any:
    """A copy in which no part is shared, so that setting one key changes only that key."""
    if isinstance(value, dict):
        return {name: _unshared(entry) for name, entry in value.items()}
    return [_unshared(entry) for entry in value] if isinstance(value, list) else value
