"""What models look like: the layout table and the forwards that need more than a row."""

from . import forwards as forwards
from .discover import discover

__all__ = ["discover"]
