"""The columns of a dataset, by the names that each task gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = [
    "CAPTIONED",
    "CHATS",
    "GROUNDED",
    "LABELLED",
    "MASKED",
    "OBJECTS",
    "QUESTIONS",
    "STATEMENTS",
    "TYPED_QUESTIONS",
    "Column",
    "Columns",
]


class Column(NamedTuple):
    """A column that a task reads: its kind of value, and whether a dataset must have it.

    :data:`vlprune.data.datasets.columns.SAYS` lists the kinds; ``anything`` is for values that the
    task takes apart by itself.
    """

    kind: str
    needed: bool = True


Columns = Mapping[str, Column]

PICTURE, TEXT, TEXTS = Column("picture"), Column("text"), Column("texts")
ID, SIDE = Column("id", needed=False), Column("number", needed=False)
SIZE: Columns = {"width": SIDE, "height": SIDE}

CAPTIONED: Columns = {"image": PICTURE, "text": TEXTS}
CHATS: Columns = {
    "messages": Column("anything"),
    "images": Column("pictures", needed=False),
    "id": ID,
}
QUESTIONS: Columns = {"image": PICTURE, "question": TEXT, "answers": TEXTS, "id": ID}
TYPED_QUESTIONS: Columns = {
    "image": PICTURE,
    "question": TEXT,
    "answer": TEXT,
    "type": TEXT,
    "id": ID,
}
STATEMENTS: Columns = {
    "left_image": PICTURE,
    "right_image": PICTURE,
    "text": TEXT,
    "label": Column("truth"),
    "id": ID,
}
LABELLED: Columns = {"image": PICTURE, "label": Column("class")}
MASKED: Columns = {"image": PICTURE, "mask": PICTURE}
GROUNDED: Columns = {
    "image": PICTURE,
    "text": TEXT,
    "boxes": Column("boxes"),
    "spans": Column("spans", needed=False),
    **SIZE,
    "id": ID,
}
OBJECTS: Columns = {
    "image": PICTURE,
    "boxes": Column("boxes"),
    "labels": Column("classes"),
    **SIZE,
    "id": ID,
}
