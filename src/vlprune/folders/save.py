"""Saves a whole model into a folder, all at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ..cutting.fsdp import is_sharded
from ..cutting.wrappers import uncompiled
from ..errors import CheckpointError, VlpruneError
from ..files import plain, read_json, reason, write_text
from ..processes import all_or_none, world
from ..structures.record import METHOD, gather_record
from .gathered import forget, gather
from .place import CONFIG, check_place, is_being_saved, staging, swap
from .weights import digest, is_weights, weight_files

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_result", "files_of_export", "save"]


PLAN_FILE, REPORT_FILE, RECIPE_FILE = "plan.json", "report.json", "recipe.yaml"


BENCH_FILE, EXPORT_FILE, MANIFEST = "bench.json", "vlprune-export.json", "export.json"


def save(
    model: Any,
    folder: str | Path,
    *,
    extras: Mapping[str, str] | None = None,
    processor: Any = None,
) -> Path:
    """Save ``model`` to ``folder``, for plain ``from_pretrained`` after ``import vlprune``.

    Returns the folder. It holds the stock ``config.json`` and ``model.safetensors``, the
    ``plan.json`` of a cut model, the files of ``processor`` (anything with ``save_pretrained``)
    and ``extras`` {file name: text}. Everything is written into a hidden folder inside and moved
    into place at the end: a kill at any moment leaves the old or the new model, a full disk the
    old one. Files that vlprune did not write survive, unless a new file has the same name.

    Where FSDP2 has spread the weights over processes, all of them must call this. Weights are
    gathered one at a time, and the first process writes the folder.

    Raises CheckpointError if the folder cannot be written.
    """
    folder, model = Path(folder), uncompiled(model)
    record = gather_record(model)
    texts = dict(extras or {})
    if record is not None:
        texts = {PLAN_FILE: record.plan.to_json() + "\n", **texts}
    if is_sharded(model):
        _save_from_all(model, folder, texts, processor)
        return folder
    check_place(folder)
    with _problems_told(folder) as staged_in, staging(folder) as staged:
        staged_in.append(staged)
        _fill(model, staged, texts, processor)
    return folder


def _save_from_all(model: Any, folder: Path, texts: Mapping[str, str], processor: Any) -> None:
    """Save a model whose weights are spread over processes: the first one writes the folder."""
    first = world()[1] == 0
    with _problems_told(folder) as staged_in, ExitStack() as stack:
        with all_or_none():
            if first:
                check_place(folder)
                staged_in.append(stack.enter_context(staging(folder)))
        staged = staged_in[0] if first else None
        with all_or_none():
            state = gather(model, staged)
        with all_or_none():
            if staged is not None:
                _fill(model, staged, texts, processor, state)


def _fill(
    model: Any,
    staged: Path,
    texts: Mapping[str, str],
    processor: Any,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write everything into a staging folder, then move it into the folder around it.

    ``state`` is the model's, where :func:`vlprune.folders.gathered.gather` has made it.
    """
    model.save_pretrained(staged, **({} if state is None else {"state_dict": state}))
    if state is not None:
        forget(staged)
    if processor is not None:
        processor.save_pretrained(staged)
    for name, text in texts.items():
        write_text(staged / name, text)
    _seal(staged)
    swap(staged, stale=_stale(staged.parent, {p.name for p in staged.iterdir()}))


@contextmanager
def _problems_told(folder: Path) -> Iterator[list[Path]]:
    """Errors of the block as CheckpointErrors; the block appends the staging folder once made."""
    staged_in: list[Path] = []
    try:
        yield staged_in
    except (VlpruneError, OSError, SafetensorError) as error:
        problem = error if isinstance(error, VlpruneError) else reason(error)
        told = _after(staged_in[0] if staged_in else folder, problem)
        raise CheckpointError(f"cannot save to {plain(folder)}: {told}") from error


def _after(staged: Path, problem: object) -> str:
    """The problem, and the state in which the failed save left the folder."""
    if staged.name.startswith(".vlprune-") and staged.is_dir():
        return f"{problem}; the new model can be loaded already, save again to finish it"
    return f"{problem}; what was there before is unchanged"


def _seal(staged: Path) -> None:
    """Write the digest of the weights into the config of a cut model."""
    path = staged / CONFIG
    config = read_json(path)
    section = config.get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == METHOD:
        section["weights"] = digest(weight_files(staged))
        write_text(path, json.dumps(config, indent=2) + "\n")


def _stale(folder: Path, new: set[str]) -> list[Path]:
    """The files of the previous model: its weights, plan, report, timings and exports."""
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
"""Keys that tell a file of vlprune from another file of that name."""


def _is_our_own(path: Path) -> bool:
    try:
        body = read_json(path)
    except CheckpointError:
        return False
    return isinstance(body, dict) and _MARKS[path.name] <= body.keys()


def files_of_export(folder: Path) -> list[Path]:
    """The files that ``vlprune export`` wrote into a folder, if any."""
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
    """Raise CheckpointError unless a whole result of ``need`` bytes can be written to ``folder``.

    Checks :func:`vlprune.folders.place.check_place`, and that the result would not overwrite files
    of the user, such as a README.md or a model of their own in the working folder.
    """
    folder = Path(folder)
    check_place(folder, need)
    if not folder.is_dir() or _is_result(folder):
        return
    names = [CONFIG, *_MARKS, RECIPE_FILE, "README.md"]
    names += [p.name for p in folder.iterdir() if is_weights(p.name)]
    taken = [name for name in names if (folder / name).exists()]
    if (folder / "dense" / CONFIG).exists():  # a dense model of vlprune has a note beside it
        taken.append("dense")
    if taken:
        raise CheckpointError(
            f"{plain(folder)} holds files that vlprune did not write and the result would "
            f"overwrite: {plain(', '.join(sorted(set(taken))))}. Choose another folder "
            "with -o"
        )


def _is_result(folder: Path) -> bool:
    """Whether a run of vlprune or :func:`save` filled the folder, or began to."""
    if (folder / REPORT_FILE).is_file() and _is_our_own(folder / REPORT_FILE):
        return True
    if is_being_saved(folder) is not None:
        return True
    if (folder / PLAN_FILE).is_file() and _is_our_own(folder / PLAN_FILE):
        return True
    return (folder / "dense" / "vlprune-dense.json").is_file()
