"""What a task is: data, a model class, a loss that the model computes, and a metric."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerFast

from ..data.files import open_image
from ..errors import DataError, RecipeError, UnsupportedError, did_you_mean
from ..recipe import DataSpec, ModelSpec

__all__ = ["PixelCache", "Task", "word_tokenizer"]

Advance = Callable[[int], None]


class Task(ABC):
    """One task on one data set.

    ``train`` and ``test`` are sequences of items that :meth:`collate` turns into the keywords
    of one forward pass; the model returns its own loss. ``metric`` names the entry of
    :meth:`evaluate` that counts.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    train: Sequence[Any]
    test: Sequence[Any]
    processor: Any

    def __init__(self, model: ModelSpec, data: DataSpec, folder: Path) -> None:
        self.model_spec = model
        if data.format not in self.formats:
            raise RecipeError(
                f"the task {self.name} reads {', '.join(self.formats)}, not {data.format!r}."
                f"{did_you_mean(data.format, self.formats)}"
            )
        self.load_data(data, folder)
        if data.format != "shapes":  # there, the numbers say how many scenes to generate
            self.train = self.train[: data.train_items or None]
            self.test = self.test[: data.test_items or None]
        if not self.train or not self.test:
            raise DataError("the data set has no training items or no test items")
        self.processor = self._processor()
        self.pixels = PixelCache(self.processor.image_processor)

    @abstractmethod
    def load_data(self, data: DataSpec, folder: Path) -> None:
        """Fill ``train`` and ``test``; ``folder`` is where generated data may be written."""

    @abstractmethod
    def texts(self) -> list[str]:
        """Every text of the training data, for a new tokenizer's vocabulary."""

    @abstractmethod
    def new_processor(self) -> Any:
        """A processor for a small new model."""

    @abstractmethod
    def new_model(self) -> Any:
        """A small new model of the task's class."""

    @abstractmethod
    def model_type(self) -> Any:
        """The class that ``model.path`` is loaded with."""

    @abstractmethod
    def collate(self, items: list[Any]) -> dict[str, Tensor]:
        """The keywords of one training forward pass."""

    @abstractmethod
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        """Metrics on ``test``, as fractions; ``advance`` is called with items done."""

    @abstractmethod
    def predict(self, model: Any, items: list[Any]) -> list[str]:
        """What the model says about each item, for a person to compare."""

    def _processor(self) -> Any:
        if not self.model_spec.path:
            return self.new_processor()
        try:
            return AutoProcessor.from_pretrained(self.model_spec.path)
        except (OSError, ValueError) as error:
            raise UnsupportedError(
                f"cannot load a processor from {self.model_spec.path}: {_first_line(error)}"
            ) from None

    def dense_model(self) -> Any:
        """The model to be compressed."""
        if not self.model_spec.path:
            return self.new_model()
        try:
            return self.model_type().from_pretrained(self.model_spec.path)
        except (OSError, ValueError) as error:
            raise UnsupportedError(
                f"cannot load {self.model_spec.path}: {_first_line(error)}"
            ) from None

    def example_inputs(self, batch_size: int = 1) -> dict[str, Tensor]:
        """Inputs of one forward pass, from the test data."""
        items = [self.test[i % len(self.test)] for i in range(batch_size)]
        return self.collate(items)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class PixelCache:
    """Pixel values of images by path; keeps as many as fit in ``limit`` bytes."""

    def __init__(self, image_processor: Any, limit: int = 2 * 1024**3) -> None:
        self.image_processor = image_processor
        self.room = limit
        self.kept: dict[Path, Tensor] = {}

    def __call__(self, paths: Sequence[Path]) -> Tensor:
        """(images, channels, height, width), float32."""
        return torch.stack([self._one(path) for path in paths])

    def _one(self, path: Path) -> Tensor:
        found = self.kept.get(path)
        if found is None:
            image: Image.Image = open_image(path)
            found = self.image_processor(image, return_tensors="pt")["pixel_values"][0]
            size = found.numel() * found.element_size()
            if size <= self.room:
                self.room -= size
                self.kept[path] = found
        return found


def word_tokenizer(texts: Sequence[str], max_length: int = 64) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token a word of ``texts``: [BOS] words [EOS]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    words = {
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    }
    # [EOS] must not be 2: transformers' CLIP then pools in a way kept for old checkpoints.
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[BOS]", "[UNK]", "[EOS]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        cls_token="[BOS]",
        sep_token="[EOS]",
        model_max_length=max_length,
    )
