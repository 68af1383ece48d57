"""GQA: compositional questions about images, answered by MDETR's answer heads."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.datasets.records import typed_question
from ..data.files import Left
from ..data.questions import TypedQuestion, read_answer_lists, read_gqa
from ..device import moved_to
from ..errors import UnsupportedError
from ..files import plain
from ..recipe.options import GqaOptions, TaskOptions
from .base import Advance
from .grounding import RegionTask

__all__ = ["ANSWER_TYPES", "GqaTask"]

ANSWER_TYPES = ("obj", "attr", "rel", "global", "cat")
"""GQA's semantic types of questions, in MDETR's order; each type has its own answer head."""

UNKNOWN = "unknown"
"""In the lists of MDETR's authors, what stands for the answers that they do not list."""

FORMER_TYPES = ("obj", "rel", "attr", "cat", "global")
"""Their order in models whose config does not name it."""


class GqaTask(RegionTask):
    """GQA with a :class:`vlprune.models.MdetrForGrounding`; the metric is ``accuracy``.

    As in MDETR, one head predicts the type of a question, and one head per type chooses among the
    answers that questions of this type have in the training set. An answer is right if it equals
    the answer in the file. The heads have as many classes as the training file has answers, or the
    file that the option ``answers`` names: ``gqa_answer2id_by_type.json`` of MDETR's authors, by
    which their checkpoints (5, 3, 1594, 403, 678 and 111 classes) number the answers. Their lists
    hold "unknown", which they train for an answer that is not listed.
    """

    name: ClassVar[str] = "gqa"
    metric: ClassVar[str] = "accuracy"
    takes: ClassVar[type[TaskOptions]] = GqaOptions
    objects: ClassVar[int] = 2
    train: Sequence[TypedQuestion]
    test: Sequence[TypedQuestion]
    item = staticmethod(typed_question)
    answers: dict[str, list[str]]
    kinds: tuple[str, ...] = ANSWER_TYPES
    """The types in the order of the model's classes."""

    def read(self, form: str, part: Mapping[str, str], left: Left) -> list[TypedQuestion]:
        return read_gqa(part["questions"], part["images"], left)

    def prepare(self) -> None:
        if self.options["answers"]:
            self.answers = read_answer_lists(self.options["answers"], ANSWER_TYPES)
        else:
            self.answers = {
                kind: sorted({q.answer for q in self.train if q.kind == kind})
                for kind in ANSWER_TYPES
            }

    def contents(self) -> dict[str, Any]:
        return {"answers": self.answers} if self.options["answers"] else {}

    def texts(self) -> list[str]:
        return [q.text for q in self.train]

    @property
    def heads(self) -> dict[str, int]:
        """Classes of each answer head; 1, which is never a target, for a type without questions."""
        sizes = {f"answer_{kind}": max(1, len(said)) for kind, said in self.answers.items()}
        return {"answer_type": len(ANSWER_TYPES), **sizes}

    def new_config(self) -> Any:
        config = super().new_config()
        if config.model_type != "vlprune_mdetr":
            raise UnsupportedError(
                "GQA needs answer heads, which only MDETR has: options.model=mdetr"
            )
        config.answer_heads = self.heads
        config.answer_types = list(ANSWER_TYPES)
        return config

    def objective(self, model: Any) -> Any:
        self.kinds = _types_of(model)
        return super().objective(model)

    def load(self, path: Any) -> Any:
        model = super().load(path)
        if dict(model.config.answer_heads) != self.heads:
            file = self.options["answers"]
            needs = f"{plain(file)} lists the answers of" if file else "the training questions need"
            advice = (
                "give the file by which it was trained"
                if file
                else "train on the questions it was made for, or give the file by which it numbers "
                "answers as options.answers"
            )
            raise UnsupportedError(
                f"the model in {path} has the answer heads {dict(model.config.answer_heads)}, "
                f"{needs} {self.heads}: {advice}"
            )
        self.kinds = _types_of(model)
        return model

    def collate(
        self, items: Sequence[TypedQuestion], rng: random.Random | None = None
    ) -> dict[str, Any]:
        words, _ = self.words([q.text for q in items])
        answers = {"answer_type": torch.tensor([self.kinds.index(q.kind) for q in items])}
        for kind in ANSWER_TYPES:
            known = {answer: number for number, answer in enumerate(self.answers[kind])}
            other = known.get(UNKNOWN, -1) if self.options["answers"] else -1
            numbers = [known.get(q.answer, other) if q.kind == kind else -1 for q in items]
            answers[f"answer_{kind}"] = torch.tensor(numbers)
        return {**words, **self.looks(items), "answers": answers}

    @torch.no_grad()
    def evaluate(self, model: Any, advance: Advance, batch_size: int = 64) -> dict[str, float]:
        right = kinds = 0
        for start in range(0, len(self.test), batch_size):
            items = list(self.test[start : start + batch_size])
            for item, (kind, said) in zip(items, self._answers(model, items), strict=True):
                right += said == item.answer
                kinds += kind == item.kind
            advance(len(items))
        count = len(self.test)
        return {"accuracy": right / count, "accuracy_of_types": kinds / count}

    def _answers(self, model: Any, items: Sequence[TypedQuestion]) -> list[tuple[str, str]]:
        """The type and the answer that the model predicts for each question."""
        model.eval()
        inputs = {k: v for k, v in self.collate(items).items() if k != "answers"}
        said = model(**moved_to(model, inputs)).answers
        best: dict[str, Tensor] = {name: logits.argmax(-1).cpu() for name, logits in said.items()}
        kinds, found = _types_of(model), []
        for number in range(len(items)):
            kind = kinds[int(best["answer_type"][number])]
            known = self.answers[kind]
            choice = int(best[f"answer_{kind}"][number])
            found.append((kind, known[choice] if choice < len(known) else ""))
        return found

    @torch.no_grad()
    def predict(self, model: Any, items: list[TypedQuestion]) -> list[str]:
        return [answer for _, answer in self._answers(model, items)]

    def result(self, item: TypedQuestion, said: str) -> dict[str, Any]:
        return {"questionId": item.id, "prediction": said}


def _types_of(model: Any) -> tuple[str, ...]:
    """The types of questions in the order of the classes of ``model``'s head ``answer_type``."""
    return tuple(model.config.answer_types or FORMER_TYPES)
