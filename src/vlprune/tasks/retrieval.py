"""Image-text retrieval with CLIP."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.captions import CaptionedImage, read_captioned
from .base import Advance, Task
from .new_models import clip_config, clip_processor

__all__ = ["RetrievalTask", "recalls"]


class RetrievalTask(Task):
    """Find the caption of an image and the image of a caption, with a CLIPModel.

    Trained with CLIP's contrastive loss on one random caption an image. Evaluated by recall
    among all test images and captions, both ways; ``recall_mean`` is the mean of the six.
    """

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "recall_mean"
    formats: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "karpathy": ("split_file", "images", "split"),
        "coco-captions": ("captions", "images"),
    }
    train: Sequence[CaptionedImage]
    test: Sequence[CaptionedImage]

    def read(self, form: str, part: Mapping[str, str]) -> list[CaptionedImage]:
        return read_captioned(form, part)

    def new_processor(self) -> Any:
        return clip_processor(self.model_spec, [c for item in self.train for c in item.captions])

    def model_type(self) -> Any:
        from transformers import CLIPModel

        return CLIPModel

    def new_model(self) -> Any:
        return self.model_type()(clip_config(self.model_spec, self.processor.tokenizer))

    def collate(
        self, items: list[CaptionedImage], rng: random.Random | None = None
    ) -> dict[str, Any]:
        chosen = [rng.choice(i.captions) if rng else i.captions[0] for i in items]
        return {
            **self._text(chosen),
            "pixel_values": self.pixels([item.image for item in items]),
            "return_loss": True,
        }

    def _text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        text = self.processor.tokenizer(
            list(captions), padding=True, truncation=True, return_tensors="pt"
        )
        return {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        images, texts, owner = [], [], []
        for start in range(0, len(self.test), batch_size):
            items = self.test[start : start + batch_size]
            captions = [caption for item in items for caption in item.captions]
            owner += [start + i for i, item in enumerate(items) for _ in item.captions]
            images.append(self._image_features(model, items))
            texts.append(self._text_features(model, captions))
            advance(len(items))
        scores = torch.cat(images) @ torch.cat(texts).T
        return recalls(scores.cpu(), torch.tensor(owner))

    def predict(self, model: Any, items: list[CaptionedImage]) -> list[str]:
        model.eval()
        captions = sorted({caption for item in items for caption in item.captions})
        with torch.no_grad():
            scores = self._image_features(model, items) @ self._text_features(model, captions).T
        return [captions[i] for i in scores.argmax(1).tolist()]

    def _image_features(self, model: Any, items: Sequence[CaptionedImage]) -> Tensor:
        pixels = self.pixels([item.image for item in items]).to(model.device)
        return _unit(model.get_image_features(pixel_values=pixels))

    def _text_features(self, model: Any, captions: Sequence[str]) -> Tensor:
        inputs = {k: v.to(model.device) for k, v in self._text(captions).items()}
        return _unit(model.get_text_features(**inputs))


def _unit(features: Any) -> Tensor:
    """Rows of length 1; transformers 5 wraps the features in an output object."""
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return tensor / tensor.norm(dim=-1, keepdim=True)


def recalls(scores: Tensor, owner: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 both ways, as fractions.

    ``scores`` is (images, texts); ``owner`` (texts,) says which image a text belongs to. An
    image is right at k if any of its texts is among its k best, as usual on COCO and Flickr.
    """
    ranked_texts = owner[scores.argsort(dim=1, descending=True, stable=True)]
    hit_text = ranked_texts == torch.arange(len(scores))[:, None]
    ranked_images = scores.T.argsort(dim=1, descending=True, stable=True)
    hit_image = ranked_images == owner[:, None]
    result = {}
    for way, hits in (("image_to_text", hit_text), ("text_to_image", hit_image)):
        for k in (1, 5, 10):
            result[f"{way}_r{k}"] = float(hits[:, :k].any(1).double().mean())
    result["recall_mean"] = sum(result.values()) / 6
    return result
