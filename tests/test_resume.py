"""A run that is killed goes on and ends as if it had never been: the same plan, the same bits."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from alike import same_results
from vlprune.recipe import load_recipe
from vlprune.run import compress

# Everything with a state of its own: momentum encoder, queue, random negatives, a teacher, UPop.
RECIPE = """
task: blip-retrieval
budget: {params: 0.6}
method: {name: upop, interval: 2}
options: {queue: 32}
teacher: {similarities: 1, features: 1}
model: {width: 32, heads: 2, vision_layers: 1, text_layers: 1, image_size: 32}
data: {train_items: 20, test_items: 4, folder: SCENES}
train: {steps: 4, batch_size: 4, save_steps: 2}
search: {steps: 6, batch_size: 4, save_steps: 2}
retrain: {steps: 6, batch_size: 4, save_steps: 2}
threads: 1
"""

# A search with a network, an optimizer and noise of its own, and weights that are tied afterwards.
SHARING = """
task: retrieval
budget: {params: 0.8}
method: {name: jsp, every: 1, learning_rate: 0.05}
options: {queue: 32}
model: {width: 32, heads: 2, vision_layers: 2, text_layers: 2, image_size: 32}
data: {train_items: 40, test_items: 4, folder: SCENES}
train: {steps: 2, batch_size: 4}
search: {steps: 10, batch_size: 4, save_steps: 2}
retrain: {steps: 6, batch_size: 4, save_steps: 2}
threads: 1
"""

# where: (patched before the run, what must be there afterwards, what the next run says)
PLACES = {
    "training, step 3": "at_step(1, 3)",
    "search, step 5": "at_step(2, 5)",
    "while a checkpoint of the search is written": "half_checkpoint(2, 4)",
    "after the search, before the cut": "after('vlprune.compressor', 'perform', before=True)",
    "while the cut model is evaluated": "after('vlprune.run', '_evaluate', nth=2, before=True)",
    "retraining, step 5": "at_step(3, 5)",
    "after the last step": "after('vlprune.run', '_evaluate', nth=3, before=True)",
    "while the result is saved": "after('vlprune.run', 'save', nth=3, before=True)",
}

KILLER = """
import importlib, os, signal, sys
import vlprune.train as train

def die():
    os.kill(os.getpid(), signal.SIGKILL)

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

def after(module, name, nth=1, before=False):
    home, calls = importlib.import_module(module), []
    real = getattr(home, name)
    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            die()
        return real(*args, **kwargs)
    setattr(home, name, patched)

keep = []
from pathlib import Path
from vlprune.recipe import load_recipe
from vlprune.run import compress
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


SLOW = ("training, step 3", "while the cut model is evaluated", "after the last step")


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in PLACES]
)
def test_a_killed_run_ends_with_the_same_bits(
    place: str, recipe: Path, whole: Path, tmp_path: Path, python: Any
) -> None:
    kill_and_go_on(python, PLACES[place], recipe, whole, tmp_path / "out")


@pytest.mark.parametrize(
    "place",
    ["at_step(2, 5)", pytest.param("at_step(2, 9)", marks=pytest.mark.slow), "at_step(3, 5)"],
)
def test_a_killed_search_for_sharing_does_so_too(
    place: str, sharing: Path, tmp_path: Path, python: Any
) -> None:
    """While the structure is learnt, after it was frozen, and while tied weights are retrained."""
    kill_and_go_on(python, place, sharing, sharing.parent / "whole", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["share"]


def kill_and_go_on(python: Any, place: str, recipe: Path, whole: Path, out: Path) -> None:
    code = f"{KILLER}\n{place}\ncompress(load_recipe({str(recipe)!r}), Path({str(out)!r}))"
    done = python.run(code)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    compress(load_recipe(recipe), out)
    same_results(whole, out)
    assert not (out / "vlprune-run").exists()


def test_a_trainer_of_ones_own_resumes_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    import transformers

    import vlprune
    from vlprune.testing import build
    from vlprune.trainee import Trainee

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
    import errno

    import vlprune.run
    from vlprune.errors import CheckpointError

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(vlprune.run, "save", full)
    with pytest.raises(CheckpointError, match=r"is full: free some space and run the same"):
        compress(load_recipe(recipe), tmp_path / "out")
    monkeypatch.undo()
    assert list((tmp_path / "out" / "vlprune-run").glob("train-*/checkpoint-4/vlprune-complete*"))
    compress(load_recipe(recipe), tmp_path / "out")  # and it goes on
    assert (tmp_path / "out" / "plan.json").exists()
