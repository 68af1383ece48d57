"""A plan: which units stay and which are shared with what. Plain data, JSON, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import PlanError, did_you_mean
from .structure import Structure

__all__ = ["Plan"]

FORMAT = "vlprune.plan"
VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Which units of which structures stay.

    ``keep`` maps a structure's name to the units that stay, ascending; a structure that
    is absent stays whole. ``share`` maps a structure to ``(source, units)`` whose weights
    it takes from the source. ``fingerprint`` names the dense model the plan was made for
    (``Description.fingerprint``); empty means "do not check".
    """

    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    share: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    attention: str = "head_dim"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        keep = {name: _units(name, units) for name, units in self.keep.items()}
        object.__setattr__(self, "keep", keep)

    def kept(self, structure: Structure) -> tuple[int, ...]:
        """The units of ``structure`` that stay."""
        return self.keep.get(structure.name, tuple(range(structure.size)))

    def check(self, structures: Sequence[Structure], fingerprint: str = "") -> None:
        """Raise PlanError unless every entry fits ``structures``."""
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise PlanError(
                f"this plan was made for another model (fingerprint {self.fingerprint}, this "
                f"model has {fingerprint}): make a new plan, or load the model it was made for"
            )
        sizes = {s.name: s.size for s in structures}
        for name, units in self.keep.items():
            if name not in sizes:
                raise PlanError(
                    f"the plan names the structure {name!r}, which this model does not "
                    f"have.{did_you_mean(name, sizes)}"
                )
            if units[-1] >= sizes[name]:
                raise PlanError(
                    f"the plan keeps unit {units[-1]} of {name!r}, which has only "
                    f"{sizes[name]} units (0 to {sizes[name] - 1})"
                )

    def to_json(self) -> str:
        """The plan as JSON text."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "attention": self.attention,
            "fingerprint": self.fingerprint,
            "keep": {name: list(self.keep[name]) for name in sorted(self.keep)},
            "share": {
                name: [src, list(units)] for name, (src, units) in sorted(self.share.items())
            },
        }
        return json.dumps(body)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote. Raises PlanError on anything else."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"the plan is not valid JSON: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise PlanError(f'this is not a plan: it lacks "format": "{FORMAT}"')
        if body.get("version") != VERSION:
            raise PlanError(
                f"the plan has version {body.get('version')!r}, this vlprune reads {VERSION}: "
                "use the vlprune that wrote it, or make the plan anew"
            )
        known = {"format", "version", "attention", "fingerprint", "keep", "share"}
        for key in body.keys() - known:
            raise PlanError(f"the plan has the unknown key {key!r}.{did_you_mean(key, known)}")
        keep, share = body.get("keep", {}), body.get("share", {})
        if not isinstance(keep, dict) or not isinstance(share, dict):
            raise PlanError("the plan's 'keep' and 'share' must be JSON objects")
        try:
            shared = {name: (src, tuple(units)) for name, (src, units) in share.items()}
        except (TypeError, ValueError):
            raise PlanError("each entry of the plan's 'share' must be [source, units]") from None
        return cls(
            keep=keep,
            share=shared,
            attention=str(body.get("attention", "head_dim")),
            fingerprint=str(body.get("fingerprint", "")),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path``, all of it or nothing."""
        path = Path(path)
        temporary = path.with_name(path.name + ".partial")
        try:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise PlanError(f"cannot write the plan to {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read the plan at ``path``. Raises PlanError if it is missing or malformed."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from None
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def _units(name: str, units: Any) -> tuple[int, ...]:
    """``units`` as an ascending tuple. Raises PlanError on repeats, negatives, nothing."""
    if isinstance(units, str | bytes) or not hasattr(units, "__iter__"):
        raise PlanError(f"the plan must list the units of {name!r}, not {units!r}")
    listed = list(units)
    for unit in listed:
        if isinstance(unit, bool) or not isinstance(unit, int):
            raise PlanError(f"the plan lists {unit!r} as a unit of {name!r}: units are integers")
        if unit < 0:
            raise PlanError(f"the plan lists unit {unit} of {name!r}: units count from 0")
    if not listed:
        raise PlanError(f"the plan keeps nothing of {name!r}: at least one unit must stay")
    if len(set(listed)) != len(listed):
        repeated = next(unit for unit in sorted(listed) if listed.count(unit) > 1)
        raise PlanError(f"the plan lists unit {repeated} of {name!r} more than once")
    return tuple(sorted(listed))
