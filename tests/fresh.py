"""New processes that need not import torch and transformers again: that takes longer than the test.

A server imports them, never vlprune, and forks for every script. What a script imports beyond
them, and all it changes, is its own; a signal kills it and nothing else.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, traceback
import torch, transformers, transformers.modeling_utils, transformers.trainer

def run(job):
    for number, path in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    os.environ.update(job["env"])
    sys.argv[:] = ["script", *job["args"]]
    sys.path[:0] = job["path"]
    code = 0
    try:
        exec(compile(job["code"], "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    children = []
    for job in json.loads(line):
        children.append(os.fork())
        if not children[-1]:
            run(job)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """A script that has ended: its exit code (minus the signal that killed it) and its words."""

    returncode: int
    stdout: str
    stderr: str


class Python:
    """Runs scripts in processes of their own. A context manager: leaving it ends the server."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.count = scratch, 0
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # so that its children can be ended with it
        )

    def __enter__(self) -> Python:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        try:
            self.server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.wait()

    def run(self, code: str, *args: object, path: Sequence[Path] = ()) -> Done:
        """One script, to its end."""
        return self.together([code], *args, path=path)[0]

    def together(
        self,
        codes: Sequence[str],
        *args: object,
        path: Sequence[Path] = (),
        env: Sequence[Mapping[str, Any]] = (),
        timeout: float = 300,
    ) -> list[Done]:
        """Scripts side by side; ``env`` is what each finds in its environment besides."""
        jobs = []
        for number, code in enumerate(codes):
            self.count += 1
            jobs.append(
                {
                    "code": code,
                    "args": [str(arg) for arg in args],
                    "path": [str(folder) for folder in path],
                    "env": {k: str(v) for k, v in env[number].items()} if env else {},
                    "stdout": str(self.scratch / f"{self.count}.out"),
                    "stderr": str(self.scratch / f"{self.count}.err"),
                }
            )
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        ready, _, _ = select.select([self.server.stdout], [], [], timeout)
        if not ready:
            os.killpg(self.server.pid, signal.SIGKILL)
            raise TimeoutError("\n".join(Path(str(job["stderr"])).read_text() for job in jobs))
        return [
            Done(code, Path(str(job["stdout"])).read_text(), Path(str(job["stderr"])).read_text())
            for code, job in zip(json.loads(self.server.stdout.readline()), jobs, strict=True)
        ]
