"""The most memory that this process has held."""

from __future__ import annotations

import sys

import psutil
import torch

__all__ = ["peak_memory"]


def peak_memory(device: torch.device) -> int:
    """Bytes: of main memory since the process began, or of a GPU's memory where one computes."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)
