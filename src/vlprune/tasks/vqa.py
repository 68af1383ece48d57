"""Visual question answering with BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.questions import Question, read_easy_vqa, read_vqav2
from ..data.shapes import write_shapes
from ..errors import DataError
from ..recipe import DataSpec
from .base import Advance, Task, word_tokenizer
from .vqa_metric import vqa_accuracy

__all__ = ["VqaTask", "rank_answers"]

RERANK = 128  # candidates kept by their first token, as BLIP evaluates


class VqaTask(Task):
    """Questions about images, answered by a BlipForQuestionAnswering.

    Trained to say the most frequent answer. Evaluated twice: by ranking the answers of the
    training set (``accuracy``) and by free generation (``accuracy_generated``).
    """

    name: ClassVar[str] = "vqa"
    metric: ClassVar[str] = "accuracy"
    formats: ClassVar[tuple[str, ...]] = ("easy-vqa", "shapes", "vqav2")
    train: Sequence[Question]
    test: Sequence[Question]
    answers: list[str]

    def load_data(self, data: DataSpec, folder: Path) -> None:
        if data.format == "easy-vqa":
            questions, self.answers = read_easy_vqa(data.folder)
            self.train = [q for q in questions if int(q.image.stem) % 10]
            self.test = [q for q in questions if int(q.image.stem) % 10 == 0]
        elif data.format == "vqav2":
            self.train, self.test = (_vqav2(part) for part in (data.train, data.test))
            self.answers = _answer_list(self.train)
        else:
            root = Path(data.folder or folder)
            write_shapes(root, data.train_items or 2000, data.test_items or 400, most=2)
            self.train, self.test = (_shapes(root, s) for s in ("train2014", "val2014"))
            self.answers = _answer_list(self.train)

    def texts(self) -> list[str]:
        return [q.text for q in self.train] + self.answers

    def new_processor(self) -> Any:
        from transformers import BlipImageProcessor, BlipProcessor

        side = self.model_spec.image_size
        images = BlipImageProcessor(size={"height": side, "width": side})
        return BlipProcessor(images, word_tokenizer(self.texts()))

    def model_type(self) -> Any:
        from transformers import BlipForQuestionAnswering

        return BlipForQuestionAnswering

    def new_model(self) -> Any:
        from transformers import BlipConfig

        spec, tokenizer = self.model_spec, self.processor.tokenizer
        # BLIP's own 0.02 suits a width of 768; narrow models learn nothing for long with it.
        common = {
            "hidden_size": spec.width,
            "num_attention_heads": spec.heads,
            "intermediate_size": 4 * spec.width,
            "initializer_range": 0.8 * spec.width**-0.5,
        }
        config = BlipConfig(
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
                "encoder_hidden_size": spec.width,
                "max_position_embeddings": 64,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "sep_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            projection_dim=spec.width,
            image_text_hidden_size=spec.width,
            initializer_range=common["initializer_range"],
        )
        return self.model_type()(config)

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

    def collate(self, items: list[Question]) -> dict[str, Tensor]:
        said = [max(q.answers, key=q.answers.count) for q in items]
        ids = _answer_ids(self.processor.tokenizer, said)
        labels = ids.masked_fill(ids == self.processor.tokenizer.pad_token_id, -100)
        return {**self._questions(items), "decoder_input_ids": ids, "labels": labels}

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

    def predict(self, model: Any, items: list[Question]) -> list[str]:
        model.eval()
        return self._ranked(model, items)

    @torch.no_grad()
    def _ranked(self, model: Any, items: Sequence[Question]) -> list[str]:
        inputs = {k: v.to(model.device) for k, v in self._questions(items).items()}
        candidates = _answer_ids(self.processor.tokenizer, self.answers).to(model.device)
        best = rank_answers(model, inputs, candidates, self.processor.tokenizer.pad_token_id)
        return [self.answers[i] for i in best.tolist()]

    @torch.no_grad()
    def _generated(self, model: Any, items: Sequence[Question]) -> list[str]:
        inputs = {k: v.to(model.device) for k, v in self._questions(items).items()}
        tokens = model.generate(**inputs, max_new_tokens=8)
        said = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in said]


def rank_answers(
    model: Any, inputs: dict[str, Tensor], candidates: Tensor, pad: int, keep: int = RERANK
) -> Tensor:
    """The index of the most probable candidate for each question. Shape (questions,).

    ``candidates`` are token ids (answers, tokens), beginning with [BOS]. As in BLIP, all
    answers compete by their first token, and the ``keep`` best by their whole probability.
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


def _answer_ids(tokenizer: Any, answers: Sequence[str]) -> Tensor:
    """[BOS] answer [EOS], padded on the right. Shape (answers, tokens)."""
    return tokenizer(list(answers), padding=True, return_tensors="pt")["input_ids"]


def _answer_list(train: Sequence[Question]) -> list[str]:
    """Every most frequent answer of the training set, in a fixed order."""
    return sorted({max(q.answers, key=q.answers.count) for q in train})


def _vqav2(part: Any) -> list[Question]:
    missing = {"questions", "annotations", "images"} - set(part)
    if missing:
        raise DataError(f"the format vqav2 also needs {', '.join(sorted(missing))} for each split")
    return read_vqav2(part["questions"], part["annotations"], part["images"])


def _shapes(root: Path, subtype: str) -> list[Question]:
    notes = root / "annotations"
    return read_vqav2(
        notes / f"questions_{subtype}.json", notes / f"answers_{subtype}.json", root / "images"
    )
