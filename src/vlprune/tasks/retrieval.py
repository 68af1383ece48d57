"""Image-text retrieval with CLIP, SigLIP and relatives, and with BLIP."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.captions import CaptionedImage, EachCaption, read_captioned
from ..data.datasets.records import captioned_image
from ..data.files import Left
from ..data.stored import Picture
from ..device import device_of, moved_to, place
from ..errors import RecipeError
from ..recipe.options import BlipRetrievalOptions, RetrievalOptions, TaskOptions
from .base import Advance
from .contrast import BlipFeatures, ClipFeatures, PairContrast
from .dual_encoders import DualEncoderTask
from .momentum import MomentumContrast
from .new_models import blip_config, blip_processor

__all__ = ["BlipRetrievalTask", "RetrievalTask", "recalls"]


class RetrievalTask(DualEncoderTask):
    """Retrieval of captions by image and of images by caption, with a CLIP, a SigLIP or a relative.

    Each training step takes one random caption per image, or with ``every_caption`` one caption and
    its image. The loss is the model's own over the pairs of all processes (:class:`PairContrast`)
    or, with a ``queue``, that of :class:`MomentumContrast`, with momentum features and soft
    targets; SigLIP's takes no queue. The metric ``recall_mean`` is the mean of six recalls among
    all test images and captions, at 1, 5 and 10 both ways. Options: ``queue`` (entries, 0 = none),
    ``momentum``, ``alpha`` (weight of soft targets after the first epoch).
    """

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "recall_mean"
    takes: ClassVar[type[TaskOptions]] = RetrievalOptions
    train: Sequence[CaptionedImage]
    test: Sequence[CaptionedImage]
    item = staticmethod(captioned_image)

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[CaptionedImage]:
        return read_captioned(form, part, left)

    def prepare(self) -> None:
        if self.sigmoid and self.uses_queue:
            raise RecipeError(
                f"options.queue must be 0 for {self.model_spec.path or 'siglip'}, a SigLIP: its "
                "loss judges each pair by itself and has no queue"
            )
        if self.options["every_caption"]:
            self.train = EachCaption(self.train)

    def texts(self) -> list[str]:
        return [caption for item in self.train for caption in item.captions]

    def collate(
        self, items: list[CaptionedImage], rng: random.Random | None = None
    ) -> dict[str, Any]:
        chosen = [rng.choice(i.captions) if rng else i.captions[0] for i in items]
        batch = {**self.words(chosen), **self.looks([item.image for item in items])}
        if rng is not None:  # only the objective takes keys, not the model
            batch["keys"] = torch.tensor([crc32(str(item.image).encode()) for item in items])
        return batch

    @property
    def uses_queue(self) -> bool:
        """Whether the training loss contrasts against a queue."""
        return bool(self.options["queue"])

    def objective(self, model: Any) -> nn.Module:
        if not self.uses_queue:
            return PairContrast(model)
        return MomentumContrast(
            self.features(model),
            self.width(model),
            self.options["queue"],
            self.options["momentum"],
            self.options["alpha"],
        )

    def features(self, model: Any) -> Any:
        """The module that gives the features to contrast."""
        return ClipFeatures(model)

    def width(self, model: Any) -> int:
        """The width of the features."""
        return int(model.config.projection_dim)

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        images, texts, owner = [], [], []
        for start in range(0, len(self.test), batch_size):
            items = self.test[start : start + batch_size]
            captions = [caption for item in items for caption in item.captions]
            owner += [start + i for i, item in enumerate(items) for _ in item.captions]
            images.append(self._image_features(model, [item.image for item in items]))
            texts.append(self._text_features(model, captions))
            advance(len(items))
        scores = (torch.cat(images) @ torch.cat(texts).T).cpu()
        return recalls(*self._reranked(model, scores), torch.tensor(owner))

    def _reranked(self, model: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (images, texts) for ranking texts, and scores of that shape for ranking images."""
        return scores, scores

    def predict(self, model: Any, items: list[CaptionedImage]) -> list[str]:
        model.eval()
        captions = sorted({caption for item in items for caption in item.captions})
        with torch.no_grad():
            looks = self._image_features(model, [item.image for item in items])
            scores = looks @ self._text_features(model, captions).T
        return [captions[i] for i in scores.argmax(1).tolist()]


