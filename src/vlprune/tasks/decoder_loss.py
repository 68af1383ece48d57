"""The loss of BLIP's text decoder as its authors compute it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..training.objective import Trainee

__all__ = ["AllAnswers", "Smoothed"]


class Smoothed(Trainee):
    """A BLIP whose text decoder learns labels smoothed by ``smoothing``.

    BLIP's authors smooth by 0.1 in the code of their decoder (``med.py``). transformers' decoder
    reads the number from its config, which is saved and would go on in the loss of whoever trains
    the saved model; here it holds within a forward pass of this module only.
    """

    def __init__(self, model: Any, smoothing: float) -> None:
        super().__init__(model)
        self.smoothing = smoothing

    def forward(self, **batch: Any) -> Any:
        """The model's own output, its loss that of smoothed labels."""
        with self.smoothed():
            return self.model(**batch)

    @contextmanager
    def smoothed(self) -> Iterator[None]:
        """Labels are smoothed in the block."""
        decoder: Any = self.model.text_decoder
        before, decoder.label_smoothing = decoder.label_smoothing, self.smoothing
        try:
            yield
        finally:
            decoder.label_smoothing = before


class AllAnswers(Smoothed):
    """The loss of a BlipForQuestionAnswering on every answer that a question has.

    As in BLIP's ``blip_vqa.py``, the loss of an answer is the sum over its tokens, times the
    answer's weight, and that of a batch is the sum over all answers by the number of questions. The
    question and its picture are read once, however many answers it has.
    """

    def forward(self, **batch: Any) -> Any:
        """``{"loss": ()}`` for a batch with ``owners``, else the model's own output.

        ``decoder_input_ids`` and ``labels`` (answers, tokens) are those of all answers, ``owners``
        (answers,) the row of the question that each belongs to, and ``weights`` (answers,).
        """
        if "owners" not in batch:
            return super().forward(**batch)
        with self.smoothed():
            return _answered(self.model, batch)

    def teach(self, teacher: Any, batch: Mapping[str, Tensor]) -> Any:
        """The output of ``teacher``, a model of the same class, for a batch."""
        return _answered(teacher, batch) if "owners" in batch else teacher(**batch)


def _answered(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    image = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    mask, owners = batch["attention_mask"], batch["owners"]
    states = model.text_encoder(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long, device=image.device),
    )[0]
    losses = model.text_decoder(
        input_ids=batch["decoder_input_ids"],
        encoder_hidden_states=states[owners],
        encoder_attention_mask=mask[owners],
        labels=batch["labels"],
        reduction="none",
    ).loss
    return {"loss": (batch["weights"] * losses).sum() / len(image)}
