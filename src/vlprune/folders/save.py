"""Saves a whole model into a folder, all at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from safetensors import SafetensorError

from ..cutting.fsdp import is_sharded
from ..cutting.sharing.ties import is_shared
from ..cutting.wrappers import uncompiled
from ..errors import CheckpointError, UnsupportedError, VerificationError, VlpruneError
from ..files import plain, read_json, reason, shown, write_text
from ..processes import all_or_none, world
from ..structures.record import METHOD, gather_record
from ..structures.units import plain_name
from .gathered import forget, gather
from .place import CONFIG, check_place, is_being_saved, staging, swap
from .weights import digest, is_weights, weight_files

__all__ = [
    "SHARD",
    "check_result",
    "check_shard_size",
    "files_of_export",
    "refuse_joined",
    "save",
    "save_by",
]


PLAN_FILE, REPORT_FILE, RECIPE_FILE = "plan.json", "report.json", "recipe.yaml"


BENCH_FILE, EXPORT_FILE, MANIFEST = "bench.json", "vlprune-export.json", "export.json"


SHARD = "2GB"
"""The largest weight file, unless a caller says otherwise."""


def save(
    model: Any,
    folder: str | Path,
    *,
    extras: Mapping[str, str] | None = None,
    processor: Any = None,
    max_shard_size: int | str = SHARD,
) -> Path:
    """Save ``model`` to ``folder``, for plain ``from_pretrained`` after ``import vlprune``.

    Returns the folder. It holds the stock ``config.json`` and ``model.safetensors``, the
    ``plan.json`` of a cut model, the files of ``processor`` (anything with ``save_pretrained``)
    and ``extras`` {file name: text}. Weights of more than ``max_shard_size`` (bytes, or a text such
    as ``"500MB"``) are spread over several files, which are written one after the other from the
    memory they are in. Everything is written into a hidden folder inside and moved
    into place at the end: a kill at any moment leaves the old or the new model, a full disk the
    old one. Files that vlprune did not write survive, unless a new file has the same name.

    Where FSDP2 has spread the weights over processes, all of them must call this. Weights are
    gathered one at a time, and the first process writes the folder.

    Raises CheckpointError if the folder cannot be written, UnsupportedError for another size, and
    for shared weights that the model's class saves as one tensor with others.
    """
    model = uncompiled(model)
    size = check_shard_size(max_shard_size)
    refuse_joined(model)

    def fill(staged: Path, **state: Any) -> None:
        model.save_pretrained(staged, max_shard_size=size, **state)
        if processor is not None:
            processor.save_pretrained(staged)

    if is_sharded(model):
        _save_from_all(fill, model, Path(folder), extras)
        return Path(folder)
    return save_by(fill, model, folder, extras)


def refuse_joined(model: Any) -> None:
    """Raise UnsupportedError if weights are shared that the class saves as a part of one tensor.

    transformers joins some weights when it saves (query, key and value of Molmo 2) and finds them
    by the beginnings of their names, which those of shared weights have, too.
    """
    if not is_shared(model):
        return
    tied = [name for name in model.state_dict() if ".parametrizations." in name]
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    rules = getattr(model, "_weight_conversions", None)
    if rules is None:
        rules = get_model_conversion_mapping(model, add_legacy=False)
    saving = [rule.reverse_transform() for rule in rules]
    for rule in saving:
        joined = [n for n in tied if isinstance(rule, WeightConverter) and _takes(rule, n)]
        if joined:
            raise UnsupportedError(
                f"{type(model).__name__} saves {plain_name(joined[0])} as a part of one tensor, "
                "which weights that are shared between layers cannot be: call "
                "vlprune.materialize(model) before you save it, or leave sharing out"
            )


def _takes(rule: Any, name: str) -> bool:
    return rule.rename_source_key(name)[1] is not None


def check_shard_size(size: int | str) -> int:
    """The bytes of a shard size. Raises UnsupportedError for anything else."""
    try:
        found = size if isinstance(size, int) else int(convert_file_size_to_int(size))
    except (ValueError, AttributeError):
        found = 0
    if found < 1 or isinstance(size, bool):
        raise UnsupportedError(
            "the size of a weight file is a number of bytes, or a text such as 2GB or 500MB, not "
            f"{shown(size)}"
        )
    return found


def save_by(
    fill: Callable[[Path], None],
    model: Any,
    folder: str | Path,
    extras: Mapping[str, str] | None = None,
) -> Path:
    """As :func:`save`, where ``fill`` writes config, weights and processor into a given folder.

    ``model`` may be without weights. An error of ``fill`` leaves what was there before.
    """
    folder = Path(folder)
    texts = _texts(model, extras)
    check_place(folder)
    with _problems_told(folder) as staged_in, staging(folder) as staged:
        staged_in.append(staged)
        fill(staged)
        _finish(staged, texts)
    return folder


def _save_from_all(
    fill: Callable[..., None], model: Any, folder: Path, extras: Mapping[str, str] | None
) -> None:
    """Save a model whose weights are spread over processes: the first one writes the folder."""
    first, texts = world()[1] == 0, _texts(model, extras)
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
                fill(staged, state_dict=state)
                forget(staged)
                _finish(staged, texts)


def _texts(model: Any, extras: Mapping[str, str] | None) -> dict[str, str]:
    """The text files of a folder: {name: text}."""
    record = gather_record(model)
    plan = {} if record is None else {PLAN_FILE: record.plan.to_json() + "\n"}
    return {**plan, **(extras or {})}


def _finish(staged: Path, texts: Mapping[str, str]) -> None:
    """Write the text files into a staging folder, then move it into the folder around it."""
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
    except VerificationError:
        raise
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
