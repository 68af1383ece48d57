"""Places on disk: whether they can be written, and how files are swapped inside a folder.

The folder that is written may be the working folder, a mount point or reached by a link, so the
folder itself is never replaced. New files wait in a hidden folder inside it and move into place one
by one; at every moment ``config.json`` names weights that exist (docs/decisions/0024).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, VlpruneError
from ..files import MiB, plain, reason, write_text

try:
    import fcntl
except ImportError:  # this system has no such locks: saves by two processes are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CONFIG",
    "INDEX",
    "MARK",
    "check_file",
    "check_place",
    "is_being_saved",
    "link",
    "staging",
    "swap",
]

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
MARK = "being-saved"
"""A file in every staging folder, locked as long as its process lives."""
HIDDEN = re.compile(r"\.vlprune-[0-9a-f]{12}")
PATIENCE = 60.0
"""Seconds to wait for another process that swaps files in the same folder."""


def check_place(folder: str | Path, need: int = 0) -> None:
    """Raise CheckpointError unless files can be written and renamed in ``folder``.

    The folder need not exist yet, and nothing is left behind. ``need`` is roughly how many bytes
    will be written; the disk must have that much space free.
    """
    folder, name = Path(folder), plain(folder)
    try:
        if folder.is_symlink() and not folder.exists():
            raise CheckpointError(f"{name} is a link to nothing: create what it points to")
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{name} is a file: choose a folder to save into")
        place = next(path for path in (folder, *folder.absolute().parents) if _is_there(path))
        if not place.is_dir():
            raise CheckpointError(f"{plain(place)} is a file, so there can be no folder {name}")
        _try_out(place)
        free = shutil.disk_usage(place).free
    except (OSError, ValueError) as error:
        if isinstance(error, VlpruneError):
            raise
        raise CheckpointError(
            f"cannot write to {name}: {reason(error)}; choose another folder"
        ) from None
    if free < need:
        raise CheckpointError(
            f"the disk of {name} has {free / MiB:,.0f} MiB left, and about {need / MiB:,.0f} MiB "
            "will be written: free some space, or choose another folder"
        )


def check_file(path: str | Path) -> None:
    """Raise CheckpointError unless the file ``path`` can be written. Nothing is left behind."""
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{plain(path)} is a folder: name a file")
        if path.exists():  # a link or a device is written to in place
            with open(path, "r+b" if path.is_file() else "ab", opener=_at_once):
                return
        if path.is_symlink():
            raise CheckpointError(f"{plain(path)} is a link to nothing: create what it points to")
        if not path.parent.is_dir():
            raise CheckpointError(
                f"cannot write {plain(path)}: there is no folder {plain(path.parent)}"
            )
        _try_out(path.parent, path.name)
    except (OSError, ValueError) as error:
        if isinstance(error, VlpruneError):
            raise
        raise CheckpointError(f"cannot write {plain(path)}: {reason(error)}") from None


def _at_once(path: str, flags: int) -> int:
    """Open an existing file, without waiting for a reader where it is a pipe."""
    return os.open(path, flags & ~os.O_CREAT | getattr(os, "O_NONBLOCK", 0))


def _is_there(path: Path) -> bool:
    """Whether the path exists. Raises OSError where the system refuses even to look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try_out(folder: Path, name: str = "") -> None:
    """Create, fill, rename and remove a file, as a save does."""
    made = folder / f".vlprune-{uuid.uuid4().hex[:12]}"
    made.mkdir()
    try:
        (made / "a").write_bytes(b"vlprune")
        os.replace(made / "a", made / "b")
        if name:
            os.replace(made / "b", made / name)  # a name too long, or with a NUL
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new hidden folder, removed at the end, inside ``folder``, which is created if need be.

    The hidden folder stays if :func:`swap` could not finish, as the config then names the weights
    in it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".vlprune-{uuid.uuid4().hex[:12]}"
    try:
        staged.mkdir()
        with open(staged / MARK, "wb") as mark:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield staged
    finally:
        if not _is_named(staged):
            shutil.rmtree(staged, ignore_errors=True)
        for path in created:
            with suppress(OSError):
                path.rmdir()  # removes only empty folders


