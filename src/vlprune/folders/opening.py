"""The only way in for models and processors: no code that comes with them is run.

A folder or a hub name may be untrusted. transformers would ask on stdin whether to run code that
the config names, read pickles, fetch kernels, and build whatever sizes a config states. Here the
answer is always no, and sizes are checked before anything is built (docs/folders.md, Trust).
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import dynamic_module_utils

from ..errors import CheckpointError, UnsupportedError, VlpruneError
from ..files import HUB_NAME, MiB, plain, read_json
from ..models import MODELS, PREFIX
from ..structures.record import METHOD
from .configs import check_config, read_config
from .pictures import pictures_only
from .weights import check_weights, weight_files

__all__ = [
    "check_memory",
    "from_folder",
    "guarded",
    "model_class",
    "open_config",
    "open_model",
    "open_processor",
]


SPARE = 2**28
"""Elements that a model may have beyond what its files hold: a new head, tables of positions."""


@contextlib.contextmanager
def guarded(
    where: object, doing: str = "open", kind: type[VlpruneError] = CheckpointError
) -> Iterator[None]:
    """No prompts, a clean stdout, and one error of ``kind`` for whatever goes wrong."""
    asks = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # otherwise a part of a model may still ask
    try:
        with contextlib.redirect_stdout(sys.stderr), _native_output():
            yield
    except VlpruneError:
        raise
    except Exception as error:
        raise kind(f"cannot {doing} {plain(where)}: {_why(error, where)}") from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = asks


@contextlib.contextmanager
def _native_output() -> Iterator[None]:
    """Send output that compiled libraries print past Python to stderr, without escape sequences.

    The Rust code of tokenizers, for one, quotes keys of a damaged file on stdout.
    """
    try:
        before = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    with tempfile.TemporaryFile() as caught:
        try:
            os.dup2(caught.fileno(), 1)
            yield
        finally:
            os.dup2(before, 1)
            os.close(before)
            caught.seek(0)
            said = caught.read(10_000).decode(errors="replace").strip()
            if said:
                print(plain(said), file=sys.stderr)


def _why(error: Exception, where: object) -> str:
    """The first sentence of another library's error, without its advice to trust the code."""
    text = " ".join(str(error).split())
    refused = isinstance(error, OSError | ValueError | ImportError)
    if refused and re.search("trust_remote_code|custom code|timed out", text.lower()):
        return "it needs code of its own, which is never run; load it yourself and use the library"
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, OSError) and not Path(str(where)).exists():
        return "there is no such folder here, and nothing of that name came from the hub"
    first = text.partition(". ")[0][:300] or "no reason given"
    known = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
    return plain(first if known else f"{type(error).__name__}: {first}")


def _config_dict(name: str | Path) -> dict[str, Any]:
    """The checked ``config.json`` of a folder or of a model on the hub."""
    if Path(name).is_dir():
        return read_config(Path(name))
    _check_hub_name(name)
    with guarded(name):
        found, _ = transformers.PreTrainedConfig.get_config_dict(name, trust_remote_code=False)
    check_config(found, f"config.json of {plain(name)}")
    return dict(found)


def _check_hub_name(name: str | Path, kind: type[VlpruneError] = CheckpointError) -> None:
    """Raise ``kind`` unless ``name``, which is no folder, can be a name on the hub."""
    if not HUB_NAME.fullmatch(str(name)):
        raise kind(f"there is no folder {plain(name)}")


