"""Conversations about images with any chat model: LLaVA, Qwen-VL, SmolVLM, InternVL and so on."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.conversations import (
    Conversation,
    from_questions,
    read_llava,
    read_messages,
)
from ..data.datasets.records import conversation
from ..data.files import Left
from ..data.images import open_image
from ..data.questions import read_easy_vqa, read_vqav2
from ..device import moved_to
from ..recipe.options import ChatOptions, TaskOptions
from .base import Advance, Task
from .chat_metric import relaxed_match
from .new_models import llava_config, llava_processor
from .prompts import IGNORED, Prompts
from .suffixes import SuffixPrompts, takes_suffixes
from .vqa_metric import normalise, vqa_accuracy

__all__ = ["ChatTask"]

TOGETHER = 8
"""Conversations evaluated at a time: the logits of a large vocabulary take much memory."""


class ChatTask(Task):
    """Conversations with an image-text-to-text model; the metric is ``token_accuracy``.

    The loss counts the tokens of the assistant's turns only, with the tokens that end them. The
    model is evaluated on every answer of the test conversations, given the true turns before it:
    ``token_accuracy`` is the fraction of answer tokens that are the most probable ones, ``loss``
    the mean negative log-likelihood of an answer token in nats. Answers of at most
    ``options.short`` words are also generated: ``exact_match`` compares them after VQA's
    normalisation, by VQA accuracy where several people answered, and ``relaxed_match`` is that of
    :func:`~vlprune.tasks.chat_metric.relaxed_match`. The training is not from a paper.
    """

    name: ClassVar[str] = "chat"
    metric: ClassVar[str] = "token_accuracy"
    takes: ClassVar[type[TaskOptions]] = ChatOptions
    objects: ClassVar[int] = 2
    train: Sequence[Conversation]
    test: Sequence[Conversation]
    item = staticmethod(conversation)

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[Conversation]:
        if form == "llava":
            return read_llava(part["conversations"], part["images"], left)
        if form == "messages":
            return read_messages(part["messages"], part["images"], left)
        if form == "vqav2":
            asked = read_vqav2(part["questions"], part["annotations"], part["images"], left)
        else:
            asked = read_easy_vqa(part["folder"], left)
        return from_questions(asked, self.options["prompt"])

    def new_processor(self) -> Any:
        texts = [turn.text for item in self.train for turn in item.turns]
        return llava_processor(self.model_spec, texts)

    def _processor(self) -> Any:
        processor = super()._processor()
        kind = SuffixPrompts if takes_suffixes(processor) else Prompts
        self.prompts = kind(processor, self.options["template"], self.options["longest"])
        return processor

    def model_type(self) -> Any:
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration

    def new_model(self) -> Any:
        return self.model_type()(llava_config(self.model_spec, self.processor))

    def load(self, path: Any) -> Any:
        return self.load_by_name(path)

    # -- one batch ---------------------------------------------------------------------

    def collate(
        self, items: list[Conversation], rng: random.Random | None = None
    ) -> dict[str, Tensor]:
        return self.prompts.answered([item.turns for item in items], open_image)

    # -- evaluation ----------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        model.eval()
        tokens = right = marked = 0
        lost = exact = relaxed = 0.0
        size = min(batch_size, TOGETHER)
        for start in range(0, len(self.test), size):
            items = list(self.test[start : start + size])
            batch = moved_to(model, self.collate(items))
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            wanted = labels != IGNORED
            scores, labels = logits[wanted].float(), labels[wanted]
            tokens += len(labels)
            right += int((scores.argmax(-1) == labels).sum())
            lost += float(torch.nn.functional.cross_entropy(scores, labels, reduction="sum"))
            asked = [(item, n) for item in items for n in item.replies if self._is_short(item, n)]
            for (item, n), said in zip(asked, self._said(model, asked), strict=True):
                answers = _answers(item, n)
                exact += vqa_accuracy(normalise(said), [normalise(one) for one in answers])
                relaxed += max(relaxed_match(said, answer) for answer in answers)
            marked += len(asked)
            advance(len(items))
        metrics = {"token_accuracy": right / tokens, "loss": lost / tokens}
        if marked:
            metrics |= {"exact_match": exact / marked, "relaxed_match": relaxed / marked}
        return metrics

    def _is_short(self, item: Conversation, number: int) -> bool:
        return len(item.turns[number].text.split()) <= self.options["short"]

    def _said(self, model: Any, asked: Sequence[tuple[Conversation, int]]) -> list[str]:
        """What the model says in the numbered turn of each conversation, by greedy search."""
        said: list[str] = []
        for start in range(0, len(asked), TOGETHER):
            part = asked[start : start + TOGETHER]
            inputs = self.prompts.asked([item.turns[:number] for item, number in part], open_image)
            tokens = model.generate(
                **moved_to(model, inputs),
                max_new_tokens=self.options["new_tokens"],
                do_sample=False,
                **self.prompts.ends(model),
            )
            said += self.prompts.texts(tokens[:, inputs["input_ids"].shape[1] :])
        return said

    @torch.no_grad()
    def predict(self, model: Any, items: list[Conversation]) -> list[str]:
        model.eval()
        return self._said(model, [(item, item.replies[-1]) for item in items])

    def result(self, item: Conversation, said: str) -> dict[str, Any]:
        return {"question_id": item.id, "answer": said}


def _answers(item: Conversation, number: int) -> tuple[str, ...]:
    """The right answers to a turn: what several people said, or what the conversation says."""
    if item.answers and number == item.replies[-1]:
        return item.answers
    return (item.turns[number].text,)
