"""A cut from folder to folder gives the bytes of a cut in memory, and is proved or refused."""

from __future__ import annotations

import dataclasses
import errno
import filecmp
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import vlprune
from vlprune.cutting.apply import Slices
from vlprune.cutting.sharing.rules import shareable
from vlprune.errors import CheckpointError, PlanError, UnsupportedError, VerificationError
from vlprune.folders.opening import open_model
from vlprune.measuring.inputs import made_up_parts
from vlprune.streaming import cut as streaming
from vlprune.streaming import shards
from vlprune.streaming.cut import Streamed, stream_cut
from vlprune.streaming.source import LazyWeights, open_source
from vlprune.structures.plan import Plan
from vlprune.structures.units import named_weights
from vlprune.testing import build
from vlprune.testing.conformance import make_plan

SIZE = 40_000


def source(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a model of the suite, in several weight files."""
    build(family).model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def halved(folder: Path, unit: str = "head_dim", seed: int = 0, shared: bool = False) -> Plan:
    """A plan that keeps half of the units; with ``shared`` some take those of another structure."""
    model = open_model(str(folder))
    description = vlprune.discover(model, unit)  # type: ignore[arg-type]
    plan = make_plan(description, lambda size: max(1, size // 2), seed)
    if not shared:
        return plan
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model).items()}
    share: dict[str, Any] = {}
    for target in description:
        free = [s for s in description if s.name not in share and s.name != target.name]
        giver = next((s for s in free if not shareable(target, s, shapes)), None)
        taken = {one[0] for one in share.values()}
        if giver is not None and target.name not in taken and target.size > 2:
            share[target.name] = (giver.name, (0, 1, 2), (1, 2, 0))
    assert share
    return dataclasses.replace(plan, share=share)


def in_memory(folder: Path, plan: Plan, out: Path) -> Path:
    """What loading, cutting and saving give."""
    model = open_model(str(folder))
    description = vlprune.discover(model, plan.attention)  # type: ignore[arg-type]
    vlprune.rewrite(model, description, plan)
    return vlprune.save(model, out, max_shard_size=SIZE)


def streamed(folder: Path, plan: Plan, out: Path, **more: Any) -> Streamed:
    return stream_cut(folder, plan, out, out.parent / "work", max_shard_size=SIZE, **more)


def same(one: Path, other: Path) -> None:
    """Every file of both folders has the same bytes."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert "plan.json" in names
    unlike = [n for n in names if not filecmp.cmp(one / n, other / n, shallow=False)]
    assert not unlike


@pytest.mark.parametrize(
    ("family", "unit"),
    [
        ("clip", "qk_vo"),
        ("vilt", "head_dim"),  # a softmax temperature is folded into the query weights
        ("blip_captioning", "head_dim"),  # embeddings are tied
        ("llava", "head_dim"),  # padded
        ("qwen2_5_vl", "head"),
        ("dinov2_swiglu", "head"),  # weights are split as they are loaded
        ("detr", "head_dim"),  # frozen statistics of a batch norm
        ("gpt_oss", "head"),  # gate and up of a neuron lie side by side
    ],
)
def test_the_bytes_are_those_of_a_cut_in_memory(family: str, unit: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "dense", family)
    plan = halved(folder, unit)
    in_memory(folder, plan, tmp_path / "memory")
    done = streamed(folder, plan, tmp_path / "small")
    same(tmp_path / "memory", tmp_path / "small")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert done.proof is not None
    assert done.proof.by_passes + done.proof.by_weights == len(done.cut.structures)
    assert vlprune.load(tmp_path / "small")


@pytest.mark.parametrize(("family", "unit"), [("mixtral", "head"), ("deepseek_v3", "qk_vo")])
def test_experts_that_are_merged_as_they_are_loaded(
    family: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in one file: save_pretrained never parts what it splits from one weight in memory
    monkeypatch.setattr(f"{__name__}.SIZE", 10_000_000)
    folder = source(tmp_path / "dense", family)
    plan = halved(folder, unit)
    in_memory(folder, plan, tmp_path / "memory")
    done = streamed(folder, plan, tmp_path / "small")
    same(tmp_path / "memory", tmp_path / "small")
    assert done.proof is not None
    assert done.proof.by_passes == len(done.cut.structures)
    names = load_file(tmp_path / "small" / "model.safetensors")
    assert any(re.search(r"experts\.3\.", name) for name in names), "not saved expert by expert"
    assert vlprune.load(tmp_path / "small")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["vilt", "llava"])
def test_in_half_precision(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = source(tmp_path / "dense", family, dtype)
    plan = halved(folder)
    in_memory(folder, plan, tmp_path / "memory")
    done = streamed(folder, plan, tmp_path / "small")
    same(tmp_path / "memory", tmp_path / "small")
    assert done.proof is not None
    assert all(found.dtype == "float64" for found in done.proof.passes.values())
    assert all(found.difference < 1e-9 for found in done.proof.passes.values())


@pytest.mark.parametrize("family", ["blip_vqa", "clip", "vilt"])
def test_shared_weights_and_a_second_cut(family: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "dense", family)
    plan = halved(folder, shared=True)
    in_memory(folder, plan, tmp_path / "memory")
    streamed(folder, plan, tmp_path / "small")
    same(tmp_path / "memory", tmp_path / "small")
    if family == "blip_vqa":  # the second plan would leave nothing of a layer
        return
    again = halved(tmp_path / "small", seed=1)
    in_memory(tmp_path / "small", again, tmp_path / "memory again")
    streamed(tmp_path / "small", again, tmp_path / "small again")
    same(tmp_path / "memory again", tmp_path / "small again")


def test_two_tied_weights_that_are_both_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    model = build("bert_decoder").model
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    names = model.state_dict().keys() - weights.keys()
    assert names
    for name in names:
        weights[name] = model.state_dict()[name].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    plan = halved(folder)
    in_memory(folder, plan, tmp_path / "memory")
    streamed(folder, plan, tmp_path / "small")
    same(tmp_path / "memory", tmp_path / "small")


def test_files_of_tokenizer_and_processor_come_along(tmp_path: Path) -> None:
    folder = source(tmp_path / "dense", "clip")
    for name in ("tokenizer.json", "preprocessor_config.json", "merges.txt"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("of the dense model")
    (folder / "notes.txt").write_text("mine")
    streamed(folder, halved(folder), tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "preprocessor_config.json", "merges.txt"} <= names
    assert not {"README.md", "notes.txt"} & names


# -- the proof ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["by passes", "by weights"])
@pytest.mark.parametrize("family", ["clip", pytest.param("llava", marks=pytest.mark.slow), "vilt"])
def test_a_wrong_slice_anywhere_is_refused(
    family: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path / "dense", family)
    plan = halved(folder)
    description = vlprune.discover(open_source(folder).model)
    real = Slices.of
    for structure in (description.structures[0], description.structures[-1]):
        for slot in (structure.slots[0], structure.slots[-1]):

            def broken(self: Any, name: str, weight: Tensor, slot: Any = slot) -> Tensor:
                part = real(self, name, weight)
                return part.roll(1, slot.axis) if name == slot.param else part

            monkeypatch.setattr(Slices, "of", broken)
            inputs: Any = {} if how == "by weights" else None
            with pytest.raises(VerificationError, match="differ"):
                streamed(folder, plan, tmp_path / "small", inputs=inputs)
            assert not (tmp_path / "small").exists()
    monkeypatch.setattr(Slices, "of", real)
    proof = streamed(folder, plan, tmp_path / "small").proof
    assert proof is not None
    assert proof.by_passes == len(description.structures)


def test_a_vision_language_model_is_proved_tower_by_tower() -> None:
    parts = made_up_parts(build("qwen2_vl").model, torch.device("cpu"))
    assert {part.rpartition(".")[2] for part in parts} == {"visual", "language_model"}
    assert set(made_up_parts(build("clip").model, torch.device("cpu"))) == {""}


# -- stopped, full, damaged ---------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path / "dense", "clip")
    plan = halved(folder)
    in_memory(folder, plan, tmp_path / "memory")
    written: list[str] = []
    real = shards.save_file

    def stopping(after: int) -> Callable[..., None]:
        def write(tensors: Any, path: Path, metadata: Any) -> None:
            real(tensors, path, metadata)
            written.append(path.name)
            if len(written) == after:
                raise KeyboardInterrupt

        return write

    monkeypatch.setattr(shards, "save_file", stopping(2))
    with pytest.raises(KeyboardInterrupt):
        streamed(folder, plan, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    (done,) = (tmp_path / "work").glob("cut-*/*.safetensors")
    content = bytearray(done.read_bytes())
    written.clear()
    monkeypatch.setattr(shards, "save_file", stopping(100))
    streamed(folder, plan, tmp_path / "small")
    same(tmp_path / "memory", tmp_path / "small")
    assert done.with_suffix(".partial").name not in written
    # a finished file that is not as it was written is written again
    content[-1] ^= 1
    done.unlink()
    done.write_bytes(content)
    written.clear()
    streamed(folder, plan, tmp_path / "again")
    same(tmp_path / "memory", tmp_path / "again")
    assert written == [done.with_suffix(".partial").name]


def test_a_full_disk_is_told_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path / "dense", "clip")
    plan = halved(folder)
    streamed(folder, plan, tmp_path / "small")
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left.*unchanged"):
        streamed(folder, halved(folder, seed=1), tmp_path / "small")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}


def test_weights_that_a_load_would_make_up_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    model = build("vit").model
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "classifier" in name or "pooler" in name))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="lacks the weights"):
        open_source(folder)


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    plan = halved(source(tmp_path / "other", "vit"))
    folder = source(tmp_path / "dense", "clip")
    with pytest.raises(PlanError, match="another model"):
        streamed(folder, plan, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_no_weight_is_kept(tmp_path: Path) -> None:
    lazy = open_source(source(tmp_path / "dense", "clip"))
    assert all(p.is_meta for p in lazy.model.parameters())
    name = next(iter(lazy.weights))
    assert lazy.weights[name] is not lazy.weights[name]
    assert isinstance(lazy.weights, LazyWeights)
    assert len(lazy.weights) == len(lazy.model.state_dict())


# -- the command --------------------------------------------------------------------------


def test_the_command(run: Any, tmp_path: Path) -> None:
    folder = source(tmp_path / "dense", "llava")
    plan = halved(folder)
    plan.save(tmp_path / "plan.json")
    in_memory(folder, plan, tmp_path / "memory")
    words = ("cut", str(folder), str(tmp_path / "plan.json"), "-o", str(tmp_path / "small"))
    code, stdout, stderr = run(*words, "--max-shard-size", f"{SIZE // 1000}KB", "--json")
    assert code == 0, stderr
    same(tmp_path / "memory", tmp_path / "small")
    facts = json.loads(stdout)
    assert facts["proof"]["by_passes"] == facts["structures"]
    assert facts["weight_bytes"]["small"] < facts["weight_bytes"]["dense"]
    code, stdout, stderr = run(*words, "--no-verify")
    assert code == 0, stderr
    assert "not proved" in stdout


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("dense", "plan.json", "-o", "dense"), "would replace it"),
        (("dense", "nothing.json", "-o", "small"), "there is no file"),
        (("nothing", "plan.json", "-o", "small"), "there is no folder"),
        (("dense", "plan.json", "-o", "small", "--max-shard-size", "huge"), "such as 2GB"),
    ],
)
def test_mistakes_of_the_command(
    change: tuple[str, ...], says: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source(tmp_path / "dense", "vit")
    halved(folder).save(tmp_path / "plan.json")
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run("cut", *change)
    assert code == 2
    assert says in stderr
    assert stderr.count("vlprune:") == 1
    assert not (tmp_path / "small").exists()


def test_all_mistakes_of_the_command_at_once(run: Any, tmp_path: Path) -> None:
    nothing, missing, out = (str(tmp_path / name) for name in ("nothing", "plan.json", "o"))
    code, _, stderr = run("cut", nothing, missing, "--max-shard-size", "huge", "-o", out)
    assert code == 2
    assert all(says in stderr for says in ("no folder", "cannot read the plan", "such as 2GB"))
    assert "torch" not in stderr
    assert not (tmp_path / "o").exists()
    assert streaming.BESIDE.fullmatch("tokenizer_config.json")
