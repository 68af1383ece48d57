"""One device, decided once: what is chosen, what is refused, and that everything goes there.

``meta`` is a second device that every machine has: torch refuses to mix it with the CPU as it
refuses to mix a GPU with the CPU. Where values are needed, :class:`Host` stands for tensors that
nobody has moved yet.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import vlprune
from small_runs import DEMO, TINY
from vlprune import device
from vlprune.commands.pipeline import make, search
from vlprune.commands.pipeline.compress import compress
from vlprune.commands.pipeline.evaluate import evaluate_folder, scan_folder
from vlprune.device import available, choose, device_of, moved_to, placed
from vlprune.errors import RecipeError, UnsupportedError, VlpruneError
from vlprune.folders.exported.write import export
from vlprune.measuring import bench
from vlprune.measuring.inputs import made_up_inputs
from vlprune.recipe.spec import Training, load_recipe
from vlprune.tasks.pixels import PixelCache
from vlprune.tasks.vqa import VqaTask
from vlprune.testing import build
from vlprune.training.fit import fit

SOURCE = Path(vlprune.__file__).parent


# -- the decision ----------------------------------------------------------------------


def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert choose() == choose("cpu") == torch.device("cpu")
    assert available()[0] == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:1", "", "cuda:-1", "auto:0"])
def test_another_device_is_refused_in_one_sentence(name: str) -> None:
    says = r"device must be auto or a device of this machine \(cpu.*--device"
    with pytest.raises(RecipeError, match=says) as caught:
        choose(name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch and accelerate as they are on a machine with two GPUs; which became the current."""
    current: list[Any] = []
    state = SimpleNamespace(num_processes=1, device=torch.device("cuda"))
    monkeypatch.setattr(device, "PartialState", lambda cpu=False: state)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: gpu)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    return current


def test_one_of_two_gpus(two_gpus: list[Any]) -> None:
    assert available() == ("cpu", "cuda:0", "cuda:1")
    for wanted, number in (("auto", 0), ("cuda", 0), ("cuda:1", 1)):
        assert choose(wanted) == torch.device("cuda", number)
        assert two_gpus.pop() == torch.device("cuda", number)
        assert device.PartialState().device == torch.device("cuda", number)
    assert choose("cpu") == torch.device("cpu")
    assert two_gpus == []
    with pytest.raises(RecipeError, match=r"\(cpu, cuda:0, cuda:1\), not 'cuda:2'"):
        choose("cuda:2")


def test_each_of_several_processes_has_its_own(two_gpus: list[Any]) -> None:
    state = device.PartialState()
    state.num_processes, state.device = 2, torch.device("cuda:1")  # as accelerate gave it
    assert choose("auto") == choose("cuda") == torch.device("cuda:1")
    for wanted in ("cuda:0", "cpu"):
        with pytest.raises(RecipeError, match=r"cannot be that of 2 processes.*write auto"):
            choose(wanted)
    assert two_gpus == []  # accelerate has done it


