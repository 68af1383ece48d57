"""Recipes that Accelerate has told to use DeepSpeed, in two processes on CPU (gloo)."""

from __future__ import annotations

import json
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks import meeting
from small_runs import DEMO, KILLED, TINY

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="deepspeed is not installed (pip install 'vlprune[deepspeed]')",
)

RECIPE = [
    "compress", DEMO, *TINY, "search.steps=4", "search.save_steps=2", "device=cpu",
    "search.weight_decay_on=all", "search.weight_decay=1",
    "options.targets=all", "options.smoothing=0.1",
]  # fmt: skip
HALF = ["search.bf16=true", "retrain.bf16=true"]

COMMAND = (
    """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed.comm.torch
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled
"""
    + KILLED
)


def launched(python: Any, stage: int, how: str, *args: str, processes: int = 2) -> list[Any]:
    """What ``accelerate launch`` sets, without its guard; stage 0 is DistributedDataParallel."""
    wanted = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    ranks = meeting(processes, **(wanted if stage else {}))
    done: list[Any] = python.together([COMMAND] * processes, how, *args, env=ranks)
    return done


def run(python: Any, stage: int, out: Path, *more: str, processes: int = 2) -> Path:
    for one in launched(python, stage, "run", *RECIPE, *more, "-o", str(out), processes=processes):
        assert one.returncode == 0, one.stderr[-3000:]
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def alone(python: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's result without DeepSpeed."""
    return run(python, 0, tmp_path_factory.mktemp("recipes") / "ddp")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_recipe_finds_what_it_finds_without_deepspeed(
    stage: int, python: Any, alone: Path, tmp_path: Path
) -> None:
    out = run(python, stage, tmp_path / "out")
    assert (out / "plan.json").read_text() == (alone / "plan.json").read_text()
    for sub in ("", "dense"):
        mine, theirs = weights(out / sub), weights(alone / sub)
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():  # Adam turns a rounding into a step
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=2e-3)
    report = json.loads((out / "report.json").read_text())
    assert report["verified"]["dtype"] == "float64"
    assert not (out / "vlprune-run").exists()


def test_a_killed_run_in_half_precision_goes_on_to_the_same_weights(
    python: Any, tmp_path: Path
) -> None:
    whole = run(python, 3, tmp_path / "whole", *HALF)
    cut = ["-o", str(tmp_path / "killed")]
    assert [one.returncode for one in launched(python, 3, "kill", *RECIPE, *HALF, *cut)] == [2, -9]
    killed = run(python, 3, tmp_path / "killed", *HALF)
    assert (killed / "plan.json").read_text() == (whole / "plan.json").read_text()
    for name, tensor in weights(whole).items():
        assert tensor.dtype == torch.float32  # as before the engine
        assert torch.equal(weights(killed)[name], tensor), name


def test_a_checkpoint_that_is_a_program_is_not_run(python: Any, tmp_path: Path) -> None:
    from vlprune.training.checkpoints import seal

    class Program:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    out = ["-o", str(tmp_path / "out")]
    launched(python, 2, "kill", *RECIPE, *out)
    (checkpoint,) = (tmp_path / "out" / "vlprune-run").glob("search-*/checkpoint-2")
    for file in checkpoint.glob("*/*.pt"):
        with file.open("wb") as stream:
            pickle.dump(Program(), stream)
    seal(checkpoint)
    for one in launched(python, 2, "run", *RECIPE, *out):
        assert one.returncode == 2, one.stderr[-2000:]
        assert "holds more than tensors" in one.stderr
        assert "Traceback" not in one.stderr
    assert not (tmp_path / "run").exists()


def test_one_process_has_an_engine_too(python: Any, tmp_path: Path) -> None:
    out = run(python, 3, tmp_path / "out", "retrain.save_steps=2", processes=1)
    assert json.loads((out / "report.json").read_text())["verified"]["difference"] < 1e-12


def test_what_stands_against_deepspeed_is_said_before_anything_trains(
    python: Any, tmp_path: Path
) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 3, "gradient_clipping": "auto",
        "optimizer": {"type": "Adam"}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    more = ["retrain.ema=0.99", "search.batch_size=3", "method={name: jsp}"]
    env = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json"),
    }
    (done,) = python.together([COMMAND], "run", *RECIPE, *more, "-o", str(out), env=[env])
    assert done.returncode == 2
    said = done.stderr.partition("vlprune: ")[2]
    for part in (
        "DeepSpeed cannot train this recipe",
        "retrain.ema",
        "its own optimizer",
        "train: DeepSpeed's config says train_micro_batch_size_per_gpu = 3, the recipe 4",
        "bf16.enabled = True, the recipe False",
        "the method jsp changes weights",
    ):
        assert part in said, said
    assert "search: DeepSpeed's config says train_micro" not in said
    assert "Traceback" not in done.stderr
    assert not out.exists()

    (tmp_path / "ds.json").write_text("{")
    (done,) = python.together([COMMAND], "run", *RECIPE, "-o", str(out), env=[env])
    assert done.returncode == 2
    assert "ds.json cannot be used" in done.stderr
    assert not out.exists()


CLIP = """
task: retrieval
data: {format: shapes, train_items: 16, test_items: 8}
options: {model: clip, queue: 8}
model: {width: 32, heads: 2, vision_layers: 1, text_layers: 1, image_size: 32, patch_size: 16}
train: {steps: 2, batch_size: 4}
budget: {params: 0.7}
method: {name: upop}
search: {steps: 2, batch_size: 4, bf16: true}
retrain: {steps: 2, batch_size: 4}
teacher: {similarities: 1.0}
device: cpu
"""


def test_averages_scalars_and_a_teacher_go_with_an_engine(python: Any, tmp_path: Path) -> None:
    """... in half precision; where weights are split, a task that averages them says so."""
    recipe = tmp_path / "clip.yaml"
    recipe.write_text(CLIP)
    out = tmp_path / "out"
    for one in launched(python, 3, "run", "compress", str(recipe), "-o", str(out)):
        assert one.returncode == 2, one.stderr[-2000:]
        assert "MomentumContrast) keeps an average of the weights" in one.stderr
        assert "Traceback" not in one.stderr
    for one in launched(python, 2, "run", "compress", str(recipe), "-o", str(out)):
        assert one.returncode == 0, one.stderr[-3000:]
    saved = weights(out)
    assert saved["logit_scale"].shape == ()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
