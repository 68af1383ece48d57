"""From samples without labels to the keyword arguments of a model's forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.images import open_image
from ...data.samples import Sample
from ...errors import DataError, UnsupportedError
from ...files import plain

__all__ = ["NEUTRAL", "Feed", "feed_of"]

NEUTRAL = "a photo"
"""The text for all pictures where the samples have none and the text tower stays dense."""
LONGEST = 512
"""Tokens of a text at most, where neither tokenizer nor config gives a limit."""


@dataclass(frozen=True)
class Feed:
    """How samples become batches of one model.

    ``text`` is one text for all, in place of texts that the samples do not have; the text tower
    has then nothing to learn from.
    """

    name: str
    model: Any
    processor: Any
    pictures: bool
    texts: bool
    text: str = ""

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The keyword arguments of one forward pass."""
        given: dict[str, Any] = {}
        if self.pictures:
            given["images"] = [open_image(one.image) for one in samples if one.image]
        if self.texts:
            texts = [self.text or one.text or "" for one in samples]
            given |= {"text": self._marked(texts), **self._lengths()}
        batch = dict(self.processor(**given, return_tensors="pt"))
        takes = inspect.signature(self.model.forward).parameters
        if "decoder_input_ids" in takes and "input_ids" in batch:  # a decoder that reads the texts
            batch.setdefault("decoder_input_ids", batch["input_ids"])
        return {
            name: value
            for name, value in batch.items()
            if name in takes and isinstance(value, torch.Tensor)
        }

    def _marked(self, texts: list[str]) -> list[str]:
        """The texts, with the mark of an image where a language model reads image tokens."""
        mark = getattr(self.processor, "image_token", None)
        if not (self.pictures and mark and _reads_image_tokens(self.model.config)):
            return texts
        return [text if str(mark) in text else f"{mark}\n{text}" for text in texts]

    def _lengths(self) -> dict[str, Any]:
        """How texts are padded and cut off."""
        text = getattr(self.model.config, "text_config", self.model.config)
        limits = [
            getattr(_tokenizer(self.processor), "model_max_length", None),
            getattr(text, "max_position_embeddings", None),
        ]
        most = min([LONGEST, *(n for n in limits if isinstance(n, int) and n > 0)])
        if _reads_image_tokens(self.model.config):
            return {"padding": True}  # cutting off could take image tokens away
        if str(getattr(self.model.config, "model_type", "")).startswith("siglip"):
            return {"padding": "max_length", "truncation": True, "max_length": most}
        return {"padding": True, "truncation": True, "max_length": most}


def feed_of(name: str, model: Any, processor: Any, samples: Sequence[Sample], where: Path) -> Feed:
    """How the samples become batches of the model.

    Raises DataError where the samples lack what the model reads, UnsupportedError for a processor
    that cannot make it.
    """
    takes = inspect.signature(model.forward).parameters
    pictures = "pixel_values" in takes
    texts = "input_ids" in takes or (pictures and "decoder_input_ids" in takes)
    kind = type(model).__name__
    if not pictures and not texts:
        raise UnsupportedError(
            f"{kind} takes neither pixel_values nor input_ids: make batches of your own, and give "
            "them to vlprune.Compressor(..., calibration=batches)"
        )
    have = samples[0]
    if pictures and have.image is None:
        raise DataError(
            f"{kind} reads images, and {plain(where)} has none: give a folder of images"
        )
    neutral = ""
    if texts and have.text is None:
        if not pictures or not _two_towers(model):
            row = '{"image": "1.jpg", "text": "..."}' if pictures else '{"text": "..."}'
            raise DataError(
                f"{kind} reads texts, and {plain(where)} has none: give a .jsonl file with rows "
                f"such as {row}"
            )
        neutral = NEUTRAL
    tokenizer = _tokenizer(processor)
    if texts and tokenizer is None:
        raise UnsupportedError(
            f"the processor in {plain(name)} has no tokenizer, and {kind} reads texts: copy the "
            "files of the tokenizer there"
        )
    if pictures and tokenizer is processor:
        raise UnsupportedError(
            f"the processor in {plain(name)} has no image processor, and {kind} reads images: copy "
            "preprocessor_config.json there"
        )
    if tokenizer is not None and texts and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Feed(name, model, processor, pictures, texts, neutral)


def _tokenizer(processor: Any) -> Any:
    """The tokenizer of a processor, or the processor itself if it is one; None without one."""
    if hasattr(processor, "convert_tokens_to_ids"):
        return processor
    return getattr(processor, "tokenizer", None)


def _two_towers(model: Any) -> bool:
    """Whether images and texts meet only in the outputs, so that either may be anything."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _reads_image_tokens(config: Any) -> bool:
    names: Mapping[str, Any] = {
        name: getattr(config, name, None) for name in ("image_token_id", "image_token_index")
    }
    return any(isinstance(value, int) for value in names.values())
