"""The methods, one small file each; JSP is a folder."""

from .base import Alignment, Layer, Look, Method, OneShot, Problem, Search, Statistics, Weights
from .jsp import JSP
from .magnitude import Magnitude
from .obs import OBS
from .random import Random
from .taylor import Taylor
from .upop import UPop

__all__ = [
    "JSP",
    "METHODS",
    "OBS",
    "Alignment",
    "Layer",
    "Look",
    "Magnitude",
    "Method",
    "OneShot",
    "Problem",
    "Random",
    "Search",
    "Statistics",
    "Taylor",
    "UPop",
    "Weights",
]

METHODS: dict[str, type[Method]] = {
    "jsp": JSP,
    "magnitude": Magnitude,
    "obs": OBS,
    "random": Random,
    "taylor": Taylor,
    "upop": UPop,
}
"""The methods, by the names that a recipe may write under ``method: name:``."""
