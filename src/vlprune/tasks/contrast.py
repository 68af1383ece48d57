"""Contrastive training: all pairs of a batch; or a momentum encoder, a queue and soft targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..device import place
from ..errors import UnsupportedError
from ..training.objective import Trainee

__all__ = ["BlipFeatures", "ClipFeatures", "MomentumContrast", "PairContrast"]


class ClipFeatures(nn.Module):
    """Unit-length features of a CLIPModel or a relative, with the model's own temperature."""

    matches = False

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
        factor: Tensor = self.model.logit_scale.exp().clamp(max=100)
        return factor


class BlipFeatures(nn.Module):
    """Unit-length features of a BlipForImageTextRetrieval, and image states for matching.

    transformers' class has no temperature, so this module learns one from 0.07, for training only.
    """

    matches = True

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

    def forward(self, keys: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """``{"loss": (), "logits_per_image": (batch, batch)}``; ``keys`` (batch,) are numbers."""
        image, text = _pair(self.model, batch)
        scale, bias = _scale_and_bias(self.model)
        same = keys[:, None] == _from_all(keys)[None]
        logits = (scale * image @ _gathered(text).T + bias).float()
        if getattr(self.model, "logit_bias", None) is not None:
            loss = -F.logsigmoid(torch.where(same, logits, -logits)).sum(1).mean()
        else:
            wanted = same / same.sum(1, keepdim=True)
            back = (scale * text @ _gathered(image).T).float()
            loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(back, wanted)) / 2
        return {"loss": loss, "logits_per_image": scale * image @ text.T + bias}

    def teach(self, teacher: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Similarities by ``teacher``, a model of the same class, for a batch: (batch, batch)."""
        image, text = _pair(teacher, {k: v for k, v in batch.items() if k != "keys"})
        scale, bias = _scale_and_bias(teacher)
        return {"logits_per_image": scale * image @ text.T + bias}


class MomentumContrast(Trainee):
    """Image-text contrast against a queue of features from a moving average of the weights.

    The averaged weights also make the targets: ``alpha`` times their softmax over all candidates,
    plus 1 - ``alpha`` shared among the texts of the same image (BLIP, section 3.3, after ALBEF).
    Their forward pass runs through the same modules, gates included, with the averaged weights
    in place of the current ones. If the model has a matching head, hard negatives, drawn by
    similarity from the other images of the batch, train that head as well.
    """

    reads_weights = True
    keys: Tensor
    image_queue: Tensor
    text_queue: Tensor
    place: Tensor

    def __init__(
        self, features: Any, width: int, queue: int, momentum: float, alpha: float
    ) -> None:
        super().__init__(features.model)
        self.features = features
        self.momentum, self.alpha = momentum, alpha
        self._names = [name for name, _ in features.named_parameters()]
        for number, parameter in enumerate(features.parameters()):
            self.register_buffer(f"average_{number}", parameter.detach().clone())
        start = torch.Generator().manual_seed(0)
        for name in ("image_queue", "text_queue"):
            noise = torch.randn(queue, width, generator=start)
            self.register_buffer(name, F.normalize(noise, dim=-1))
        self.register_buffer("keys", torch.full((queue,), -1))
        self.register_buffer("place", torch.tensor(0))

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """``{"loss": (), "logits_per_image": (batch, batch)}``.

        Pairs with equal ``keys`` (batch,) show the same image and are no negatives of each other.
        """
        image, text, states = self.features(pixel_values, input_ids, attention_mask)
        scale = self.features.scale()
        with torch.no_grad():
            self._move()
            own = self.features.parameters()
            average = {
                name: slow.to(now.dtype)  # DeepSpeed may train in half precision
                for name, slow, now in zip(self._names, self._averages(), own, strict=True)
            }
            slow_image, slow_text, _ = functional_call(
                self.features, average, (pixel_values, input_ids, attention_mask)
            )
            slow_image, slow_text = (f.to(self.text_queue.dtype) for f in (slow_image, slow_text))
            all_text = torch.cat([slow_text, self.text_queue])
            all_image = torch.cat([slow_image, self.image_queue])
            same = (keys[:, None] == torch.cat([keys, self.keys])[None]).float()
            same = (1 - self.alpha) * same / same.sum(1, keepdim=True)
            to_text = self.alpha * (scale * slow_image @ all_text.T).softmax(1) + same
            to_image = self.alpha * (scale * slow_text @ all_image.T).softmax(1) + same
        image, text = (f.to(self.text_queue.dtype) for f in (image, text))
        loss = (
            F.cross_entropy(scale * image @ all_text.T, to_text)
            + F.cross_entropy(scale * text @ all_image.T, to_image)
        ) / 2
        similarities = scale * image @ text.T
        if self.features.matches:
            loss = loss + self._matching(similarities, keys, input_ids, attention_mask, states)
        if self.training:
            self._enqueue(slow_image, slow_text, keys)
        return {"loss": loss, "logits_per_image": similarities}

    def teach(self, teacher: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Similarities by ``teacher``, a model of the same class, for a batch: (batch, batch)."""
        features = place(type(self.features)(teacher), self.device)
        image, text, _ = features(
            *(batch[k] for k in ("pixel_values", "input_ids", "attention_mask"))
        )
        return {"logits_per_image": self.features.scale().detach() * image @ text.T}

    def _averages(self) -> list[Tensor]:
        return [self.get_buffer(f"average_{n}") for n in range(len(self._names))]

    def _move(self) -> None:
        if self.training:
            for average, parameter in zip(
                self._averages(), self.features.parameters(), strict=True
            ):
                # DeepSpeed makes a vector of a scalar
                now = parameter.detach().reshape(average.shape).to(average.dtype)
                average.lerp_(now, 1 - self.momentum)

    def _matching(
        self, similarities: Tensor, keys: Tensor, ids: Tensor, mask: Tensor, states: Tensor
    ) -> Tensor:
        """The matching loss over all pairs, each with a hard negative text and image."""
        with torch.no_grad():
            other = keys[:, None] != keys[None]
            if not bool(other.any()):  # a batch of one image has no negatives
                wrong_text = wrong_image = keys.new_zeros(0)
            else:
                wrong_text = (similarities.softmax(1) * other + 1e-9 * other).multinomial(1)[:, 0]
                weights = similarities.T.softmax(1) * other + 1e-9 * other
                wrong_image = weights.multinomial(1)[:, 0]
        kept = len(wrong_text)
        logits = self.features.match(
            torch.cat([ids, ids[wrong_text], ids[:kept]]),
            torch.cat([mask, mask[wrong_text], mask[:kept]]),
            torch.cat([states, states[:kept], states[wrong_image]]),
        )
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor, keys: Tensor) -> None:
        """Replace the oldest entries of the queue by the features of all processes."""
        image, text, keys = _from_all(image), _from_all(text), _from_all(keys)
        where = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.image_queue[where] = image.to(self.image_queue.dtype)
        self.text_queue[where] = text.to(self.text_queue.dtype)
        self.keys[where] = keys
        self.place.copy_((self.place + len(keys)) % len(self.keys))


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
    scale = model.logit_scale.exp()
    return (scale.clamp(max=100), 0.0) if bias is None else (scale, bias)


def _unit(features: Any) -> Tensor:
    """Features with rows of length 1; transformers 5 wraps features in an output object.

    Raises UnsupportedError for a model that has a row per token.
    """
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    if tensor.dim() != 2:
        raise UnsupportedError("this model has features per token, not one per image and text")
    return F.normalize(tensor, dim=-1)


class _Gather(torch.autograd.Function):
    """The rows of all processes; backward, the sum of their gradients for the own rows."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.start, context.count = dist.get_rank() * len(rows), len(rows)
        return _from_all(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[context.start : context.start + context.count]


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to each."""
    found: Tensor = _Gather.apply(rows) if _several() else rows
    return found


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _from_all(tensor: Tensor) -> Tensor:
    if not _several():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
