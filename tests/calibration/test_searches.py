"""Folding the plan of a search: what it trained is repaired, not what it has left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from small_models import clip
from vlprune.calibration.store import Originals
from vlprune.testing import build


def batches(count: int = 4) -> list[dict[str, Any]]:
    numbers = torch.Generator().manual_seed(1)
    return [
        {
            "pixel_values": torch.randn(4, 3, 16, 16, generator=numbers),
            "input_ids": torch.randint(2, 60, (4, 6), generator=numbers),
        }
        for _ in range(count)
    ]


def searched(steps: int, of: int = 8) -> vlprune.Compressor:
    """A compressor of a CLIP after some steps of a search by UPop, its gates still in place."""
    model, data = clip(), batches()
    compressor = vlprune.Compressor(model, vlprune.UPop(), {"params": 0.7}, calibration=data)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    compressor.attach()
    for step in range(steps):
        model(**data[step % len(data)]).logits_per_image.diagonal().sum().backward()
        compressor.step((step + 1) / of)
        optimizer.step()
        optimizer.zero_grad()
    return compressor


@pytest.mark.parametrize("steps", [5, 8], ids=["half-way", "at the end"])
def test_the_dense_side_of_a_repair_is_the_model_with_its_gates(steps: int) -> None:
    compressor = searched(steps)
    model, batch = compressor.model.eval(), batches()[0]
    with torch.no_grad():
        trained = model(**batch).image_embeds
        compressor.detach()
        without = model(**batch).image_embeds
        assert (without - trained).abs().max() > 1e-3
        originals = Originals(model)
        compressor._gating.write_into_weights(originals)
        torch.testing.assert_close(model(**batch).image_embeds, trained)
        originals.put_back()
        assert torch.equal(model(**batch).image_embeds, without)


def test_after_a_whole_search_nothing_is_left_to_repair() -> None:
    compressor = searched(8)
    with torch.no_grad():
        trained = compressor.model.eval()(**batches()[0]).image_embeds
        small = compressor.finish()
        torch.testing.assert_close(small(**batches()[0]).image_embeds, trained)
    outputs = compressor.report()["calibration"]["outputs"]
    assert max(outputs["before"].values()) < 1e-5


def test_half_way_the_repair_helps() -> None:
    compressor = searched(5)
    with pytest.warns(UserWarning, match="ended at"):
        compressor.finish()
    outputs = compressor.report()["calibration"]["outputs"]
    for name, before in outputs["before"].items():
        assert outputs["after"][name] < before


def test_gates_of_every_place_are_written_into_the_weights() -> None:
    """In the weights of an nn.MultiheadAttention (SigLIP's head) and of a Conv1D (GPT-2), too."""
    for family in ("siglip", "gpt2"):
        sample = build(family)
        model, inputs = sample.model.eval(), sample.inputs
        compressor = vlprune.Compressor(model, vlprune.UPop(), {"params": 0.95})
        for values in compressor.gates.values():
            values.data.uniform_(0.2, 1)
        with torch.no_grad(), vlprune.gated(model, compressor.structures, compressor.gates):
            gated = model(**inputs)[0]
        compressor._gating.write_into_weights(Originals(model))
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs)[0], gated)
