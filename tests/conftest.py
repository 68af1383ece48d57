"""Settings of every test process: one thread, no network, no denormal numbers, no GPU."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
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
# are left to the commands that tests/commands/test_gpu.py starts.
os.environ.setdefault("VLPRUNE_TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import transformers
from torch import nn

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # Its compiled operators are for another build of torch. It only needs them declared; where
        # they fit, to declare them again would abort the process.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

torch.set_num_threads(1)
torch.set_flush_denormal(True)
transformers.utils.logging.disable_progress_bar()
# transformers compiles some two thousand patterns per loaded model, and re keeps 512 of them
re._MAXCACHE = 100_000


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the quick lane: see tests/lanes.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        whole = [item for item in items if item.get_closest_marker("whole")]
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if item not in whole]


@pytest.fixture(scope="session", autouse=True)
def lane(request: pytest.FixtureRequest) -> Iterator[None]:
    """The quick lane, if it was asked for."""
    if not request.config.getoption("quick"):
        yield
        return
    from lanes import quick_lane

    with quick_lane():
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """A test changes no setting of the process that the next one would find."""

    def settings() -> dict[str, Any]:
        hooks = nn.modules.module
        return {
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "denormals": float(torch.tensor(1e-39) * 1),
            "verbosity": transformers.utils.logging.get_verbosity(),
            "logging": logging.root.manager.disable,
            "hooks": len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
            "processes": len(multiprocessing.active_children()),
            "folder": os.getcwd(),
        }

    before = settings()
    yield
    after = settings()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"the test leaves behind {changed}"


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
    from vlprune.commands import main as cli

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
    from vlprune.commands.pipeline.compress import compress
    from vlprune.recipe.spec import load_recipe

    out = tmp_path_factory.mktemp("tiny") / "small"
    compress(load_recipe(DEMO, TINY), out)
    return out


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A clock that counts work in linear layers and activations, in place of time."""
    from vlprune.prices import clock

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
    monkeypatch.setattr(clock.Clock, "now", lambda self: work["done"])
    yield work
    handle.remove()
