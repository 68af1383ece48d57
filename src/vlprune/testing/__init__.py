"""The conformance suite, for the supported families and for architectures of your own."""

from . import detectors, experts, variants
from .conformance import CHECKS
from .families import FAMILIES, VARIANTS, Sample, build

__all__ = ["CHECKS", "FAMILIES", "VARIANTS", "Sample", "build", "detectors", "experts", "variants"]
