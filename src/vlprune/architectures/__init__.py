"""Model architectures: the layout table, and forwards for models that need more than a row."""

from . import forwards as forwards
from .discover import discover, discover_apart

__all__ = ["discover", "discover_apart"]
