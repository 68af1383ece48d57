"""Seeded damage to everything that vlprune reads: 10,000 cases, each in a process of its own.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--surface recipes] [-o results.json]
    python benchmarks/fuzz.py --case recipes:17 [--seed 0]

A case damages one sound file (a recipe, a plan, a config, a report, annotations, a picture,
weights, a checkpoint, ...) and calls a command or a function on it, which must be done with it or
refuse it: exit code 2, nothing on stdout, and one message that names the file or the key. A
traceback, a hang, much memory, a question, a process, a pickle, anything written elsewhere, or
damaged weights taken as sound is a finding. Findings are grouped by what and where;
``--case`` runs one of them again and shows all of it. The exit code is 1 if there are findings.
Linux only: it forks, and reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

from fuzzing import cases, cell, damage, folders, seeds, surfaces
from vlprune.files import plain

LONGEST = 4000
"""Characters of a message: a file with twenty wrong values is told all of them."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SAYS_WHAT = r"model\.path|^there is no f|there is no such folder here"
"""Of messages that name what a damaged recipe asks for, whatever the damage has made of it."""
Finding = tuple[str, str]


def findings(case: cases.Case, seen: cell.Seen) -> list[Finding]:
    """(kind, where or what) of all that is wrong with how a case ended."""
    found = [*_ended(case, seen), *_touched(case, seen)]
    if case.theirs and not seen.frame:
        found = list(_touched(case, seen))
    if seen.ended == "hung":
        return found
    if CONTROL.search(seen.stdout + seen.stderr + _refusal(seen)):
        found.append(("control characters printed", ""))
    if "Traceback (most recent call last)" in seen.stderr:
        found.append(("traceback on stderr", seen.stderr.strip().splitlines()[-1][:80]))
    if seen.ended == "exited" or (seen.ended == "refused" and seen.message):
        found += _message(case, seen)
    elif seen.ended == "returned":
        found += _result(case, seen)
    return found


def _ended(case: cases.Case, seen: cell.Seen) -> Iterator[Finding]:
    if seen.ended == "hung":
        yield "hang", seen.frame
    elif seen.ended == "died":
        yield "crash", f"signal {seen.signal}"
    elif seen.ended == "raised":
        yield "traceback", f"{seen.error} at {seen.frame or 'no frame of vlprune'}"
    elif seen.ended == "exited" and seen.code != 2:
        yield "exit code", str(seen.code)
    if seen.memory > cell.MEMORY:
        yield "memory", seen.frame or seen.ended


def _touched(case: cases.Case, seen: cell.Seen) -> Iterator[Finding]:
    for change in cell.elsewhere(seen.changed, case.allowed, case.kept):
        yield "written elsewhere", re.sub(r"[0-9a-f]{6,}|\d+|tmp\w+", "*", change)[:80]
    for event in seen.events:
        if not (case.starts and event.startswith("subprocess.Popen")):
            yield "reached outside", re.sub(r"[0-9a-f]{6,}|\d+|tmp\w+", "*", event)[:80]
    if seen.asked:
        yield "a question was asked", ""
    if seen.orphans:
        yield "a process was left running", ""


def _refusal(seen: cell.Seen) -> str:
    """The message of a refusal, the command's or an exception's."""
    if seen.ended == "refused":
        return seen.message
    return re.split(r"(?m)^vlprune: ", seen.stderr, maxsplit=1)[-1]


def _message(case: cases.Case, seen: cell.Seen) -> Iterator[Finding]:
    message = _refusal(seen)
    start = re.sub(r"['\"\d].*", "", message.splitlines()[0] if message else "")[:60]
    if seen.stdout and not (case.json and _says_error(seen.stdout)):
        yield "stdout at a refusal", seen.stdout[:60]
    if len(re.findall(r"(?m)^vlprune: ", seen.stderr)) > 1:
        yield "several messages", start
    if len(message) > LONGEST:
        yield "a long message", start
    if case.must:
        yield "a run that does not go on", start
    flat = "".join(message.split())
    named = any("".join(plain(name).split())[:100] in flat for name in case.names if name)
    if not named and not re.search(SAYS_WHAT, message):
        yield "a message that names neither file nor key", start


def _result(case: cases.Case, seen: cell.Seen) -> Iterator[Finding]:
    try:
        wrong = case.wrong(seen.value)
    except OSError as error:
        wrong = f"no result: {error.strerror}"
    if wrong:
        yield "taken as sound", wrong if "tensors" not in wrong else "damaged tensors were loaded"
    if case.json:
        try:
            json.loads(seen.stdout, parse_constant=_no_json)
        except ValueError as error:
            yield "stdout is not JSON", str(error).partition(":")[0][:60]


