"""The methods, one small file each."""

from .base import Method, OneShot, Problem, Search
from .magnitude import Magnitude
from .random import Random
from .taylor import Taylor

__all__ = ["METHODS", "Magnitude", "Method", "OneShot", "Problem", "Random", "Search", "Taylor"]

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "random": Random,
    "taylor": Taylor,
}
"""What a recipe may write under ``method: name:``."""