class BlipRetrievalTask(RetrievalTask):
    """Retrieval with a BlipForImageTextRetrieval; the metric is ``recall_mean``.

    Training is as in BLIP, by contrast with momentum features and a queue, and by matching with
    hard negatives. Evaluation is as in BLIP: the ``rerank`` best by similarity are ordered again by
    similarity plus matching score.
    """

    name: ClassVar[str] = "blip-retrieval"
    takes: ClassVar[type[TaskOptions]] = BlipRetrievalOptions

    @cached_property
    def kind(self) -> str:
        return "blip"

    def new_processor(self) -> Any:
        return blip_processor(self.model_spec, self.texts())

    def model_type(self) -> Any:
        from transformers import BlipForImageTextRetrieval

        return BlipForImageTextRetrieval

    def new_model(self) -> Any:
        return self.model_type()(blip_config(self.model_spec, self.processor.tokenizer))

    def features(self, model: Any) -> Any:
        return BlipFeatures(model)

    def width(self, model: Any) -> int:
        return int(model.config.image_text_hidden_size)

    @property
    def uses_queue(self) -> bool:
        return True

    def _image_features(self, model: Any, images: Sequence[Picture]) -> Tensor:
        pixels = moved_to(model, self.pixels(images))
        states = model.vision_model(pixels).last_hidden_state
        return F.normalize(model.vision_proj(states[:, 0]), dim=-1)

    def _text_features(self, model: Any, texts: Sequence[str]) -> Tensor:
        inputs = moved_to(model, self.words(texts))
        states = model.text_encoder(**inputs).last_hidden_state
        return F.normalize(model.text_proj(states[:, 0]), dim=-1)

    def _reranked(self, model: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (images, texts) for each way, with the matching scores of the best added."""
        captions = [caption for item in self.test for caption in item.captions]
        features = place(BlipFeatures(model), device_of(model))
        # each image is encoded once; its states wait in main memory
        seen = [
            model.vision_model(moved_to(model, self.pixels([item.image])))
            .last_hidden_state[0]
            .cpu()
            for item in self.test
        ]

        def matched(images: Sequence[int], texts: Sequence[int]) -> Tensor:
            states = moved_to(model, torch.stack([seen[i] for i in images]))
            ids = moved_to(model, self.words([captions[t] for t in texts]))
            logits = features.match(ids["input_ids"], ids["attention_mask"], states)
            return logits[:, 1].cpu()

        by_image, by_text = scores - 1000, scores - 1000  # so that all others come after the best
        keep = self.options["rerank"]
        for image, row in enumerate(scores):
            best = row.topk(min(keep, len(row)))
            texts = best.indices.tolist()
            by_image[image, texts] = best.values + matched([image] * len(texts), texts)
        for text, column in enumerate(scores.T):
            best = column.topk(min(keep, len(column)))
            images = best.indices.tolist()
            by_text[images, text] = best.values + matched(images, [text] * len(images))
        return by_image, by_text


def recalls(by_image: Tensor, by_text: Tensor, owner: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 both ways, as fractions.

    ``by_image`` and ``by_text`` are scores (images, texts); the first ranks the texts for an image,
    the second the images for a text. ``owner`` (texts,) is the index of the image of each text. An
    image counts as a hit at k if any of its texts is among its k best, as usual on COCO and Flickr.
    """
    ranked_texts = owner[by_image.argsort(dim=1, descending=True, stable=True)]
    hit_text = ranked_texts == torch.arange(len(by_image))[:, None]
    ranked_images = by_text.T.argsort(dim=1, descending=True, stable=True)
    hit_image = ranked_images == owner[:, None]
    result = {}
    for way, hits in (("image_to_text", hit_text), ("text_to_image", hit_image)):
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = float(hits[:, :k].any(1).double().mean())
    result["recall_mean"] = sum(result.values()) / 6
    return result
