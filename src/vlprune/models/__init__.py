"""Models that transformers lacks, as ordinary PreTrainedModels built from transformers' parts.

The classes are imported on first use, so that ``import vlprune`` stays light.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blip_nlvr import BlipForVisualReasoning
    from .configs import BlipNlvrConfig, GlipConfig, MdetrConfig, SegmenterConfig
    from .glip import GlipForGrounding
    from .mdetr import MdetrForGrounding
    from .segmenter import SegmenterForSemanticSegmentation

__all__ = [
    "MODELS",
    "MODEL_TYPES",
    "PREFIX",
    "BlipForVisualReasoning",
    "BlipNlvrConfig",
    "GlipConfig",
    "GlipForGrounding",
    "MdetrConfig",
    "MdetrForGrounding",
    "SegmenterConfig",
    "SegmenterForSemanticSegmentation",
]

_HOME = {
    "BlipForVisualReasoning": "blip_nlvr",
    "GlipForGrounding": "glip",
    "MdetrForGrounding": "mdetr",
    "SegmenterForSemanticSegmentation": "segmenter",
}

PREFIX = "vlprune_"
"""Start of each model type defined here, so that transformers cannot define the same type."""

MODEL_TYPES = {
    "vlprune_blip_nlvr": "BlipNlvrConfig",
    "vlprune_glip": "GlipConfig",
    "vlprune_mdetr": "MdetrConfig",
    "vlprune_segmenter": "SegmenterConfig",
}
"""The config class of each model type."""


class _Models(Mapping[str, Any]):
    """Model classes by the name that a ``config.json`` gives under ``architectures``."""

    def __getitem__(self, name: str) -> Any:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)

    def __iter__(self) -> Iterator[str]:
        return iter(_HOME)

    def __len__(self) -> int:
        return len(_HOME)


MODELS = _Models()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return MODELS[name]
    if name in MODEL_TYPES.values():
        return getattr(import_module(".configs", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
