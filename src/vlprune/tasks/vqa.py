"""Visual question answering with BLIP."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.datasets.records import question
from ..data.files import Left, check_split
from ..data.questions import (
    Question,
    read_answer_list,
    read_easy_vqa,
    read_visual_genome,
    read_vqav2,
)
from ..device import moved_to
from ..errors import DataError
from ..recipe.options import TaskOptions, VqaOptions
from .base import Advance, Task
from .decoder_loss import AllAnswers, Smoothed
from .new_models import blip_config, blip_processor
from .vqa_metric import vqa_accuracy

__all__ = ["VqaTask", "rank_answers"]

RERANK = 128  # candidates kept by their first token, as in BLIP's evaluation


class VqaTask(Task):
    """Visual question answering with a BlipForQuestionAnswering; the metric is ``accuracy``.

    The model learns the most frequent answer to each question, or with ``targets`` "all" each
    answer by its frequency (:class:`~vlprune.tasks.decoder_loss.AllAnswers`). It is evaluated by
    ranking the answers of the training set, or those in the file that the option ``answers`` names
    (``accuracy``), and by free generation (``accuracy_generated``).
    """

    name: ClassVar[str] = "vqa"
    metric: ClassVar[str] = "accuracy"
    takes: ClassVar[type[TaskOptions]] = VqaOptions
    objects: ClassVar[int] = 2
    train: Sequence[Question]
    test: Sequence[Question]
    item = staticmethod(question)
    answers: list[str]

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[Question]:
        if form == "easy-vqa":
            test = check_split(part["split"]) == "test"
            found = read_easy_vqa(part["folder"], left)
            return [q for q in found if (int(q.image.stem) % 10 == 0) == test]
        if form == "visual-genome":
            return read_visual_genome(part["questions"], part["image_data"], part["images"], left)
        found = read_vqav2(part["questions"], part["annotations"], part["images"], left)
        if "visual_genome" in part:
            names = ("visual_genome", "visual_genome_data", "visual_genome_images")
            missing = [name for name in names if name not in part]
            if missing:
                raise DataError(f"to join Visual Genome, {', '.join(missing)} must be given too")
            told, data, folder = (part[name] for name in names)
            found += read_visual_genome(told, data, folder, left)
        return found

    def prepare(self) -> None:
        if self.options["answers"]:
            self.answers = read_answer_list(self.options["answers"])
            return
        self.answers = sorted({max(q.answers, key=q.answers.count) for q in self.train})

    def contents(self) -> dict[str, Any]:
        return {"answers": self.answers} if self.options["answers"] else {}

    def new_processor(self) -> Any:
        return blip_processor(self.model_spec, [q.text for q in self.train] + self.answers)

    def model_type(self) -> Any:
        from transformers import BlipForQuestionAnswering

        return BlipForQuestionAnswering

    def new_model(self) -> Any:
        return self.model_type()(blip_config(self.model_spec, self.processor.tokenizer))

    def objective(self, model: Any) -> nn.Module:
        smoothing = self.options["smoothing"]
        if self.options["targets"] == "all":
            return AllAnswers(model, smoothing)
        return Smoothed(model, smoothing) if smoothing else super().objective(model)

    # -- one batch ---------------------------------------------------------------------

    def _questions(self, items: Sequence[Question]) -> dict[str, Tensor]:
        text = self.processor.tokenizer(
            [q.text for q in items], padding=True, truncation=True, return_tensors="pt"
        )
        return {
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "pixel_values": self.pixels([q.image for q in items]),
        }

    def collate(self, items: list[Question], rng: random.Random | None = None) -> dict[str, Tensor]:
        more: dict[str, Tensor] = {}
        if rng is not None and self.options["targets"] == "all":  # else one forward of the model
            shares = [(row, *one) for row, q in enumerate(items) for one in _shares(q)]
            said = [answer for _, answer, _ in shares]
            more["owners"] = torch.tensor([row for row, *_ in shares])
            more["weights"] = torch.tensor([weight for *_, weight in shares])
        else:
            said = [max(q.answers, key=q.answers.count) for q in items]
        ids = self._answer_ids(said)
        labels = ids.masked_fill(ids == self.processor.tokenizer.pad_token_id, -100)
        return {**self._questions(items), "decoder_input_ids": ids, "labels": labels, **more}

    def _answer_ids(self, answers: Sequence[str]) -> Tensor:
        """Token ids of [start] answer [end], padded to one length: (answers, tokens)."""
        text = self.processor.tokenizer(list(answers), padding=True, return_tensors="pt")
        ids: Tensor = text["input_ids"]
        ids[:, 0] = self.start_token()
        return ids

    # -- evaluation ----------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        ranked = generated = 0.0
        for start in range(0, len(self.test), batch_size):
            items = self.test[start : start + batch_size]
            for item, first, second in zip(
                items, self._ranked(model, items), self._generated(model, items), strict=True
            ):
                ranked += vqa_accuracy(first, item.answers)
                generated += vqa_accuracy(second, item.answers)
            advance(len(items))
        return {
            "accuracy": ranked / len(self.test),
            "accuracy_generated": generated / len(self.test),
        }

    def result(self, item: Question, said: str) -> dict[str, Any]:
        return {"question_id": item.id, "answer": said}

    def predict(self, model: Any, items: list[Question]) -> list[str]:
        model.eval()
        return self._ranked(model, items)

    @torch.no_grad()
    def _ranked(self, model: Any, items: Sequence[Question]) -> list[str]:
        inputs = moved_to(model, self._questions(items))
        candidates = moved_to(model, self._answer_ids(self.answers))
        best = rank_answers(model, inputs, candidates, self.processor.tokenizer.pad_token_id)
        return [self.answers[i] for i in best.tolist()]

    @torch.no_grad()
    def _generated(self, model: Any, items: Sequence[Question]) -> list[str]:
        inputs = moved_to(model, self._questions(items))
        tokens = model.generate(**inputs, max_new_tokens=8)
        said = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in said]


def _shares(question: Question) -> list[tuple[str, float]]:
    """Each answer once, with the question's weight times its share of the answers."""
    counts = Counter(question.answers)
    whole = len(question.answers)
    return [(answer, question.weight * count / whole) for answer, count in counts.items()]


