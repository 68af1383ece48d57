"""Structured pruning for vision-language transformers.

A Hugging Face model in, a smaller one out, that plain ``from_pretrained`` loads.
Importing this package is what teaches ``from_pretrained`` to do so.
"""

from . import cost, errors
from .architectures import discover
from .budget import select
from .checkpoint import load, save
from .compressor import Compressor
from .errors import VlpruneError
from .gate import gated
from .methods import Magnitude, Random, Taylor
from .plan import Plan
from .rewrite import rewrite
from .structure import Attr, Description, Gate, Slot, Structure

__version__ = "0.1.0"

__all__ = [
    "Attr",
    "Compressor",
    "Description",
    "Gate",
    "Magnitude",
    "Plan",
    "Random",
    "Slot",
    "Structure",
    "Taylor",
    "VlpruneError",
    "cost",
    "discover",
    "errors",
    "gated",
    "load",
    "rewrite",
    "save",
    "select",
]
