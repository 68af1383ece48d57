"""One case in a forked process: limits on time and memory, and a watch on all that it touches.

Linux only: it forks, and reads /proc.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlprune.errors import VlpruneError

MiB = 2**20
MEMORY = 1024 * MiB
"""What a case may take beyond what its process begins with: the seeds are models of a megabyte."""


class Accepted(BaseException):
    """Raised in place of a training: the recipe was accepted."""


@dataclass(frozen=True)
class Room:
    """The folders of one case: all is below ``root``, and ``cwd`` is where the command runs."""

    root: Path

    def __getattr__(self, name: str) -> Path:
        if name in ("cwd", "user", "out", "tmp", "home", "outside"):
            return self.root / name
        raise AttributeError(name)

    def clear(self) -> None:
        """Empty folders, whatever the case before left."""
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("cwd", "user", "out", "tmp", "home", "outside"):
            (self.root / name).mkdir(parents=True)


@dataclass
class Seen:
    """What became of a case."""

    ended: str = "died"
    """returned, refused, raised, accepted, exited, hung or died."""
    code: int = 0
    message: str = ""
    error: str = ""
    frame: str = ""
    trace: str = ""
    value: Any = None
    events: list[str] = field(default_factory=list)
    stdout: str = ""
    stderr: str = ""
    signal: int = 0
    memory: int = 0
    cpu: float = 0.0
    asked: bool = False
    orphans: bool = False
    changed: list[str] = field(default_factory=list)


def run(call: Callable[[], Any], room: Room, limit: float) -> Seen:
    """Call in a process of its own, ended after ``limit`` seconds."""
    files = {
        name: room.root.parent / f"case.{name}" for name in ("in", "out", "err", "end", "dump")
    }
    for path in files.values():
        path.write_text("y\n" * 50 if path.suffix == ".in" else "")
    before = snapshot(room)
    with open(files["in"], "rb") as stdin:
        pid = os.fork()
        if not pid:
            _inside(call, room, limit, files, stdin.fileno())
        seen = _wait(pid, limit)
        seen.asked = os.lseek(stdin.fileno(), 0, os.SEEK_CUR) > 0
    text = files["end"].read_text()
    if text and seen.ended != "hung":
        vars(seen).update(json.loads(text))
    elif seen.ended == "hung":
        seen.trace = files["dump"].read_text()
        seen.frame = _frame_in_dump(seen.trace)
    seen.stdout = files["out"].read_text("utf-8", "replace")
    seen.stderr = files["err"].read_text("utf-8", "replace")
    seen.changed = _changes(before, snapshot(room))
    return seen


def _wait(pid: int, limit: float) -> Seen:
    """Wait for the end of a process; whatever it started ends with it."""
    seen, own = Seen(), _resident()
    handle = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([handle], [], [], limit)
    finally:
        os.close(handle)
    if not ready:
        seen.ended = "hung"
        os.killpg(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    seen.signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    seen.memory = max(0, used.ru_maxrss * 1024 - own)
    seen.cpu = used.ru_utime + used.ru_stime
    try:
        os.killpg(pid, signal.SIGKILL)
        seen.orphans = True
    except ProcessLookupError:
        pass
    return seen


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _inside(
    call: Callable[[], Any], room: Room, limit: float, files: dict[str, Path], stdin: int
) -> None:
    """The child: never returns."""
    seen: dict[str, Any] = {"ended": "raised", "events": []}
    try:
        _settle(room, files, stdin)
        faulthandler.dump_traceback_later(limit * 0.95, file=open(files["dump"], "w"))  # noqa: SIM115
        address = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (address + 2 * MEMORY, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(_watch(room, seen["events"]))
        try:
            seen |= {"value": call(), "ended": "returned"}
        except Accepted:
            seen["ended"] = "accepted"
        except VlpruneError as error:
            seen |= {"ended": "refused", "message": str(error)}
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            seen |= {"ended": "exited" if code else "returned", "code": code}
        except BaseException as error:
            seen |= {"error": type(error).__name__, "message": str(error)[:500]}
            seen |= {"frame": frame_of(error), "trace": "".join(traceback.format_exception(error))}
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        faulthandler.cancel_dump_traceback_later()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException as error:  # a text that stdout cannot take, or a fault of this program
        seen |= {"ended": "raised", "error": type(error).__name__, "message": str(error)[:500]}
        seen |= {"trace": "".join(traceback.format_exception(error))}
    finally:
        files["end"].write_text(json.dumps(seen, default=str))
        os._exit(0)


def _settle(room: Room, files: dict[str, Path], stdin: int) -> None:
    """Standard streams, folders and environment of the case."""
    os.setsid()
    os.dup2(stdin, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(files[name], os.O_WRONLY | os.O_TRUNC), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(room.cwd)
    os.environ.update(
        HOME=str(room.home), TMPDIR=str(room.tmp), COLUMNS="100", PATH="/none"
    )  # without Java
    tempfile.tempdir = None
    sys.dont_write_bytecode = True


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.symlink": 2, "os.link": 2,
    "os.truncate": 1, "os.chmod": 1, "shutil.rmtree": 1, "os.utime": 1,
}  # fmt: skip
NEVER = {
    "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect",
    "pickle.find_class", "ctypes.dlopen",
}  # fmt: skip
DEVICES = ("/dev/null", "/dev/stdout", "/dev/stderr", "/dev/tty", "/dev/shm", "/proc/self")


def _watch(room: Room, events: list[str]) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that notes whatever is written outside the room, started, reached or unpickled."""
    root = str(room.root)

    def outside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        full = os.path.join(os.getcwd(), os.fsdecode(path))
        return not os.path.normpath(full).startswith((root, *DEVICES))

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if len(events) > 20:
            return
        if event == "open":
            path, _, flags = details
            if isinstance(flags, int) and flags & WRITES and outside(path):
                events.append(f"writes {path}")
        elif event in CHANGES:
            for path in details[: CHANGES[event]]:
                if outside(path):
                    events.append(f"{event} {path}")
        elif event in NEVER and not (event == "ctypes.dlopen" and not _from(details[0], root)):
            events.append(f"{event} {' '.join(map(str, details))[:200]}")

    return hook


