"""A run that is killed goes on and ends as if it had never been: the same plan, the same bits."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alike import same_results
from vlprune.commands.pipeline import fingerprint, notes
from vlprune.commands.pipeline.compress import compress
from vlprune.commands.pipeline.make import make_task
from vlprune.commands.pipeline.workplace import claimed, cleared
from vlprune.errors import CheckpointError
from vlprune.files import is_full
from vlprune.folders.notes import read_note, write_note
from vlprune.recipe.spec import load_recipe
from vlprune.status import Progress
from vlprune.training import checkpoints

# Everything with a state of its own: momentum encoder, queue, random negatives, a teacher, UPop,
# an average of the weights.
RECIPE = """
task: blip-retrieval
budget: {params: 0.6}
method: {name: upop, interval: 2}
options: {queue: 32}
teacher: {similarities: 1, features: 1}
model: {width: 32, heads: 2, vision_layers: 1, text_layers: 1, image_size: 32}
data: {train_items: 20, test_items: 4, folder: SCENES}
train: {steps: 4, batch_size: 4, save_steps: 2, ema: 0.6}
search: {steps: 6, batch_size: 4, save_steps: 2}
retrain: {steps: 6, batch_size: 4, save_steps: 2}
threads: 1
"""

# A search with a network, an optimizer and noise of its own, and weights that are tied afterwards,
# and averaged.
SHARING = """
task: retrieval
budget: {params: 0.8}
method: {name: jsp, every: 1, learning_rate: 0.05}
options: {queue: 32}
model: {width: 32, heads: 2, vision_layers: 2, text_layers: 2, image_size: 32}
data: {train_items: 40, test_items: 4, folder: SCENES}
train: {steps: 2, batch_size: 4}
search: {steps: 10, batch_size: 4, save_steps: 2}
retrain: {steps: 6, batch_size: 4, save_steps: 2, ema: 0.6}
threads: 1
"""

PLACES = {
    "training, step 3": "at_step(1, 3)",
    "search, step 5": "at_step(2, 5)",
    "while a checkpoint of the search is written": "half_checkpoint(2, 4)",
    "after the search, before the cut": "after('vlprune.training.compressor', 'perform')",
    "while the cut model is evaluated": "after('vlprune.commands.pipeline.search', 'evaluated')",
    "retraining, step 5": "at_step(3, 5)",
    "after the last step": "after('vlprune.commands.pipeline.search', 'evaluated', nth=2)",
    "while the result is saved": "after('vlprune.commands.pipeline.result', 'save')",
}
# the others are killed
ASKED = {"after the search, before the cut": signal.SIGINT, "retraining, step 5": signal.SIGTERM}

KILLER = """
import importlib, os, signal, sys
import vlprune.training.fit as train

def die():
    os.kill(os.getpid(), SIGNAL)

def at_step(phase, step):
    calls, real = [], train._Watch.on_step_end
    def on_step_end(self, args, state, control, **kwargs):
        if id(self) not in calls:
            calls.append(id(self)); keep.append(self)
        real(self, args, state, control, **kwargs)
        if len(calls) == phase and state.global_step == step:
            die()
    train._Watch.on_step_end = on_step_end

def half_checkpoint(phase, step):
    calls, real = [], train.seal
    def seal(checkpoint):
        if checkpoint.parent not in calls:
            calls.append(checkpoint.parent)
        if len(calls) == phase and checkpoint.name == f"checkpoint-{step}":
            die()  # the folder is there, but nothing says that it is whole
        real(checkpoint)
    train.seal = seal

def after(module, name, nth=1):
    home, calls = importlib.import_module(module), []
    real = getattr(home, name)
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            die()
        return real(*args, **kwargs)
    setattr(home, name, patched)

keep = []
from vlprune.commands.main import main
"""


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharing")
    path = folder / "recipe.yaml"
    path.write_text(SHARING.replace("SCENES", str(folder / "scenes")))
    compress(load_recipe(path), folder / "whole")
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("SCENES", str(folder / "scenes")))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The same run, never killed."""
    out = recipe.parent / "whole"
    compress(load_recipe(recipe), out)
    return out


