"""Questions about images: VQAv2's pair of JSON files, and easy-VQA's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .files import field, read_json

__all__ = [
    "Question",
    "TypedQuestion",
    "read_easy_vqa",
    "read_gqa",
    "read_visual_genome",
    "read_vqav2",
]


@dataclass(frozen=True)
class Question:
    """A question about an image and the answers people gave (VQAv2: ten, easy-VQA: one)."""

    id: int
    image: Path
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class TypedQuestion:
    """A question of GQA, its answer and its semantic type (obj, rel, attr, cat or global)."""

    id: str
    image: Path
    text: str
    answer: str
    kind: str


def read_gqa(questions: str | Path, images: str | Path) -> list[TypedQuestion]:
    """The questions of a GQA file such as ``train_balanced_questions.json``.

    The image of ``imageId`` 1234 is ``1234.jpg`` in ``images``. Questions without an answer or a
    type, as in the test files, are refused.
    """
    path, folder, found = Path(questions), Path(images), []
    body = read_json(path)
    if not isinstance(body, dict):
        raise DataError(f"{path} must map question ids to questions, as GQA's files do")
    for number, (key, entry) in enumerate(body.items()):
        types = field(entry, "types", path, number)
        found.append(
            TypedQuestion(
                id=str(key),
                image=folder / f"{field(entry, 'imageId', path, number)}.jpg",
                text=str(field(entry, "question", path, number)),
                answer=str(field(entry, "answer", path, number)),
                kind=str(field(types, "semantic", path, number)),
            )
        )
    if not found:
        raise DataError(f"{path} holds no question")
    return found


def read_vqav2(
    questions: str | Path, annotations: str | Path, images: str | Path
) -> list[Question]:
    """The questions of a VQAv2 pair of files, in the order of the question file.

    Images are looked for as ``COCO_{subtype}_{id:012d}.jpg``, the subtype from the question
    file, in ``images`` or in its subfolder of that name.
    """
    q_path, a_path = Path(questions), Path(annotations)
    body = read_json(q_path)
    answers = {}
    for number, entry in enumerate(field(read_json(a_path), "annotations", a_path, 0)):
        given = field(entry, "answers", a_path, number)
        answers[field(entry, "question_id", a_path, number)] = tuple(
            str(field(answer, "answer", a_path, number)) for answer in given
        )
    subtype = str(body.get("data_subtype", ""))
    folder = Path(images) / subtype if (Path(images) / subtype).is_dir() else Path(images)
    found = []
    for number, entry in enumerate(field(body, "questions", q_path, 0)):
        key = field(entry, "question_id", q_path, number)
        if key not in answers:
            raise DataError(f"{a_path} has no answers for question {key} of {q_path}")
        image_id = field(entry, "image_id", q_path, number)
        found.append(
            Question(
                id=key,
                image=folder / f"COCO_{subtype}_{image_id:012d}.jpg",
                text=field(entry, "question", q_path, number),
                answers=answers[key],
            )
        )
    if not found:
        raise DataError(f"{q_path} holds no question")
    return found


def read_easy_vqa(folder: str | Path) -> list[Question]:
    """The questions of an easy-VQA split folder.

    The folder holds ``questions.json`` ([question, answer, image id] triples) and
    ``images/{id}.png``.
    """
    folder = Path(folder)
    path = folder / "questions.json"
    found = []
    for number, entry in enumerate(read_json(path)):
        if not isinstance(entry, list) or len(entry) != 3:
            raise DataError(f"{path}: entry {number} is not [question, answer, image id]")
        text, answer, image = entry
        found.append(Question(number, folder / "images" / f"{image}.png", text, (str(answer),)))
    if not found:
        raise DataError(f"{path} holds no question")
    return found


def read_visual_genome(
    questions: str | Path, image_data: str | Path, images: str | Path
) -> list[Question]:
    """The questions of Visual Genome's ``question_answers.json``, one answer each.

    ``image_data.json`` says in which folder an image lies (the last two parts of its ``url``,
    as in ``VG_100K_2/1.jpg``); ``images`` is the folder above those. Answers lose their final
    period and capitals, as is usual when they join VQAv2.
    """
    path, data_path, folder = Path(questions), Path(image_data), Path(images)
    places = {}
    for number, entry in enumerate(read_json(data_path)):
        url = str(field(entry, "url", data_path, number))
        places[field(entry, "image_id", data_path, number)] = "/".join(url.split("/")[-2:])
    found = []
    for number, entry in enumerate(read_json(path)):
        for pair in field(entry, "qas", path, number):
            image_id = pair.get("image_id", entry.get("id"))
            if image_id not in places:
                raise DataError(f"{data_path} does not list image {image_id} of {path}")
            answer = str(field(pair, "answer", path, number)).strip().rstrip(".").lower()
            found.append(
                Question(
                    id=field(pair, "qa_id", path, number),
                    image=folder / places[image_id],
                    text=str(field(pair, "question", path, number)),
                    answers=(answer,),
                )
            )
    if not found:
        raise DataError(f"{path} holds no question")
    return found
