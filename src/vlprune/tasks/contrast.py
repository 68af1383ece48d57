"""Features of images and texts, and the contrast of all pairs of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..training.objective import Trainee
from .gathering import from_all, gathered

__all__ = ["BlipFeatures", "ClipFeatures", "PairContrast"]


MOST = math.log(100)
"""The largest ``logit_scale`` of a CLIP: its authors let no logit be more than 100."""


class ClipFeatures(nn.Module):
    """Unit-length features of a CLIPModel or a relative, with the model's own temperature."""

    matches = False
    queues_averaged = False
    """Whether a queue holds the features by the averaged weights, or the current ones."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        _check_scale(model)
        self.model = model

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        """Images (batch, width), texts (batch, width), and None, as CLIP has no matching head."""
        text = self.text(self.model, input_ids=input_ids, attention_mask=attention_mask)
        return self.image(self.model, pixel_values=pixel_values), text, None

    @staticmethod
    def image(model: Any, **inputs: Tensor) -> Tensor:
        """Image features, (batch, width)."""
        return _unit(model.get_image_features(**inputs))

    @staticmethod
    def text(model: Any, **inputs: Tensor) -> Tensor:
        """Text features, (batch, width)."""
        return _unit(model.get_text_features(**inputs))

    def scale(self) -> Tensor:
        """Factor by which similarities are multiplied, a scalar."""
        factor: Tensor = self.model.logit_scale.clamp(max=MOST).exp()
        return factor

    def hold(self) -> None:
        """Bring the temperature back into its bounds, beyond which it would get no gradient."""
        _hold(self.model)


class BlipFeatures(nn.Module):
    """Unit-length features of a BlipForImageTextRetrieval, and image states for matching.

    transformers' class has no temperature, so this module learns one from 0.07, for training only.
    """

    matches = True
    queues_averaged = True

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images (batch, width), texts (batch, width), image states (batch, patches, width)."""
        states = self.model.vision_model(pixel_values).last_hidden_state
        text = self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        image_features = F.normalize(self.model.vision_proj(states[:, 0]), dim=-1)
        return image_features, F.normalize(self.model.text_proj(text[:, 0]), dim=-1), states

    def match(self, input_ids: Tensor, attention_mask: Tensor, states: Tensor) -> Tensor:
        """Matching logits (pairs, 2); class 1 means that text and image belong together."""
        read = self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=states
        ).last_hidden_state
        logits: Tensor = self.model.itm_head(read[:, 0])
        return logits

    def scale(self) -> Tensor:
        """Factor by which similarities are multiplied, a scalar."""
        return 1 / self.temperature.clamp(0.001, 0.5)

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the temperature back into its bounds, beyond which it would get no gradient."""
        self.temperature.clamp_(0.001, 0.5)


class PairContrast(Trainee):
    """The model's own contrastive loss over all pairs of all processes.

    With a ``logit_bias`` it is that of SigLIP: -log sigmoid of plus or minus each logit, summed
    over the texts and averaged over the images (Zhai et al., ICCV 2023, equation 1); any other has
    CLIP's, the mean cross-entropy both ways. Pairs with equal keys belong together: SigLIP takes
    each for a match, and in CLIP's loss they share the target evenly, as in UniCL (Yang et al.,
    CVPR 2022). With different keys both losses are the model's own, but for
    CLIP's factor of the logits, which stays at most 100, as its authors keep it.

    A process holds the logits of its own images with the texts of all, and in CLIP's loss of its
    own texts with the images of all; gradients of features reach the processes that made them.
    Raises UnsupportedError for a model without a ``logit_scale``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        _check_scale(model)

    def begin(self, epoch: int) -> None:
        """Bring CLIP's factor into its bounds, where it learns: that of a checkpoint may be out."""
        _hold(self.model)

    def stepped(self) -> None:
        """Keep CLIP's factor within its bounds."""
        _hold(self.model)

    def forward(self, keys: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """``{"loss": (), "logits_per_image": (batch, batch)}``; ``keys`` (batch,) are numbers."""
        image, text = _pair(self.model, batch)
        scale, bias = _scale_and_bias(self.model)
        same = keys[:, None] == from_all(keys)[None]
        logits = (scale * image @ gathered(text).T + bias).float()
        if getattr(self.model, "logit_bias", None) is not None:
            loss = -F.logsigmoid(torch.where(same, logits, -logits)).sum(1).mean()
        else:
            wanted = same / same.sum(1, keepdim=True)
            back = (scale * text @ gathered(image).T).float()
            loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(back, wanted)) / 2
        return {"loss": loss, "logits_per_image": scale * image @ text.T + bias}

    def teach(self, teacher: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Similarities by ``teacher``, a model of the same class, for a batch: (batch, batch)."""
        image, text = _pair(teacher, {k: v for k, v in batch.items() if k != "keys"})
        scale, bias = _scale_and_bias(teacher)
        return {"logits_per_image": scale * image @ text.T + bias}


WORDS = ("input_ids", "attention_mask")
"""Inputs of the text encoder; the others are the image encoder's."""


def _pair(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Unit-length features of the images and of the texts of a batch, (batch, width) each."""
    image = ClipFeatures.image(model, **{k: v for k, v in batch.items() if k not in WORDS})
    return image, ClipFeatures.text(model, **{k: v for k, v in batch.items() if k in WORDS})


def _check_scale(model: Any) -> None:
    if not hasattr(model, "logit_scale"):
        raise UnsupportedError(
            f"{type(model).__name__} has no logit_scale to contrast with: give a CLIP, a SigLIP or "
            "a relative"
        )


def _scale_and_bias(model: Any) -> tuple[Tensor, Tensor | float]:
    bias = getattr(model, "logit_bias", None)
    if bias is None:
        return model.logit_scale.clamp(max=MOST).exp(), 0.0
    return model.logit_scale.exp(), bias


@torch.no_grad()
def _hold(model: Any) -> None:
    """Bring CLIP's ``logit_scale`` back into its bounds; SigLIP's has none."""
    if getattr(model, "logit_bias", None) is None:
        model.logit_scale.clamp_(0, MOST)


def _unit(features: Any) -> Tensor:
    """Features with rows of length 1; transformers 5 wraps features in an output object.

    Raises UnsupportedError for a model that has a row per token.
    """
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    if tensor.dim() != 2:
        raise UnsupportedError("this model has features per token, not one per image and text")
    return F.normalize(tensor, dim=-1)
