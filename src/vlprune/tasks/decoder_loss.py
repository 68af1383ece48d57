"""The loss of BLIP's text decoder as its authors compute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..training.objective import Trainee

__all__ = ["AllAnswers"]


class AllAnswers(Trainee):
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
        return _answered(self.model, batch) if "owners" in batch else self.model(**batch)

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
