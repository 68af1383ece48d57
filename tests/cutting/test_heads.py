"""A BLIP that answers questions returns nothing of its text: its logits are asked for."""

from __future__ import annotations

from typing import Any

import torch

import vlprune
from vlprune.cutting.difference import difference
from vlprune.cutting.heads import head_outputs, output_heads
from vlprune.cutting.proof import _run
from vlprune.testing import build


def asking() -> tuple[Any, dict[str, Any]]:
    """The model, and a batch without labels."""
    sample = build("blip_vqa")
    batch = {name: value for name, value in sample.inputs.items() if name != "labels"}
    batch["decoder_input_ids"] = sample.inputs["labels"].clamp(min=0)
    return sample.model.eval(), batch


def test_heads_are_found_and_watched_without_a_trace() -> None:
    model, batch = asking()
    (head,) = output_heads(model)
    with head_outputs(model) as seen, torch.no_grad():
        output = model(**batch)
    assert seen[0].shape[-1] == model.config.text_config.vocab_size
    assert not any(tensor.shape == seen[0].shape for tensor in output.values())
    assert not head._forward_hooks


def test_a_proof_without_labels_sees_the_text() -> None:
    model, batch = asking()
    before = _run(model, batch, torch.float32)
    layer = model.text_decoder.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.weight.mul_(0.5)
    assert difference(before, _run(model, batch, torch.float32)).largest > 1e-4


def test_calibration_without_labels_reaches_the_text() -> None:
    model, batch = asking()
    compressor = vlprune.Compressor(
        model, vlprune.OBS(), {"params": 0.6}, calibration=[batch, batch]
    )
    compressor.finish()
    kept = {g["tower"]: g["kept"] / g["units"] for g in compressor.report()["groups"]}
    assert compressor.report()["budget"]["reached"] <= 0.6
    assert max(kept.values()) < 1
