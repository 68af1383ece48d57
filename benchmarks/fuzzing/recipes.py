"""Recipes, their overrides, runs, and runs that were stopped."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import yaml

from . import damage, seeds
from .cases import Case, Maker, Sound, cli, until_training

REPO = Path(__file__).parent.parent.parent


def output(make: Maker) -> tuple[str, ...]:
    """A place for the result where the user has files, beside such as we might call ours."""
    kept = []
    for name in (".result.old", ".result.partial", "result"):
        if name != "result" or make.rng.random() < 0.5:
            (make.room.out / name).mkdir()
            (make.room.out / name / "notes.txt").write_text("the user's own")
            kept.append(f"out/{name}/notes.txt")
    return tuple(kept)


def recipes(make: Maker) -> Case:
    """A damaged recipe; those that are accepted end where training would begin."""
    path, more = make.room.user / "recipe.yaml", []
    if make.rng.random() < 0.08:
        shutil.copy(make.rng.choice(sorted((REPO / "recipes").rglob("*.yaml"))), path)
        more = ["--toy"]
    else:
        task, form = make.rng.choice(seeds.FORMATS)
        make.copy("scenes")
        body = seeds.recipe_of(task, form if make.rng.random() < 0.5 else "")
        path.write_text(yaml.safe_dump(body, sort_keys=False))
    what, names = make.hurt(path, "yaml")
    kept = output(make)
    call = cli("compress", path, "-o", "../out/result", *more)
    return Case(until_training(call), what, names, ("out/result",), kept)


def _known_keys(task: str, method: str) -> dict[str, Any]:
    """{dotted key: default} of all that a recipe of this task and method may hold."""
    from vlprune.recipe.options import METHOD_OPTIONS, TASK_OPTIONS, TeacherOptions
    from vlprune.recipe.spec import Recipe, Training

    body = dataclasses.asdict(Recipe(task=task, budget={"params": 0.5}))
    body |= {phase: dataclasses.asdict(Training()) for phase in ("search", "retrain")}
    for key, takes in (
        ("method", METHOD_OPTIONS[method]),
        ("options", TASK_OPTIONS[task]),
        ("teacher", TeacherOptions),
    ):
        body[key] = {f.name: f.default for f in dataclasses.fields(takes)}
    found = {}
    for key, value in body.items():
        found[key] = value
        if isinstance(value, dict):
            found |= {f"{key}.{name}": one for name, one in value.items()}
    return found


def overrides(make: Maker) -> Case:
    """A sound recipe and a ``key=value`` that is not."""
    task = make.rng.choice(list(seeds.SETTINGS))
    path = make.room.user / "recipe.yaml"
    path.write_text(yaml.safe_dump(seeds.recipe_of(task)))
    known, given, names = _known_keys(task, seeds.SETTINGS[task][0]), [], [path.name]
    for _ in range(make.rng.choice([1, 1, 2])):
        key, old = make.rng.choice(list(known.items()))
        old = None if old is dataclasses.MISSING else old
        more = tuple(f"@@{name}@@" for name in damage.RAW_YAML)
        value = damage.dump(damage.odd(make.rng, old, more), "yaml").removesuffix("...\n").strip()
        names += [*key.split("."), key]
        if make.rng.random() < 0.1:
            key = make.rng.choice([key + "x", key + ".x", "", ".", "\x1b[1m", "a.b.c", key[:-1]])
            names += [key, *key.split(".")]
        if isinstance(make, Sound):
            key, value = "seed", "1"
        given.append(f"{key}={value}"[:100_000].replace("\0", "\1"))  # no argument holds a NUL
        names += [given[-1][:60]] + ([value] if "/" in value or key.startswith("data.") else [])
    kept = output(make)
    call = cli("compress", "-o", "../out/result", path, "--", *given)
    what = " ".join(text[:60] for text in given)
    return Case(until_training(call), ascii(what), names, ("out/result",), kept)


def runs(make: Maker) -> Case:
    """A recipe with another number in it, run to its end where it is accepted."""
    able = [task for task in seeds.SETTINGS if task != "captioning"]  # its metric starts Java
    task = make.rng.choice(able)
    path = make.room.user / "recipe.yaml"
    path.write_text(yaml.safe_dump(seeds.recipe_of(task), sort_keys=False))
    what, keys = make.nudge(path)
    call = cli("compress", path, "-o", "../out/result", "--json")
    return Case(call, what, [path.name, *keys], ("out/result",), output(make), json=True)


def checkpoints(make: Maker) -> Case:
    """Damaged files of a stopped run: it goes on, and ends with the same bits."""
    folder = make.copy("stopped", ".", "cwd")
    files = sorted(p for p in (folder / "out").rglob("*") if p.is_file())
    path = make.rng.choice(files)
    form = {".json": "json", ".safetensors": "safetensors"}.get(path.suffix, "bytes")
    what, names = make.hurt(path, form)
    whole, inside = make.seeds / "whole" / "out", folder / "out"

    def wrong(_: Any) -> str:
        for name in ("plan.json", "model.safetensors"):
            if (inside / name).read_bytes() != (whole / name).read_bytes():
                return f"{name} has other bits than a run that was never stopped"
        return ""

    name = str(path.relative_to(folder))
    return Case(cli("compress", "recipe.yaml", "-o", "out", "--json"), f"{name}: {what}",
                [*names, "out"], ("cwd/out",), json=True, wrong=wrong,
                must="checkpoints" in name)  # fmt: skip
