"""The methods, one small file each."""

from .base import Alternating, Method, OneShot, Problem, Search
from .jsp import JSP
from .magnitude import Magnitude
from .random import Random
from .taylor import Taylor
from .upop import UPop

__all__ = [
    "JSP",
    "METHODS",
    "Alternating",
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
    "jsp": JSP,
    "magnitude": Magnitude,
    "random": Random,
    "taylor": Taylor,
    "upop": UPop,
}
"""What a recipe may write under ``method: name:``."""
