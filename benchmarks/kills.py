"""Kills small runs at random moments, runs the same command until it is done, compares every file.

    python benchmarks/kills.py --kills 1000

A moment is a time, or the n-th time that the run writes, renames or removes a file in its folder,
where a kill does most harm. A run is stopped once to three times by SIGKILL, SIGTERM or SIGINT.
Then its folder must hold what a run that was never stopped holds, bit for bit (tests/alike.py says
which times are left out), and nothing must lie beside it. A run that is asked to stop must say so
in one line and end with the signal's exit code. Every try can be repeated by itself: --only NUMBER.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

# Loaded once: a run is a fork of this process, and begins without waiting for imports.
import torch
import transformers.models.blip.modeling_blip
import transformers.models.clip.modeling_clip
import transformers.trainer  # noqa: F401

from alike import same_results
from vlprune.commands import main as cli
from vlprune.commands.pipeline import compress as _run  # noqa: F401
from vlprune.commands.pipeline.workplace import WORK
from vlprune.testing import build

UPOP = """
task: blip-retrieval
budget: {params: 0.6}
method: {name: upop, interval: 1}
options: {queue: 32}
teacher: {similarities: 1, features: 1}
model: {width: 32, heads: 2, vision_layers: 1, text_layers: 1, image_size: 32}
data: {train_items: 12, test_items: 4}
train: {steps: 3, batch_size: 4, save_steps: 1}
search: {steps: 4, batch_size: 4, save_steps: 2}
retrain: {steps: 3, batch_size: 4, save_steps: 1}
threads: 1
"""
JSP = """
task: retrieval
budget: {params: 0.8}
method: {name: jsp, every: 1, learning_rate: 0.05}
options: {queue: 32}
model: {width: 32, heads: 2, vision_layers: 2, text_layers: 2, image_size: 32}
data: {train_items: 40, test_items: 4}
train: {steps: 2, batch_size: 4, save_steps: 1}
search: {steps: 8, batch_size: 4, save_steps: 2}
retrain: {steps: 3, batch_size: 4, save_steps: 1}
threads: 1
"""
RECIPES = {"upop": UPOP, "jsp": JSP}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


@dataclass(frozen=True)
class Stop:
    """A signal after so many seconds, or at the n-th change of a file."""

    number: int
    seconds: float = 0.0
    event: int = 0


@dataclass(frozen=True)
class Ran:
    """One command, to its end."""

    code: int
    seconds: float
    events: int
    stderr: str


def run(recipe: Path, out: Path, stop: Stop | None = None, limit: float = 300) -> Ran:
    """``vlprune compress`` in a fork of this process; code 1000 if it had not ended in time."""
    errors, count = out.with_suffix(".stderr"), out.with_suffix(".events")
    began = time.monotonic()
    child = os.fork()
    if not child:
        _be_a_run(recipe, out, errors, count, stop)
    if stop is not None and stop.seconds:
        _wait(child, began + stop.seconds)
        os.kill(child, stop.number)  # a child that has ended is a zombie, and does not mind
    code = _wait(child, began + limit)
    if code is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    else:
        os.waitpid(child, 0)
    events = int(count.read_text()) if count.exists() else 0
    said = errors.read_text() if errors.exists() else ""  # killed before it could say anything
    ran = Ran(1000 if code is None else code, time.monotonic() - began, events, said)
    errors.unlink(missing_ok=True)
    count.unlink(missing_ok=True)
    return ran


def _wait(child: int, until: float) -> int | None:
    """The exit code of a child, left to be waited for; None if it still runs at ``until``."""
    while True:
        found = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def _be_a_run(recipe: Path, out: Path, errors: Path, count: Path, stop: Stop | None) -> None:
    """The child: the command, its words in files, and never back into the caller."""
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        for number, path in enumerate((os.devnull, os.devnull, str(errors))):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), number)
        seen = _count_events(str(out), stop)
        sys.argv[:] = ["vlprune", "compress", str(recipe), "-o", str(out)]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        count.write_text(str(seen[0]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _count_events(folder: str, stop: Stop | None) -> list[int]:
    """A counter of changes below ``folder``, which sends this process the signal at its event."""
    seen = [0]

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in EVENTS:
            path = args[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder):
            seen[0] += 1
            if stop is not None and stop.event and seen[0] == stop.event:
                os.kill(os.getpid(), stop.number)

    sys.addaudithook(heard)
    return seen


def attempt(number: int, seed: int, recipe: Path, whole: Path, ran: Ran, out: Path) -> list[str]:
    """Stop a run once to three times, finish it, compare: an outcome per stop, and the result's."""
    dice = random.Random(f"{seed}/{number}")
    outcomes = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        signal_number = dice.choice(SIGNALS)
        if dice.random() < 0.5:
            stop = Stop(signal_number, seconds=dice.uniform(0.01, 0.95) * ran.seconds)
        else:
            stop = Stop(signal_number, event=dice.randint(1, ran.events))
        judged = _judged(run(recipe, out, stop), stop, out)
        outcomes.append(f"{signal.Signals(signal_number).name}: {judged}")
    end = run(recipe, out)
    if end.code:
        return [*outcomes, f"result: FAILED with code {end.code}\n{end.stderr[-3000:]}"]
    try:
        same_results(whole, out)
        left = sorted(entry.name for entry in out.parent.iterdir())
        assert left == [out.name], f"beside the folder lie {left}"
        assert not (out / WORK).exists(), "its working folder is still there"
    except AssertionError as error:
        return [*outcomes, f"result: FAILED: {error}"]
    return [*outcomes, "result: the same bits"]


