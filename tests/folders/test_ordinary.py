"""One width a tower: the stock class, the stock config, the same weights, no vlprune."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vlprune
from alike import same_model
from small_runs import DEMO, TINY
from vlprune.errors import UnsupportedError
from vlprune.structures.record import read_record
from vlprune.testing import build

FFN_ONLY = [
    "clip", "siglip", "blip", "blip_captioning", "blip_retrieval", "bert", "gpt2", "vilt", "flava",
    "owlvit", "detr", "qwen2_5_vl", "gemma3", "internvl", "blip_nlvr", "vit_mdetr",
]  # fmt: skip
HEADS_TOO = {"vit": "", "deit": "", "llava": "vision", "smolvlm": "vision", "paligemma": "vision"}


def uniform(family: str, budget: float, leave: Any) -> tuple[Any, Any]:
    """A small model with one width a tower, and its sample."""
    sample = build(family)
    skip = tuple(s.name for s in vlprune.discover(sample.model, "head") if leave(s))
    compressor = vlprune.Compressor(
        sample.model,
        vlprune.Magnitude(),
        {"params": budget},
        attention="head",
        uniform=True,
        skip=skip,
        example_inputs=sample.inputs,
    )
    return compressor.finish(), sample


@pytest.mark.parametrize("family", FFN_ONLY)
def test_an_ordinary_config_says_the_width_of_the_ffn(family: str) -> None:
    small, sample = uniform(family, 0.9, lambda s: s.kind != "ffn")
    widths: dict[tuple[str, int], set[int]] = {}
    record = read_record(small)
    assert record is not None
    for s in vlprune.discover(small, "head"):
        if s.kind == "ffn" and s.name in record.sizes:
            widths.setdefault((s.tower, record.sizes[s.name]), set()).add(s.size)
    assert widths
    assert all(len(found) == 1 for found in widths.values())
    plain = vlprune.ordinary(small)
    assert read_record(plain) is None
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in small.parameters())
    same_model(small, plain, sample.inputs)


@pytest.mark.parametrize("family", HEADS_TOO)
def test_whole_heads_and_kv_groups_where_the_config_has_a_head_dim(
    family: str, tmp_path: Path, python: Any
) -> None:
    tower = HEADS_TOO[family]
    small, sample = uniform(family, 0.85, lambda s: tower and s.tower == tower and s.kind != "ffn")
    plain = vlprune.ordinary(small)
    same_model(small, plain, sample.inputs)
    kept = {s.kind: s.size for s in vlprune.discover(plain, "head") if s.tower != tower}
    dense = {s.kind: s.size for s in vlprune.discover(build(family).model, "head")}
    assert any(kept[kind] < dense[kind] for kind in kept)
    plain.save_pretrained(tmp_path)
    script = (
        "import sys, torch, transformers\n"
        f"model = transformers.{type(plain).__name__}.from_pretrained({str(tmp_path)!r})\n"
        "assert 'vlprune' not in sys.modules\n"
        "print(sum(p.double().abs().sum().item() for p in model.parameters()))"
    )
    done = python.run(script)
    total = sum(p.double().abs().sum().item() for p in plain.parameters())
    assert float(done.stdout) == pytest.approx(total, rel=1e-12), done.stderr


def test_what_a_config_cannot_say_is_said() -> None:
    small, _ = uniform("clip", 0.8, lambda s: False)
    with pytest.raises(UnsupportedError, match="CLIPConfig has no number for attention"):
        vlprune.ordinary(small)
    sample = build("clip")
    skip = tuple(s.name for s in vlprune.discover(sample.model) if s.kind != "ffn")
    uneven = vlprune.Compressor(
        sample.model, vlprune.Magnitude(), {"params": 0.9}, skip=skip, example_inputs=sample.inputs
    ).finish()
    with pytest.raises(UnsupportedError, match="uniform=True"):
        vlprune.ordinary(uneven)
    dense = build("clip").model
    assert vlprune.ordinary(dense) is dense


def test_a_uniform_recipe_saves_an_ordinary_folder(run: Any, tmp_path: Path) -> None:
    """The demo's text towers share one config, so only the vision FFN may be cut here."""
    out = tmp_path / "small"
    skip = 'skip=["*attention*", "*self_attn*", "text_*"]'
    args = [a for a in TINY if not a.startswith("budget")]
    code, _, stderr = run(
        "compress", DEMO, *args, skip, "budget.params=0.97", "uniform=true", "-o", str(out)
    )
    assert code == 0, stderr
    report = json.loads((out / "report.json").read_text())
    assert report["ordinary"] == ""
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "plan.json").exists()
    assert "ordinary model" in (out / "README.md").read_text()
    code, stdout, _ = run("evaluate", str(out), "--json")
    assert json.loads(stdout) == pytest.approx(report["metrics"]["retrained"])
