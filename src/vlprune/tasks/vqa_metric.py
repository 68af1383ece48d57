"""The accuracy of VQAv2 as its evaluation defines it (Antol et al., ICCV 2015, section 4.3)."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["normalise", "vqa_accuracy"]

_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"(\d)(,)(\d)")

_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's "
        "how'd how'll how's I'm I've isn't it'll ma'am might've mightn't must've mustn't needn't "
        "not've o'clock oughtn't shan't she's should've shouldn't somebody'd somebody's someone'd "
        "someone's something'd something'll that'd that's there'd there're there's they'd they'll "
        "they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
        "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't "
        "y'all you'd you'll you're you've"
    ).split()
}


def normalise(answer: str) -> str:
    """The answer without case, articles and most punctuation, with numbers up to ten as digits."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    text = _without_punctuation(text)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """Text without punctuation, as the evaluation code removes it.

    A mark that somewhere stands next to a space is dropped, and so is every mark of a text that
    has a comma between digits; other marks become spaces. Periods go unless a digit follows.
    """
    result = text
    for mark in _PUNCTUATION:
        if f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text):
            result = result.replace(mark, "")
        else:
            result = result.replace(mark, " ")
    return _PERIOD.sub("", result)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean of min(people who agree / 3, 1), leaving out each person in turn.

    ``answers`` are those of ten people. A single answer, as in data sets with one truth,
    counts as ten people who agree. As in the evaluation code, if people disagree, the
    prediction is normalised and the answers lose their punctuation; if all give the same answer,
    the comparison is literal.
    """
    people = list(answers) * 10 if len(answers) == 1 else list(answers)
    said = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len(set(people)) > 1:
        said = normalise(said)
        people = [_without_punctuation(answer) for answer in people]
    agree = [answer == said for answer in people]
    total = sum(agree)
    return sum(min((total - own) / 3, 1.0) for own in agree) / len(people)
