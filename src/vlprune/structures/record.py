"""The record that a cut model keeps of its cut: one section in its own config.

The section is named ``quantization_config`` because that is the only hook that transformers
offers for rebuilding module shapes before the weights are loaded. It holds the whole plan in a
compact form (one bit mask per structure), so every folder that ``save_pretrained`` writes can be
loaded, and cut again, without any other file.
"""

from __future__ import annotations

import base64
import binascii
import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from ..errors import CheckpointError, UnsupportedError
from ..facts import Section, check_facts
from ..files import plain, reason
from .plan import Plan
from .structure import Description, Structure

__all__ = ["METHOD", "Record", "gather_record", "read_record", "record_of", "write_record"]

METHOD = "vlprune"
VERSIONS = (1, 2)
"""1: units that stay. 2: also units that are shared; written only where a plan shares any."""


@dataclass(frozen=True)
class Record:
    """The cut of a model: its plan in terms of the dense model's units, and how it was made.

    ``sizes`` are the dense sizes of the structures in the plan; ``layouts`` says which were
    cut ``"native"`` and which ``"padded"``, so that loading rebuilds exactly the same layers.
    """

    plan: Plan
    sizes: Mapping[str, int]
    layouts: Mapping[str, str] = field(default_factory=dict)

    def alive(self) -> dict[str, tuple[int, ...]]:
        """{structure: units that stay}, without units whose source unit does not stay."""
        sizes = self.sizes.items()
        bare = [Structure(name, "", size, "", (), ()) for name, size in sizes]
        return {structure.name: self.plan.kept(structure) for structure in bare}

    def renamed(self, new_name: Callable[[str], str]) -> Record:
        """The same record with every structure renamed by ``new_name``."""
        keep = {new_name(name): units for name, units in self.plan.keep.items()}
        share = {
            new_name(name): (new_name(source), *pairs)
            for name, (source, *pairs) in self.plan.share.items()
        }
        return Record(
            replace(self.plan, keep=keep, share=share),
            {new_name(name): size for name, size in self.sizes.items()},
            {new_name(name): layout for name, layout in self.layouts.items()},
        )

    def check(self, structures: Sequence[Structure]) -> None:
        """Raise UnsupportedError if ``structures`` do not have the sizes that the record says."""
        alive = self.alive()
        for structure in structures:
            left = len(alive.get(structure.name, range(structure.size)))
            if left != structure.size:
                raise UnsupportedError(
                    f"the config says that {structure.name} was cut to {left} units, but it has "
                    f"{structure.size}: a model built from the config of a cut model has full "
                    "size; load the cut one with from_pretrained, or delete "
                    "model.config.quantization_config"
                )

    def section(self, prefix: str = "") -> dict[str, Any]:
        """The record as a config section, for the sub-model whose names start with ``prefix``."""
        keep = {
            name.removeprefix(prefix): {
                "kept": len(units),
                "of": self.sizes[name],
                "mask": _pack(units, self.sizes[name]),
                "layout": self.layouts.get(name, "native"),
            }
            for name, units in self.plan.keep.items()
            if name.startswith(prefix)
        }
        share = {
            name.removeprefix(prefix): {
                "from": source.removeprefix(prefix),
                "mask": _pack(units, self.sizes[name]),
                **({} if units == theirs else {"units": list(theirs)}),
            }
            for name, (source, units, theirs) in self.plan.share.items()
            if name.startswith(prefix)
        }
        return {
            "quant_method": METHOD,
            "version": 2 if share else 1,
            "attention": self.plan.attention,
            "fingerprint": self.plan.fingerprint,
            **({} if self.plan.experts == "neuron" else {"experts": self.plan.experts}),
            "keep": keep,
            **({"share": share} if share else {}),
        }

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> Record:
        """The record in a config section. Raises CheckpointError if it is damaged."""
        if section.get("version") not in VERSIONS:
            raise CheckpointError(
                f"this folder was written by another version of vlprune (format "
                f"{plain(repr(section.get('version')))[:40]}, this one reads up to "
                f"{VERSIONS[-1]}): update vlprune"
            )
        again = "copy the folder again, or write it again with vlprune.save"
        check_facts(Section, dict(section), "the vlprune section", advice=again)
        try:
            entries = dict(section["keep"])
            keep = {n: _unpack(e["mask"], e["of"]) for n, e in entries.items()}
            for name, entry in entries.items():
                if len(keep[name]) != entry["kept"]:
                    raise ValueError(f"{name} keeps {len(keep[name])}, not {entry['kept']}")
            share = {
                name: _unshare(entry, entries[name]["of"])
                for name, entry in section.get("share", {}).items()
            }
            plan = Plan(
                keep=keep,
                share=share,
                attention=section["attention"],
                fingerprint=section["fingerprint"],
                experts=section.get("experts", "neuron"),
            )
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"the vlprune section is damaged ({reason(error)}): {again}"
            ) from None
        return cls(
            plan,
            {n: e["of"] for n, e in entries.items()},
            {n: e["layout"] for n, e in entries.items()},
        )