def test_a_recipe_with_another_machines_device_stops_before_anything_is_made(
    run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for asked in (["device=cuda:77"], ["--device", "cuda:77"]):
        code, stdout, stderr = run("demo", "-o", str(out), *TINY, *asked)
        assert (code, stdout) == (2, "")
        assert "not 'cuda:77'" in stderr
        assert not out.exists()


def test_every_command_that_runs_a_model_takes_a_device(run: Any, tiny_folder: Path) -> None:
    commands = (
        ("compress", DEMO, *TINY), ("demo", *TINY), ("evaluate", str(tiny_folder)),
        ("sensitivity", str(tiny_folder / "dense")), ("bench", str(tiny_folder)),
    )  # fmt: skip
    for command in commands:
        code, stdout, stderr = run(*command, "--device", "gpu")
        assert (code, stdout) == (2, ""), command
        assert "device must be auto or a device of this machine" in stderr


def test_fp16_needs_a_gpu_that_the_recipe_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    recipe = load_recipe(DEMO, [*TINY, "device=cpu", "train.fp16=true"])
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        compress(recipe, tmp_path / "out")


# -- inputs follow the model -----------------------------------------------------------


def test_inputs_go_to_the_model_at_any_depth() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    boxes = torch.rand(3, 4)
    inputs = {"x": torch.rand(1), "ids": torch.tensor([1]), "return_loss": True,
              "labels": [{"boxes": boxes}, {"boxes": boxes}]}  # fmt: skip
    there = moved_to(model, inputs)
    assert there["x"].dtype == torch.bfloat16
    assert there["ids"].dtype == torch.int64
    assert there["labels"][1]["boxes"].dtype == torch.float32  # the loss knows what it wants
    there = moved_to(model.to("meta"), inputs)
    assert {t.device.type for t in tree_flatten(there)[0] if isinstance(t, Tensor)} == {"meta"}
    assert there["return_loss"] is True
    assert moved_to(model, boxes).device.type == "meta"
    assert boxes.device.type == "cpu"


@pytest.mark.parametrize("family", ["clip", "vit", "deit", "segmenter"])
def test_macs_are_counted_where_the_model_is(family: str) -> None:
    sample = build(family)
    inputs = {n: v for n, v in sample.inputs.items() if n != "attention_mask"}
    structures = vlprune.discover(sample.model).structures
    here = vlprune.cost.measure_macs(sample.model, structures, inputs)
    assert vlprune.cost.measure_macs(sample.model.to("meta"), structures, inputs) == here


def test_made_up_inputs_are_the_same_numbers_everywhere() -> None:
    model = build("clip").model
    state = torch.get_rng_state()
    first = made_up_inputs(model, 2)
    assert bool((torch.get_rng_state() == state).all())
    with torch.device("meta"):  # a default device is not where they are drawn
        second = made_up_inputs(model, 2)
    for name, value in first.items():
        assert torch.equal(value, second[name])
    there = made_up_inputs(model.to("meta"), 2)
    assert {value.device.type for value in there.values()} == {"meta"}


def test_models_on_two_devices_are_not_compared_in_time() -> None:
    models = {"dense": build("vit").model, "small": build("vit").model.to("meta")}
    with pytest.raises(VlpruneError, match="not dense on cpu, small on meta"):
        bench.latencies(models, lambda size: {})


def test_a_model_is_exported_on_the_cpu_and_put_back(tmp_path: Path) -> None:
    moves: list[str] = []

    class Elsewhere:
        device = torch.device("cuda:1")

        def to(self, where: torch.device) -> None:
            moves.append(str(where))

    with placed(Elsewhere(), torch.device("cpu")):
        assert moves == ["cpu"]
    assert moves == ["cpu", "cuda:1"]
    with pytest.raises(UnsupportedError, match="exported with its weights"):
        export(build("vit").model.to("meta"), [], "onnx", tmp_path / "out")


# -- a whole run -----------------------------------------------------------------------


class Host(Tensor):
    """A tensor that nobody has moved to the model's device: it must not meet a weight.

    ``to`` gives a plain tensor; whatever else is computed of it stays on the host.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs).as_subclass(Tensor)
        if any(isinstance(value, nn.Parameter) for value in tree_flatten((args, kwargs))[0]):
            raise AssertionError(f"{func.__name__} got an input that was not moved to the model")
        return super().__torch_function__(func, types, args, kwargs)

    @staticmethod
    def all_of(value: Any) -> Any:
        """``value`` with its tensors as they come from a data set."""
        return tree_map(lambda t: t.as_subclass(Host) if isinstance(t, Tensor) else t, value)


@pytest.fixture
def nothing_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a VQA task reads lies on the host."""
    for owner, name in (
        (PixelCache, "__call__"), (VqaTask, "collate"), (VqaTask, "_questions"),
        (VqaTask, "_answer_ids"),
    ):  # fmt: skip
        real = getattr(owner, name)

        def host(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            return Host.all_of(real(*args, **kwargs))

        monkeypatch.setattr(owner, name, host)


def test_the_host_stands_for_a_device_of_its_own() -> None:
    ids = Host.all_of({"ids": torch.tensor([0, 1])})["ids"]
    layer = nn.Embedding(2, 3)
    with pytest.raises(AssertionError, match="not moved"):
        layer(ids)
    with pytest.raises(AssertionError, match="not moved"):
        layer(ids + 1 - 1)
    assert layer(moved_to(layer, ids)).shape == (2, 3)


@pytest.mark.parametrize(
    "method",
    [pytest.param("{name: upop}", marks=pytest.mark.slow), "{name: magnitude, round_to: auto}"],
)
def test_every_input_of_a_run_is_moved_to_the_model(
    method: str, nothing_moved: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlprune.prices.round_to.MULTIPLES", (1,))
    out = tmp_path / "out"
    more = ["teacher={logits: 1}", f"method={method}", "budget={macs: 0.6}", "device=cpu"]
    recipe = load_recipe(DEMO, [*TINY, *more])
    compress(recipe, out)
    evaluate_folder(out, recipe)
    scan_folder(out / "dense", recipe)


@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_model_of_a_run_is_placed_once_made(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the dense model, the cut one and the one that is loaded by a run that goes on."""
    recipe = load_recipe(DEMO, [*TINY, "device=cpu"])
    if stopped:
        stop = pytest.raises(RuntimeError, match="pulled the plug")
        with monkeypatch.context() as patch, stop:
            real = search.run_phase

            def until_retraining(problem: Any, phase: Any, *args: Any, **more: Any) -> Any:
                if phase.name == "retrain":
                    raise RuntimeError("pulled the plug")
                return real(problem, phase, *args, **more)

            patch.setattr(search, "run_phase", until_retraining)
            compress(recipe, tmp_path / "out")
    where: list[torch.device] = []
    place = make.place

    def noted(model: Any, device: torch.device) -> Any:
        where.append(device)
        model.placed = True
        return place(model, device)

    seen = 0

    def check(module: nn.Module, _args: Any) -> None:
        nonlocal seen
        if type(module).__name__ == "BlipForQuestionAnswering":
            seen += 1
            assert getattr(module, "placed", False), "a model runs that was never placed"

    monkeypatch.setattr(make, "place", noted)
    handle = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        compress(recipe, tmp_path / "out")
    finally:
        handle.remove()
    assert seen > 10
    assert where == [torch.device("cpu")] * (2 if stopped else 1)


def test_nothing_touches_a_gpu_that_the_recipe_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch says that there is one; the first use of it would fail here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = ["train.save_steps=0", "search.save_steps=0", "retrain.save_steps=0"]
    recipe = load_recipe(DEMO, [*TINY, *steps, "device=cpu"])
    report = compress(recipe, tmp_path / "out")
    assert report["device"] == "cpu"
    evaluate_folder(tmp_path / "out", recipe)
    scan_folder(tmp_path / "out", recipe)


def test_the_trainer_trains_where_the_model_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.training import fit as train

    seen = []
    real = train._Trainer.__init__

    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        seen.append((self.args.device, self.args.n_gpu, self.accelerator.device))

    monkeypatch.setattr(train._Trainer, "__init__", noted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sample = build("vit")

    def collate(items: Any, rng: Any) -> dict[str, Tensor]:
        return {**sample.inputs, "labels": torch.tensor([0, 1])}

    fit(sample.model, [0, 1], collate, Training(steps=1, batch_size=2), seed=0)
    cpu = torch.device("cpu")
    assert seen == [(cpu, 0, cpu)]
    assert device_of(sample.model) == cpu


def test_the_report_says_where_it_ran(tiny_folder: Path) -> None:
    report = json.loads((tiny_folder / "report.json").read_text())
    assert report["device"] == "cpu"
    assert load_recipe(tiny_folder / "recipe.yaml").device == "auto"


def test_only_one_module_asks_which_device_there_is() -> None:
    words = r"cuda\.is_available|use_cpu=not|\.to\((?:\w+\.)?model\.device|\bsend_to_device\b"
    # the compressor moves held-out batches by itself
    allowed = {"device.py"}
    for path in SOURCE.rglob("*.py"):
        if path.name not in allowed:
            assert not re.search(words, path.read_text()), path
