"""Shared weights of classes that save several weights as one tensor (Molmo 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from vlprune.errors import UnsupportedError
from vlprune.testing import build


def shared(source: str, target: str) -> tuple[Any, dict[str, Any]]:
    """A model in which two units of ``target`` are those of ``source``."""
    sample = build("molmo2")
    description = vlprune.discover(sample.model)
    plan = vlprune.Plan(
        share={target: (source, [0, 1], [0, 1])},
        attention=description.attention,
        fingerprint=description.fingerprint,
    )
    return vlprune.rewrite(sample.model, description, plan, sample.inputs), sample.inputs


def test_shared_weights_that_would_be_joined_are_refused(tmp_path: Path) -> None:
    layers = "model.language_model.layers"
    model, inputs = shared(f"{layers}.0.self_attn", f"{layers}.1.self_attn")
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight as a part of one tensor.*material"):
        vlprune.save(model, tmp_path / "small")
    assert not [*tmp_path.iterdir()]
    whole = vlprune.materialize(model)
    vlprune.save(whole, tmp_path / "small")
    again = vlprune.load(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, whole.eval()(**inputs).logits)


def test_others_of_the_same_model_are_saved(tmp_path: Path) -> None:
    layers = "model.vision_tower.layers"
    model, inputs = shared(f"{layers}.0.self_attn", f"{layers}.1.self_attn")
    vlprune.save(model, tmp_path / "small")
    again = vlprune.load(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits)
