"""The working folder of an unfinished run, and the lock that admits only one run."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import CheckpointError, VlpruneError
from ...files import is_full, plain, read_text, reason

__all__ = ["WORK", "claimed", "cleared", "disk_errors_told"]

WORK = "vlprune-run"
"""A folder in the output: checkpoints, the cut model, the lock. Nothing in it is the user's."""
LOCK, OWNER = "lock", "owner"
OURS = (
    "train-*",
    "search-*",
    "cut-*",
    "retrain-*",
    "calibration-*",
    "round-to.json",
    "damaged-*",
    ".probe",
)


@contextmanager
def disk_errors_told(out: Path, goes_on: str) -> Iterator[None]:
    """Raise CheckpointError for errors of the disk; ``goes_on`` is where the run goes on from."""
    try:
        yield
    except (OSError, VlpruneError) as error:
        if is_full(error):
            raise CheckpointError(
                f"the disk of {plain(out)} is full: free some space and run the same command "
                f"again, it goes on from {goes_on}"
            ) from None
        if isinstance(error, VlpruneError) or error.filename is None:
            raise
        raise CheckpointError(
            f"cannot read or write {plain(error.filename)}: {reason(error)}"
        ) from None


@contextmanager
def claimed(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """The working folder of a run in ``out``, for this run alone.

    The lock ends with the process that holds it, however the process ends. Where the file system
    has no locks, ``say`` gets a line and the run goes on. Folders made here that are still empty at
    the end are removed again. Raises CheckpointError if another run is at work in ``out``, or if
    nothing can be written there.
    """
    work = out / WORK
    made = [folder for folder in (work, *work.parents) if not folder.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = _locked(work, out, say)
    except OSError as error:
        raise CheckpointError(f"cannot write to {plain(out)}: {reason(error)}") from None
    try:
        yield work
    finally:
        for name in (OWNER, LOCK):  # while the lock is held: who waits for it gets a new file
            (work / name).unlink(missing_ok=True)
        if lock is not None:
            lock.release()
        with suppress(OSError):  # a folder is not empty
            for folder in made or [work]:
                folder.rmdir()


def _locked(work: Path, out: Path, say: Callable[[str], None]) -> FileLock | None:
    """The lock of the folder, held; None where the file system has none."""
    lock = FileLock(work / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        owner = ""
        with suppress(CheckpointError):
            owner = f" ({plain(read_text(work / OWNER, most=1000)).strip()})"
        raise CheckpointError(
            f"another run{owner} is working in {plain(out)}: wait until it has ended, or choose "
            "another folder with -o"
        ) from None
    except (OSError, NotImplementedError) as error:
        if not os.access(work, os.W_OK):
            raise
        say(
            f"the file system of {plain(out)} has no locks ({reason(error)}): see to it that no "
            "other run writes there"
        )
        return None
    (work / OWNER).write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
    return lock


def cleared(work: Path) -> None:
    """Remove what a finished run no longer needs, by the names that runs give."""
    for pattern in OURS:
        for entry in work.glob(pattern):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
