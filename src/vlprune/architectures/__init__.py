"""Model architectures: the layout table, and forwards for models that need more than a row."""

from . import forwards as forwards
from .discover import discover
from .recorded import discover_apart, discover_recorded

__all__ = ["discover", "discover_apart", "discover_recorded"]
