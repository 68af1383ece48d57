"""Exports: a model for a runtime, checked against the model before it replaces anything."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...cutting.gates import evaluating
from ...device import device_of, moved_to, placed
from ...errors import CheckpointError, IncomparableError, UnsupportedError, VerificationError
from ...files import plain, read_json, reason, write_text
from ..place import MARK, check_place, is_being_saved, staging, swap
from ..save import EXPORT_FILE, MANIFEST, files_of_export
from . import FORMATS
from .compared import TOLERANCE, compared, compared_stages
from .model import Exported, is_export
from .runtimes import (
    EXPORTERS,
    needs,
    own_forwards,
    quantizer,
    sentence,
    silence,
    transformers_exporters,
)

__all__ = ["check_export_place", "export"]


def check_export_place(out: str | Path, need: int = 0) -> None:
    """Raise CheckpointError unless an export of ``need`` bytes can be written to ``out``.

    ``out`` may be new, empty, or hold an export (which is replaced) or an unfinished one.
    """
    out = Path(out)
    check_place(out, need)
    ours = is_export(out) or files_of_export(out) or is_being_saved(out) is False
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise CheckpointError(
            f"{plain(out)} exists and is no export: choose another folder with -o"
        )


def export(
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    to: str,
    out: str | Path,
    *,
    int8: bool = False,
    generation: bool = False,
    calibration: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write ``model`` to the folder ``out`` in the format ``to``; returns the facts about it.

    The first of ``inputs`` (keywords of one forward pass; of ``generate`` with ``generation``) is
    traced with all its dimensions dynamic; the export is then read back and must answer as the
    model does on every input, so the inputs should differ in batch size and length. A model on a
    GPU is traced and checked on the CPU, where the runtimes compute, and put back afterwards. With
    ``generation``, the stages that ``generate`` needs (encoders, prefill, decode) are exported and
    each is checked on the inputs that ``generate`` gives it; the loop around them is left to the
    runtime. With ``int8``, the quantizer is calibrated on ``calibration`` (more such inputs;
    default: ``inputs``), and the difference is reported rather than judged.

    The result has ``format``, ``int8``, ``model``, ``files`` {name: bytes}, ``seconds``,
    ``versions`` and ``checked``: per input or stage its shapes, the largest difference relative to
    the largest value of that output, and the fraction of all values that was compared (both sides
    finite).

    Raises UnsupportedError for an unknown format, a missing package, or a model without weights or
    that the exporter cannot trace; CheckpointError if ``out`` cannot be written; VerificationError
    if export and model answer differently, or if there is nothing finite to compare.
    """
    if to not in EXPORTERS:
        raise UnsupportedError(f"a model is exported to {', '.join(FORMATS)}, not to {to!r}")
    exporters = transformers_exporters()
    packages = EXPORTERS[to].packages
    for package in packages:
        needs(package)
    started, out = time.monotonic(), Path(out)
    if device_of(model).type == "meta":
        raise UnsupportedError("a model is exported with its weights, and this one has none")
    check_export_place(out)
    with staging(out) as staged:
        with placed(model, torch.device("cpu")), evaluating(model), torch.no_grad():
            samples = [_without_labels(moved_to(model, one)) for one in inputs]
            options: dict[str, Any] = {"dynamic": True}
            if int8:
                more = [moved_to(model, one) for one in calibration]
                options["quantizer"] = quantizer(exporters, to, more or samples)
            try:
                _trace(model, samples[0], exporters, to, options, staged, generation)
            except OSError as error:
                raise CheckpointError(f"cannot write {plain(out)}: {reason(error)}") from error
            rows = _proved(model, staged, samples, to, generation, judged=not int8)
        found = sorted(path for path in staged.iterdir() if path.name != MARK)
        files = {path.name: path.stat().st_size for path in found}
        facts: dict[str, Any] = {
            "format": to,
            "int8": int8,
            "model": type(model).__name__,
            "files": files,
            "checked": rows,
            "seconds": round(time.monotonic() - started, 1),
            "versions": {p: version(p) for p in ("torch", "transformers", *packages)},
        }
        write_text(staged / EXPORT_FILE, json.dumps(facts, indent=1) + "\n")
        stale = [path for path in files_of_export(out) if path.name not in (*files, EXPORT_FILE)]
        swap(staged, last=MANIFEST, stale=stale)
    return facts


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "labels"}


def _trace(
    model: Any,
    sample: Mapping[str, Any],
    exporters: Any,
    to: str,
    options: Mapping[str, Any],
    folder: Path,
    generation: bool,
) -> None:
    """Trace the model on one sample and write it. Raises UnsupportedError, or OSError."""
    exporter = getattr(exporters, EXPORTERS[to].exporter)()
    config = getattr(exporters, EXPORTERS[to].config)(**options)
    run = exporter.export_for_generation if generation else exporter.export
    try:
        with silence(), own_forwards(model):
            run(model, dict(sample), config).save_pretrained(folder)
        _forget_code(folder / "config.json")
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnsupportedError(
            f"{type(model).__name__} cannot be exported to {to}: {sentence(error)}"
        ) from error


def _proved(
    model: Any,
    folder: Path,
    samples: Sequence[Mapping[str, Any]],
    to: str,
    generation: bool,
    judged: bool,
) -> list[dict[str, Any]]:
    """How far export and model differ, per sample or stage; too far raises if ``judged``."""
    written = Exported(folder, trust_remote_code=True)  # trusted: just written
    compare = compared_stages if generation else compared
    try:
        rows = compare(model, written, samples)
        worst = max(row["difference"] for row in rows)
        if judged and not worst <= TOLERANCE:
            raise VerificationError(f"they are {worst:.2g} apart, relative to the largest")
    except IncomparableError as error:
        raise IncomparableError(
            f"the {to} export cannot be checked ({error}), so nothing was written: "
            "give inputs that the model answers with finite numbers"
        ) from error
    except VerificationError as error:
        raise VerificationError(
            f"the {to} export answers otherwise than the model ({error}), so nothing was "
            "written: report this architecture"
        ) from error
    return rows


def _forget_code(path: Path) -> None:
    """Remove ``auto_map`` from an export's config: a reader of the export would follow it."""
    if path.exists():
        write_text(path, json.dumps(_without(read_json(path), "auto_map"), indent=2) + "\n")


def _without(value: Any, name: str) -> Any:
    """The same JSON value without the key ``name``, at any depth."""
    if isinstance(value, dict):
        return {key: _without(one, name) for key, one in value.items() if key != name}
    return [_without(one, name) for one in value] if isinstance(value, list) else value
