"""Captions, questions, referring expressions and statements about scenes."""

from __future__ import annotations

import itertools
import random

from .scene import COLOURS, SHAPES, Scene

NUMBERS = ("zero", "one", "two", "three", "four")


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions that each name every object, in random order."""
    result = []
    for _ in range(5):
        things = rng.sample(scene.things, len(scene.things))
        phrases = [
            f"a {t.phrase if rng.random() < 0.8 else f'{t.colour} {t.shape}'}" for t in things
        ]
        result.append(rng.choice(("", "a picture of ", "there is ")) + " and ".join(phrases))
    return result


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, answer type) triples, with one "yes" and one "no" question."""
    things = scene.things
    asked = [
        ("how many objects are there?", NUMBERS[len(things)], "number"),
    ]
    for thing in things:
        if sum(t.shape == thing.shape for t in things) == 1:
            asked.append((f"what color is the {thing.shape}?", thing.colour, "other"))
        if sum(t.colour == thing.colour for t in things) == 1:
            asked.append((f"what shape is the {thing.colour} object?", thing.shape, "other"))
    there = rng.choice(things)
    asked.append((f"is there a {there.colour} {there.shape}?", "yes", "yes/no"))
    absent = [
        (c, s)
        for c, s in itertools.product(COLOURS, SHAPES)
        if all((t.colour, t.shape) != (c, s) for t in things)
        and any(t.colour == c or t.shape == s for t in things)
    ]
    colour, shape = rng.choice(absent)
    asked.append((f"is there a {colour} {shape}?", "no", "yes/no"))
    return asked


def references(scene: Scene) -> list[tuple[int, str]]:
    """(object number, expression) for every expression that fits only one object."""
    found: list[tuple[int, str]] = []
    for number, thing in enumerate(scene.things):
        others = [t for t in scene.things if t is not thing]
        if all(t.shape != thing.shape for t in others):
            found.append((number, f"the {thing.shape}"))
        if all(t.colour != thing.colour for t in others):
            found.append((number, f"the {thing.colour} object"))
        found.append((number, f"the {thing.phrase}"))
    return found


def statement(first: Scene, second: Scene, rng: random.Random) -> tuple[str, bool]:
    """A statement about two images, true or false with equal chance."""
    total = len(first.things) + len(second.things)
    truth = rng.random() < 0.5
    if rng.random() < 0.5:
        said = total if truth else rng.choice([n for n in range(2, 7) if n != total])
        return f"there are {said} objects in total", truth
    colours = {t.colour for scene in (first, second) for t in scene.things}
    pool = [c for c in COLOURS if (c in colours) == truth] or list(COLOURS)
    colour = rng.choice(pool)
    return f"at least one object is {colour}", colour in colours