SLOW = (
    "training, step 3", "while the cut model is evaluated", "after the last step",
    "while a checkpoint of the search is written",
)  # fmt: skip


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PLACES]
)
def test_a_killed_run_ends_with_the_same_bits(
    place: str, recipe: Path, whole: Path, tmp_path: Path, python: Any
) -> None:
    asked = ASKED.get(place, signal.SIGKILL)
    damaged = "search-*/checkpoint-4/optimizer.pt" if place == "search, step 5" else ""
    kill_and_go_on(python, PLACES[place], recipe, whole, tmp_path / "out", asked, damaged)


LATER = ("at_step(2, 9)", "at_step(3, 5)")


@pytest.mark.parametrize(
    "place",
    ["at_step(2, 5)", *(pytest.param(p, marks=pytest.mark.slow) for p in LATER)],
)
def test_a_killed_search_for_sharing_does_so_too(
    place: str, sharing: Path, tmp_path: Path, python: Any
) -> None:
    """While the structure is learnt, after it was frozen, and while tied weights are retrained."""
    kill_and_go_on(python, place, sharing, sharing.parent / "whole", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["share"]


class Said(Progress):
    """What a run says besides its phases."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def kill_and_go_on(
    python: Any,
    place: str,
    recipe: Path,
    whole: Path,
    out: Path,
    asked: signal.Signals = signal.SIGKILL,
    damaged: str = "",
) -> None:
    """Stop a run at ``place``, damage the file that a pattern names, and run it to its end."""
    code = f"SIGNAL = {int(asked)}\n{KILLER}\n{place}\nmain()"
    done = python.run(code, "compress", recipe, "-o", out)
    if asked == signal.SIGKILL:
        assert done.returncode == -asked, done.stderr[-2000:]
    else:
        assert done.returncode == 128 + asked, done.stderr[-2000:]
        assert done.stderr.splitlines()[-1].startswith("vlprune: stopped; the same command goes on")
        assert "Traceback" not in done.stderr
    said = Said()
    if damaged:
        (victim,) = (out / "vlprune-run").glob(damaged)
        flip(victim)
    compress(load_recipe(recipe), out, said)
    if damaged:
        (line,) = said.lines
        assert f"{victim.name} is not as it was written): set aside as" in line
        assert "checkpoint-4 is damaged" in line
        assert line.endswith("going on from checkpoint-2")
    same_results(whole, out)
    assert not (out / "vlprune-run").exists()


def test_the_log_of_a_resumed_training_is_that_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    """Where checkpoints fall between two logs, whose losses are means."""
    import torch

    from vlprune.recipe.spec import Training
    from vlprune.training.fit import fit

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def forward(self, x: Any) -> Any:
            return {"loss": ((x @ self.weight - x.sum(1)) ** 2).mean()}

    class Stop(Exception):
        pass

    generator = torch.Generator().manual_seed(0)
    items = list(torch.randn(12, 3, generator=generator))
    spec = Training(steps=60, batch_size=4, save_steps=10, learning_rate=0.1)

    def history(folder: Path, stop_at: int = 0) -> Any:
        done = []

        def advance(steps: int, note: str = "") -> None:
            done.append(steps)
            if stop_at and sum(done) == stop_at:
                raise Stop

        return fit(
            Regression(), items, lambda rows, _: {"x": torch.stack(rows)}, spec, seed=0,
            checkpoints=folder, advance=advance,
        )  # fmt: skip

    whole = history(tmp_path / "whole")
    assert whole[-1]["step"] == 60
    with pytest.raises(Stop):
        history(tmp_path / "stopped", stop_at=15)
    assert history(tmp_path / "stopped") == whole
    assert history(tmp_path / "stopped") == whole  # from the checkpoint of its last step


def test_a_trainer_of_ones_own_resumes_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    import vlprune
    from vlprune.testing import build
    from vlprune.training.objective import Trainee

    class Stop(Exception):
        pass

    class StopAt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 5:
                raise Stop

    def run(folder: Path, *more: Any, resume: bool = False) -> Any:
        transformers.set_seed(0)
        model = build("vit").model
        compressor = vlprune.Compressor(model, vlprune.UPop(interval=2), {"params": 0.7})
        generator = torch.Generator().manual_seed(3)
        items = [
            {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2}
            for i in range(12)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, save_steps=2,
            data_seed=0, report_to="none", use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=Trainee(model), args=arguments, train_dataset=items,
            callbacks=[compressor.callback(), *more],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return compressor

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", StopAt())
    resumed = run(tmp_path / "stopped", resume=True)
    assert resumed.search.total.equal(whole.search.total)
    assert resumed.search.steps == 8
    assert resumed.plan() == whole.plan()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert a.equal(b)
    # a Trainer that finds none of the checkpoint's weights says nothing, so we do
    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", lambda *_, **__: None)
    with pytest.raises(vlprune.VlpruneError, match="have not been loaded"):
        run(tmp_path / "stopped", resume=True)


def test_a_full_disk_is_said_in_one_sentence(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "out" / "checkpoints" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlprune.commands.pipeline.dense.save", full)
    with pytest.raises(CheckpointError, match=r"is full: free some space and run the same"):
        compress(load_recipe(recipe), tmp_path / "out")
    monkeypatch.undo()
    assert list((tmp_path / "out" / "vlprune-run").glob("train-*/checkpoint-4/vlprune-complete*"))
    compress(load_recipe(recipe), tmp_path / "out")  # and it goes on
    assert (tmp_path / "out" / "plan.json").exists()
    assert not (tmp_path / "out" / "vlprune-run").exists()
    assert mine.read_text() == "precious"


def test_a_writer_that_loses_the_number_of_a_full_disk(tmp_path: Path) -> None:
    import torch

    assert is_full(OSError(errno.ENOSPC, "full"))
    assert not is_full(OSError(errno.EIO, "No space left on device"))  # words say nothing
    assert not is_full(RuntimeError("No space left on device"), tmp_path)
    with pytest.raises(RuntimeError) as lost:
        torch.save(torch.zeros(100), "/dev/full")
    assert not is_full(lost.value, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".probe").symlink_to("/dev/full")
    assert is_full(lost.value, tmp_path)


def flip(path: Path) -> None:
    """One bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def phase_with_checkpoints(folder: Path) -> Path:
    """Two sealed checkpoints, of steps 18 and 20."""
    phase = folder / "search-0123"
    for step in (18, 20):
        place = phase / f"checkpoint-{step}"
        place.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            (place / name).write_bytes(f"{name} of step {step}".encode())
        checkpoints.seal(place)
    return phase


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "flipped": flip,
    "missing": Path.unlink,
    "a folder": as_folder,
    "a pipe": as_pipe,
    "a link to a device": as_link,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "trainer_state.json", checkpoints.SEAL]
)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    name: str, damage: str, tmp_path: Path
) -> None:
    phase, said = phase_with_checkpoints(tmp_path), []
    DAMAGES[damage](phase / "checkpoint-20" / name)
    found = checkpoints.newest(phase, said.append)
    assert found == phase / "checkpoint-18"
    (line,) = said
    assert line.startswith("checkpoint-20 ")
    assert line.endswith("; going on from checkpoint-18")
    assert not (phase / "checkpoint-20").exists()
    if (name, damage) != (checkpoints.SEAL, "missing"):  # that is what a kill leaves
        assert (phase / "damaged-checkpoint-20").is_dir()


