"""Questions about images, in the formats of VQAv2, GQA, Visual Genome and easy-VQA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import Left, field, inside, optional, read_json, some, unique, value, wrong
from .kinds import (
    ANSWER,
    ID,
    LIST,
    NAME,
    NUMBERED,
    OBJECT,
    PAIRS,
    TEXT,
    TRIPLE,
    URL,
    WHOLE,
    WORDS,
    Id,
    one_of,
    shown,
)
from .stored import Picture

__all__ = [
    "Question",
    "TypedQuestion",
    "is_asked",
    "read_answer_list",
    "read_answer_lists",
    "read_easy_vqa",
    "read_gqa",
    "read_visual_genome",
    "read_vqav2",
]

VISUAL_GENOME = 0.2
"""The weight of an answer of Visual Genome, as BLIP's authors train."""

BLANK = "questions that are blank"
UNANSWERED = "questions without an answer"
UNASKED = "answers to questions that the file does not ask"


@dataclass(frozen=True)
class Question:
    """A question about an image and its answers (VQAv2: those of ten people; easy-VQA: one).

    ``weight`` is what all its answers weigh together, where all of them are learnt.
    """

    id: Id
    image: Picture
    text: str
    answers: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class TypedQuestion:
    """A question of GQA, its answer and its semantic type (obj, rel, attr, cat or global)."""

    id: str
    image: Picture
    text: str
    answer: str
    kind: str


SEMANTIC = one_of("obj", "rel", "attr", "cat", "global")


def read_gqa(
    questions: str | Path, images: str | Path, left: Left | None = None
) -> list[TypedQuestion]:
    """The questions of a GQA file such as ``train_balanced_questions.json``.

    The image of ``imageId`` 1234 is ``1234.jpg`` in ``images``. ``left`` counts the entries left
    out: blank questions and blank answers. Raises DataError, also for files without answers or
    types, such as GQA's test files.
    """
    path, folder, left = Path(questions), Path(images), Left() if left is None else left
    found = []
    for key, entry in value(read_json(path), PAIRS):
        question = TypedQuestion(
            id=key,
            image=folder / f"{field(entry, 'imageId', NAME)}.jpg",
            text=field(entry, "question", TEXT),
            answer=field(entry, "answer", ANSWER),
            kind=field(field(entry, "types", OBJECT), "semantic", SEMANTIC),
        )
        if is_asked(question.text, (question.answer,), left):
            found.append(question)
    return some(found, path, "question", left)


def read_answer_list(path: str | Path) -> list[str]:
    """The answers in a JSON file with a list of them, such as the ``answer_list.json`` of BLIP.

    Raises DataError, also for a blank answer and for one that is there twice.
    """
    place, found = Path(path), {}
    for entry in value(read_json(place), LIST):
        answer = value(entry, WORDS)
        if answer in found:
            raise wrong(entry, f"the answer {shown(answer)} is there twice")
        found[answer] = entry
    return some(list(found), place, "answer")


def read_answer_lists(path: str | Path, types: Sequence[str]) -> dict[str, list[str]]:
    """The answers of each type of question in the order of their numbers, from a file of MDETR's.

    In ``gqa_answer2id_by_type.json`` an object under ``answer_obj``, ``answer_attr`` and so on, for
    each of ``types``, maps answers to numbers. Raises DataError unless the numbers of each type are
    0, 1, 2 and so on, each once. Other keys are not read.
    """
    body, lists = read_json(Path(path)), {}
    for kind in types:
        named = field(body, f"answer_{kind}", OBJECT)
        answers: dict[int, str] = {}
        for answer, entry in value(named, PAIRS):
            number = value(entry, WHOLE)
            if number in answers:
                text = f"{number} is also the number of {shown(answers[number])}"
                raise wrong(entry, f"{text}: each answer needs its own")
            answers[number] = answer
        missing = next((n for n in range(len(answers)) if n not in answers), None)
        if missing is not None or not answers:
            text = "no answer has the number" if answers else "there is no answer with the number"
            raise wrong(
                named, f"{text} {missing or 0}: the {len(answers)} answers must be numbered from 0"
            )
        lists[kind] = [answers[number] for number in range(len(answers))]
    return lists


