"""The methods, one small file each; JSP is a folder."""

from .base import Alignment, Look, Method, OneShot, Problem, Search, Weights
from .jsp import JSP
from .magnitude import Magnitude
from .random import Random
from .taylor import Taylor
from .upop import UPop

__all__ = [
    "JSP",
    "METHODS",
    "Alignment",
    "Look",
    "Magnitude",
    "Method",
    "OneShot",
    "Problem",
    "Random",
    "Search",
    "Taylor",
    "UPop",
    "Weights",
]

METHODS: dict[str, type[Method]] = {
    "jsp": JSP,
    "magnitude": Magnitude,
    "random": Random,
    "taylor": Taylor,
    "upop": UPop,
}
"""The methods, by the names that a recipe may write under ``method: name:``."""
