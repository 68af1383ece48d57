"""The tasks, one file each."""

from .base import Task
from .retrieval import RetrievalTask
from .vqa import VqaTask

__all__ = ["TASKS", "RetrievalTask", "Task", "VqaTask"]

TASKS: dict[str, type[Task]] = {"retrieval": RetrievalTask, "vqa": VqaTask}
"""What a recipe may write under ``task:``."""
