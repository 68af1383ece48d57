"""Conversations as a chat model's tokens: its processor's template, and which tokens are answers.

Templates differ in everything but this: the template of the first turns is the beginning of the
template of all turns. So the text of an answer is what comes between the template before it and the
template after it. From texts to tokens, pictures are what is in the way: a processor puts many
tokens for each, and only it knows how many. After the last picture, though, the tokens are those of
the bare text, counted from the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from ..data.conversations import ASSISTANT, USER, Turn
from ..data.stored import Picture
from ..errors import DataError, RecipeError, first_line
from ..files import plain, read_text

__all__ = ["IGNORED", "Opened", "Prompts", "Turns", "opened_parts"]

IGNORED = -100
"""The label of a token that is not part of the loss."""
LARGEST_TEMPLATE = 2**20

Turns = Sequence[Turn]
Opened = Callable[[Picture], Image]


class Prompts:
    """The prompts of a processor: batches to learn from and to answer.

    ``template`` is a file with a Jinja chat template to use instead of the processor's own, and
    ``longest`` the most tokens of a conversation (0: no limit), from which the last questions and
    answers are cut off. Raises RecipeError for a processor without a template, and for a template
    that does not keep turns in their order.
    """

    def __init__(self, processor: Any, template: str = "", longest: int = 0) -> None:
        self.processor, self.longest = processor, longest
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if template:
            processor.chat_template = read_text(Path(template), RecipeError, LARGEST_TEMPLATE)
        if getattr(processor, "chat_template", None) is None:
            if getattr(self.tokenizer, "chat_template", None) is None:
                raise RecipeError(
                    f"the processor {type(processor).__name__} in model.path has no chat template: "
                    "give the file of one in options.template"
                )
            processor.chat_template = self.tokenizer.chat_template
        if not getattr(self.tokenizer, "is_fast", False):
            raise RecipeError(
                f"the tokenizer {type(self.tokenizer).__name__} in model.path does not say which "
                "characters its tokens stand for: save it as a fast tokenizer (tokenizer.json)"
            )
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.end = ""
        self.end = self._missing_end()

    def _missing_end(self) -> str:
        """The end token, where the template puts no special token after an answer.

        A model that never learns where answers end goes on talking.
        """
        turns = (Turn(USER, ("question",)), Turn(ASSISTANT, ("answer",)))
        text, (span,) = self._rendered(turns)
        after = text[span[0] : span[1]].rpartition("answer")[2]
        if any(token in after for token in self.tokenizer.all_special_tokens):
            return ""
        return self.tokenizer.eos_token or ""

    # -- texts -------------------------------------------------------------------------

    def _text(self, turns: Turns, asks: bool = False) -> str:
        """The template of the turns, with the beginning of an answer if it ``asks`` for one."""
        messages = []
        for turn in turns:
            parts: list[dict[str, str]] = [
                {"type": "image"} if not isinstance(part, str) else {"type": "text", "text": part}
                for part in turn.parts
            ]
            if turn.role == ASSISTANT:
                parts = [{"type": "text", "text": turn.text + self.end}]
            messages.append({"role": turn.role, "content": parts})
        try:
            text: str = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks
            )
        except Exception as error:  # a template may raise anything
            raise RecipeError(
                f"the chat template of {type(self.processor).__name__} refuses a conversation of "
                f"{', '.join(turn.role for turn in turns)}: {first_line(error)}"
            ) from error
        return text

    def _rendered(self, turns: Turns) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where each answer begins and ends in it.

        The end of an answer is that of the token which ends the turn.
        """
        whole, spans = self._text(turns), []
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            first = _alike(self._text(turns[:number], asks=True), whole)
            after = whole[: _alike(self._text(turns[: number + 1]), whole)]
            if turn.text.strip() not in after[first:]:
                raise RecipeError(
                    f"the chat template of {type(self.processor).__name__} does not keep the "
                    "answers in their places, so they cannot be learnt: give another in "
                    "options.template"
                )
            spans.append((first, len(after.rstrip())))
        return whole, spans

    # -- tokens ------------------------------------------------------------------------

    def _tokens(self, texts: Sequence[str], images: Sequence[list[Image]], side: str) -> Any:
        """The processor's batch: every input of the model."""
        bos = self.tokenizer.bos_token
        options: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        if bos is not None and texts[0].startswith(bos):  # it is in the text already
            options["add_special_tokens"] = False
        pictured = [list(one) for one in images]
        try:
            return self.processor(
                text=list(texts), images=pictured if any(pictured) else None, **options
            )
        except (ValueError, TypeError, IndexError, KeyError) as error:
            if any(pictured) and not all(pictured):
                raise RecipeError(
                    f"{type(self.processor).__name__} takes no batch in which some conversations "
                    f"have pictures and others have none: {first_line(error)}; train on those with "
                    "pictures only, or set batch_size to 1"
                ) from error
            raise

    def answered(self, conversations: Sequence[Turns], opened: Opened) -> dict[str, Tensor]:
        """Inputs and ``labels`` (conversations, tokens) of a forward pass that learns answers.

        ``opened`` opens a picture. Raises DataError for a conversation that is too long even with
        one question.
        """
        kept = [list(turns) for turns in conversations]
        while True:
            rendered = [self._rendered(turns) for turns in kept]
            images = [opened_parts(turns, opened) for turns in kept]
            batch = self._tokens([text for text, _ in rendered], images, "right")
            rows = [
                ids[mask.bool()].tolist()
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            long = [n for n, row in enumerate(rows) if self.longest and len(row) > self.longest]
            if not long:
                break
            for number in long:
                kept[number] = self._shortened(kept[number], len(rows[number]))
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for number, (row, (text, spans), turns) in enumerate(
            zip(rows, rendered, kept, strict=True)
        ):
            places = torch.tensor(self._places(row, text, spans, turns, opened))
            used = batch["attention_mask"][number].nonzero()[:, 0]
            labels[number, used[places]] = batch["input_ids"][number, used[places]]
        return {**batch, "labels": labels}

    def _shortened(self, turns: list[Turn], tokens: int) -> list[Turn]:
        """The turns without the last question and answer."""
        if sum(turn.role == ASSISTANT for turn in turns) < 2:
            said = plain(turns[-1].text[:40])
            raise DataError(
                f"a conversation of one question has {tokens} tokens (its answer begins "
                f"{said!r}), more than options.longest={self.longest}: raise it, or make the "
                "pictures smaller"
            )
        return turns[:-2]

    def _places(
        self,
        row: Sequence[int],
        text: str,
        spans: Sequence[tuple[int, int]],
        turns: Turns,
        opened: Opened,
    ) -> list[int]:
        """The places in ``row``, the tokens of a conversation, of those of its answers."""
        bos = self.tokenizer.bos_token
        bare = self.tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=bos is None or not text.startswith(bos),
        )
        own = bare["input_ids"]
        alike = _alike(own[::-1], row[::-1])
        answers = [n for n, turn in enumerate(turns) if turn.role == ASSISTANT]
        found: list[int] = []
        for (begin, end), number in zip(spans, answers, strict=True):
            told = [
                place
                for place, (first, last) in enumerate(bare["offset_mapping"])
                if first < end and last > begin and last > first
            ]
            if told and told[0] >= len(own) - alike:
                found += [place + len(row) - len(own) for place in told]
            elif number + 1 < len(turns):  # pictures follow it: ask what it was without them
                found += self._places_of_last(row, turns[: number + 1], opened)
            else:
                self._refuse()
        return found

    def _places_of_last(self, row: Sequence[int], turns: Turns, opened: Opened) -> list[int]:
        """The places of the last answer among ``turns``, with which ``row`` begins."""
        text, spans = self._rendered(turns)
        ids = self._tokens([text], [opened_parts(turns, opened)], "right")["input_ids"][0].tolist()
        last = self._places(ids, text, spans[-1:], turns[-1:], opened)
        if not last or ids[: last[-1] + 1] != list(row[: last[-1] + 1]):
            self._refuse()
        return last

    def _refuse(self) -> None:
        raise RecipeError(
            f"{type(self.processor).__name__} makes tokens in which the answers cannot be found: "
            "its text changes after a picture"
        )

    def asked(self, conversations: Sequence[Turns], opened: Opened) -> dict[str, Tensor]:
        """Inputs to generate the next answer of each conversation from, padded on the left."""
        texts = [self._text(turns, asks=True) for turns in conversations]
        images = [opened_parts(turns, opened) for turns in conversations]
        return {**self._tokens(texts, images, "left")}

    def texts(self, tokens: Tensor) -> list[str]:
        """What was generated, without special tokens."""
        said = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in said]

    def ends(self, model: Any) -> dict[str, Any]:
        """The ids of tokens that end an answer and that pad, for ``generate``."""
        known = getattr(model, "generation_config", None)
        ends = getattr(known, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        own = self.tokenizer.eos_token_id
        both = list(dict.fromkeys([*ends, *([] if own is None else [own])]))
        return {"eos_token_id": both, "pad_token_id": self.tokenizer.pad_token_id}


def _alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def opened_parts(turns: Turns, opened: Opened) -> list[Image]:
    """The pictures of a conversation, in their order."""
    return [opened(part) for turn in turns for part in turn.parts if not isinstance(part, str)]