def _judged(ran: Ran, stop: Stop, out: Path) -> str:
    """What became of a run that was to be stopped."""
    if "Traceback" in ran.stderr:
        return f"FAILED with a traceback\n{ran.stderr[-3000:]}"
    if ran.code == 0:
        return "had ended"
    if ran.code == 1000:
        return "FAILED: did not end"
    if stop.number == signal.SIGKILL and ran.code == -signal.SIGKILL:
        return "stopped"
    # A signal after the command's end, while the process goes, ends it as the system does.
    if ran.code == -stop.number and (out / "report.json").exists() and not (out / WORK).exists():
        return "had ended"
    said = ran.stderr.strip().splitlines()[-1:]
    if ran.code == 128 + stop.number and said and said[0].startswith("vlprune: stopped;"):
        return "stopped"
    return f"FAILED with code {ran.code}\n{ran.stderr[-3000:]}"


def measure(
    kills: int, seed: int, methods: list[str], only: int | None, say: Callable[[str], None]
) -> Counter[str]:
    """Outcomes of so many stops; failures are said at once, with the number to repeat them by."""
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="vlprune-kills-") as scratch:
        model: Any = build("clip").model
        model.save_pretrained(Path(scratch) / "warm")  # fills caches of transformers
        gc.freeze()  # nothing here is garbage: looking for it would take every run a second
        whole: dict[str, Ran] = {}
        for method in methods:
            recipe = Path(scratch) / f"{method}.yaml"
            recipe.write_text(RECIPES[method])
            whole[method] = run(recipe, Path(scratch) / f"whole-{method}")
            if whole[method].code:
                raise SystemExit(whole[method].stderr)
            say(f"{method}: {whole[method].seconds:.1f} s, {whole[method].events} changes of files")
        number, done = only or 0, 0
        while done < kills:
            method = methods[number % len(methods)]
            place = Path(scratch) / "try"
            place.mkdir()
            found = attempt(
                number, seed, Path(scratch) / f"{method}.yaml", Path(scratch) / f"whole-{method}",
                whole[method], place / "out",
            )  # fmt: skip
            for outcome in found:
                if "FAILED" in outcome:
                    say(f"try {number} ({method}): {outcome}")
                outcomes[f"{method}: {outcome.splitlines()[0]}"] += 1
            shutil.rmtree(place)
            number, done = number + 1, done + len(found) - 1
            if only is not None:
                break
            if number % 20 == 0:
                failed = sum(count for text, count in outcomes.items() if "FAILED" in text)
                say(f"{done} stops, {failed} failures")
    return outcomes


def main() -> None:
    """The table of outcomes; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("both", *RECIPES), default="both")
    parser.add_argument("--only", type=int, help="one try, by its number")
    given = parser.parse_args()
    methods = list(RECIPES) if given.method == "both" else [given.method]
    outcomes = measure(
        given.kills, given.seed, methods, given.only, lambda text: print(text, file=sys.stderr)
    )
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    raise SystemExit(any("FAILED" in outcome for outcome in outcomes))


if __name__ == "__main__":
    main()
