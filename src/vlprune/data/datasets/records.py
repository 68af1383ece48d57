"""Items of each task, made from the rows of a data set.

Each function makes one item of a row, or counts in ``left`` why there is none: a row without a
picture, a label or a text is left out, and a wrong value raises DataError.
"""

from __future__ import annotations

from ..captions import BARE, EMPTY, CaptionedImage
from ..conversations import Conversation, message_turns, paired_turns, told_turns, whole
from ..files import Left, value, wrong
from ..kinds import ANSWER, BOX, LABEL, OBJECT, PAIRS, SPANS, TEXT_OR_NULL, YES_OR_NO
from ..pairs import BLANK as BLANK_STATEMENT
from ..pairs import Statement
from ..pictures import LabelledImage, MaskedImage
from ..questions import SEMANTIC, Question, TypedQuestion, is_asked
from ..regions import BARE as BOXLESS
from ..regions import BLANK as BLANK_TEXT
from ..regions import UNNAMED, Box, Grounding, Phrase, Scenery, Spans, clip
from ..stored import Picture
from .rows import Row

__all__ = [
    "captioned_image",
    "conversation",
    "grounding",
    "labelled_image",
    "masked_image",
    "question",
    "scenery",
    "statement",
    "typed_question",
]

NO_PICTURE = "rows without a picture"
NO_MASK = "pictures without a mask"
NO_LABEL = "rows without a label"
NAMELESS = "boxes without a label"


def captioned_image(row: Row, left: Left) -> CaptionedImage | None:
    """From ``image`` and ``text``: one caption, or a list of them."""
    image = _picture(row, left)
    if image is None:
        return None
    said = row.each("text", TEXT_OR_NULL)
    texts = tuple(text for text in said if text.strip())
    left[EMPTY] += len(said) - len(texts)
    left[BARE] += not texts
    return CaptionedImage(image, texts) if texts else None


def conversation(row: Row, left: Left) -> Conversation | None:
    """From ``messages``, in any of three formats, and ``images``, one or a list of them."""
    said = row.each("messages", OBJECT)
    keys = {key for one in said[:1] for key, _ in value(one, PAIRS)}
    pictures = row.pictures("images")
    if "from" in keys:
        turns = told_turns(row.entry, said, pictures)
    elif "role" in keys or not keys:
        turns = message_turns(row.entry, said, pictures, row.place.folder)
    else:
        turns = paired_turns(said, pictures)
    found = whole(row.entry, row.id, turns, left)
    return found[0] if found else None


def question(row: Row, left: Left) -> Question | None:
    """From ``image``, ``question`` and ``answers``: one answer, or a list of them."""
    image, text = _picture(row, left), _text(row, "question")
    if image is None:
        return None
    answers = tuple(row.each("answers", ANSWER))
    return Question(row.id, image, text, answers) if is_asked(text, answers, left) else None


def typed_question(row: Row, left: Left) -> TypedQuestion | None:
    """From ``image``, ``question``, ``answer`` and ``type``, one of GQA's semantic types."""
    image, text = _picture(row, left), _text(row, "question")
    if image is None:
        return None
    answer = row.optional("answer", ANSWER) or ""
    if not is_asked(text, (answer,), left):
        return None
    return TypedQuestion(str(row.id), image, text, answer, row.get("type", SEMANTIC))


def statement(row: Row, left: Left) -> Statement | None:
    """From ``left_image``, ``right_image``, ``text`` and ``label``: whether the text is true."""
    images = _picture(row, left, "left_image"), _picture(row, left, "right_image")
    text = _text(row, "text")
    if images[0] is None or images[1] is None:
        return None
    if not text.strip():
        left[BLANK_STATEMENT] += 1
        return None
    if row.hidden("label"):
        left[NO_LABEL] += 1
        return None
    return Statement(str(row.id), text, (images[0], images[1]), row.get("label", YES_OR_NO))


def labelled_image(row: Row, left: Left) -> LabelledImage | None:
    """From ``image`` and ``label``: the name of a class, or its number."""
    image = _picture(row, left)
    if image is None:
        return None
    if row.hidden("label"):
        left[NO_LABEL] += 1
        return None
    return LabelledImage(image, row.get("label", ANSWER))


def masked_image(row: Row, left: Left) -> MaskedImage | None:
    """From ``image`` and ``mask``."""
    image, mask = _picture(row, left), row.picture("mask")
    if image is None:
        return None
    if mask is None:
        left[NO_MASK] += 1
        return None
    return MaskedImage(image, mask)


def scenery(row: Row, left: Left) -> Scenery | None:
    """From ``image``, ``boxes`` and ``labels``; ``width`` and ``height`` save opening pictures."""
    image = _picture(row, left)
    if image is None:
        return None
    size, boxes = row.size(image), row.each("boxes", BOX)
    labels = row.each("labels", LABEL)
    if len(labels) != len(boxes):
        raise wrong(row.entry, f"there are {len(boxes)} boxes and {len(labels)} labels")
    pairs = []
    for box, label in zip(boxes, labels, strict=True):
        if not label:
            left[NAMELESS] += 1
        elif clipped := clip(box, size, left):
            pairs.append((clipped, label))
    return Scenery(row.id, image, size, tuple(b for b, _ in pairs), tuple(n for _, n in pairs))


def grounding(row: Row, left: Left) -> Grounding | None:
    """From ``image``, ``text`` and ``boxes``, which ``spans`` of the text name, or all of it."""
    image, text = _picture(row, left), _text(row, "text")
    if image is None:
        return None
    if not text.strip():
        left[BLANK_TEXT] += 1
        return None
    size, boxes = row.size(image), row.each("boxes", BOX)
    spans: list[Spans] = [((0, len(text)),)] * len(boxes)
    if "spans" in row.found:
        spans = row.each("spans", SPANS)
    if len(spans) != len(boxes):
        raise wrong(row.entry, f"there are {len(boxes)} boxes and spans for {len(spans)}")
    phrases: dict[Spans, list[Box]] = {}
    for own, box in zip(spans, boxes, strict=True):
        if any(end > len(text) for _, end in own):
            raise wrong(row.entry, "a box names characters that the text lacks")
        if not any(text[start:end].strip() for start, end in own):
            left[UNNAMED] += 1
        elif clipped := clip(box, size, left):
            phrases.setdefault(own, []).append(clipped)
    if not phrases:
        left[BOXLESS] += 1
        return None
    found = tuple(Phrase(own, tuple(places)) for own, places in phrases.items())
    return Grounding(row.id, image, size, text, found)


# -- parts of rows ---------------------------------------------------------------------


def _picture(row: Row, left: Left, name: str = "image") -> Picture | None:
    found = row.picture(name)
    left[NO_PICTURE] += found is None
    return found


def _text(row: Row, name: str) -> str:
    return row.optional(name, TEXT_OR_NULL) or ""
