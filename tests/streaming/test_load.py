"""Saving in several files, and loading with less memory than the model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from vlprune.cutting.difference import tensors_of
from vlprune.errors import UnsupportedError
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def cut(family: str) -> tuple[Any, Any]:
    """A model of the suite at half its units, and inputs."""
    sample = build(family)
    description = vlprune.discover(sample.model)
    plan = make_plan(description, lambda size: max(1, size // 2), 0)
    return vlprune.rewrite(sample.model, description, plan), sample.inputs


@torch.no_grad()
def answers(model: Any, inputs: Any) -> list[torch.Tensor]:
    return tensors_of(model.eval()(**inputs))


@pytest.mark.parametrize("family", ["clip", "llava"])  # native, padded
@pytest.mark.parametrize("where", ["auto", "cpu", "disk", "layers on disk"])
def test_a_small_model_loads_wherever_there_is_room(
    family: str, where: str, tmp_path: Path
) -> None:
    model, inputs = cut(family)
    vlprune.save(model, tmp_path / "small", max_shard_size="20KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    options: dict[str, Any] = {"device_map": where}
    if where == "disk":
        options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "rest")}
    if where == "layers on disk":
        children = [name for name, _ in model.named_children()]
        places = dict.fromkeys(children, "cpu")
        places |= {name: "cpu" for name, _ in model.named_parameters() if "." not in name}
        places[children[0]] = "disk"
        options = {"device_map": places, "offload_folder": str(tmp_path / "rest")}
    loaded = vlprune.load(tmp_path / "small", **options)
    if "disk" in where:
        assert any(parameter.is_meta for parameter in loaded.parameters())
    for expected, found in zip(answers(model, inputs), answers(loaded, inputs), strict=True):
        assert torch.allclose(expected, found, atol=1e-5)


@pytest.mark.parametrize("size", ["huge", "-1GB", 0, "12"])
def test_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="such as 2GB"):
        vlprune.save(build("vit").model, tmp_path / "small", max_shard_size=size)
    assert not (tmp_path / "small").exists()
