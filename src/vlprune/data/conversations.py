"""Conversations about images, in the formats of LLaVA and of chat templates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import Left, field, optional, read_json, read_jsonl, some, value, wrong
from .kinds import ID, LIST, PATH, TEXT, WORDS, Entry, Id, Kind, one_of
from .questions import Question
from .stored import Picture

__all__ = [
    "ASSISTANT",
    "MARK",
    "SYSTEM",
    "USER",
    "Conversation",
    "Turn",
    "from_questions",
    "message_turns",
    "paired_turns",
    "read_llava",
    "read_messages",
    "told_turns",
    "whole",
]

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
MARK = "<image>"
"""Where a picture stands in a text of LLaVA's format."""
UNANSWERED = "conversations without an answer"
BLANK = "conversations with a blank turn"


@dataclass(frozen=True)
class Turn:
    """What one side says: texts and pictures in their order."""

    role: str
    parts: tuple[str | Picture, ...]

    @property
    def text(self) -> str:
        """The texts of the turn as one."""
        return "\n".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """Turns of user and assistant, which alternate and end with the assistant's.

    A turn of the system may come first. ``answers`` are what several people answered to the last
    question, where a data set knows that; a model is then marked by VQA accuracy.
    """

    id: Id
    turns: tuple[Turn, ...]
    answers: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Picture, ...]:
        """The pictures of all turns, in their order."""
        return tuple(
            part for turn in self.turns for part in turn.parts if not isinstance(part, str)
        )

    @property
    def replies(self) -> tuple[int, ...]:
        """The numbers of the assistant's turns."""
        return tuple(n for n, turn in enumerate(self.turns) if turn.role == ASSISTANT)


# -- LLaVA -------------------------------------------------------------------------------

SPEAKERS = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
SPEAKER = one_of(*SPEAKERS)


def read_llava(
    conversations: str | Path, images: str | Path, left: Left | None = None
) -> list[Conversation]:
    """The entries of a file such as ``llava_v1_5_mix665k.json``, a list or one object per line.

    An entry has ``conversations``, a list of ``{"from": "human" or "gpt", "value": ...}``, and may
    have ``image``, a path below ``images`` or a list of them. ``<image>`` marks the place of each
    picture; pictures without any mark come first in the first question. ``left`` counts the entries
    left out: those with a blank turn, and those without an answer. A question that nobody answers
    at the end of an entry is cut off. Raises DataError.
    """
    path, folder, left = Path(conversations), Path(images), Left() if left is None else left
    found = []
    for number, entry in enumerate(_entries(path)):
        pictures = [folder / name for name in _pictures(entry, "image")]
        turns = told_turns(entry, field(entry, "conversations", LIST), pictures)
        found += whole(entry, _id_of(entry, number), turns, left)
    return some(found, path, "conversation", left)


def told_turns(entry: Entry, said: Sequence[Entry], pictures: Sequence[Picture]) -> list[Turn]:
    """The turns of an entry in LLaVA's format. Raises DataError."""
    texts = [(SPEAKERS[field(one, "from", SPEAKER)], field(one, "value", TEXT)) for one in said]
    marks = sum(text.count(MARK) for _, text in texts)
    if marks and marks != len(pictures):
        raise wrong(entry, f"{marks} times {MARK} in the turns, but {len(pictures)} pictures")
    waiting = iter(pictures)
    turns = [Turn(role, _marked(text, waiting)) for role, text in texts]
    return turns if marks else _shown_first(turns, pictures)


def _shown_first(turns: list[Turn], pictures: Sequence[Picture]) -> list[Turn]:
    """The turns, with pictures whose place nothing marks at the beginning of the first question."""
    asked = next((number for number, turn in enumerate(turns) if turn.role == USER), None)
    if pictures and asked is not None:
        turns[asked] = Turn(USER, (*pictures, *turns[asked].parts))
    return turns


def _marked(text: str, pictures: Iterator[Picture]) -> tuple[str | Picture, ...]:
    """The text as parts, with a picture at each mark."""
    parts: list[str | Picture] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append(next(pictures))
        if piece.strip():
            parts.append(piece.strip())
    return tuple(parts)


# -- chat templates ------------------------------------------------------------------------

ROLE = one_of(USER, ASSISTANT, SYSTEM)
NAMED = ("image", "path", "url")
PART = one_of("text", "image")
CONTENT: Kind[str | list[Entry]] = Kind(
    "text, or a list of parts", lambda entry: TEXT.take(entry) or LIST.take(entry)
)


def read_messages(
    messages: str | Path, images: str | Path, left: Left | None = None
) -> list[Conversation]:
    """The entries of a file as chat templates take them, a list or one object per line.

    An entry has ``messages``, a list of ``{"role": "user", "content": ...}``; a content is a text,
    or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. A picture is named in
    its part, under ``image``, ``path`` or ``url``, or in the entry's ``images``, in the order in
    which they are shown; where no part is a picture, those come first in the first question. All
    names are paths below ``images``. ``left`` counts as for :func:`read_llava`. Raises DataError.
    """
    path, folder, left = Path(messages), Path(images), Left() if left is None else left
    found = []
    for number, entry in enumerate(_entries(path)):
        pictures = [folder / name for name in _pictures(entry, "images")]
        turns = message_turns(entry, field(entry, "messages", LIST), pictures, folder)
        found += whole(entry, _id_of(entry, number), turns, left)
    return some(found, path, "conversation", left)