def open_config(name: str | Path) -> Any:
    """The config in a folder or on the hub. Raises CheckpointError, UnsupportedError."""
    found = _config_dict(name)
    with guarded(name):
        if _is_ours(found):
            cls = MODELS[found["architectures"][0]].config_class
            return cls.from_pretrained(name, trust_remote_code=False)
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` names a model of vlprune, not one of the same name elsewhere."""
    name = (config.get("architectures") or [""])[0]
    prefixed = str(config.get("model_type", "")).startswith(PREFIX)
    return name in MODELS and (prefixed or not hasattr(transformers, name))


def model_class(config: Mapping[str, Any], where: object) -> Any:
    """The class of vlprune or transformers that a ``config.json`` names.

    Raises UnsupportedError if neither has a model class of that name.
    """
    names = config.get("architectures") or [""]
    cls: Any = MODELS[names[0]] if _is_ours(config) else getattr(transformers, names[0], None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise UnsupportedError(
            f"{plain(where)} names the model class {plain(names[0] or 'nothing')!r}, which this "
            "transformers does not have: update transformers, or load it with its own class"
        )
    return cls


def from_folder(
    cls: Any, name: str | Path, kind: type[VlpruneError] = CheckpointError, **kwargs: Any
) -> Any:
    """``cls.from_pretrained(name)``, from safetensors only, without code that comes along.

    Raises ``kind``, with file and key where they are known, and UnsupportedError for adapters and
    for weights that another library quantized.
    """
    options = {"trust_remote_code": False, "use_safetensors": True, **kwargs}
    folder = Path(name)
    if folder.is_dir():
        config = read_config(folder)
        _refuse_others(folder, config)
        check_weights(folder)
        with guarded(name, "load", kind):
            _check_memory_of(cls, folder, config)
            return cls.from_pretrained(name, **options)
    _config_dict(name)
    with guarded(name, "load", kind):
        return cls.from_pretrained(name, **options)


def _refuse_others(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise for entries that lead transformers to other models, other code or another format."""
    if (folder / "adapter_config.json").exists():
        raise UnsupportedError(
            f"{plain(folder)} holds an adapter (adapter_config.json): merge it into its base model "
            "first, and save that"
        )
    section = config.get("quantization_config")
    if section is not None and section.get("quant_method") != METHOD:
        raise UnsupportedError(
            f"{plain(folder)}/config.json: quantization_config says that the weights are quantized "
            f"with {plain(repr(section.get('quant_method')))}: compress the unquantized model"
        )
    for path in folder.glob("shard-*-model-*.safetensors"):
        raise UnsupportedError(
            f"{plain(path)} belongs to a distributed checkpoint: save the model with "
            "save_pretrained"
        )
    _check_files(folder, CheckpointError)


CONFIGS = {
    f"{name}config.json"
    for name in "|generation_|preprocessor_|processor_|tokenizer_|video_preprocessor_".split("|")
}
"""What transformers reads as a mapping; other libraries have files of like names for themselves."""


def _check_files(folder: Path, kind: type[VlpruneError]) -> None:
    """Raise ``kind`` for a pipe, an endless file or damaged JSON, which transformers would read."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise kind(f"{plain(path)} is not a regular file: remove it")
        if path.name in CONFIGS and not isinstance(read_json(path, kind), dict):
            raise kind(f"{plain(path)} is not a JSON object: copy the file again")
        if path.suffix in (".json", ".txt", ".jinja", ".model") and path.is_file():
            size = path.stat().st_size
            if size > 256 * MiB:
                raise kind(f"{plain(path)} has {size / MiB:,.0f} MiB: it is no file of a model")


def _check_memory_of(cls: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Build an uncut model without weights to check its size; the loading hook checks a cut one."""
    if config.get("quantization_config") is not None:
        return
    found = cls.config_class.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        built = cls(found)
    files = weight_files(folder, config.get("transformers_weights"))
    check_memory(built, sum(path.stat().st_size for path in files), folder)


def check_memory(model: Any, held: int, where: object) -> None:
    """Raise CheckpointError if an empty model is far larger than its files of ``held`` bytes.

    Weights that the files lack would be made up, in memory.
    """
    count = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    if count > held + SPARE:
        raise CheckpointError(
            f"{plain(where)}: config.json describes a model of {count:,} numbers, but its weights "
            f"have {held:,} bytes: config and weights do not belong together"
        )


def open_processor(name: str | Path) -> Any:
    """The processor in a folder or on the hub. Raises UnsupportedError.

    Where torchvision is missing, that of a model for pictures and videos takes pictures only.
    """
    if Path(name).is_dir():
        _check_files(Path(name), UnsupportedError)
    else:
        _check_hub_name(name, UnsupportedError)
    with guarded(name, "load a processor from", UnsupportedError):
        own = pictures_only(name)
        if own is not None:
            return own
        return transformers.AutoProcessor.from_pretrained(name, trust_remote_code=False)


def open_model(name: str, config_only: bool = False) -> Any:
    """The model in a folder or on the hub, by the class its config names.

    With ``config_only``, only its architecture is built, without weights, on the meta device;
    ``name`` may then also be a model type, which stands for that type's default sizes. Raises
    CheckpointError, UnsupportedError.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    transformers.utils.logging.disable_progress_bar()
    if not Path(name).exists():
        _check_hub_name(name)
    with guarded(name):
        if config_only and not Path(name).exists() and name in CONFIG_MAPPING:
            config = transformers.AutoConfig.for_model(name)
        else:
            config = open_config(name)
        if not config_only:
            return from_folder(model_class(config.to_dict(), name), name)
        with torch.device("meta"):
            if getattr(config, "architectures", None):
                return model_class(config.to_dict(), name)(config).eval()
            return transformers.AutoModel.from_config(config, trust_remote_code=False).eval()
