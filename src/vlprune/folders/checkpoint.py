"""Folders: saved all or not at all, loaded by plain ``from_pretrained``."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..architectures import discover
from ..cutting.apply import apply_plan
from ..cutting.wrappers import uncompiled
from ..errors import CheckpointError, VlpruneError
from ..files import plain, read_json, reason, write_text
from ..structures.record import METHOD, Record, gather_record
from ..structures.structure import Structure
from .opening import (
    check_memory,
    from_folder,
    guarded,
    model_class,
    open_config,
    open_model,
    open_processor,
    read_config,
)
from .place import CONFIG, check_place, is_being_saved, staging, swap
from .weights import check_digest, check_weights, digest, is_weights, weight_files

__all__ = [
    "check_place",
    "check_result",
    "check_weights",
    "files_of_export",
    "from_folder",
    "load",
    "model_class",
    "open_config",
    "open_model",
    "open_processor",
    "rebuild_shapes",
    "save",
]

PLAN_FILE, REPORT_FILE, RECIPE_FILE = "plan.json", "report.json", "recipe.yaml"
BENCH_FILE, EXPORT_FILE, MANIFEST = "bench.json", "vlprune-export.json", "export.json"


def rebuild_shapes(
    model: Any, section: Mapping[str, Any], files: Sequence[str | Path] | None = None
) -> Record:
    """Cut a freshly built, still empty model to the shapes that ``section`` describes.

    Returns the record in the names that this model has for its structures. ``files`` are those the
    weights will be read from; they must have the digest that the section states, if any. Raises
    CheckpointError if section, model and weights do not belong together.
    """
    paths = [Path(file) for file in files or ()]
    with _naming(paths[0].parent / CONFIG if paths else Path(CONFIG)):
        cut, record = _matched(model, Record.from_section(section))
        apply_plan(model, cut, record.plan)
    if paths and all(is_weights(path.name) for path in paths):  # others are variants, with a dtype
        check_memory(model, sum(path.stat().st_size for path in paths), paths[0].parent)
        if section.get("weights"):
            check_digest(paths, section["weights"])
    return record


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors name the file that they are about."""
    try:
        yield
    except VlpruneError as error:
        raise type(error)(f"{plain(path)}: {error}") from error


def _matched(model: Any, record: Record) -> tuple[list[Structure], Record]:
    """The model's structures that the record cut, and the record in the model's own names.

    A folder may be opened by a class one level up or down (AutoModel on a folder written by
    a head class), whose module names lack or gain the base model's prefix.
    """
    description = discover(model, attention=record.plan.attention)  # type: ignore[arg-type]
    own = {structure.name: structure for structure in description}
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    cut, keep, unknown = [], {}, []

    def find(name: str) -> Structure | None:
        candidates = (name, prefix + name, name.removeprefix(prefix))
        return next((own[c] for c in candidates if c in own), None)

    for name, units in record.plan.keep.items():
        found = find(name)
        if found is None:
            unknown.append(name)
            continue
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


def save(
    model: Any,
    folder: str | Path,
    *,
    extras: Mapping[str, str] | None = None,
    processor: Any = None,
) -> Path:
    """The folder, which plain ``from_pretrained`` loads after ``import vlprune``.

    Holds the stock ``config.json`` and ``model.safetensors``, ``plan.json``, the files of
    ``processor`` (anything with ``save_pretrained``) and ``extras`` {file name: text}. All is
    written into a hidden folder inside and moved into place at the end: a kill at any moment
    leaves the old or the new model, a full disk the old one. Files that vlprune did not write
    survive, unless they have the name of a new one.

    Raises CheckpointError if the folder cannot be written.
    """
    folder, model = Path(folder), uncompiled(model)
    record = gather_record(model)
    check_place(folder)
    staged = folder
    try:
        with staging(folder) as staged:
            model.save_pretrained(staged)
            if processor is not None:
                processor.save_pretrained(staged)
            if record is not None:
                write_text(staged / PLAN_FILE, record.plan.to_json() + "\n")
            for name, text in (extras or {}).items():
                write_text(staged / name, text)
            _seal(staged)
            swap(staged, stale=_stale(folder, {p.name for p in staged.iterdir()}))
    except VlpruneError as error:
        raise CheckpointError(f"cannot save to {plain(folder)}: {_after(staged, error)}") from error
    except (OSError, SafetensorError) as error:
        problem = reason(error)
        raise CheckpointError(
            f"cannot save to {plain(folder)}: {_after(staged, problem)}"
        ) from error
    return folder


