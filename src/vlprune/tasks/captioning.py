"""Image captioning with BLIP."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.captions import CaptionedImage, EachCaption, read_captioned
from ..data.datasets.records import captioned_image
from ..data.files import Left
from ..device import moved_to
from ..errors import RecipeError
from ..recipe.options import CaptioningOptions, TaskOptions
from .base import Advance, Task
from .caption_metric import caption_scores
from .decoder_loss import Smoothed
from .new_models import blip_config, blip_processor

__all__ = ["CaptioningTask"]

LONGEST_PROMPT = 15
"""Most tokens of a prompt: captions have 5 to 20 tokens, including the prompt."""


class CaptioningTask(Task):
    """COCO captions with a BlipForConditionalGeneration; the metric is ``cider``.

    Each training step takes one random caption per image (with ``every_caption``, one caption and
    its image), after a prompt that is left out of the loss. The option ``smoothing`` smooths the
    labels of training. Captions for evaluation come from beam search, as in BLIP (3 beams, 5 to 20
    tokens).
    """

    name: ClassVar[str] = "captioning"
    metric: ClassVar[str] = "cider"
    takes: ClassVar[type[TaskOptions]] = CaptioningOptions
    train: Sequence[CaptionedImage]
    test: Sequence[CaptionedImage]
    item = staticmethod(captioned_image)

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[CaptionedImage]:
        return read_captioned(form, part, left)

    def prepare(self) -> None:
        if self.options["every_caption"]:
            self.train = EachCaption(self.train)

    def new_processor(self) -> Any:
        said = [caption for item in self.train for caption in item.captions]
        return blip_processor(self.model_spec, [*said, self.options["prompt"]])

    def _processor(self) -> Any:
        self.processor = super()._processor()
        if self._prompt_length() > LONGEST_PROMPT:
            raise RecipeError(
                f"options.prompt has {self._prompt_length()} tokens: at most {LONGEST_PROMPT} "
                "leave room for a caption of 20"
            )
        return self.processor

    def model_type(self) -> Any:
        from transformers import BlipForConditionalGeneration

        return BlipForConditionalGeneration

    def new_model(self) -> Any:
        return self.model_type()(blip_config(self.model_spec, self.processor.tokenizer))

    def objective(self, model: Any) -> nn.Module:
        smoothing = self.options["smoothing"]
        return Smoothed(model, smoothing) if smoothing else super().objective(model)

    def _ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids, from the decoder's start token on, and mask: (texts, tokens) each."""
        text = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=40, return_tensors="pt"
        )
        ids = text["input_ids"]
        ids[:, 0] = self.start_token()
        return ids, text["attention_mask"]

    def collate(
        self, items: list[CaptionedImage], rng: random.Random | None = None
    ) -> dict[str, Tensor]:
        prompt = self.options["prompt"]
        said = [rng.choice(i.captions) if rng else i.captions[0] for i in items]
        ids, mask = self._ids([f"{prompt} {caption}".strip() for caption in said])
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : self._prompt_length()] = -100
        return {
            "pixel_values": self.pixels([item.image for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
        }

    def _prompt_length(self) -> int:
        """Tokens of the prompt and the start token, without the end token."""
        return len(self.processor.tokenizer(self.options["prompt"])["input_ids"]) - 1

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        said = []
        for start in range(0, len(self.test), batch_size):
            items = list(self.test[start : start + batch_size])
            said += self.predict(model, items)
            advance(len(items))
        return caption_scores(said, [item.captions for item in self.test])

    def result(self, item: CaptionedImage, said: str) -> dict[str, Any]:
        """An entry of COCO's result file; the image id is the number that ends the file's name."""
        digits = re.search(r"(\d+)$", item.image.stem)
        return {"image_id": int(digits[1]) if digits else item.image.name, "caption": said}

    @torch.no_grad()
    def predict(self, model: Any, items: list[CaptionedImage]) -> list[str]:
        model.eval()
        prompt = self.options["prompt"]
        ids, mask = self._ids([prompt] * len(items))
        pixels = self.pixels([item.image for item in items])
        inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        tokens = model.generate(  # drops the prompt's last token, its end token
            **moved_to(model, inputs),
            num_beams=self.options["beams"],
            min_length=5,
            max_length=20,
        )
        texts = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip().removeprefix(prompt).strip() for text in texts]