def read_vqav2(
    questions: str | Path,
    annotations: str | Path,
    images: str | Path,
    left: Left | None = None,
) -> list[Question]:
    """The questions of a VQAv2 pair of files, in the order of the question file.

    Images are named ``COCO_{subtype}_{id:012d}.jpg``, with the subtype from the question file, and
    lie in the subfolder of ``images`` that is named after the subtype, or in ``images`` itself.
    ``left`` counts the entries left out: blank questions, questions that nobody answered, and
    answers to questions that the file does not ask. Raises DataError.
    """
    q_path, a_path = Path(questions), Path(annotations)
    left = Left() if left is None else left
    body = read_json(q_path)
    answers = {
        key: tuple(field(one, "answer", ANSWER) for one in field(entry, "answers", LIST))
        for key, entry in unique(
            field(read_json(a_path), "annotations", LIST), "question_id"
        ).items()
    }
    subtype = field(body, "data_subtype", NAME)
    folder = inside(Path(images), subtype)
    asked = unique(field(body, "questions", LIST), "question_id")
    found = []
    for key, entry in asked.items():
        if key not in answers:
            raise wrong(entry, f"{a_path} has no answers for question {shown(key)} of {q_path}")
        image = folder / f"COCO_{subtype}_{field(entry, 'image_id', NUMBERED):012d}.jpg"
        question = Question(key, image, field(entry, "question", TEXT), answers[key])
        if is_asked(question.text, question.answers, left):
            found.append(question)
    left[UNASKED] += len(answers.keys() - asked.keys())
    return some(found, q_path, "question", left)


def read_easy_vqa(folder: str | Path, left: Left | None = None) -> list[Question]:
    """The questions of an easy-VQA split folder.

    The folder holds ``questions.json`` ([question, answer, image id] triples) and
    ``images/{id}.png``. ``left`` counts blank questions and answers, which are left out. Raises
    DataError.
    """
    folder, left = Path(folder), Left() if left is None else left
    path = folder / "questions.json"
    found = []
    for number, entry in enumerate(value(read_json(path), LIST)):
        text, answer, image = value(entry, TRIPLE)
        place = folder / "images" / f"{value(image, NUMBERED)}.png"
        question = Question(number, place, value(text, TEXT), (value(answer, ANSWER),))
        if is_asked(question.text, question.answers, left):
            found.append(question)
    return some(found, path, "question", left)


def read_visual_genome(
    questions: str | Path,
    image_data: str | Path,
    images: str | Path,
    left: Left | None = None,
) -> list[Question]:
    """The questions of Visual Genome's ``question_answers.json``, with one answer each.

    ``image_data`` is ``image_data.json``, where the last two parts of an image's ``url`` are its
    path below ``images``, as in ``VG_100K_2/1.jpg``. Answers lose their final period and capitals,
    as is usual when they join VQAv2, and they weigh 0.2. ``left`` counts blank questions and
    answers, which are left out. Raises DataError.
    """
    path, data_path, folder = Path(questions), Path(image_data), Path(images)
    left = Left() if left is None else left
    places = {
        key: folder / field(entry, "url", URL)
        for key, entry in unique(value(read_json(data_path), LIST), "image_id").items()
    }
    found = []
    for entry in value(read_json(path), LIST):
        for pair in field(entry, "qas", LIST):
            image_id = optional(pair, "image_id", ID)
            image_id = field(entry, "id", ID) if image_id is None else image_id
            if image_id not in places:
                raise wrong(pair, f"{data_path} does not list image {shown(image_id)} of {path}")
            question = Question(
                id=field(pair, "qa_id", ID),
                image=places[image_id],
                text=field(pair, "question", TEXT),
                answers=(field(pair, "answer", ANSWER).strip().rstrip(".").lower(),),
                weight=VISUAL_GENOME,
            )
            if is_asked(question.text, question.answers, left):
                found.append(question)
    return some(found, path, "question", left)


def is_asked(text: str, answers: tuple[str, ...], left: Left) -> bool:
    """Whether neither the question nor all its answers are blank; else count it in ``left``."""
    if not text.strip():
        left[BLANK] += 1
    elif not any(answer.strip() for answer in answers):
        left[UNANSWERED] += 1
    else:
        return True
    return False
