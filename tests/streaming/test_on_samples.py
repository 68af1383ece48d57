"""A model cut on samples while its weights lie in files: the plan and the bits of one in memory."""

from __future__ import annotations

import copy
import filecmp
import json
import signal
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import looped
import vlprune
from unlabelled import assistant, captioned, captioner, classifier, dual_encoder, pictures
from vlprune.calibration import backward
from vlprune.calibration import session as sessions
from vlprune.calibration.influence import influence_of
from vlprune.calibration.session import Session
from vlprune.commands.pipeline import on_samples
from vlprune.commands.pipeline.make import in_fresh_memory
from vlprune.cutting.paged import Pages, paged, pages_of, resident
from vlprune.errors import DataError
from vlprune.folders.opening import open_model
from vlprune.measuring import memory
from vlprune.streaming import on_pages
from vlprune.streaming.source import open_source
from vlprune.testing import build

ROOM = 30_000
CPU = torch.device("cpu")


def saved(folder: Path, family: str, dtype: torch.dtype) -> tuple[Path, list[dict[str, Any]]]:
    """A folder with a model of the suite, and four batches for it."""
    sample = build(family)
    sample.model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    numbers = torch.Generator().manual_seed(1)
    batches = [
        {
            name: value + 0.1 * torch.randn(value.shape, generator=numbers)
            if value.is_floating_point()
            else value
            for name, value in sample.inputs.items()
        }
        for _ in range(4)
    ]
    return folder, batches


def pages_for(folder: Path, work: Path, room: int = ROOM) -> tuple[Any, Pages]:
    source = open_source(folder)
    return source.model, Pages(source.model, source.weights.__getitem__, room, work / "pages", CPU)


def unlike(model: Any, pages: Pages) -> list[str]:
    """The parameters that differ between a model in memory and one on pages."""

    def bits(weight: Tensor) -> Tensor:
        return weight.detach().contiguous().reshape(-1).view(torch.uint8)

    weights = model.named_parameters(remove_duplicate=False)
    return [name for name, p in weights if not torch.equal(bits(p), bits(pages.now(name)))]


def both(
    folder: Path, batches: list[dict[str, Any]], work: Path, method: Any, **more: Any
) -> tuple[Any, Any]:
    """A compression in memory, and the same one on pages; weights and plan are compared."""

    def compressor(model: Any) -> vlprune.Compressor:
        return vlprune.Compressor(model, method, {"params": 0.7}, calibration=batches, **more)

    dense = in_fresh_memory(open_model(str(folder)))
    first = compressor(dense)
    plan = first.repaired()
    empty, pages = pages_for(folder, work)
    with paged(empty, pages):
        second = compressor(empty)
        assert second.repaired() == plan
        assert unlike(dense, pages) == []
    assert not pages.folder.exists()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert first.session is not None
    assert second.session is not None
    assert first.session.errors == second.session.errors
    assert first.session.facts() == second.session.facts()
    return first, second