def _says_error(text: str) -> bool:
    """Whether a machine can read from stdout that the command refused."""
    try:
        body = json.loads(text, parse_constant=_no_json)
    except ValueError:
        return False
    return isinstance(body, dict) and "error" in body


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def make_seeds(folder: Path, chosen: Sequence[str], count: int) -> None:
    """Make what surfaces damage, in a process of its own; import here what that process needed."""
    wanted = {name for surface in chosen for name in surfaces.SURFACES[surface].needs}
    todo = [name for name in seeds.MAKERS if name in wanted and not (folder / name).exists()]
    listed = folder / "modules.json"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(2, 1)
            for name in todo:
                seeds.MAKERS[name](folder / name)
                shutil.rmtree(folder / name / "data", ignore_errors=True)
                if name in seeds.WEIGHED:
                    body = json.dumps(seeds.digest_of(folder / name))
                    (folder / f"{name}.digest.json").write_text(body)
            load_models(folder)
            use_once(folder, chosen, count)
            listed.write_text(json.dumps(sorted(sys.modules)))
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the seeds could not be made")
    for name in json.loads(listed.read_text()):
        try:
            importlib.import_module(name)
        except Exception:  # modules that are made, not imported
            continue


def use_once(folder: Path, chosen: Sequence[str], count: int) -> None:
    """Call what cases call, on sound files, so that all it imports is imported.

    Not more often than a tenth of the ``count`` of cases that gain by it.
    """
    for surface in chosen:
        for number in range(min(surfaces.SURFACES[surface].used, count // 10)):
            room = empty_room(folder.parent)
            make = cases.Sound(random.Random(f"{surface}/{number}"), room, folder)
            case = surfaces.SURFACES[surface].make(make)
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.chdir(room.cwd))
                quiet = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(quiet))
                stack.enter_context(contextlib.redirect_stderr(quiet))
                stack.enter_context(contextlib.suppress(BaseException))
                case.call()


def load_models(folder: Path) -> None:
    """The models that plans cut."""

    for name in ("small", "shared"):
        if (folder / name / "dense").exists():
            from vlprune.folders.opening import open_model

            folders.DENSE[name] = open_model(str(folder / name / "dense"))


def prepare(folder: Path, chosen: Sequence[str], count: int = 10) -> None:
    """Seeds, modules and models: all that children are forked with."""
    import torch
    import transformers

    import vlprune.commands.main
    import vlprune.commands.pipeline.compress
    import vlprune.commands.pipeline.cut
    import vlprune.commands.pipeline.describe
    import vlprune.commands.pipeline.exports
    import vlprune.commands.pipeline.streamed
    import vlprune.measuring.bench
    import vlprune.reports.page

    print(f"vlprune of {Path(vlprune.__file__).parent}", file=sys.stderr)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    re._MAXCACHE = 100_000  # type: ignore[attr-defined]
    make_seeds(folder, chosen, count)
    load_models(folder)
    gc.collect()
    gc.freeze()


def empty_room(folder: Path) -> cell.Room:
    """A room with nothing in it but a trap: what a stranger's working folder may hold."""
    room = cell.Room(folder / "room" / "case")
    room.clear()
    (room.cwd / "torch.py").write_text(damage.EVIL)
    return room


def run(
    surface: str, number: int, seed: int, folder: Path, limit: float, sound: bool = False
) -> tuple[cases.Case, cell.Seen, list[Finding]]:
    """One case."""
    kind = surfaces.SURFACES[surface]
    room = empty_room(folder)
    rng = random.Random(f"{seed}/{surface}/{number}")
    maker = cases.Sound if sound else cases.Maker
    case = kind.make(maker(rng, room, folder / "seeds"))
    seen = cell.run(case.call, room, limit * kind.slower)
    found = findings(case, seen)
    if sound and seen.ended not in ("returned", "accepted"):
        found.append(("not done, though sound", seen.ended))
    return case, seen, found


def shares(count: int, chosen: Sequence[str]) -> list[tuple[str, int]]:
    """(surface, number) of every case, mixed, so that a run that is stopped has seen all kinds."""
    total = sum(surfaces.SURFACES[name].share for name in chosen)
    plan = [
        (name, number)
        for name in chosen
        for number in range(round(count * surfaces.SURFACES[name].share / total))
    ]
    random.Random(0).shuffle(plan)
    return plan