def test_checkpoints_that_are_not_of_this_run_are_not_read(tmp_path: Path) -> None:
    phase, said = phase_with_checkpoints(tmp_path), []
    (phase / "checkpoint-20" / "pytorch_model.bin").write_bytes(b"a stranger's pickle")
    other = tmp_path / "search-4567"
    shutil.copytree(phase, other)
    (phase / "checkpoint-22").write_text("no folder")
    (phase / "checkpoint-x").mkdir()
    assert checkpoints.newest(phase, said.append) == phase / "checkpoint-18"
    assert ["is not a folder" in said[0], "pytorch_model.bin was not there" in said[1]] == [
        True
    ] * 2
    said.clear()
    assert checkpoints.newest(other, said.append) is None
    assert "belongs to another run" in said[1]
    assert all(line.endswith("; this phase starts anew") for line in said)
    # only the two newest stay when another is whole
    for step in (20, 22):
        (phase / f"checkpoint-{step}").mkdir()
        (phase / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"weights")
        checkpoints.seal(phase / f"checkpoint-{step}")
    kept = {path.name for path in phase.iterdir()}
    assert kept >= {"checkpoint-x", "checkpoint-20", "checkpoint-22"}
    assert "checkpoint-18" not in kept


def test_a_dense_model_is_taken_only_as_it_was_left(tmp_path: Path) -> None:
    def left() -> Path:
        folder = tmp_path / "dense"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
        body = {"basis": dataclasses.asdict(basis), "metrics": {1: 0.5}, "history": []}
        notes.remember(folder / notes.DENSE_NOTE, basis.key, body)
        return folder

    basis = notes.Basis("model", "data", "training")
    said = Said()
    folder = left()
    (folder / "bench.json").write_text("{}")  # what `vlprune bench --save` adds is no damage
    found = notes.known_dense(folder, basis, said)
    assert found["metrics"] == {"1": 0.5}
    assert said.lines == []
    for change, words in {
        "model": "another model",
        "data": "other data",
        "training": "other settings",
    }.items():
        said.lines.clear()
        other = dataclasses.replace(basis, **{change: "changed"})
        assert notes.known_dense(folder, other, said) is None
        assert f"was made from {words}" in said.lines[0]
    for number, name in enumerate(["config.json", "model.safetensors", notes.DENSE_NOTE]):
        said.lines.clear()
        flip(left() / name)
        assert notes.known_dense(folder, basis, said) is None
        aside = "damaged-dense" + (f"-{number + 1}" if number else "")
        assert "is damaged" in said.lines[0]
        assert said.lines[0].endswith(f"{aside}, and made anew")
        assert (tmp_path / aside / "model.safetensors").exists()
        assert not folder.exists()


