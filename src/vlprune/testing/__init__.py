"""The conformance suite, for the supported families and for architectures of your own."""

from . import chats, detectors, encoders, experts, segmenters, texts, variants
from .conformance import CHECKS
from .families import FAMILIES, VARIANTS, Sample, build

__all__ = [
    "CHECKS",
    "FAMILIES",
    "VARIANTS",
    "Sample",
    "build",
    "chats",
    "detectors",
    "encoders",
    "experts",
    "segmenters",
    "texts",
    "variants",
]
