"""Exports answer as the model does, on other sizes too; what cannot be exported says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vlprune
from alike import close
from vlprune.cutting.difference import tensors_of
from vlprune.errors import (
    CheckpointError,
    IncomparableError,
    UnsupportedError,
    VerificationError,
    VlpruneError,
)
from vlprune.folders.exported import runtimes
from vlprune.folders.exported.model import Exported
from vlprune.folders.exported.write import export
from vlprune.measuring.inputs import made_up_inputs
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def uneven(family: str) -> Any:
    """A small model whose layers differ."""
    model = build(family).model
    description = vlprune.discover(model)
    plan = make_plan(description, lambda size: max(1, size // 2))
    return vlprune.rewrite(model, description, plan).eval()


def samples(model: Any) -> list[dict[str, torch.Tensor]]:
    return [made_up_inputs(model, *sizes) for sizes in ((2, 8), (3, 6), (1, 7))]


@pytest.mark.parametrize(
    ("family", "to"),
    [
        ("clip", "onnx"),
        pytest.param("deit", "openvino", marks=pytest.mark.slow),
        pytest.param("blip_vqa", "openvino", marks=pytest.mark.slow),
        pytest.param("segmenter", "torch-export", marks=pytest.mark.slow),
    ],
)
def test_an_export_answers_as_the_model_does(family: str, to: str, tmp_path: Path) -> None:
    model = uneven(family)
    facts = export(model, samples(model), to, tmp_path / to)
    assert not [name for name, m in model.named_modules() if "forward" in vars(m)]
    assert [row["difference"] < 1e-5 for row in facts["checked"]] == [True] * 3
    assert [row["compared"] for row in facts["checked"]] == [1] * 3
    assert json.loads((tmp_path / to / "vlprune-export.json").read_text()) == facts
    again = Exported(tmp_path / to, trust_remote_code=True)
    inputs = made_up_inputs(model, 4, 5)  # neither traced nor checked
    with torch.no_grad():
        for a, b in zip(tensors_of(model(**inputs)), tensors_of(again(**inputs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [to]  # nothing else is left


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"])
def test_shared_weights_are_stored_once(to: str, tmp_path: Path) -> None:
    """Large enough that ONNX's optimizer does not fold them; ONNX Runtime does, at loading."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=16)
    model = transformers.ViTForImageClassification(config)
    description = vlprune.discover(model)
    first, second = (s for s in description if s.kind == "ffn")
    plan = vlprune.Plan(share={second.name: (first.name, range(900))})
    tied = vlprune.rewrite(model, description, plan).eval()
    bytes_of = {}
    for name in ("tied", "materialised"):
        if name == "materialised":
            vlprune.materialize(tied)
        facts = export(tied, samples(tied), to, tmp_path / name)
        bytes_of[name] = sum(facts["files"].values())
    shared = 4 * 2 * 512 * 900
    assert bytes_of["materialised"] - bytes_of["tied"] == pytest.approx(shared, rel=0.1)


def test_int8_is_the_runtimes_own_and_its_difference_is_told(tmp_path: Path) -> None:
    model = uneven("deit")
    small = export(model, samples(model), "onnx", tmp_path / "int8", int8=True)
    worst = max(row["difference"] for row in small["checked"])
    assert 1e-5 < worst < 0.5
    whole = 4 * sum(p.numel() for p in model.parameters())  # in float32
    assert small["files"]["model.onnx.data"] < 0.6 * whole
    with pytest.raises(UnsupportedError, match="--to onnx or --to openvino"):
        export(model, samples(model), "torch-export", tmp_path / "no", int8=True)


