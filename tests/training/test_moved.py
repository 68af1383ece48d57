"""A loaded model lies elsewhere in memory: its weights are the same bits, its outputs nearly so.

Kernels sum in another order where a matrix begins off a 64-byte boundary, which is where a mapped
safetensors file may put one. Which shapes show it depends on the CPU; a batch of one does on most.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moved import loads_move, move
from vlprune.commands.pipeline.make import in_fresh_memory
from vlprune.testing import CHECKS, Sample, build

FAMILIES = ("clip", "vit", "bert", "blip_captioning", "glip")
FOLDERS = ("folders_round_trip", "a_second_cut_composes", "sharing_is_exact")


def one_item(family: str) -> Sample:
    """A sample whose batch is one, so that products with a single row occur."""
    sample = build(family)
    sample.inputs = {
        name: value[:1] if isinstance(value, torch.Tensor) else value
        for name, value in sample.inputs.items()
    }
    return sample


@pytest.mark.parametrize("check", FOLDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_checks_hold_wherever_the_weights_lie(
    family: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loads_move(monkeypatch)
    CHECKS[check](lambda: one_item(family), "head")
    assert loaded


def test_moving_moves_every_weight_and_no_value() -> None:
    model: Any = build("clip").model
    moved = move(copy.deepcopy(model))
    for name, tensor in moved.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
        assert tensor.data_ptr() % 64 == tensor.element_size()


def test_a_resumed_run_trains_where_the_one_it_continues_did(tmp_path: Path) -> None:
    build("clip").model.save_pretrained(tmp_path)
    loaded: Any = move(transformers.CLIPModel.from_pretrained(tmp_path))
    assert any(p.data_ptr() % 64 for p in loaded.parameters())
    assert not any(p.data_ptr() % 64 for p in in_fresh_memory(loaded).parameters())
