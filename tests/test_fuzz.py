"""Damage to all that is read: the fuzz program finds what is planted, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

PLANTED = """
import ctypes, json, os, pickle, random, subprocess, sys, time
from pathlib import Path
import fuzz
from fuzzing import cases, cell, recipes
from vlprune.commands.pipeline import compress as run
from vlprune.errors import RecipeError

work = Path(sys.argv[1])
fuzz.use_once(work / "seeds", ["overrides"], 10)  # else every case imports what it needs
real = run.compress

def key_error(*_): {}["nothing"]
def endless(*_): time.sleep(100)
def greedy(*_): bytearray(10 * 2**30)
def large(*_): bytearray(b"x") * int(1.6 * 2**30)
def crash(*_): ctypes.string_at(0)
def code(*_): sys.exit(3)
def beside(*_): Path("../user/mine.txt").write_text("x")
def away(*_): open(work / "away.txt", "w").close()
def gone(*_): Path("../user/recipe.yaml").unlink()
def kept(*_): [p.unlink() for p in Path("../out").rglob("notes.txt")]
def left(*_): (Path(os.environ["TMPDIR"]) / "left").touch()
def asks(*_): input("run it? ")
def starts(*_): subprocess.run(["true"])
def orphan(*_): os.fork() or time.sleep(100)
def pickled(*_): pickle.loads(pickle.dumps(Path("x")))
def nameless(*_): raise RecipeError("something is wrong")
def coloured(*_): print("\\x1b[31mred", file=sys.stderr)
def chatty(*_): print("hello"); raise RecipeError("recipe.yaml is wrong")
def endless_text(*_): raise RecipeError("recipe.yaml: " + "x" * 10000)
def twice(*_): print("vlprune: a", file=sys.stderr); raise RecipeError("recipe.yaml is wrong")
def fine(*_): raise RecipeError("recipe.yaml is wrong")

told = {}
for plant in (key_error, endless, greedy, large, crash, code, beside, away, gone, kept, left, asks,
              starts, orphan, pickled, nameless, coloured, chatty, endless_text, twice, fine):
    run.compress = lambda *args, **more: (plant(), real(*args, **more))[1]

    limit = 3 if plant is endless else 30
    room = fuzz.empty_room(work)
    make = cases.Sound(random.Random(plant.__name__), room, work / "seeds")
    case = recipes.overrides(make)
    seen = cell.run(case.call, room, limit)
    told[plant.__name__] = sorted({kind for kind, _ in fuzz.findings(case, seen)})
print(json.dumps(told))
"""

FOUND = {
    "key_error": "traceback",
    "endless": "hang",
    "greedy": "traceback",  # MemoryError: no case may have so much
    "large": "memory",
    "crash": "crash",
    "code": "exit code",
    "beside": "written elsewhere",
    "away": "reached outside",
    "gone": "written elsewhere",
    "kept": "written elsewhere",
    "left": "written elsewhere",
    "asks": "a question was asked",
    "starts": "reached outside",
    "orphan": "a process was left running",
    "pickled": "reached outside",
    "nameless": "a message that names neither file nor key",
    "coloured": "control characters printed",
    "chatty": "stdout at a refusal",
    "endless_text": "a long message",
    "twice": "several messages",
}


@pytest.fixture(scope="module")
def planted(python: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    done = python.run(PLANTED, tmp_path_factory.mktemp("planted"), path=[BENCHMARKS])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("plant", FOUND)
def test_a_planted_fault_is_found(plant: str, planted: dict[str, list[str]]) -> None:
    assert FOUND[plant] in planted[plant]


def test_a_good_refusal_is_no_finding(planted: dict[str, list[str]]) -> None:
    assert planted["fine"] == []


FUZZ = "import sys, fuzz; sys.exit(fuzz.main())"


def test_some_damage_to_recipes_and_data(python: Any) -> None:
    surfaces = [word for name in ("recipes", "overrides", "data") for word in ("--surface", name)]
    done = python.run(FUZZ, "--cases", 8, "--seed", 1, *surfaces, path=[BENCHMARKS])
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_damage_to_everything(python: Any) -> None:
    done = python.together([FUZZ], "--cases", 500, "--seed", 2, path=[BENCHMARKS], timeout=3600)[0]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_without_damage_nothing_is_found(python: Any) -> None:
    done = python.together([FUZZ], "--sound", "--cases", 100, path=[BENCHMARKS], timeout=1800)[0]
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