def test_generation_is_exported_stage_by_stage(tmp_path: Path) -> None:
    """Each stage, with its cache, answers as the model's own does."""
    sample = build("florence2")
    description = vlprune.discover(sample.model, "head")
    plan = make_plan(description, lambda size: max(1, size // 2))
    model = vlprune.rewrite(sample.model, description, plan).eval()
    facts = export(model, [sample.generate or {}], "torch-export", tmp_path / "g", generation=True)
    stages = {row["stage"]: row["difference"] for row in facts["checked"]}
    assert "decode" in stages
    assert max(stages.values()) < 1e-5
    assert set(Exported(tmp_path / "g", trust_remote_code=True).stages) == set(stages)
    blip = uneven("blip_captioning")
    with pytest.raises(UnsupportedError, match="BlipForConditionalGeneration cannot be exported"):
        export(blip, samples(blip), "torch-export", tmp_path / "b", generation=True)


@pytest.fixture(scope="module")
def exported_once() -> tuple[Any, Any]:
    """A DeiT and what torch.export made of it."""
    from transformers.exporters import DynamoConfig, DynamoExporter

    model = uneven("deit")
    with torch.no_grad():
        return model, DynamoExporter().export(model, samples(model)[0], DynamoConfig(dynamic=True))


@pytest.fixture
def traced(exported_once: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model that torch.export need not trace again, for tests of what comes after."""
    import transformers.exporters as exporters

    model, exported = exported_once
    trace = exporters.DynamoExporter.export

    def export_once(self: Any, given: Any, *args: Any) -> Any:
        return exported if given is model else trace(self, given, *args)

    monkeypatch.setattr(exporters.DynamoExporter, "export", export_once)
    return model


def test_a_wrong_export_is_not_written(
    traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_text("the old one")
    real = Exported.__call__

    def off(self: Exported, **inputs: Any) -> Any:
        output = real(self, **inputs)
        output["logits"] = output["logits"] * 1.01
        return output

    monkeypatch.setattr(Exported, "__call__", off)
    with pytest.raises(VlpruneError, match="answers otherwise than the model"):
        export(traced, samples(traced), "torch-export", tmp_path / "out")
    assert (tmp_path / "out" / "export.json").read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_answers_nan_is_not_written(
    traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Exported.__call__

    def broken(self: Exported, **inputs: Any) -> Any:
        output = real(self, **inputs)
        output["logits"] = output["logits"].clone()
        output["logits"][0, 0] = float("nan")
        return output

    monkeypatch.setattr(Exported, "__call__", broken)
    with pytest.raises(VerificationError, match=r"answers otherwise .* NaN or infinite at 1 of"):
        export(traced, samples(traced), "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_nan_everywhere_is_not_verified(
    traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, nan = samples(traced), {"logits": torch.full((2, 3), float("nan"))}
    monkeypatch.setattr(Exported, "__call__", lambda self, **_: nan)
    monkeypatch.setattr(traced, "forward", lambda **_: nan)
    with pytest.raises(IncomparableError, match=r"cannot be checked .* nowhere finite"):
        export(traced, inputs, "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_small_output_is_judged_at_its_own_scale(
    traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of 0.01 that are one per cent off differ by 1e-4 only, and are refused."""
    inputs, small = samples(traced), {"logits": torch.full((2, 3), 0.01)}
    off = {"logits": small["logits"] * 1.01}
    monkeypatch.setattr(Exported, "__call__", lambda self, **_: off)
    monkeypatch.setattr(traced, "forward", lambda **_: small)
    with pytest.raises(VerificationError, match=r"answers otherwise .* 0\.01 apart"):
        export(traced, inputs, "torch-export", tmp_path / "out")


def test_mistakes_get_one_sentence(
    run: Any, traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = uneven("vilt")
    with pytest.raises(UnsupportedError, match="ViltForQuestionAnswering cannot be exported"):
        export(model, samples(model), "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("no copy")
    with pytest.raises(CheckpointError, match="is no export: choose another folder"):
        export(traced, samples(traced), "torch-export", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "no copy"
    vlprune.save(traced, tmp_path / "deit")
    code, stdout, stderr = run("export", str(tmp_path / "deit"), "--to", "tflite")
    assert (code, stdout) == (2, "")
    assert "onnx, torch-export, openvino, not to 'tflite'" in stderr
    monkeypatch.setattr(runtimes, "version", lambda name: (_ for _ in ()).throw(ImportError))
    with pytest.raises(UnsupportedError, match=r"pip install 'vlprune\[export\]'"):
        export(traced, samples(traced), "onnx", tmp_path / "out")


@pytest.mark.slow
def test_an_export_is_evaluated_where_the_task_only_calls_forward(
    run: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "task: reasoning\nmodel: {width: 32, heads: 2, vision_layers: 1, text_layers: 1, "
        "image_size: 32}\ndata: {train_items: 8, test_items: 8}\nbudget: {params: 0.8}\n"
    )
    out = tmp_path / "small"
    assert run("compress", str(recipe), "-o", str(out))[0] == 0
    code, stdout, stderr = run("export", str(out), "--to", "torch-export", "--json")
    assert code == 0, stderr
    assert len(json.loads(stdout)["checked"]) == 3
    code, stdout, stderr = run("evaluate", str(out / "torch-export"))
    assert (code, stdout) == (2, "")
    assert "runs code when it is read" in stderr
    trusting = ["--trust-remote-code", "--json"]
    figures = [run("evaluate", str(p), *trusting)[1] for p in (out, out / "torch-export")]
    close(*map(json.loads, figures))

    model = vlprune.load(tiny_folder)
    export(model, samples(model), "torch-export", tiny_folder / "torch-export")
    code, stdout, stderr = run("evaluate", str(tiny_folder / "torch-export"), trusting[0])
    assert (code, stdout) == (2, "")
    assert "an export is its forward pass alone" in stderr