def _after(staged: Path, problem: object) -> str:
    """The problem, and what a failed save has left."""
    if staged.name.startswith(".vlprune-") and staged.is_dir():
        return f"{problem}; the new model can be loaded already, save again to finish it"
    return f"{problem}; what was there before is unchanged"


def _seal(staged: Path) -> None:
    """Write the digest of the weights into the config, where it says that the model was cut."""
    path = staged / CONFIG
    config = read_json(path)
    section = config.get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == METHOD:
        section["weights"] = digest(weight_files(staged))
        write_text(path, json.dumps(config, indent=2) + "\n")


def _stale(folder: Path, new: set[str]) -> list[Path]:
    """What would speak of the model before: its weights, plan, report, timings and exports."""
    if not (folder / CONFIG).is_file():
        return []
    try:
        config = read_json(folder / CONFIG)
    except CheckpointError:
        config = None
    section = config.get("quantization_config") if isinstance(config, dict) else None
    ours = isinstance(section, dict) and section.get("quant_method") == METHOD
    found = [
        path
        for path in folder.iterdir()
        if path.name not in new
        and not path.is_dir()
        and (is_weights(path.name) or (path.name in _MARKS and (ours or _is_our_own(path))))
    ]
    return found + [path for export in folder.iterdir() for path in files_of_export(export)]


_MARKS = {PLAN_FILE: {"format", "keep"}, REPORT_FILE: {"budget"}, BENCH_FILE: {"runs", "faster"}}
"""Keys that tell a file of ours from another of that name."""


def _is_our_own(path: Path) -> bool:
    try:
        body = read_json(path)
    except CheckpointError:
        return False
    return isinstance(body, dict) and _MARKS[path.name] <= body.keys()


def files_of_export(folder: Path) -> list[Path]:
    """The files that ``vlprune export`` wrote into a folder; none if it wrote none there."""
    note = folder / EXPORT_FILE
    if folder.is_symlink() or not note.is_file():
        return []
    try:
        body = read_json(note)
    except CheckpointError:
        return []
    names = body.get("files") if isinstance(body, dict) else None
    listed = [name for name in names or () if isinstance(name, str) and Path(name).name == name]
    paths = [folder / MANIFEST, *(folder / name for name in listed), note]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def check_result(folder: str | Path, need: int = 0) -> None:
    """Raise CheckpointError unless a whole result can be written to ``folder``, now.

    Besides :func:`vlprune.folders.place.check_place`: files of the user that a result would
    overwrite are refused, such as a README.md or a model of his own in the working folder.
    """
    folder = Path(folder)
    check_place(folder, need)
    if not folder.is_dir() or _is_result(folder):
        return
    names = [CONFIG, *_MARKS, RECIPE_FILE, "README.md"]
    names += [p.name for p in folder.iterdir() if is_weights(p.name)]
    taken = [name for name in names if (folder / name).exists()]
    if (folder / "dense" / CONFIG).exists():  # one of ours has a note beside it
        taken.append("dense")
    if taken:
        raise CheckpointError(
            f"{plain(folder)} holds files that vlprune did not write and the result would "
            f"overwrite: {plain(', '.join(sorted(set(taken))))}. Choose another folder "
            "with -o"
        )


def _is_result(folder: Path) -> bool:
    """Whether a run of vlprune filled the folder, or began to, or :func:`save` did."""
    if (folder / REPORT_FILE).is_file() and _is_our_own(folder / REPORT_FILE):
        return True
    if is_being_saved(folder) is not None:
        return True
    if (folder / PLAN_FILE).is_file() and _is_our_own(folder / PLAN_FILE):
        return True
    return (folder / "dense" / "vlprune-dense.json").is_file()


def load(folder: str | Path, **kwargs: Any) -> Any:
    """The model in a folder that :func:`save` (or ``save_pretrained`` of a cut model) wrote.

    Its class is the one named in ``config.json``; ``kwargs`` go to ``from_pretrained``. Nothing is
    written. While another process saves into the folder, it is tried again for some seconds. Says
    what is wrong where ``from_pretrained`` would raise from deep inside. Raises CheckpointError for
    a folder that is missing, incomplete or damaged.
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
    """Changes whenever a save puts another config in place."""
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
    with _naming(folder / CONFIG):
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
