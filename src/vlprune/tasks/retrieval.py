"""Image-text retrieval with CLIP."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.captions import CaptionedImage, read_coco_captions, read_karpathy
from ..data.shapes import write_shapes
from ..errors import DataError
from ..recipe import DataSpec
from .base import Advance, Task, word_tokenizer

__all__ = ["RetrievalTask", "recalls"]


class RetrievalTask(Task):
    """Find the caption of an image and the image of a caption, with a CLIPModel.

    Trained with CLIP's contrastive loss on one random caption an image. Evaluated by recall
    among all test images and captions, both ways; ``recall_mean`` is the mean of the six.
    """

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "recall_mean"
    formats: ClassVar[tuple[str, ...]] = ("coco-captions", "karpathy", "shapes")
    train: Sequence[CaptionedImage]
    test: Sequence[CaptionedImage]

    def load_data(self, data: DataSpec, folder: Path) -> None:
        if data.format == "coco-captions":
            self.train, self.test = (
                read_coco_captions(*_parts(part, data.format, "captions", "images"))
                for part in (data.train, data.test)
            )
        elif data.format == "karpathy":
            self.train, self.test = (
                read_karpathy(*_parts(part, data.format, "split_file", "images", "split"))
                for part in (data.train, data.test)
            )
        else:
            root = Path(data.folder or folder)
            write_shapes(root, data.train_items or 2000, data.test_items or 400)
            split_file = root / "annotations" / "dataset_shapes.json"
            self.train, self.test = (
                read_karpathy(split_file, root / "images", split) for split in ("train", "test")
            )

    def texts(self) -> list[str]:
        return [caption for item in self.train for caption in item.captions]

    def new_processor(self) -> Any:
        from transformers import CLIPImageProcessor, CLIPProcessor

        side = self.model_spec.image_size
        images = CLIPImageProcessor(
            size={"height": side, "width": side}, crop_size={"height": side, "width": side}
        )
        return CLIPProcessor(images, word_tokenizer(self.texts()))

    def model_type(self) -> Any:
        from transformers import CLIPModel

        return CLIPModel

    def new_model(self) -> Any:
        from transformers import CLIPConfig

        spec, tokenizer = self.model_spec, self.processor.tokenizer
        common = {
            "hidden_size": spec.width,
            "num_attention_heads": spec.heads,
            "intermediate_size": 4 * spec.width,
        }
        config = CLIPConfig(
            vision_config={
                **common,
                "num_hidden_layers": spec.vision_layers,
                "image_size": spec.image_size,
                "patch_size": spec.patch_size,
            },
            text_config={
                **common,
                "num_hidden_layers": spec.text_layers,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 64,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            projection_dim=spec.width,
        )
        return self.model_type()(config)

    def collate(self, items: list[CaptionedImage]) -> dict[str, Any]:
        chosen = [random.choice(item.captions) for item in items]
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


def _parts(part: Any, form: str, *names: str) -> list[str]:
    missing = [name for name in names if name not in part]
    if missing:
        raise DataError(f"the format {form} also needs {', '.join(missing)} for each split")
    return [part[name] for name in names]
