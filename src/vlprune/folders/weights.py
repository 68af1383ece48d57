"""Weight files: which ones belong to a folder, whether they are whole, and their digest.

Only safetensors are read, and only from inside the folder: an untrusted index or link must not make
vlprune read another file of this machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import MiB, plain, read_json, reason
from .place import INDEX, is_being_saved

__all__ = ["WEIGHTS", "check_digest", "check_weights", "digest", "is_weights", "weight_files"]

WEIGHTS = "model.safetensors"
_OURS = re.compile(r"(model(-\d{5}-of-\d{5})?\.safetensors)|(model\.safetensors\.index\.json)")


def is_weights(name: str) -> bool:
    """Whether ``name`` is one that ``save_pretrained`` gives to weight files."""
    return _OURS.fullmatch(name) is not None


def weight_files(folder: Path, named: object = None) -> list[Path]:
    """The files that ``from_pretrained`` reads weights from.

    ``named`` is the config's ``transformers_weights``, if it has that entry. Raises CheckpointError
    if ``named`` is not safetensors, if an index is malformed, or for a file that is missing, is not
    a regular file or lies outside the folder.
    """
    name = plain(folder)
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", INDEX[5:])):
            raise CheckpointError(
                f"{name}/config.json: transformers_weights must name safetensors, not "
                f"{plain(repr(named))}: remove this entry"
            )
        first = named
    else:
        first = INDEX if (folder / INDEX).exists() and not (folder / WEIGHTS).exists() else WEIGHTS
    names = [first]
    if first.endswith(".json"):
        names = sorted(set(_index(_inside(folder, first)).values()))
    return [_inside(folder, one) for one in names]


def _index(path: Path) -> Mapping[str, str]:
    """{tensor: file} from an index. Raises CheckpointError."""
    body = read_json(path)
    mapping = body.get("weight_map") if isinstance(body, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"cannot read {plain(path)}: it has no object weight_map")
    for tensor, file in mapping.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"cannot read {plain(path)}: weight_map[{plain(repr(tensor))}] is no file name"
            )
    if not isinstance(body.get("metadata"), dict):
        raise CheckpointError(f"cannot read {plain(path)}: it has no object metadata")
    return mapping


def _inside(folder: Path, name: str) -> Path:
    """``folder/name``, a regular file of that folder. Raises CheckpointError.

    A snapshot in the hub's cache holds links to ``blobs`` two folders above, which are accepted.
    """
    path, real = folder / name, folder.resolve()
    try:
        target = path.resolve()
        blobs = real.parent.parent / "blobs"
        inside = target.is_relative_to(real) or (
            real.parent.name == "snapshots" and target.is_relative_to(blobs)
        )
        if not inside or not path.absolute().is_relative_to(folder.absolute()) or ".." in name:
            raise CheckpointError(
                f"{plain(folder)} takes weights from {plain(name)}, which lies outside of it: copy "
                "the file into the folder"
            )
        if not path.exists():
            raise CheckpointError(f"{plain(folder)} lacks {plain(name)}: {_mend(folder)}")
        if not path.is_file():
            raise CheckpointError(f"{plain(path)} is not a regular file: copy the folder again")
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a NUL
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot read {plain(path)}: {reason(error)}") from None
    return path


def _mend(folder: Path) -> str:
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "its weights are pickled, which could run code and are never read; save the model "
            "again with save_pretrained"
        )
    if is_being_saved(folder) is not None:
        return "a save into it was not finished, save again"
    return "copy the folder again (pickled weights are never read)"


def check_weights(folder: Path) -> None:
    """Raise CheckpointError unless every weight file of the folder is present and whole.

    Their digest is checked when they are loaded (:mod:`vlprune.folders.hook`).
    """
    config: Any = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    for path in weight_files(folder, named):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{plain(path)} is damaged or cut short ({reason(error)}): copy the file again"
            ) from None


def check_digest(files: Sequence[Path], wanted: str) -> None:
    """Raise CheckpointError unless the tensors in ``files`` have the digest ``wanted``."""
    if digest(files) != wanted:
        raise CheckpointError(
            f"the weights in {plain(files[0].parent)} are not those that were saved with its "
            "config.json: a file is damaged, or of another model. Copy the folder again; if you "
            'changed the weights on purpose, remove "weights" from quantization_config in '
            "config.json"
        )


def digest(files: Iterable[Path]) -> str:
    """32 hex digits that change with any name, shape, dtype or bit of the tensors in ``files``.

    How the tensors are spread over files does not matter, nor does other content of the files. The
    digest reveals accidents, not forgery: whoever can change the weights can change it too. Raises
    CheckpointError for a damaged file.
    """
    facts = [fact for path in files for fact in _facts(path)]
    return hashlib.blake2b(json.dumps(sorted(facts)).encode(), digest_size=16).hexdigest()


def _facts(path: Path) -> Iterator[list[Any]]:
    """Name, dtype, shape and checksum of every tensor in a file. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 100 * MiB:
                raise ValueError("its header is too long")
            header = json.loads(file.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    sum_of_bits = _checksum(file, 8 + length + start, end - start)
                    yield [name, entry["dtype"], entry["shape"], sum_of_bits]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{plain(path)} is damaged or cut short ({reason(error)}): copy the file again"
        ) from None


def _checksum(file: BinaryIO, start: int, length: int) -> int:
    """CRC-32 of part of a file: it finds every flipped bit, three times as fast as disk or SHA."""
    file.seek(start)
    buffer = memoryview(bytearray(min(length, MiB)))
    found = 0
    while length:
        count = file.readinto(buffer[: min(length, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise ValueError("it ends too early")
        found = zlib.crc32(buffer[:count], found)
        length -= count
    return found