@pytest.mark.parametrize("text", ["", "8", "[]", '{"round_to": 8}', '{"digest": "x"}', "\0"])
def test_a_damaged_note_is_set_aside(text: str, tmp_path: Path) -> None:
    path, said = tmp_path / "round-to.json", Said()
    assert notes.known(path, "key", said, "the width") is None
    write_note(path, "key", 8)
    assert notes.known(path, "key", said, "the width") == 8
    assert notes.known(path, "other", said, "the width") is None
    assert said.lines == []
    changed = path.read_text().replace('"body": 8', '"body": 9')
    path.write_text(text or changed)
    assert notes.known(path, "key", said, "the width") is None
    assert "the width is damaged" in said.lines[0]
    assert (tmp_path / "damaged-round-to.json").read_text() == (text or changed)
    with pytest.raises(CheckpointError):
        read_note(tmp_path / "damaged-round-to.json")


def test_what_decides_is_what_a_model_is_made_from(recipe: Path, tmp_path: Path) -> None:
    """Neither places nor how often a checkpoint is saved; but every bit of model and data."""
    task = make_task(load_recipe(recipe), tmp_path)
    scenes = recipe.parent / "scenes"
    moved = tmp_path / "moved"
    shutil.copytree(scenes, moved)
    dense = tmp_path / "model"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    (dense / "model.safetensors").write_bytes(bytes(1000))

    def keys(*overrides: str) -> tuple[str, str]:
        changed = load_recipe(recipe, overrides)
        own = make_task(changed, tmp_path) if "data" in "".join(overrides) else task
        basis = notes.basis_of(changed, own)
        return basis.key, notes.search_key(changed, basis, 1)

    once = keys()
    for same in ("train.save_steps=3", "search.save_steps=1", "threads=2", "device=cpu",
                 "report_to=tensorboard", f"data.folder={moved}"):  # fmt: skip
        assert keys(same) == once, same
    assert keys("search.steps=7")[0] == once[0]
    for other in (
        "search.steps=7", "budget.params=0.7", "latency_batch_size=2", "calibration.items=8",
        "search.drop_path={'vision*': 0.1}", "search.dropout={'text*': 0.1}",
    ):  # fmt: skip
        assert keys(other)[1] != once[1], other
    for other in (
        "train.steps=5", "seed=1", "model.width=64", f"model.path={dense}", "data.augment.crop=0.5",
    ):  # fmt: skip
        assert keys(other)[0] != once[0], other

    def changed_in_place(path: Path) -> None:
        times = path.stat()
        flip(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    before = keys(f"model.path={dense}")
    shutil.copytree(dense, tmp_path / "model-moved")
    (tmp_path / "model-moved" / "bench.json").write_text("{}")
    assert keys(f"model.path={tmp_path / 'model-moved'}") == before
    changed_in_place(dense / "model.safetensors")
    assert keys(f"model.path={dense}") != before
    picture = next((moved / "images" / "train2014").iterdir())
    changed_in_place(picture)
    items = [(picture,)]
    assert fingerprint.of_data(items) != fingerprint.of_data(
        [(scenes / picture.relative_to(moved),)]
    )


def test_a_second_run_in_the_same_folder_is_told(
    run: Any, recipe: Path, tmp_path: Path, python: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    with claimed(out, print) as work:
        assert work == out / "vlprune-run"
        code, stdout, stderr = run("compress", str(recipe), "-o", str(out))
        assert (code, stdout) == (2, "")
        assert stderr.strip().splitlines()[-1].startswith("vlprune: another run (process ")
        assert "choose another folder with -o" in stderr
    assert not (tmp_path / "deep").exists()  # nothing was written, so nothing stays
    # the lock of a process that was killed holds nobody up
    done = python.run(
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from vlprune.commands.pipeline.workplace import claimed\n"
        "with claimed(Path(sys.argv[1]), print):\n    os.kill(os.getpid(), signal.SIGKILL)",
        out,
    )
    assert done.returncode == -signal.SIGKILL
    assert (out / "vlprune-run" / "lock").exists()
    with claimed(out, print):
        pass
    # a file system without locks: said, and not refused
    lines: list[str] = []

    def no_locks(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("vlprune.commands.pipeline.workplace.FileLock.acquire", no_locks)
    with claimed(out, lines.append):
        (work / "train-1").mkdir()
        (work / "mine.txt").write_text("precious")
        cleared(work)
    assert "has no locks (No locks available)" in lines[0]
    assert [entry.name for entry in work.iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot write to"),
        claimed(tmp_path / "file" / "out", print),
    ):
        pass


def test_signals_that_ask_to_stop(python: Any) -> None:
    code = """
import os, signal, sys
from vlprune.commands.signals import Stopped, received, stoppable
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
before = signal.getsignal(signal.SIGTERM)
class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
with stoppable():
    os.kill(os.getpid(), signal.SIGHUP)
    assert not received()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except Exception:
        raise SystemExit("caught as an ordinary error")
    except Stopped as stop:
        assert stop.number == received() == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGINT)  # torchrun sends both
assert signal.getsignal(signal.SIGTERM) == before
with stoppable():
    Swallows()  # an exception in __del__ goes nowhere, but it was heard
    assert received()
"""
    done = python.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.slow
def test_kills_at_random_moments() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "20"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same bits" in done.stdout


def test_what_a_killed_writer_left_goes_with_the_next_note(tmp_path: Path) -> None:
    note = tmp_path / notes.DENSE_NOTE
    left = tmp_path / f".{note.name}.0123abcd"
    mine = tmp_path / f".{note.name}.backup"
    for path in (left, mine):
        path.write_text("{}")
    notes.remember(note, "key", {"metrics": {}})
    assert note.exists()
    assert mine.exists()
    assert not left.exists()
