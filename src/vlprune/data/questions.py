"""Questions about images: VQAv2's pair of JSON files, and easy-VQA's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .files import field, read_json, read_text

__all__ = ["Question", "read_easy_vqa", "read_vqav2"]


@dataclass(frozen=True)
class Question:
    """A question about an image and the answers people gave (VQAv2: ten, easy-VQA: one)."""

    id: int
    image: Path
    text: str
    answers: tuple[str, ...]


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


def read_easy_vqa(folder: str | Path) -> tuple[list[Question], list[str]]:
    """The questions of an easy-VQA split folder, and the list of all answers.

    The folder holds ``questions.json`` ([question, answer, image id] triples) and
    ``images/{id}.png``; ``answers.txt`` lies in it or beside it.
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
    beside = folder / "answers.txt"
    listed = read_text(beside if beside.exists() else folder.parent / "answers.txt").split()
    return found, listed
