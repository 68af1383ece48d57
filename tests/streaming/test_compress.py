"""A model cut by its weights alone, never loaded whole: the plan and the bytes of a load."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cut import source

import vlprune
from vlprune.folders.opening import open_model
from vlprune.measuring.inputs import made_up_inputs
from vlprune.streaming.source import open_source
from vlprune.structures.units import unit_squares


@pytest.mark.parametrize(
    ("family", "method", "budget"),
    [
        ("clip", vlprune.Magnitude(), {"params": 0.6}),
        ("llava", vlprune.Magnitude(), {"params": 0.7}),
        ("vit", vlprune.Magnitude(), {"macs": 0.6}),
        ("vilt", vlprune.Random(), {"params": 0.7}),
    ],
)
def test_the_bytes_are_those_of_a_model_in_memory(
    family: str, method: Any, budget: dict[str, float], run: Any, tmp_path: Path
) -> None:
    folder = source(tmp_path / "dense", family, torch.bfloat16)
    model = open_model(str(folder))
    inputs = made_up_inputs(model) if "macs" in budget else None
    compressor = vlprune.Compressor(model, method, budget, example_inputs=inputs)
    vlprune.save(compressor.finish(), tmp_path / "memory", max_shard_size="30KB")
    ((what, fraction),) = budget.items()
    words = ("--budget", f"{what}={fraction}", "--method", type(method).__name__.lower())
    small = tmp_path / "small"
    size = ("--max-shard-size", "30KB")
    code, stdout, stderr = run("compress", str(folder), *words, *size, "-o", str(small), "--json")
    assert code == 0, stderr
    for path in (tmp_path / "memory").iterdir():
        assert filecmp.cmp(path, small / path.name, shallow=False), path.name
    report = json.loads(stdout)
    assert report == json.loads((small / "report.json").read_text())
    assert report["budget"]["reached"] <= fraction
    assert report["streamed"]["by_passes"] + report["streamed"]["by_weights"] > 0
    assert "with unlabelled samples" not in (small / "README.md").read_text()
    assert not (small / "vlprune-run").exists()


def test_the_scores_are_those_of_a_model_in_memory(tmp_path: Path) -> None:
    folder = source(tmp_path / "dense", "blip_vqa", torch.float16)
    lazy, model = open_source(folder), open_model(str(folder))
    structures = vlprune.discover(model).structures
    names = dict(model.named_parameters(remove_duplicate=False))
    expected = unit_squares(names.__getitem__, structures)
    found = unit_squares(lazy.weight, structures)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "macs=0.5", "--method", "magnitude"), "none can be made up"),
        (("--budget", "latency=0.5", "--method", "magnitude"), "needs the model in memory"),
        (("--budget", "params=0.01", "--method", "magnitude"), "params"),
        (("--budget", "params=0.5"), "or --method magnitude"),
    ],
)
def test_mistakes(words: tuple[str, ...], says: str, run: Any, tmp_path: Path) -> None:
    folder, small = source(tmp_path / "dense", "llava"), tmp_path / "small"
    code, _, stderr = run("compress", str(folder), *words, "-o", str(small))
    assert code == 2
    assert says in " ".join(stderr.split())
    assert stderr.count("vlprune:") == 1
    assert not small.exists()
