"""Configs of the models that transformers lacks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from transformers import AutoModel
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.vit.configuration_vit import ViTConfig

__all__ = ["BlipNlvrConfig", "SegmenterConfig"]


class BlipNlvrConfig(BlipConfig):
    """A BlipConfig, and from which text layer on the two cross-attentions are merged linearly."""

    model_type = "blip_nlvr"

    merge_from_layer: int = 6


class SegmenterConfig(ViTConfig):
    """A ViTConfig, and the number of layers of the mask transformer."""

    model_type = "segmenter"

    decoder_layers: int = 2
    semantic_loss_ignore_index: int = 255


class _Later:
    """Stands for a model class that is imported when it is used."""

    def __init__(self, name: str, config_class: Any) -> None:
        self.__name__, self.config_class = name, config_class

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module("vlprune.models").MODELS[self.__name__], attribute)


for _config, _name in (
    (BlipNlvrConfig, "BlipForVisualReasoning"),
    (SegmenterConfig, "SegmenterForSemanticSegmentation"),
):
    AutoModel.register(_config, _Later(_name, _config), exist_ok=True)