def record_of(
    description: Description, plan: Plan, before: Record | None, cut: Sequence[Structure]
) -> Record:
    """The record after cutting ``plan``; ``before`` is the record of an earlier cut, if any.

    A second cut is expressed in units of the original dense model, so that loading takes
    one step however often a model was cut. Structures that share, and their sources, are listed
    even where all of their units stay. Raises UnsupportedError if the earlier cut counted
    attention in another unit.
    """
    keep = before.alive() if before else {}
    share = dict(before.plan.share) if before else {}
    sizes = dict(before.sizes) if before else {}
    layouts = dict(before.layouts) if before else {}
    after: dict[str, tuple[int, ...]] = {}
    if before and before.plan.attention != plan.attention:
        raise UnsupportedError(
            f"this model was cut with attention={before.plan.attention!r} before: "
            f"cut it again with the same choice, not {plan.attention!r}"
        )
    for structure in cut:
        if structure.name not in keep:
            keep[structure.name] = tuple(range(structure.size))
            sizes[structure.name] = structure.size
    for structure in cut:
        layouts[structure.name] = structure.layout
        if plan.shared(structure):
            share[structure.name] = _composed(structure, plan, share, keep)
    for structure in cut:
        dense = keep[structure.name]
        after[structure.name] = tuple(dense[unit] for unit in plan.kept(structure))
    first = before.plan.fingerprint if before else description.fingerprint
    experts = before.plan.experts if before else plan.experts
    made = Plan(
        keep={**keep, **after},
        share=share,
        attention=plan.attention,
        fingerprint=first,
        experts=experts,
    )
    bare = {name: Structure(name, "", size, "", (), ()) for name, size in sizes.items()}
    alive = {name: made.shared(bare[name]) for name in made.share}
    tidy = {n: (made.share[n][0], [*p], [*p.values()]) for n, p in alive.items() if p}
    return Record(replace(made, share=tidy), sizes, layouts)


def _composed(
    structure: Structure,
    plan: Plan,
    share: Mapping[str, tuple[Any, ...]],
    keep: Mapping[str, tuple[int, ...]],
) -> tuple[str, list[int], list[int]]:
    """The sharing of a structure by ``plan``, in dense units, joined with its earlier sharing."""
    source = plan.share[structure.name][0]
    ours, theirs = keep[structure.name], keep[source]
    pairs = {ours[unit]: theirs[other] for unit, other in plan.shared(structure).items()}
    before = share.get(structure.name)
    if before is not None:
        pairs |= dict(zip(before[1], before[2], strict=True))
    return source, [*pairs], [*pairs.values()]


def read_record(model: nn.Module) -> Record | None:
    """The record of a cut model, None for a dense one.

    If only a part of the model was cut (its vision tower, say), the result is that part's record
    under the whole model's names. Raises UnsupportedError if the model carries another quantizer
    or its parts were cut with different attention units, CheckpointError if a record is damaged.
    """
    record = _own_record(model)
    seen = {id(getattr(model, "config", None))}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if not path or not hasattr(module, "base_model_prefix") or id(config) in seen:
            continue
        seen.add(id(config))
        part = _own_record(module)
        if part is not None:
            record = _joined(record, part, path + ".")
    return record


def gather_record(model: nn.Module) -> Record | None:
    """As :func:`read_record`, and copy records held only by parts into the model's own config."""
    record, own = read_record(model), _own_record(model)
    if record is not None and (own is None or own.plan.keep.keys() != record.plan.keep.keys()):
        write_record(model, record)
    return record


def _own_record(model: nn.Module) -> Record | None:
    """The record in the model's own config, in the model's own names."""
    section = getattr(getattr(model, "config", None), "quantization_config", None)
    if section is None:
        return getattr(model, "_vlprune_record", None)
    if not isinstance(section, Mapping):
        section = section.to_dict()
    method = section.get("quant_method")
    if method != METHOD:
        raise UnsupportedError(
            f"this model is already quantized with {str(getattr(method, 'value', method))!r}: cut "
            "the unquantized model first, then quantize the small one"
        )
    return Record.from_section(section)