def message_turns(
    entry: Entry, said: Sequence[Entry], pictures: Sequence[Picture], folder: Path | None
) -> list[Turn]:
    """The turns of an entry as chat templates take them.

    Pictures that a part names lie below ``folder``; without one, parts name none. Raises DataError.
    """
    listed, turns = iter(pictures), []
    for one in said:
        role, content = field(one, "role", ROLE), field(one, "content", CONTENT)
        if isinstance(content, str):
            turns.append(Turn(role, (content.strip(),) if content.strip() else ()))
        else:
            turns.append(Turn(role, tuple(_parts(content, folder, listed))))
    rest = [*listed]
    if rest and any(not isinstance(part, str) for turn in turns for part in turn.parts):
        raise wrong(entry, f"{len(rest)} pictures in 'images' that no part of a message shows")
    return _shown_first(turns, rest)


def paired_turns(said: Sequence[Entry], pictures: Sequence[Picture]) -> list[Turn]:
    """The turns of a list of ``{"user": question, "assistant": answer}``, as in The Cauldron.

    Pictures come first in the first question. Raises DataError.
    """
    turns = []
    for one in said:
        for role in (USER, ASSISTANT):
            text = field(one, role, TEXT).strip()
            turns.append(Turn(role, (text,) if text else ()))
    return _shown_first(turns, pictures)


def _parts(
    content: Sequence[Entry], folder: Path | None, listed: Iterator[Picture]
) -> Iterator[str | Picture]:
    """The parts of a message that say something."""
    for one in content:
        if field(one, "type", PART) == "text":
            text = field(one, "text", TEXT).strip()
            if text:
                yield text
            continue
        names = (optional(one, key, PATH) for key in NAMED) if folder is not None else ()
        name = next((name for name in names if name), None)
        picture = next(listed, None) if name is None or folder is None else folder / name
        if picture is None:
            raise wrong(
                one, "a picture without a name: give it here, under 'image', or in 'images'"
            )
        yield picture


# -- questions -----------------------------------------------------------------------------


def from_questions(questions: Iterable[Question], prompt: str = "") -> list[Conversation]:
    """Each question about a picture as a conversation with one answer, the most frequent one.

    ``prompt`` follows the question on a line of its own, as in LLaVA's "Answer the question using
    a single word or phrase."
    """
    return [
        Conversation(
            one.id,
            (
                Turn(USER, (one.image, f"{one.text}\n{prompt}" if prompt else one.text)),
                Turn(ASSISTANT, (max(one.answers, key=one.answers.count),)),
            ),
            one.answers,
        )
        for one in questions
    ]


# -- both ------------------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[Entry]:
    """The entries of a JSON list, or the lines of any other file."""
    if path.suffix.lower() == ".json":
        yield from value(read_json(path), LIST)
    else:
        yield from read_jsonl(path)


def _id_of(entry: Entry, number: int) -> Id:
    known = optional(entry, "id", ID)
    return number if known is None else known


def _pictures(entry: Entry, key: str) -> list[str]:
    """The paths under ``key``: a text, a list of texts, or nothing."""
    names = optional(entry, key, NAMES)
    if names is None:
        return []
    return [names] if isinstance(names, str) else [value(name, PATH) for name in names]


NAMES: Kind[str | list[Entry]] = Kind(
    "a path inside the folder of images, or a list of them",
    lambda entry: (PATH.take(entry) if WORDS.take(entry) else None) or LIST.take(entry),
)


def whole(entry: Entry, key: Id, turns: Sequence[Turn], left: Left) -> list[Conversation]:
    """The conversation in a list; an empty list, counted in ``left``, if it cannot be learnt.

    Raises DataError where the turns do not alternate: chat templates refuse those.
    """
    while turns and turns[-1].role == USER:
        turns = turns[:-1]
    roles = [turn.role for turn in turns]
    spoken = roles[1:] if roles[:1] == [SYSTEM] else roles
    for number, role in enumerate(spoken):
        if role != (USER, ASSISTANT)[number % 2]:
            raise wrong(
                entry,
                f"turn {number + 1 + len(roles) - len(spoken)} is of the {role}: after at most one "
                "turn of the system, user and assistant take turns, and the user begins",
            )
    for turn in turns:
        if turn.role == ASSISTANT and any(not isinstance(part, str) for part in turn.parts):
            raise wrong(entry, "the assistant shows a picture: only the user can")
    if not spoken:
        left[UNANSWERED] += 1
    elif any(not turn.parts for turn in turns):
        left[BLANK] += 1
    else:
        return [Conversation(key, tuple(turns))]
    return []
