"""A plan: which units stay and which share weights, as plain data, in JSON, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from ..errors import PlanError, did_you_mean
from ..files import parse_json, plain, read_text, shown, write_text
from .structure import AttentionUnit, ExpertUnit, Structure

__all__ = ["Plan"]

FORMAT = "vlprune.structures.plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Which units of which structures stay, and which take their weights from another's.

    ``keep`` maps a structure's name to the units that stay, ascending; a structure that is absent
    stays whole. ``share`` maps a structure to ``(source, units)``, or to ``(source, units, source
    units)`` where the unit numbers differ: each of the units takes its weights from the unit of
    the same number in the source, or from the source unit at the same place in the list, and keeps
    its own bias. A source may itself share. A unit whose source unit does not stay does not stay
    either. ``attention`` is the attention unit that the plan counts in, ``experts`` the unit of
    experts that are one parameter. ``fingerprint`` names the
    dense model that the plan was made for (``Description.fingerprint``); empty means "do not
    check".

    Raises PlanError for an entry that is malformed or empty, or that repeats a unit.
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    share: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    attention: AttentionUnit = "head_dim"
    fingerprint: str = ""
    experts: str = "neuron"

    def __post_init__(self) -> None:
        keep = {name: _units(name, units) for name, units in self.keep.items()}
        object.__setattr__(self, "keep", keep)
        share = {name: _share(name, entry) for name, entry in self.share.items()}
        object.__setattr__(self, "share", share)

    def kept(self, structure: Structure) -> tuple[int, ...]:
        """The units of ``structure`` that stay, whether their weights are its own or shared."""
        units = self.keep.get(structure.name, tuple(range(structure.size)))
        if structure.name not in self.share:
            return units
        gone = set(self.share[structure.name][1]) - self.shared(structure).keys()
        return tuple(unit for unit in units if unit not in gone)

    def shared(self, structure: Structure) -> dict[int, int]:
        """The units of ``structure`` that stay with another's weights: {unit: source's unit}."""
        return self._alive(structure.name) if structure.name in self.share else {}

    def _alive(self, name: str, below: tuple[str, ...] = ()) -> dict[int, int]:
        """The shared units that a structure and its source keep. Raises PlanError for a circle."""
        if name in below:
            raise PlanError(f"the plan shares in a circle: {' from '.join([*below, name])}")
        source, units, theirs = self.share[name]
        kept = set(self.keep.get(name, units))
        there = set(self.keep.get(source, theirs))
        if source in self.share:
            there -= set(self.share[source][1]) - self._alive(source, (*below, name)).keys()
        pairs = zip(units, theirs, strict=True)
        return {unit: other for unit, other in pairs if unit in kept and other in there}

    def check(self, structures: Sequence[Structure], fingerprint: str = "") -> None:
        """Raise PlanError unless every entry fits ``structures``, and ``fingerprint`` if given."""
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise PlanError(
                "this plan was made for another model (fingerprint "
                f"{plain(self.fingerprint)[:40]}, this model has {fingerprint}): make a new plan, "
                "or load the model it was made for"
            )
        sizes = {s.name: s.size for s in structures}
        for name, units in self.keep.items():
            if name not in sizes:
                raise PlanError(
                    f"the plan names the structure {shown(name)}, which this model does not "
                    f"have.{did_you_mean(name, sizes)}"
                )
            if units[-1] >= sizes[name]:
                raise PlanError(
                    f"the plan keeps unit {units[-1]} of {shown(name)}, which has only "
                    f"{sizes[name]} units (0 to {sizes[name] - 1})"
                )
        for name, (source, units, theirs) in self.share.items():
            for one in (name, source):
                if one not in sizes:
                    raise PlanError(
                        f"the plan shares with the structure {shown(one)}, which this model does "
                        f"not have.{did_you_mean(one, sizes)}"
                    )
            for one, last in ((name, units[-1]), (source, max(theirs))):
                if last >= sizes[one]:
                    raise PlanError(
                        f"the plan shares units of {shown(name)} from {shown(source)} up to "
                        f"number {last}, but {shown(one)} has only {sizes[one]} units "
                        f"(0 to {sizes[one] - 1})"
                    )
        for structure in structures:
            if len(self.keep.get(structure.name, range(structure.least))) < structure.least:
                few, groups = len(self.keep[structure.name]), structure.gates[0].repeat
                raise PlanError(
                    f"the plan keeps {few} of the experts of {shown(structure.name)}: every token "
                    f"goes to {structure.least}, so as many must stay"
                    if groups == 1
                    else f"the plan keeps {few} experts in each of the {groups} groups of "
                    f"{shown(structure.name)}: a token finds enough only if {structure.least} stay"
                )
            if structure.name in self.share and not self.kept(structure):
                raise PlanError(
                    f"the plan leaves nothing of {shown(structure.name)}: every unit that stays is "
                    f"shared from one of {shown(self.share[structure.name][0])} that does not"
                )

    def to_json(self) -> str:
        """The plan as JSON text."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "attention": self.attention,
            "fingerprint": self.fingerprint,
            **({} if self.experts == "neuron" else {"experts": self.experts}),
            "keep": {name: list(self.keep[name]) for name in sorted(self.keep)},
            "share": {
                name: [source, list(units)] + ([] if units == theirs else [list(theirs)])
                for name, (source, units, theirs) in sorted(self.share.items())
            },
        }
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote as ``text``. Raises PlanError for any other text."""
        body = parse_json(text, "the plan", PlanError)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise PlanError(f'this is not a plan: it lacks "format": "{FORMAT}"')
        if body.get("version") != VERSION:
            raise PlanError(
                f"the plan has version {shown(body.get('version'))}, this vlprune reads {VERSION}: "
                "use the vlprune that wrote it, or make the plan anew"
            )
        known = {"format", "version", "attention", "fingerprint", "experts", "keep", "share"}
        for key in body.keys() - known:
            raise PlanError(f"the plan has the unknown key {shown(key)}.{did_you_mean(key, known)}")
        unit = _one_of(body, "attention", get_args(AttentionUnit))
        experts = _one_of(body, "experts", get_args(ExpertUnit))
        keep, share = body.get("keep", {}), body.get("share", {})
        if not isinstance(keep, dict) or not isinstance(share, dict):
            raise PlanError("the plan's 'keep' and 'share' must be JSON objects")
        return cls(
            keep=keep,
            share=share,
            attention=unit,
            fingerprint=_text(body, "fingerprint", ""),
            experts=experts,
        )

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path``, whole or not at all. Raises PlanError if that fails."""
        write_text(path, self.to_json() + "\n", PlanError)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read the plan at ``path``. Raises PlanError if it is missing or malformed."""
        try:
            text = read_text(path, PlanError)
        except PlanError as error:
            raise PlanError(f"cannot read the plan: {error}") from None
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{plain(path)}: {error}") from None


def _text(body: Mapping[str, Any], key: str, default: str) -> str:
    value = body.get(key, default)
    if not isinstance(value, str):
        raise PlanError(f"the plan's {key!r} must be a text, not {shown(value)}")
    return value


def _one_of(body: Mapping[str, Any], key: str, units: Sequence[Any]) -> Any:
    """The unit under ``key``, the first one by default."""
    unit = _text(body, key, units[0])
    if unit not in units:
        raise PlanError(f"the plan's {key!r} must be one of {', '.join(units)}, not {shown(unit)}")
    return unit


def _share(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """``(source, units, source units)``, units ascending. Raises PlanError for a bad entry."""
    is_list = isinstance(entry, Sequence) and not isinstance(entry, str | bytes)
    if not is_list or not 2 <= len(entry) <= 3 or not isinstance(entry[0], str):
        raise PlanError(
            f"what the plan shares of {shown(name)} must be [source, units] or [source, units, "
            f"source units], not {shown(entry)}"
        )
    source, *lists = entry
    units = _units(name, lists[0])
    listed = list(lists[0])
    others = listed
    if len(lists) == 2:
        others = _numbers(source, lists[1])
    if len(others) != len(listed):
        raise PlanError(
            f"the plan shares {len(listed)} units of {shown(name)} from {len(others)} of "
            f"{shown(source)}"
        )
    pairing = dict(zip(listed, others, strict=True))
    return source, units, tuple(pairing[unit] for unit in units)


def _units(name: str, units: Any) -> tuple[int, ...]:
    """``units`` as an ascending tuple. Raises PlanError if they repeat, are negative or empty."""
    listed = sorted(_numbers(name, units))
    for unit, following in pairwise(listed):
        if unit == following:
            raise PlanError(f"the plan lists unit {shown(unit)} of {shown(name)} more than once")
    return tuple(listed)


def _numbers(name: str, units: Any) -> list[int]:
    """``units`` as a list of unit numbers. Raises PlanError for other values or an empty list."""
    if isinstance(units, str | bytes | Mapping) or not hasattr(units, "__iter__"):
        raise PlanError(f"the plan must list the units of {shown(name)}, not {shown(units)}")
    listed = list(units)
    for unit in listed:
        if isinstance(unit, bool) or not isinstance(unit, int):
            raise PlanError(
                f"the plan lists {shown(unit)} as a unit of {shown(name)}: units are integers"
            )
        if unit < 0:
            raise PlanError(
                f"the plan lists unit {shown(unit)} of {shown(name)}: units count from 0"
            )
    if not listed:
        raise PlanError(f"the plan keeps nothing of {shown(name)}: at least one unit must stay")
    return listed