def fuzz(options: argparse.Namespace, folder: Path) -> int:
    """All cases, and a table; the exit code."""
    chosen = options.surface or list(surfaces.SURFACES)
    began = time.monotonic()
    prepare(folder / "seeds", chosen, options.cases)
    print(f"seeds made in {time.monotonic() - began:.0f} s", file=sys.stderr)
    counts: dict[str, dict[str, Any]] = {
        name: defaultdict(int, slowest=0.0, seconds=0.0) for name in chosen
    }
    groups: dict[Finding, list[dict[str, Any]]] = defaultdict(list)
    plan = shares(options.cases, chosen)
    for done, (surface, number) in enumerate(plan, 1):
        start = time.monotonic()
        try:
            case, seen, found = run(
                surface, number, options.seed, folder, options.limit, options.sound
            )
        except Exception as error:  # a fault of this program costs a case, not the night
            print(f"{surface}:{number} was not made: {error!r}", file=sys.stderr, flush=True)
            counts[surface]["unmade"] += 1
            continue
        took = time.monotonic() - start
        count = counts[surface]
        good = seen.ended in ("returned", "accepted")
        count["findings" if found else "done" if good else "refused"] += 1
        count["seconds"] += seen.cpu
        if took > count["slowest"]:
            count |= {"slowest": took, "which": number}
        for finding in found:
            told = {"case": f"{surface}:{number}", "what": case.what[:300]}
            groups[finding].append(told | {"message": (_refusal(seen) or seen.message)[:300]})
        if done % max(1, len(plan) // 20) == 0:
            bad = sum(len(told) for told in groups.values())
            passed = time.monotonic() - began
            print(
                f"{done}/{len(plan)}, {bad} findings, {passed:.0f} s", file=sys.stderr, flush=True
            )
            _keep(options.output, counts, groups)  # whoever stops it has these
        if options.seconds and time.monotonic() - began > options.seconds:
            break
    _tell(counts, groups)
    _keep(options.output, counts, groups)
    return 1 if groups else 0


def _keep(path: Path | None, counts: dict[str, Any], groups: dict[Finding, list[Any]]) -> None:
    if path is not None:
        body = [{"kind": k[0], "where": k[1], "cases": v} for k, v in groups.items()]
        path.write_text(json.dumps({"counts": counts, "findings": body}, indent=1))


def _tell(counts: dict[str, Any], groups: dict[Finding, list[dict[str, Any]]]) -> None:
    print("| surface | cases | done | refused | with findings | CPU s per case | slowest, s |")
    print("|---|---|---|---|---|---|---|")
    total: dict[str, float] = defaultdict(float)
    for name, count in counts.items():
        number = count["done"] + count["refused"] + count["findings"]
        for key in ("done", "refused", "findings", "seconds"):
            total[key] += count[key]
        if number:
            print(_row(name, number, count))
    print(_row("all", int(total["done"] + total["refused"] + total["findings"]), total))
    if unmade := sum(count["unmade"] for count in counts.values()):
        print(f"{unmade} cases were not made, for faults of this program")
    for (kind, where), told in sorted(groups.items(), key=lambda one: -len(one[1])):
        print(_flat(f"{len(told)} x {kind}{': ' if where else ''}{where}"))
        for one in told[:3]:
            text = f"   --case {one['case']}  {one['what'][:120]}  =>  {one['message'][:160]}"
            print(_flat(text))


def _flat(text: str) -> str:
    """On one line, whatever is in it."""
    return text.encode("unicode_escape").decode()


def _row(name: str, number: int, count: Any) -> str:
    three = " | ".join(str(int(count[key])) for key in ("done", "refused", "findings"))
    each = count["seconds"] / max(1, number)
    slowest = f"{count['slowest']:.1f} (:{count['which']})" if "which" in count else ""
    return f"| {name} | {number} | {three} | {each:.2f} | {slowest} |"


def show(options: argparse.Namespace, folder: Path) -> int:
    """One case with all that is known of it; the exit code."""
    surface, _, number = options.case.partition(":")
    prepare(folder / "seeds", [surface])
    case, seen, found = run(
        surface, int(number), options.seed, folder, options.limit, options.sound
    )
    print(f"damage: {case.what!a}\nallowed to write: {', '.join(case.allowed) or 'nothing'}")
    for name, value in asdict(seen).items():
        if value:
            text = value if isinstance(value, str) else repr(value)
            print(f"--- {name}\n{text if options.raw else text.encode('unicode_escape').decode()}"
                  if name not in ("trace",) else f"--- {name}\n{text}")  # fmt: skip
    for kind, where in found:
        print(f"FINDING {kind}: {where}")
    return 1 if found else 0


@contextlib.contextmanager
def _place(given: Path | None) -> Iterator[Path]:
    """Where seeds and cases lie: a folder that is kept, or one that is not."""
    if given is not None:
        (given / "seeds").mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="vlprune-fuzz-")).resolve()
    (made / "seeds").mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and say by the exit code whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--surface", action="append", choices=list(surfaces.SURFACES))
    parser.add_argument("--case", help="SURFACE:NUMBER, to run one again")
    parser.add_argument("--sound", action="store_true", help="no damage: all must be done")
    parser.add_argument("--raw", action="store_true", help="with --case: do not escape its output")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a case may take")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after so many")
    parser.add_argument("--work", type=Path, help="a folder that keeps the seeds for the next time")
    parser.add_argument("-o", "--output", type=Path, help="a JSON file for all findings")
    options = parser.parse_args(argv)
    with _place(options.work) as folder:
        return show(options, folder) if options.case else fuzz(options, folder)


if __name__ == "__main__":
    sys.exit(main())
