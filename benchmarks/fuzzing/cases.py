"""What a case is, and what makes one: sound files copied into a room, and damaged there."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import damage
from .cell import Accepted, Room

ODD_NAMES = (
    "a\x1b[31mb",
    "a\nb",
    "[bold]a[/b]",
    "a b",
    "-a",
    "é",
    "<b>a",
    "a|b",
    "$HOME",
    "a" * 200,
)


@dataclass
class Case:
    """One damaged input and what is called on it."""

    call: Callable[[], Any]
    what: str
    names: list[str]
    """What a message may name: the damaged file, its folder, its keys."""
    allowed: tuple[str, ...] = ()
    """Where in the room the call may write."""
    kept: tuple[str, ...] = ()
    """What it must leave as it is, there too."""
    json: bool = False
    starts: bool = False
    """Whether it starts processes of its own."""
    wrong: Callable[[Any], str] = field(default=lambda value: "")
    """What is wrong with the value that came back, if anything."""
    theirs: bool = False
    """Whether only what has a frame of vlprune is a finding: a call of another library."""
    must: bool = False
    """Whether refusing is wrong too."""


@dataclass(frozen=True)
class Maker:
    """What a case is made of."""

    rng: random.Random
    room: Room
    seeds: Path

    def copy(self, seed: str, name: str = "", where: str = "user") -> Path:
        """A seed, copied into the room."""
        target = self.room.root / where / (name or seed)
        shutil.copytree(self.seeds / seed, target, symlinks=True, dirs_exist_ok=True)
        return target

    def folder(self, seed: str) -> Path:
        """A copy under its own or, now and then, an odd name, with a stranger's code in it."""
        name = self.rng.choice(ODD_NAMES) if self.rng.random() < 0.08 else seed
        made = self.copy(seed, name)
        for code in ("evil", "torch", "json"):
            (made / f"{code}.py").write_text(damage.EVIL)
        return made

    def hurt(self, path: Path, form: str) -> tuple[str, list[str]]:
        """Damage one file; what was done, and what a message may name."""
        names, kind = [path.stem, str(path.parent)], self.rng.random()
        if kind < 0.12:
            return damage.damage_kind(self.rng, path, self.room.outside), names
        if kind < 0.24 or form == "bytes":
            return damage.damage_bytes(self.rng, path), names
        if form == "safetensors":
            return damage.damage_safetensors(self.rng, path), names
        if form == "image":
            return damage.damage_image(self.rng, path), names
        if form == "jsonl":
            return self._line(path), names
        what, keys = damage.damage_text(self.rng, path, form, self.rng.choice([1, 1, 1, 2, 3]))
        return what, names + keys

    def nudge(self, path: Path) -> tuple[str, list[str]]:
        """Change one number or switch of a recipe a little: most of these are to be accepted."""
        tree = yaml.safe_load(path.read_text())
        able = [p for p in damage.places(tree) if isinstance(damage.at(tree, p), int | float)]
        place = self.rng.choice(able)
        parent, last = damage.at(tree, place[:-1]), place[-1]
        old = parent[last]
        new = not old if isinstance(old, bool) else self.rng.choice([0, 1, 2, 3, 5])
        parent[last] = type(old)(self.rng.choice([old * new, old / 2, 1 / (1 + new)]))
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return f"{'.'.join(map(str, place))}: {old} -> {parent[last]}", [str(s) for s in place]

    def _line(self, path: Path) -> str:
        lines = path.read_text().splitlines()
        number = self.rng.randrange(len(lines))
        tree, what, _ = damage.damage_tree(self.rng, json.loads(lines[number]))
        lines[number] = damage.dump(tree, "json")
        path.write_text("\n".join(lines))
        return f"line {number}: {what}"


class Sound(Maker):
    """Leaves every file as it is."""

    def hurt(self, path: Path, form: str) -> tuple[str, list[str]]:
        """Nothing."""
        return "nothing", [path.name]

    def nudge(self, path: Path) -> tuple[str, list[str]]:
        """Nothing."""
        return "nothing", [path.name]

    def folder(self, seed: str) -> Path:
        """A copy under its own name."""
        return self.copy(seed)


def cli(*argv: object) -> Callable[[], None]:
    """The command, in this process."""

    def call() -> None:
        from vlprune.commands import main as command

        sys.argv = ["vlprune", *map(str, argv)]
        command.main()

    return call


def until_training(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same, ended where a training would begin."""

    def called() -> Any:
        import transformers

        def accepted(*_: Any, **__: Any) -> None:
            raise Accepted

        transformers.Trainer.train = accepted
        return call()

    return called