@pytest.mark.parametrize(
    ("family", "attention", "rotate", "dtype"),
    [
        ("clip", "qk_vo", True, torch.float32),
        ("vit", "qk_vo", True, torch.bfloat16),
        ("llava", "head_dim", False, torch.float16),
        ("qwen2_vl", "head", False, torch.float32),
        ("blip_captioning", "head_dim", False, torch.float32),  # embeddings are tied
        ("blip_vqa", "qk_vo", True, torch.float32),
        ("swin", "head_dim", False, torch.float32),  # lists of layers inside of others
        ("detr", "head_dim", False, torch.float32),
        ("mixtral", "head", False, torch.float32),  # experts are taken apart
        pytest.param("deepseek_v3", "qk_vo", True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_those_of_a_model_in_memory(
    family: str, attention: Any, rotate: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, batches = saved(tmp_path / "dense", family, dtype)
    method = vlprune.OBS(rotate=rotate)
    both(folder, batches, tmp_path, method, attention=attention)


def test_layers_that_a_pass_runs_again_and_again(tmp_path: Path) -> None:
    model, given = looped.looped(), looped.batches(4, 2)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    empty = copy.deepcopy(model).to("meta")
    pages = Pages(empty, stored.__getitem__, ROOM, tmp_path / "pages", CPU)
    first = vlprune.Compressor(model, vlprune.OBS(), {"params": 0.7}, calibration=given)
    plan = first.repaired()
    with paged(empty, pages):
        second = vlprune.Compressor(empty, vlprune.OBS(), {"params": 0.7}, calibration=given)
        assert second.repaired() == plan
        assert unlike(model, pages) == []
        files = len(list(pages.folder.iterdir()))
        assert 0 < files <= len(stored)  # older states of a weight are removed


@pytest.mark.parametrize("across", ["layers", "uniform"])
def test_other_comparisons_of_layers(across: Any, tmp_path: Path) -> None:
    folder, batches = saved(tmp_path / "dense", "vit", torch.float32)
    both(folder, batches, tmp_path, vlprune.OBS(across=across))


def test_another_method_and_another_budget(tmp_path: Path) -> None:
    folder, batches = saved(tmp_path / "dense", "vit", torch.float32)
    both(folder, batches, tmp_path, vlprune.Magnitude())


def test_a_repair_that_is_taken_back_leaves_the_rotated_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches = saved(tmp_path / "dense", "clip", torch.float32)
    real = sessions.fold_layers

    def worse(model: Any, *rest: Any) -> Any:
        done = real(model, *rest)
        for name in ("vision_model", "text_model"):
            layer = model.get_submodule(f"{name}.encoder.layers.0.mlp.fc2")
            with torch.no_grad():
                layer.weight.mul_(-3)
        return done

    monkeypatch.setattr(sessions, "fold_layers", worse)
    first, _ = both(folder, batches, tmp_path, vlprune.OBS(rotate=True), attention="qk_vo")
    assert not first.session.errors.kept
    assert unlike_dense(folder, first.model)


def unlike_dense(folder: Path, model: Any) -> bool:
    weights = dict(open_model(str(folder)).named_parameters())
    return any(not torch.equal(weights[name], p) for name, p in model.named_parameters())


# -- the pages ----------------------------------------------------------------------------


def deep(folder: Path, layers: int = 8) -> tuple[Path, list[dict[str, Tensor]]]:
    """A ViT of many small blocks, and batches."""
    torch.manual_seed(0)
    config = T.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    T.ViTForImageClassification(config).eval().save_pretrained(folder)
    return folder, [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)]


def test_two_blocks_are_in_memory_and_graphs_hold_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches = deep(tmp_path / "dense")
    alive: dict[int, tuple[Any, int]] = {}
    most = [0]
    real = Pages.parameter

    def parameter(self: Pages, name: str, placeholder: Any) -> nn.Parameter:
        found = real(self, name, placeholder)
        alive[id(found)] = weakref.ref(found), found.nbytes
        most[0] = max(most[0], sum(size for ref, size in alive.values() if ref() is not None))
        return found

    monkeypatch.setattr(Pages, "parameter", parameter)
    monkeypatch.setattr(on_pages, "LEAST", 0)
    source = open_source(folder)
    whole = sum(p.nbytes for p in source.model.parameters())
    block = sum(p.nbytes for p in source.model.vit.layers[0].parameters())
    structures = vlprune.discover(source.model).structures
    with on_pages.on_pages(source, structures, tmp_path / "pages") as pages:
        assert pages.room == 2 * block
        method = vlprune.OBS(rotate=True)
        calibration = vlprune.Calibration(batches, work=tmp_path / "steps")
        compressor = vlprune.Compressor(
            source.model, method, {"params": 0.7}, attention="qk_vo", calibration=calibration
        )
        compressor.repaired()
        pages.flush()
        assert list(pages.folder.iterdir()) == []  # what was changed lies in the steps' files only
    assert most[0] <= 2.5 * block < whole / 2


@pytest.mark.parametrize("room", [0, 10**9])
def test_activations_that_wait_in_files_give_the_same_derivatives(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, batches = saved(tmp_path / "dense", "clip", torch.float32)
    monkeypatch.setattr(backward, "SMALL", 1)
    filed: list[int] = []
    real = backward._Filed.read
    monkeypatch.setattr(
        backward._Filed,
        "read",
        lambda self: filed.append(1) or real(self),  # type: ignore[func-returns-value]
    )
    model, (empty, pages) = in_fresh_memory(open_model(str(folder))), pages_for(folder, tmp_path)
    structures = vlprune.discover(model).structures

    def derivatives(of: Any) -> Any:
        ready = Session(of, structures, vlprune.Calibration(batches)).batches
        return influence_of(of, structures, ready)

    expected = derivatives(model)
    assert not filed
    monkeypatch.setattr(backward, "IN_MEMORY", room)
    with paged(empty, pages):
        found = derivatives(empty)
    assert bool(filed) == (room == 0)
    for name in ("outputs", "scores"):
        one: Mapping[str, Tensor] = getattr(expected, name)
        other = getattr(found, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("layout", ["transposed", "a part", "misaligned"])
def test_a_filed_tensor_comes_back_as_it_lay(layout: str, tmp_path: Path) -> None:
    whole = torch.randn(7, 50)
    tensor = {"transposed": whole.T, "a part": whole[:, 3:9], "misaligned": whole[1:]}[layout]
    found = backward._Filed(tensor, tmp_path / "1").read()
    assert torch.equal(found, tensor)
    assert found.stride() == tensor.stride()
    assert found.data_ptr() % 64 == tensor.data_ptr() % 64


def test_changes_outlive_their_memory(tmp_path: Path) -> None:
    folder, _ = deep(tmp_path / "dense", 2)
    model, pages = pages_for(folder, tmp_path, room=1)
    with paged(model, pages), torch.no_grad():
        assert pages_of(model) is pages
        layer = model.vit.layers[0].mlp.fc1
        assert all(bool(p.isnan().all()) for p in model.parameters())
        place = pages.place("vit.layers.0.mlp.fc1.weight")
        before = layer.weight.clone()
        layer.weight.mul_(2)
        assert layer.bias.isfinite().all()  # takes the weight's room
        assert torch.equal(layer.weight, 2 * before)
        with resident(model.vit.layers[0]):
            assert not any(p.isnan().any() for p in model.vit.layers[0].parameters())
            layer.weight.data = layer.weight.data.double()
            layer.weight.zero_()
            layer.weight.data = layer.weight.data.float()
            layer.bias.fill_(-0.0)
        assert pages.now("vit.layers.0.mlp.fc1.bias").signbit().all()
        assert not layer.weight.any()
        pages.put_back({"vit.layers.0.mlp.fc1.weight": place})
        assert torch.equal(layer.weight, before)
    assert not (tmp_path / "pages").exists()


# -- the command --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    for kind, make in (
        ("clip", dual_encoder), ("blip", captioner), ("vit", classifier), ("llava", assistant)
    ):  # fmt: skip
        make(folder / kind)
    pictures(folder / "pictures")
    captioned(folder / "captioned")
    return folder


def command(here: Path, kind: str, out: Path, *more: str) -> list[str]:
    samples = "pictures" if kind == "vit" else "captioned/captions.jsonl"
    words = ["compress", str(here / kind), "--budget", "params=0.7", "--items", "16"]
    return [*words, "--calibration", str(here / samples), "-o", str(out), *more]


def same(one: Path, other: Path) -> dict[str, Any]:
    """Every file has the same bytes, but for the report; returns the second folder's report."""
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    assert {"plan.json", "config.json", "report.json"} <= names
    for name in names - {"report.json"}:
        assert filecmp.cmp(one / name, other / name, shallow=False), name
    bodies = [json.loads((folder / "report.json").read_text()) for folder in (one, other)]
    for key in ("plan", "budget", "layers", "calibration", "notes", "command", "weight_bytes"):
        assert bodies[0].get(key) == bodies[1].get(key), key
    return dict(bodies[1])


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("clip", ("--rotate", "--attention", "qk_vo", "--max-shard-size", "60KB")),
        ("blip", ()),
        ("vit", ("--budget", "macs=0.7")),
        ("llava", ("--attention", "head")),
        ("vit", ("--method", "magnitude")),
    ],
)
def test_the_folder_is_that_of_a_model_in_memory(
    kind: str,
    more: tuple[str, ...],
    run: Any,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(on_pages, "LEAST", 0)
    for way in ("--no-stream", "--stream"):
        code, _, stderr = run(*command(here, kind, tmp_path / way, way, *more))
        assert code == 0, stderr
        assert ("layer by layer" in stderr) == (way == "--stream")
    report = same(tmp_path / "--no-stream", tmp_path / "--stream")
    cut = [layer for layer in report["layers"] if layer["kept"] < layer["units"]]
    assert report["streamed"]["by_passes"] == len(cut) > 0
    assert report["streamed"]["by_weights"] == 0
    assert report["verified"]["dtype"] == "float64"


STOPPED = """
import os
from vlprune.calibration.store import Steps
from vlprune.streaming import on_pages, shards
on_pages.LEAST = 0
remembered, written = Steps.remember, shards.save_file

def remember(self, name, *rest):
    remembered(self, name, *rest)
    if name == STEP:
        os.kill(os.getpid(), SIGNAL)

def write(tensors, path, metadata):
    written(tensors, path, metadata)
    if STEP in path.name:
        os.kill(os.getpid(), SIGNAL)

Steps.remember, shards.save_file = remember, write
from vlprune.commands.main import main
main()
"""


@pytest.mark.parametrize("step", ["rotated", "influence-rotated", "folded-1", "model-00002"])
@pytest.mark.parametrize("then", ["--stream", pytest.param("--no-stream", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    step: str, then: str, run: Any, here: Path, tmp_path: Path, python: Any
) -> None:
    """Also in memory, where another process has made room meanwhile."""
    more = ("--rotate", "--attention", "qk_vo", "--max-shard-size", "60KB")
    whole, out = here / "whole", tmp_path / "out"
    if not whole.exists():
        assert run(*command(here, "clip", whole, *more))[0] == 0
    code = f"STEP, SIGNAL = {step!r}, {int(signal.SIGKILL)}\n{STOPPED}"
    done = python.run(code, *command(here, "clip", out, *more, "--stream"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (out / "config.json").exists()
    assert list((out / "vlprune-run").glob("calibration-*/rotated.safetensors"))
    number, _, stderr = run(*command(here, "clip", out, *more, then))
    assert number == 0, stderr
    assert "rotating" not in stderr
    assert ("derivatives" in stderr) == (step == "rotated")
    same(whole, out)


@pytest.mark.parametrize("free", [10**6 // 8, 10**9])
def test_the_free_memory_decides(
    free: int, run: Any, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_samples, "free_memory", lambda device: free)
    code, _, stderr = run(*command(here, "vit", tmp_path / "out"))
    assert code == 0, stderr
    said = " ".join(stderr.split())
    assert ("streaming: the weights have" in said) == (free < 10**6)
    assert ("in memory: the weights have" in said) == (free > 10**6)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert ("streamed" in report) == (free < 10**6)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.free_memory(CPU)
    assert free > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(CPU) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory.free_memory(CPU) == 4000


def test_mistakes(run: Any, here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def said(words: str, *args: str) -> None:
        code, _, stderr = run(*args)
        assert code == 2, stderr
        assert stderr.count("vlprune:") == 1
        assert words in " ".join(stderr.split()), stderr
        assert not out.exists()

    cut = command(here, "vit", out)
    said("latency needs the model in memory", *cut, "--stream", "--budget", "latency=0.7")
    few = ("compress", str(here / "vit"), "--budget", "params=0.7", "--method", "magnitude")
    said("--no-stream needs --calibration", *few, "--no-stream", "-o", str(out))
    demo = Path(vlprune.__file__).parent / "demo.yaml"
    said(
        "--stream cannot be given with a recipe", "compress", str(demo), "--stream", "-o", str(out)
    )
    said("--no-stream cannot be", "compress", str(demo), "--no-stream", "-o", str(out))
    said("ask for at least", *cut, "--stream", "--budget", "params=0.01")


def test_batches_that_are_no_numbers(tmp_path: Path) -> None:
    folder, batches = deep(tmp_path / "dense", 2)
    batches[0]["pixel_values"][0, 0, 0, 0] = torch.nan
    model, pages = pages_for(folder, tmp_path)
    with paged(model, pages), pytest.raises(DataError, match="NaN or infinite"):
        vlprune.Compressor(model, vlprune.OBS(), {"params": 0.7}, calibration=batches).repaired()
    assert all(parameter.is_meta for parameter in model.parameters())
