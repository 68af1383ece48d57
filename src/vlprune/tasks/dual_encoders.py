"""What tasks with a dual encoder share: CLIP, SigLIP and relatives, their inputs and features."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..data.stored import Picture
from ..device import moved_to
from ..errors import UnsupportedError
from ..files import plain
from .base import Task
from .contrast import ClipFeatures
from .new_models import clip_config, clip_processor, siglip_config, siglip_processor
from .pixels import PIXELS, Names

__all__ = ["DualEncoderTask"]

SIGMOID = ("siglip", "siglip2")
"""Model types whose loss judges each pair by itself, and whose texts have one length."""
PATCHED: Names = (*PIXELS, "pixel_attention_mask", "spatial_shapes")
"""Inputs of an image encoder that takes pictures of any shape as patches: SigLIP 2 (NaFlex)."""


class DualEncoderTask(Task):
    """Base class of tasks with one vector for an image and one for a text.

    A model in ``model.path`` is loaded as the class of its config's type, which must have
    ``get_image_features`` and ``get_text_features``.
    """

    @cached_property
    def kind(self) -> str:
        """The model type: that of the model in ``model.path``, or the one of a small new model."""
        if not self.model_spec.path:
            return str(self.options["model"])
        return str(self.model_config.model_type)

    @property
    def sigmoid(self) -> bool:
        """Whether the model is a SigLIP, whose loss is a sum over pairs."""
        return self.kind in SIGMOID

    def texts(self) -> list[str]:
        """Every text of the training set, for the vocabulary of a new model."""
        raise NotImplementedError

    def new_processor(self) -> Any:
        make = siglip_processor if self.sigmoid else clip_processor
        return make(self.model_spec, self.texts())

    def model_type(self) -> Any:
        """Raises UnsupportedError for a model without features of images and texts."""
        import transformers

        if not self.model_spec.path:
            return transformers.SiglipModel if self.sigmoid else transformers.CLIPModel
        cls = transformers.MODEL_MAPPING.get(type(self.model_config), None)
        if not all(hasattr(cls, name) for name in ("get_image_features", "get_text_features")):
            raise UnsupportedError(
                f"{plain(self.model_spec.path)} is of the type {plain(self.kind)}, which has no "
                "features of images and of texts to compare: give a CLIP, a SigLIP or a relative"
            )
        return cls

    def new_model(self) -> Any:
        """A small new CLIP or SigLIP; SigLIP's logits begin with its authors' scale and bias."""
        cls, tokenizer = self.model_type(), self.processor.tokenizer
        if not self.sigmoid:
            return cls(clip_config(self.model_spec, tokenizer))
        model = cls(siglip_config(self.model_spec, tokenizer))
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.fill_(-10.0)
        return model

    # -- inputs and features -------------------------------------------------------------

    def words(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, (texts, tokens) each.

        SigLIP has learnt from texts of one length, their padding included, without a mask.
        """
        if not self.sigmoid:
            made = self.processor.tokenizer(
                list(texts), padding=True, truncation=True, return_tensors="pt"
            )
            return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}
        made = self.processor.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._positions,
            return_tensors="pt",
        )
        return {"input_ids": made["input_ids"]}

    @cached_property
    def _positions(self) -> int:
        if not self.model_spec.path:
            return int(self.processor.tokenizer.model_max_length)
        return int(self.model_config.text_config.max_position_embeddings)

    def looks(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        """The inputs of the image encoder: ``pixel_values``, and for SigLIP 2 where they belong."""
        return self.pixels.inputs(images, PATCHED if self.kind == "siglip2" else PIXELS)

    def _image_features(self, model: Any, images: Sequence[Picture]) -> Tensor:
        """Unit-length features of images, (images, width)."""
        return ClipFeatures.image(model, **moved_to(model, self.looks(images)))

    def _text_features(self, model: Any, texts: Sequence[str]) -> Tensor:
        """Unit-length features of texts, (texts, width)."""
        return ClipFeatures.text(model, **moved_to(model, self.words(texts)))
