"""Random scenes of coloured shapes, and their pictures."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

__all__ = ["COLOURS", "SHAPES", "Scene", "Thing", "draw", "make_scene"]


COLOURS = {
    "red": (222, 45, 38),
    "green": (49, 163, 84),
    "blue": (40, 90, 220),
    "yellow": (250, 214, 40),
    "purple": (136, 66, 178),
    "white": (250, 250, 250),
}


SHAPES = ("circle", "square", "triangle")


SIZES = {"small": 0.14, "big": 0.21}  # radius, as a fraction of the image side


@dataclass(frozen=True)
class Thing:
    """One object; ``x``, ``y`` (its centre) and ``radius`` are in pixels, ``angle`` in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float

    def outline(self) -> list[tuple[float, float]]:
        """Corners of the polygon that is drawn, as (x, y) in pixels."""
        if self.shape == "circle":
            turns = [(i / 24, 1.0) for i in range(24)]
        elif self.shape == "square":
            turns = [((i + 0.5) / 4, 1.15) for i in range(4)]
        else:
            turns = [((i + 0.25) / 3 - 1 / 3, 1.2) for i in range(3)]
        return [
            (
                self.x + self.radius * r * math.cos(2 * math.pi * t + self.angle),
                self.y + self.radius * r * math.sin(2 * math.pi * t + self.angle),
            )
            for t, r in turns
        ]

    @property
    def phrase(self) -> str:
        """Size, colour and shape in words, without an article."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A square picture of ``side`` pixels before it is drawn, on a grey ``background``."""

    side: int
    background: int
    things: tuple[Thing, ...]


def make_scene(rng: random.Random, side: int = 64, most: int = 3) -> Scene:
    """A scene of one to ``most`` objects, apart from each other, no two of one shape and colour."""
    wanted = rng.randint(1, most)
    things: list[Thing] = []
    while len(things) < wanted:
        size = rng.choice(list(SIZES))
        radius = SIZES[size] * side * rng.uniform(0.92, 1.08)
        margin = radius * 1.3
        thing = Thing(
            rng.choice(SHAPES),
            rng.choice(list(COLOURS)),
            size,
            rng.uniform(margin, side - margin),
            rng.uniform(margin, side - margin),
            radius,
            rng.uniform(-0.2, 0.2),
        )
        apart = all(
            math.hypot(thing.x - t.x, thing.y - t.y) > 1.25 * (thing.radius + t.radius)
            and (thing.shape, thing.colour) != (t.shape, t.colour)
            for t in things
        )
        if apart:
            things.append(thing)
        elif rng.random() < 0.02:
            wanted = len(things) or 1
    return Scene(side, rng.randint(20, 90), tuple(things))


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB image, drawn at four times the size and reduced to smooth the edges."""
    scale = 4
    image = Image.new("RGB", (scene.side * scale,) * 2, (scene.background,) * 3)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        shade = rng.uniform(0.85, 1.0)
        colour = tuple(int(c * shade) for c in COLOURS[thing.colour])
        pen.polygon([(x * scale, y * scale) for x, y in thing.outline()], fill=colour)
    return image.resize((scene.side, scene.side), Image.Resampling.BOX)
