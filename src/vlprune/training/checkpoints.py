"""The Trainer's checkpoints of one phase: sealed when whole, checked before they are read.

The Trainer reads them with ``weights_only``, so that a pickle in a checkpoint runs no code. But the
Trainer would go on from corrupted weights, and stop at a truncated file without saying what to do.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..files import plain
from ..folders.notes import files_in, read_note, set_aside, write_note

__all__ = ["newest", "seal", "step_of"]

SEAL = "vlprune-complete.json"
KEPT = 2
"""Checkpoints to keep: the newest, and the one before in case the newest is damaged."""


def step_of(checkpoint: Path) -> int:
    """The number in ``checkpoint-20``."""
    return int(checkpoint.name.rpartition("-")[2])


def _found(phase: Path) -> list[Path]:
    """Everything named like a checkpoint, the oldest first."""
    paths = phase.iterdir() if phase.is_dir() else ()
    return sorted((p for p in paths if re.fullmatch("checkpoint-[0-9]{1,18}", p.name)), key=step_of)


def seal(checkpoint: Path) -> None:
    """Note that the checkpoint is whole, and remove checkpoints that are no longer needed.

    Raises CheckpointError if the note cannot be written.
    """
    names = [name for name in files_in(checkpoint) if name != SEAL]
    write_note(checkpoint / SEAL, checkpoint.parent.name, files=names)
    for old in _found(checkpoint.parent)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def newest(phase: Path, say: Callable[[str], None]) -> Path | None:
    """The last whole checkpoint in the folder of a phase.

    Later ones that are damaged, or that this phase did not write, are set aside with a line to
    ``say``; a checkpoint cut short by a kill is removed. Raises CheckpointError if neither can be
    done.
    """
    passed, whole = [], None
    for path in reversed(_found(phase)):
        try:
            if path.is_symlink() or not path.is_dir():
                raise CheckpointError("it is not a folder")
            note = read_note(path / SEAL, only=True)
            if note is None:
                shutil.rmtree(path, ignore_errors=True)
                passed.append(f"{path.name} was not written to its end: removed")
                continue
            if note.key != phase.name:
                raise CheckpointError("it belongs to another run")
        except CheckpointError as error:
            place = plain(set_aside(path))
            passed.append(f"{path.name} is damaged ({error}): set aside as {place}")
            continue
        whole = path
        break
    for line in passed:
        say(f"{line}; {f'going on from {whole.name}' if whole else 'this phase starts anew'}")
    return whole
