"""The conformance suite, for the supported families and for architectures of your own."""

from . import (
    assistants,
    chats,
    detectors,
    documents,
    encoders,
    experts,
    segmenters,
    texts,
    trackers,
    variants,
)
from .conformance import CHECKS
from .families import FAMILIES, VARIANTS, Sample, build

__all__ = [
    "CHECKS",
    "FAMILIES",
    "VARIANTS",
    "Sample",
    "assistants",
    "build",
    "chats",
    "detectors",
    "documents",
    "encoders",
    "experts",
    "segmenters",
    "texts",
    "trackers",
    "variants",
]
