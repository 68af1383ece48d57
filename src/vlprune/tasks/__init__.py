"""The tasks, one module each."""

from .base import Task
from .captioning import CaptioningTask
from .chat import ChatTask
from .classification import ClassificationTask
from .detection import DetectionTask
from .gqa import GqaTask
from .grounding import GroundingTask
from .reasoning import ReasoningTask
from .retrieval import BlipRetrievalTask, RetrievalTask
from .segmentation import SegmentationTask
from .vqa import VqaTask

__all__ = [
    "TASKS",
    "BlipRetrievalTask",
    "CaptioningTask",
    "ChatTask",
    "ClassificationTask",
    "DetectionTask",
    "GqaTask",
    "GroundingTask",
    "ReasoningTask",
    "RetrievalTask",
    "SegmentationTask",
    "Task",
    "VqaTask",
]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        BlipRetrievalTask,
        CaptioningTask,
        ChatTask,
        ClassificationTask,
        DetectionTask,
        GqaTask,
        GroundingTask,
        ReasoningTask,
        RetrievalTask,
        SegmentationTask,
        VqaTask,
    )
}
"""Task classes by the names that a recipe may give under ``task:``."""
