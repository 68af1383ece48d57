"""From a recipe to a folder, and the work of commands on a folder that exists.

``compress`` lists the steps of a run as verbs; the files beside it hold one step each.
"""

from .compress import compress
from .cut import cut_folder
from .describe import describe
from .evaluate import evaluate_folder, scan_folder
from .exports import export_folder
from .make import make_task
from .streamed import compress_streaming
from .untrained import Asked, compress_model

__all__ = [
    "Asked",
    "compress",
    "compress_model",
    "compress_streaming",
    "cut_folder",
    "describe",
    "evaluate_folder",
    "export_folder",
    "make_task",
    "scan_folder",
]
