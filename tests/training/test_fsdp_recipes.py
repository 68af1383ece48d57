"""Recipes that Accelerate has told to use FSDP2, in two processes on CPU (gloo)."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks import meeting
from small_runs import DEMO, KILLED, TINY

RECIPE = [
    "compress", DEMO, *TINY, "search.steps=4", "search.save_steps=2", "device=cpu",
    "search.weight_decay_on=all", "search.weight_decay=1",
    "options.targets=all", "options.smoothing=0.1",
]  # fmt: skip

# Accelerate uses FSDP on no CPU: it is let to take these processes for GPUs.
HEAD = """
import os, torch, torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType

if "ACCELERATE_USE_FSDP" in os.environ:
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    dist.init_process_group("gloo")
"""
COMMAND = HEAD + KILLED
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launched(python: Any, engine: dict[str, str], how: str, *args: str) -> list[Any]:
    """What ``accelerate launch`` sets; without an engine this is DistributedDataParallel."""
    done: list[Any] = python.together([COMMAND] * 2, how, *args, env=meeting(2, **engine))
    return done


def run(python: Any, engine: dict[str, str], out: Path, *more: str) -> Path:
    for one in launched(python, engine, "run", *RECIPE, *more, "-o", str(out)):
        assert one.returncode == 0, one.stderr[-3000:]
    return out


def same(mine: Path, theirs: Path, apart: float) -> None:
    assert (mine / "plan.json").read_text() == (theirs / "plan.json").read_text()
    for sub in ("", "dense"):
        own, other = (load_file(f / sub / "model.safetensors") for f in (mine, theirs))
        assert own.keys() == other.keys()
        for name, tensor in other.items():
            assert own[name].dtype == tensor.dtype
            torch.testing.assert_close(own[name], tensor, rtol=0, atol=apart)


@pytest.mark.slow
def test_a_recipe_finds_what_it_finds_without_fsdp(python: Any, tmp_path: Path) -> None:
    out = run(python, FSDP, tmp_path / "fsdp")
    alone = run(python, {}, tmp_path / "ddp")
    same(out, alone, 2e-3)  # Adam turns a rounding into a step
    report = json.loads((out / "report.json").read_text())
    assert report["verified"]["dtype"] == "float64"
    assert not (out / "vlprune-run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["method={name: jsp}", "budget.params=0.72"],
        ["search.bf16=true", "retrain.bf16=true"],
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(
    more: list[str], python: Any, tmp_path: Path
) -> None:
    whole = run(python, FSDP, tmp_path / "whole", *more)
    out = ["-o", str(tmp_path / "killed")]
    found = launched(python, FSDP, "kill", *RECIPE, *more, *out)
    assert [one.returncode for one in found] == [2, -9], found[0].stderr
    for one in launched(python, {}, "run", *RECIPE, *more, *out):
        assert one.returncode == 2
        assert "began by FSDP and is to go on without an engine" in one.stderr
        assert "Traceback" not in one.stderr
    same(run(python, FSDP, tmp_path / "killed", *more), whole, 0)


def test_a_checkpoint_that_is_a_program_is_not_run(python: Any, tmp_path: Path) -> None:
    from vlprune.training.checkpoints import seal

    class Program:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    out = ["-o", str(tmp_path / "out")]
    launched(python, FSDP, "kill", *RECIPE, *out)
    (checkpoint,) = (tmp_path / "out" / "vlprune-run").glob("search-*/checkpoint-2")
    files = [*checkpoint.glob("*.bin"), *checkpoint.glob("*.pt")]
    assert "pytorch_model_fsdp.bin" in [file.name for file in files]
    for file in files:
        with file.open("wb") as stream:
            pickle.dump(Program(), stream)
    seal(checkpoint)
    for one in launched(python, FSDP, "run", *RECIPE, *out):
        assert one.returncode == 2, one.stderr[-2000:]
        assert "Traceback" not in one.stderr
    assert not (tmp_path / "run").exists()


def test_what_stands_against_fsdp_is_said_before_anything_trains(
    python: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    env = {**FSDP, "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}
    for one in launched(python, env, "run", *RECIPE, "retrain.ema=0.99", "-o", str(out)):
        assert one.returncode == 2
        said = one.stderr.partition("vlprune: ")[2]
        for part in (
            "FSDP cannot train this recipe",
            "retrain.ema",
            "fsdp_offload_params",
            "train: accelerate was told mixed precision bf16, the recipe says no",
        ):
            assert part in said, said
    for one in launched(python, {**FSDP, "FSDP_VERSION": "1"}, "run", *RECIPE, "-o", str(out)):
        assert one.returncode == 2
        assert "add --fsdp_version 2" in one.stderr
    assert not out.exists()


TRAINER = """
import sys, transformers, vlprune
from vlprune.testing import build

model = build("vit").model
compressor = vlprune.Compressor(model, vlprune.UPop(interval=2), {"params": 0.7})
numbers = torch.Generator().manual_seed(0)
items = [
    {"pixel_values": torch.randn(3, 16, 16, generator=numbers), "labels": torch.tensor(i % 2)}
    for i in range(16)
]
arguments = transformers.TrainingArguments(
    output_dir=sys.argv[1], max_steps=4, per_device_train_batch_size=4, report_to="none",
    use_cpu=True, save_strategy="no", disable_tqdm=True,
)
trainer = transformers.Trainer(
    model=model, args=arguments, train_dataset=items, callbacks=[compressor.callback()]
)
trainer.train()
small = compressor.finish()
parts = sum(hasattr(p, "full_tensor") for p in small.parameters())
if parts or dist.get_rank() == 0:  # all processes save what they hold in parts
    vlprune.save(small, sys.argv[1])
print(trainer.is_fsdp_enabled, parts > 0, compressor.plan().to_json())
"""


@pytest.mark.slow
def test_a_trainer_of_ones_own_searches_and_saves_a_model_in_parts(
    python: Any, tmp_path: Path
) -> None:
    found, shapes = {}, {}
    for name, engine in (("fsdp", FSDP), ("ddp", {})):
        folder = tmp_path / name
        env = meeting(2, **engine)
        for one in python.together([HEAD + TRAINER] * 2, str(folder), env=env):
            assert one.returncode == 0, one.stderr[-3000:]
        found[name] = one.stdout.splitlines()[-1].split(maxsplit=2)
        shapes[name] = {n: t.shape for n, t in load_file(folder / "model.safetensors").items()}
    assert found["fsdp"][:2] == ["True", "True"]
    assert found["ddp"][:2] == ["False", "False"]
    assert found["fsdp"][2] == found["ddp"][2]
    assert shapes["fsdp"] == shapes["ddp"]
