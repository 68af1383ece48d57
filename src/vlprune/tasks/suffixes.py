"""Questions and answers as PaliGemma takes them: a prompt, and the answer as its suffix.

Such a processor writes the tokens around pictures and answers itself. A prompt is read in both
directions, an answer from left to right, and the processor says which tokens are which.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.conversations import Turn
from .prompts import IGNORED, Opened, Prompts, Turns, opened_parts

__all__ = ["SuffixPrompts", "takes_suffixes"]

PLAIN = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""All pictures, then the text of the turns, one a line: what the authors' prompts look like."""


def takes_suffixes(processor: Any) -> bool:
    """Whether the processor takes an answer apart from its prompt."""
    return "suffix" in inspect.signature(processor.__call__).parameters


class SuffixPrompts(Prompts):
    """The prompts of such a processor; of a conversation, the last answer is learnt.

    ``template`` and ``longest`` are as in :class:`Prompts`; without a template, pictures come
    first, then the turns, one a line.
    """

    def __init__(self, processor: Any, template: str = "", longest: int = 0) -> None:
        if getattr(processor, "chat_template", None) is None:
            processor.chat_template = PLAIN
        super().__init__(processor, template, longest)

    def _missing_end(self) -> str:
        """None: the processor ends an answer itself."""
        return ""

    def answered(self, conversations: Sequence[Turns], opened: Opened) -> dict[str, Tensor]:
        """Inputs and ``labels`` (conversations, tokens) of a forward pass that learns answers.

        Raises DataError for a conversation that is too long even with one question.
        """
        kept = [list(turns) for turns in conversations]
        while True:
            batch = self._with_suffixes(kept, opened)
            lengths = batch["attention_mask"].sum(1).tolist()
            long = [n for n, length in enumerate(lengths) if self.longest and length > self.longest]
            if not long:
                break
            for number in long:
                kept[number] = self._shortened(kept[number], lengths[number])
        answer = batch["token_type_ids"].bool() & batch["attention_mask"].bool()
        return {**batch, "labels": torch.where(answer, batch["input_ids"], IGNORED)}

    def _with_suffixes(self, conversations: Sequence[list[Turn]], opened: Opened) -> Any:
        return self.processor(
            text=[self._text(turns[:-1], asks=True) for turns in conversations],
            suffix=[turns[-1].text.strip() for turns in conversations],
            images=[opened_parts(turns, opened) for turns in conversations],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )

    def asked(self, conversations: Sequence[Turns], opened: Opened) -> dict[str, Tensor]:
        """Inputs to generate the next answer of each conversation from, padded on the left."""
        batch = super().asked(conversations, opened)
        return {name: value for name, value in batch.items() if name != "labels"}