def rank_answers(
    model: Any, inputs: dict[str, Tensor], candidates: Tensor, pad: int, keep: int = RERANK
) -> Tensor:
    """The index of the most probable candidate for each question: (questions,).

    ``inputs`` are the model's ``pixel_values``, ``input_ids`` and ``attention_mask``, one row per
    question. ``candidates`` are token ids (answers, tokens) that begin with the start token and are
    padded with ``pad``. As in BLIP, all answers compete by the probability of their first token,
    and then the ``keep`` best by that of the whole answer.
    """
    image = model.vision_model(inputs["pixel_values"])[0]
    states = model.text_encoder(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        encoder_hidden_states=image,
        return_dict=False,
    )[0]
    mask, count = inputs["attention_mask"], len(states)
    first = (
        model.text_decoder(
            input_ids=candidates[:1, :1].expand(count, 1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
        )
        .logits[:, -1]
        .log_softmax(-1)
    )
    keep = min(keep, len(candidates))
    top = first[:, candidates[:, 1]].topk(keep, dim=1).indices  # (questions, keep)
    ids = candidates[top].flatten(0, 1)
    logits = (
        model.text_decoder(
            input_ids=ids,
            attention_mask=(ids != pad).long(),
            encoder_hidden_states=states.repeat_interleave(keep, 0),
            encoder_attention_mask=mask.repeat_interleave(keep, 0),
        )
        .logits[:, :-1]
        .log_softmax(-1)
    )
    following = ids[:, 1:]
    likelihood = logits.gather(2, following[..., None])[..., 0]
    total = likelihood.masked_fill(following == pad, 0).sum(1).reshape(count, keep)
    return top.gather(1, total.argmax(1, keepdim=True))[:, 0]