def _joined(whole: Record | None, part: Record, prefix: str) -> Record:
    """``whole`` plus the structures recorded only by ``part``, a sub-model at ``prefix``."""
    if whole is None:
        whole = Record(Plan(attention=part.plan.attention, experts=part.plan.experts), {})
    named = part.renamed(lambda name: prefix + name)
    new = named.plan.keep.keys() - whole.plan.keep.keys()
    if not new:
        return whole
    if part.plan.attention != whole.plan.attention:
        raise UnsupportedError(
            f"parts of this model were cut with attention={whole.plan.attention!r} and "
            f"{part.plan.attention!r}: a model is saved and cut with one; cut them alike"
        )
    return Record(
        replace(
            whole.plan,
            keep={**{n: named.plan.keep[n] for n in sorted(new)}, **whole.plan.keep},
            share={**named.plan.share, **whole.plan.share},
        ),
        {**named.sizes, **whole.sizes},
        {**named.layouts, **whole.layouts},
    )


def write_record(model: nn.Module, record: Record, undo: ExitStack | None = None) -> None:
    """Write the record into the model's config and into those of its sub-models.

    The model first gets its own copy of the config, so that another model built from the same
    config object is not affected. A model without a config keeps the record as an attribute.
    ``undo`` takes the calls that put everything back.
    """
    undo = undo if undo is not None else ExitStack()
    if getattr(model, "config", None) is None:
        undo.callback(model.__dict__.__setitem__, "_vlprune_record", _own_record(model))
        model._vlprune_record = record  # type: ignore[assignment]
        return
    config = _own_config(model, undo)
    _adopt_parts(model, config, undo)
    config.quantization_config = record.section()
    # CLIPVisionModel.from_pretrained(folder of a CLIPModel) reads only the sub-config.
    own = {id(getattr(config, name, None)) for name in getattr(config, "sub_configs", {})}
    holders = [(path, module) for path, module in model.named_modules() if path]
    whole = [holder for holder in holders if hasattr(holder[1], "base_model_prefix")]
    for path, module in (*whole, *holders):  # OWL-ViT's towers are plain modules with a config
        sub: Any = getattr(module, "config", None)
        if sub is not None and id(sub) in own:  # a part that this model lacks is None
            own.discard(id(sub))
            sub.quantization_config = record.section(prefix=path + ".")


def _own_config(model: nn.Module, undo: ExitStack) -> Any:
    """A copy of the model's config, put in place wherever the model refers to the old one."""
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    _refer_to(model, copies, undo)
    return config


def _refer_to(model: nn.Module, copies: Mapping[int, Any], undo: ExitStack) -> None:
    """Replace every config that the model refers to by its copy in ``copies`` {id: copy}."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if hasattr(value, "model_type") and id(value) in copies:
                undo.callback(module.__dict__.__setitem__, name, value)
                module.__dict__[name] = copies[id(value)]


def _adopt_parts(model: nn.Module, config: Any, undo: ExitStack) -> None:
    """Let ``config`` hold the configs that sub-models got when they were cut on their own."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    used = {id(getattr(module, "config", None)) for module in model.modules()}
    for name, part in parts.items():
        if part is None or id(part) in used:
            continue
        strays = [
            module.config
            for module in model.modules()
            if type(getattr(module, "config", None)) is type(part)
            and module.config is not config
            and all(module.config is not other for other in parts.values())
        ]
        if strays and all(stray is strays[0] for stray in strays):
            own = copy.deepcopy(strays[0])
            _refer_to(model, {id(strays[0]): own}, undo)
            setattr(config, name, own)


def _unshare(entry: Mapping[str, Any], size: int) -> tuple[Any, ...]:
    """``(source, units, source units)`` from an entry of a section."""
    units = _unpack(entry["mask"], size)
    return entry["from"], units, entry.get("units", units)


def _pack(units: Sequence[int], size: int) -> str:
    """A bit mask of ``units``, one bit per unit, in base64."""
    mask = np.zeros(size, dtype=bool)
    mask[list(units)] = True
    return base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")


def _unpack(text: str, size: int) -> tuple[int, ...]:
    """The units whose bit is set. Raises ValueError if the mask does not fit ``size``."""
    raw = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if raw.size != (size + 7) // 8:
        raise ValueError(f"a mask of {raw.size} bytes for {size} units")
    return tuple(int(unit) for unit in np.flatnonzero(np.unpackbits(raw)[:size]))