def _from(path: Any, root: str) -> bool:
    return str(path).startswith((root, "."))


def frame_of(error: BaseException) -> str:
    """Where an error left the project: file and function of its innermost frame."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if "/vlprune/" in frame.filename:
            found = f"{frame.filename.rpartition('/vlprune/')[2]}:{frame.name}"
    return found


def _frame_in_dump(text: str) -> str:
    """The same in what faulthandler wrote, innermost first."""
    for line in text.rpartition("most recent call first")[2].splitlines():
        if "/vlprune/" in line:
            path, _, rest = line.partition('", line ')
            return f"{path.rpartition('/vlprune/')[2]}:{rest.rpartition(' in ')[2]}"
    return ""


def snapshot(room: Room) -> dict[str, tuple[Any, ...]]:
    """What lies in the room: {path: kind, mode, size, time, target}."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder, names, files in os.walk(room.root):
        for name in (*names, *files):
            path = os.path.join(folder, name)
            facts = os.lstat(path)
            entry: tuple[Any, ...] = (stat.S_IFMT(facts.st_mode), stat.S_IMODE(facts.st_mode))
            if not stat.S_ISDIR(facts.st_mode):
                entry += (facts.st_size, facts.st_mtime_ns, facts.st_ino)
            if stat.S_ISLNK(facts.st_mode):
                entry += (os.readlink(path),)
            found[os.path.relpath(path, room.root)] = entry
    return found


def _changes(before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> list[str]:
    """Paths that are new, changed or gone, with which of them."""
    gone = [f"gone {path}" for path in before.keys() - after.keys()]
    new = [f"new {path}" for path in after.keys() - before.keys()]
    other = [f"changed {p}" for p in before.keys() & after.keys() if before[p] != after[p]]
    return sorted(gone + new + other)


def elsewhere(changed: Iterable[str], allowed: Iterable[str], kept: Iterable[str]) -> list[str]:
    """The changes that are in none of the ``allowed`` places, or to a path that must be kept."""
    allowed, kept = tuple(allowed), set(kept)
    bad = []
    for change in changed:
        kind, _, path = change.partition(" ")
        inside = any(path == place or path.startswith(f"{place}/") for place in allowed)
        if not inside or (path in kept and kind != "new"):
            bad.append(change)
    return bad
