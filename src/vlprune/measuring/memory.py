"""The most memory that this process has held, and how much is free."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

__all__ = ["free_memory", "peak_memory"]


def peak_memory(device: torch.device) -> int:
    """Bytes: of main memory since the process began, or of a GPU's memory where one computes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: main memory, or a GPU's where one computes.

    The limit of a container counts, if it has one (cgroup v2).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no Linux, no container, or no limit
        limit = int((CGROUP / "memory.max").read_text())
        free = min(free, limit - int((CGROUP / "memory.current").read_text()))
    return free


CGROUP = Path("/sys/fs/cgroup")
