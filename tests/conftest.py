"""Settings of every test process: one thread, no network, no denormal numbers, no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Runs are compared to the last bit, so they compute on the CPU wherever the tests run. The GPUs
# are left to the commands that tests/test_gpu.py starts.
os.environ.setdefault("VLPRUNE_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import transformers

if importlib.util.find_spec("torchvision"):
    # torchvision's compiled operators do not fit a CPU build of torch; it only needs them declared
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.set_num_threads(1)
torch.set_flush_denormal(True)
transformers.utils.logging.disable_progress_bar()
# transformers compiles some two thousand patterns per loaded model, and re keeps 512 of them
re._MAXCACHE = 100_000


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    folder = os.environ.get("VLPRUNE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("VLPRUNE_DATA is not set: the real data sets are not here")
    return Path(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command: run("inspect", ...) gives its exit code, stdout and stderr."""
    from vlprune import cli

    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlprune", *args])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """New processes, started fast: python.run(code) gives exit code, stdout and stderr."""
    from fresh import Python

    with Python(tmp_path_factory.mktemp("fresh")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `vlprune compress` made of a tiny BLIP, with its dense model inside."""
    from small_runs import DEMO, TINY
    from vlprune.recipe import load_recipe
    from vlprune.run import compress

    out = tmp_path_factory.mktemp("tiny") / "small"
    compress(load_recipe(DEMO, TINY), out)
    return out


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A clock that counts work in linear layers and activations, in place of time."""
    from torch import nn

    from vlprune import latency

    work = {"done": 0.0}
    linear = nn.Linear.forward

    def counted(module: nn.Linear, inputs: Any) -> Any:
        """In place of nn.Linear.forward, so that the work falls inside what is timed."""
        work["done"] += inputs.numel() // inputs.shape[-1] * module.weight.numel() / 1e6
        return linear(module, inputs)

    def count(module: Any, args: Any, _output: Any) -> None:
        if "GELU" in type(module).__name__ or "Activation" in type(module).__name__:
            work["done"] += 20 * args[0].numel() / 1e6

    monkeypatch.setattr(nn.Linear, "forward", counted)
    handle = nn.modules.module.register_module_forward_hook(count)
    monkeypatch.setattr(latency._Clock, "now", lambda self: work["done"])
    yield work
    handle.remove()
