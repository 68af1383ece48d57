"""Folders: saved all or not at all, loaded by plain ``from_pretrained``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from .architectures import discover
from .cutting import apply_plan
from .errors import CheckpointError, UnsupportedError, VlpruneError
from .models import MODELS, PREFIX
from .record import METHOD, Record, gather_record
from .structure import Structure
from .wrappers import uncompiled

__all__ = [
    "check_weights",
    "load",
    "model_class",
    "open_config",
    "open_model",
    "rebuild_shapes",
    "save",
]

PLAN_FILE, REPORT_FILE, RECIPE_FILE = "plan.json", "report.json", "recipe.yaml"
BENCH_FILE, EXPORT_FILE = "bench.json", "vlprune-export.json"


def rebuild_shapes(model: Any, section: Mapping[str, Any]) -> Record:
    """Cut a freshly built, still empty model to the shapes that ``section`` describes.

    Returns the record in the names that this model has for its structures.
    """
    cut, record = _matched(model, Record.from_section(section))
    apply_plan(model, cut, record.plan)
    return record


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
                f"config.json describes {name} with {found.size} units, its vlprune section with "
                f"{record.sizes[name]}: the folder mixes files of two models, copy it again"
            )
        cut.append(replace(found, layout=record.layouts[name]))  # type: ignore[arg-type]
        keep[found.name] = units
    if unknown and type(model).__name__ in (getattr(model.config, "architectures", None) or []):
        raise CheckpointError(
            f"this {type(model).__name__} has no {unknown[0]!r}, which its vlprune section cuts: "
            "it was written by another version of transformers or vlprune; use that one"
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
    ``processor`` (anything with ``save_pretrained``) and ``extras`` {file name: text}. All
    is written beside the folder and renamed into place at the end: a kill or a full disk
    leaves what was there before. Files that vlprune did not write survive.

    Raises CheckpointError if the folder cannot be written.
    """
    folder, model = Path(folder), uncompiled(model)
    record = gather_record(model)
    partial, old = _neighbours(folder)
    _recover(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: choose a folder to save into")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        model.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        if record is not None:
            (partial / PLAN_FILE).write_text(record.plan.to_json() + "\n", encoding="utf-8")
        for name, text in (extras or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        _keep_foreign_files(folder, partial)
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(folder)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"cannot save to {folder}: {reason}; what was there before is unchanged"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(folder)
        raise
    return folder


def _neighbours(folder: Path) -> tuple[Path, Path]:
    """Where a save is prepared, and where the previous folder waits during the swap."""
    name = folder.resolve().name
    return folder.resolve().parent / f".{name}.partial", folder.resolve().parent / f".{name}.old"


def _recover(folder: Path) -> None:
    """Finish a swap that was killed between its two renames."""
    _, old = _neighbours(folder)
    if old.exists():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, folder)


def _keep_foreign_files(folder: Path, partial: Path) -> None:
    """Carry over what the old folder holds and the new one does not.

    Except old weights, and the plan, report, timings and exports of another model.
    """
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        target = partial / entry.name
        stale = entry.name.startswith("model") and ".safetensors" in entry.name
        stale = stale or entry.name in (PLAN_FILE, REPORT_FILE, BENCH_FILE)
        if target.exists() or stale or (entry / EXPORT_FILE).is_file():
            continue
        if entry.is_dir():
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)
        else:
            _link(entry, target)


def _link(source: str | Path, target: str | Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def load(folder: str | Path, **kwargs: Any) -> Any:
    """The model in a folder that :func:`save` (or ``save_pretrained`` of a cut model) wrote.

    Its class is the one named in ``config.json``; ``kwargs`` go to ``from_pretrained``.
    Says what is wrong where ``from_pretrained`` would raise from deep inside. Raises
    CheckpointError for a folder that is missing, incomplete or damaged.
    """
    folder = Path(folder)
    _recover(folder)
    config = _config(folder)
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{folder}/config.json has no vlprune section, so the plan of this model is not known: "
            "restore config.json from where the folder was saved, or load an uncut model with "
            "from_pretrained"
        )
    Record.from_section(section)
    check_weights(folder)
    cls = model_class(config, folder)
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks the weights of {sorted(info['missing_keys'])[0]} and "
            f"{len(info['missing_keys']) - 1} more: copy the folder again"
        )
    return model


def _config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no config.json: it is not a model") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {folder}/config.json: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder}/config.json is not a JSON object")
    return config


def open_config(name: str | Path) -> Any:
    """The config in a folder or on the hub."""
    found, _ = transformers.PreTrainedConfig.get_config_dict(name)
    if _is_ours(found):
        return MODELS[found["architectures"][0]].config_class.from_pretrained(name)
    return transformers.AutoConfig.from_pretrained(name)


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a model of ours, not one of the same name elsewhere."""
    name = (config.get("architectures") or [""])[0]
    prefixed = str(config.get("model_type", "")).startswith(PREFIX)
    return name in MODELS and (prefixed or not hasattr(transformers, name))


def model_class(config: Mapping[str, Any], where: object) -> Any:
    """The class a ``config.json`` names, ours or transformers'. Never runs code from the folder."""
    names = config.get("architectures") or [""]
    cls: Any = MODELS[names[0]] if _is_ours(config) else getattr(transformers, names[0], None)
    if cls is None or not issubclass(cls, transformers.PreTrainedModel):
        raise UnsupportedError(
            f"{where} names the model class {names[0] or 'nothing'!r}, which this "
            "transformers does not have: update transformers, or load it with its own class"
        )
    return cls


def check_weights(folder: Path) -> None:
    """Raise CheckpointError unless every safetensors file of the folder is there and whole."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(mapping.values()))
        except (OSError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"cannot read {index}: {error}") from None
    else:
        files = ["model.safetensors"]
    for name in files:
        path = folder / name
        if not path.exists():
            raise CheckpointError(
                f"{folder} lacks {name}: copy the folder again (pickled weights are never read)"
            )
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({error}): copy the file again"
            ) from None


def open_model(name: str, config_only: bool = False) -> Any:
    """The model in a folder or on the hub, by the class its config names.

    With ``config_only`` its architecture without weights, on the meta device; ``name`` may
    then also be a model type, which stands for that type's default sizes.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.utils.logging.disable_progress_bar()
    if name.startswith(("/", ".", "~")) and not Path(name).exists():
        raise CheckpointError(f"there is no folder {name}")
    try:
        if config_only and not Path(name).exists() and name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name)
        else:
            config = open_config(name)
        if not config_only:
            if Path(name).is_dir():
                check_weights(Path(name))
            return model_class(config.to_dict(), name).from_pretrained(name)
        with torch.device("meta"):
            if getattr(config, "architectures", None):
                return model_class(config.to_dict(), name)(config).eval()
            return AutoModel.from_config(config).eval()
    except VlpruneError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise CheckpointError(f"cannot open {name}: {reason}") from None