def _is_named(staged: Path) -> bool:
    """Whether the folder's config names weights in ``staged``."""
    try:
        return staged.name in (staged.parent / CONFIG).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _left_behind(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every staging folder of a save, and whether the process of that save is alive."""
    for path in sorted(folder.glob(".vlprune-*")):
        if HIDDEN.fullmatch(path.name) and (path / MARK).is_file():
            yield path, _is_locked(path / MARK)


def _is_locked(mark: Path) -> bool:
    if fcntl is None:
        return False
    try:
        with open(mark, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def is_being_saved(folder: Path) -> bool | None:
    """True: a process is saving into ``folder``. False: a save was stopped. None: neither."""
    alive = [living for _, living in _left_behind(folder)]
    return any(alive) if alive else None


def swap(staged: Path, last: str = CONFIG, stale: Iterable[Path] = ()) -> None:
    """Move the files of a staging folder into the folder around it; remove the ``stale`` files.

    The file ``last`` is moved last. Where the folder holds a model, its config first names the new
    weights where they wait, so that a kill at any moment leaves the old or the new model. Raises
    CheckpointError, and leaves the old files, if a folder has the name of a new file or another
    process goes on saving here.
    """
    folder = staged.parent
    names = sorted(p.relative_to(staged) for p in staged.rglob("*") if not p.is_dir())
    names = [name for name in names if str(name) not in (MARK, last)]
    for name in (*names, Path(last)):
        if (folder / name).is_dir():
            raise CheckpointError(
                f"{plain(folder / name)} is a folder, where a file is to be written: rename it"
            )
    mode = stat.S_IMODE((staged / MARK).stat().st_mode)  # made by open(), so it follows the umask
    for name in (*names, Path(last)):
        (staged / name).chmod(mode)
    with _alone(folder):
        if last == CONFIG and (folder / CONFIG).exists():
            os.replace(_config_meanwhile(staged), folder / CONFIG)
        else:
            (folder / last).unlink(missing_ok=True)
        try:
            _finish(staged, names, last, stale)
        except BaseException:  # from here on the swap can only be finished, not undone
            _finish(staged, names, last, stale)
            raise
        dead = [path for path, living in _left_behind(folder) if path != staged and not living]
        for path in dead:
            shutil.rmtree(path, ignore_errors=True)


def _config_meanwhile(staged: Path) -> Path:
    """A file in ``staged`` with the new config, which names the weights where they wait."""
    config: dict[str, Any] = json.loads((staged / CONFIG).read_text(encoding="utf-8"))
    weights = "model.safetensors"
    if (staged / INDEX).exists():
        weights = f"{MARK}.safetensors.index.json"
        index = json.loads((staged / INDEX).read_text(encoding="utf-8"))
        mapping = index["weight_map"]
        index["weight_map"] = {n: f"{staged.name}/{file}" for n, file in mapping.items()}
        write_text(staged / weights, json.dumps(index))
    meanwhile = staged / f"{MARK}.json"
    config["transformers_weights"] = f"{staged.name}/{weights}"
    write_text(meanwhile, json.dumps(config))
    return meanwhile


def _finish(staged: Path, names: Iterable[Path], last: str, stale: Iterable[Path]) -> None:
    """Move all files into place, ``last`` at the end. May be called again after an interruption."""
    folder = staged.parent
    for path in stale:
        path.unlink(missing_ok=True)
    for name in names:
        if name.name.startswith(MARK) or not (staged / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.name.endswith(".safetensors"):  # stays where the config names it meanwhile
            link(staged / name, folder / name)
        else:
            os.replace(staged / name, folder / name)
    if (staged / last).exists():
        os.replace(staged / last, folder / last)


def link(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``; where links are impossible, move ``source``."""
    second = source.with_name(f"{source.name}.second")
    second.unlink(missing_ok=True)
    try:
        os.link(source, second)
    except OSError:
        os.replace(source, target)
        return
    os.replace(second, target)
    second.unlink(missing_ok=True)  # remains where the target was the same file already


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the folder while its files are swapped; other saves wait. Raises CheckpointError."""
    if fcntl is None:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise CheckpointError(
                        f"another process is saving into {plain(folder)}: run this again when it "
                        "has ended"
                    ) from None
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(place)
