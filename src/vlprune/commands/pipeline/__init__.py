"""From a recipe to a folder, and what the commands ask of a folder that is there.

``compress`` reads as the verbs of a run; the files beside it hold one step each.
"""

from .compress import compress
from .describe import describe
from .evaluate import evaluate_folder, scan_folder
from .exports import export_folder
from .make import make_task

__all__ = [
    "compress",
    "describe",
    "evaluate_folder",
    "export_folder",
    "make_task",
    "scan_folder",
]
