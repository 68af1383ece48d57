"""A plain Trainer finds the weights of its checkpoints again, whatever names they are saved under."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.testing import FAMILIES, build


def trainer(model: Any, folder: Path, callbacks: Any = (), **more: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, per_device_train_batch_size=1, seed=3, **more,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, callbacks=list(callbacks))


@torch.no_grad()
def spoil(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Other values for all weights; the state as it was before."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(7)
    return state


def shards_of(model: Any, folder: Path) -> set[str]:
    """Save the model in about four files; the names in them."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // 4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    return set(index["weight_map"])


def loads(model: Any, folder: Path) -> None:
    """Whether the Trainer restores each bit from four files, and from one."""
    model.eval()
    names = shards_of(model, folder / "shards")
    sources = ["shards"]
    if not names <= model.state_dict().keys():
        model.save_pretrained(folder / "one")
        sources.append("one")
    compressor = vlprune.Compressor(model, vlprune.UPop(), {"params": 0.95})
    resumed = trainer(model, folder / "out", [compressor.callback()])
    for source in sources:
        before = spoil(model)
        resumed._load_from_checkpoint(str(folder / source))
        now = model.state_dict()
        assert now.keys() == before.keys()
        assert [n for n in now if not now[n].equal(before[n])] == [], source
    compressor.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_loads_every_family(family: str, tmp_path: Path) -> None:
    loads(build(family).model, tmp_path)


@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu", "llava"])
def test_and_one_that_has_been_cut(family: str, tmp_path: Path) -> None:
    model = build(family).model
    attention = "head" if family == "llava" else "head_dim"
    vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": 0.9}, attention=attention
    ).finish()
    loads(model, tmp_path)
