"""Contrast with a momentum encoder, a queue of features and soft targets, as in ALBEF and BLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ..cutting.ungated import ungated
from ..device import place
from ..processes import world
from ..training.objective import Trainee
from .gathering import from_all, gathered, padded_from_all

__all__ = ["MomentumContrast"]


class MomentumContrast(Trainee):
    """Image-text contrast against a queue of features, with targets by averaged weights.

    A moving average of the weights gives the candidates of a batch and softens the targets: its
    softmax over all candidates counts ``alpha``, and 1 - ``alpha`` is shared among the pairs of the
    same image (BLIP, section 3.3, after ALBEF). ``alpha`` rises from 0 in a line over the first
    epoch, if :meth:`begin` was told how long that is. The averaged pass runs through the same
    modules with other weights and without gates: in a search, the average is that of the dense
    model. Queued are averaged features where ``features.queues_averaged`` (BLIP), else the current
    ones (UPop's CLIP). If the model has a matching head, hard negatives, drawn by similarity from
    the other images of all processes, train that head as well.

    The average moves once per optimizer step, at its first batch, and what is queued is put in at
    its end, by :meth:`stepped`: with accumulated batches the average moves no faster, and the
    batches of one step are no negatives of each other, just like those of several processes.
    """

    reads_weights = True
    keys: Tensor
    image_queue: Tensor
    text_queue: Tensor
    place: Tensor
    steps: Tensor

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
        self.register_buffer("steps", torch.tensor(0))
        self.epoch = 0
        self._moved = False  # checkpoints are written between two steps, where this is right
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []

    def begin(self, epoch: int) -> None:
        """Let ``alpha`` rise over the first ``epoch`` optimizer steps (0: it is constant)."""
        self.epoch = epoch

    def stepped(self) -> None:
        """Count an optimizer step, and put its features into the queue."""
        self.steps += 1
        for image, text, keys in self._waiting:
            self._enqueue(image, text, keys)
        self._waiting.clear()
        self._moved = False

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """``{"loss": (), "logits_per_image": (batch, batch)}``.

        Pairs with equal ``keys`` (batch,) show the same image and are no negatives of each other.
        """
        learns = self.training and self.model.training  # a look at a held-out batch does not count
        if learns and not self._moved:
            self._move()
        image, text, states = self.features(pixel_values, input_ids, attention_mask)
        scale = self.features.scale()
        slow_image, slow_text = self._averaged(pixel_values, input_ids, attention_mask)
        with torch.no_grad():
            all_text = torch.cat([slow_text, self.text_queue])
            all_image = torch.cat([slow_image, self.image_queue])
            same = (keys[:, None] == torch.cat([keys, self.keys])[None]).float()
            same = same / same.sum(1, keepdim=True)
            soft = self._softness()
            to_text, to_image = (
                soft * (scale * own @ other.T).softmax(1) + (1 - soft) * same
                for own, other in ((slow_image, all_text), (slow_text, all_image))
            )
        image, text = (f.to(self.text_queue.dtype) for f in (image, text))
        loss = (
            F.cross_entropy(scale * image @ all_text.T, to_text)
            + F.cross_entropy(scale * text @ all_image.T, to_image)
        ) / 2
        if self.features.matches:
            loss = loss + self._matching(
                image.detach(), text.detach(), keys, input_ids, attention_mask, states
            )
        if learns:
            if self.features.queues_averaged:
                self._wait(slow_image, slow_text, keys)
            else:
                self._wait(image, text, keys)
        return {"loss": loss, "logits_per_image": scale * image @ text.T}

    def teach(self, teacher: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Similarities by ``teacher``, a model of the same class, for a batch: (batch, batch)."""
        features = place(type(self.features)(teacher), self.device)
        image, text, _ = features(
            *(batch[k] for k in ("pixel_values", "input_ids", "attention_mask"))
        )
        return {"logits_per_image": self.features.scale().detach() * image @ text.T}

    def _softness(self) -> Tensor | float:
        """The weight of the soft targets at this step."""
        if not self.epoch:
            return self.alpha
        return self.alpha * (self.steps / self.epoch).clamp(max=1)

    def _averages(self) -> list[Tensor]:
        return [self.get_buffer(f"average_{n}") for n in range(len(self._names))]

    @torch.no_grad()
    def _averaged(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The features of the images and of the texts by the averaged weights."""
        now = self.features.parameters()
        average = {
            name: slow.to(own.dtype)  # DeepSpeed may train in half precision
            for name, slow, own in zip(self._names, self._averages(), now, strict=True)
        }
        with ungated(self.features):
            image, text, _ = functional_call(self.features, average, batch)
        return image.to(self.text_queue.dtype), text.to(self.text_queue.dtype)

    @torch.no_grad()
    def _move(self) -> None:
        self.features.hold()
        for average, parameter in zip(self._averages(), self.features.parameters(), strict=True):
            # DeepSpeed makes a vector of a scalar
            now = parameter.detach().reshape(average.shape).to(average.dtype)
            average.lerp_(now, 1 - self.momentum)
        self._moved = True

    def _matching(
        self,
        image: Tensor,
        text: Tensor,
        keys: Tensor,
        ids: Tensor,
        mask: Tensor,
        states: Tensor,
    ) -> Tensor:
        """The matching loss over all pairs, each with a hard negative text and image."""
        everywhere, first = gathered(states), world()[1] * len(keys)
        with torch.no_grad():
            all_ids, all_mask = padded_from_all(ids), padded_from_all(mask)
            ids, mask = (of[first : first + len(keys)] for of in (all_ids, all_mask))
            other = keys[:, None] != from_all(keys)[None]
            if not bool(other.any()):  # a single image in all processes has no negatives
                wrong_text = wrong_image = keys.new_zeros(0)
            else:
                scale = self.features.scale()
                wrong_text, wrong_image = (
                    (
                        (scale * own @ from_all(theirs).T).softmax(1) * other + 1e-9 * other
                    ).multinomial(1)[:, 0]
                    for own, theirs in ((image, text), (text, image))
                )
        kept = len(wrong_text)
        logits = self.features.match(
            torch.cat([ids, all_ids[wrong_text], ids[:kept]]),
            torch.cat([mask, all_mask[wrong_text], mask[:kept]]),
            torch.cat([states, states[:kept], everywhere[wrong_image]]),
        )
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(ids)] = 1
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def _wait(self, image: Tensor, text: Tensor, keys: Tensor) -> None:
        """Keep the features of all processes until the optimizer steps."""
        image, text = (f.detach().to(self.text_queue.dtype) for f in (image, text))
        self._waiting.append((from_all(image), from_all(text), from_all(keys)))

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor, keys: Tensor) -> None:
        """Replace the oldest entries of the queue."""
        where = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.keys)
        self.image_queue[where], self.text_queue[where], self.keys[where] = image, text, keys
        self.place.copy_((self.place + len(keys)) % len(self.keys))
