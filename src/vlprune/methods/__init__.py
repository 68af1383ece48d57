"""The methods, one small file each."""

from .base import Method, OneShot, Problem, Search
from .magnitude import Magnitude
from .random import Random
from .taylor import Taylor
from .upop import UPop

__all__ = [
    "METHODS",
    "Magnitude",
    "Method",
    "OneShot",
    "Problem",
    "Random",
    "Search",
    "Taylor",
    "UPop",
]

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "random": Random,
    "taylor": Taylor,
    "upop": UPop,
}
"""What a recipe may write under ``method: name:``."""
