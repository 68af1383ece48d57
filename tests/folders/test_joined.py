"""Models whose class saves weights as one tensor, of which a cut leaves unequal parts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import vlprune
from vlprune.cutting.difference import tensors_of
from vlprune.cutting.joined import save_apart
from vlprune.testing import build


def uneven(model: Any, inputs: dict[str, Any]) -> Any:
    """The model with fewer dimensions of queries and keys than of values."""
    description = vlprune.discover(model, "qk_vo")
    keep = {
        s.name: tuple(range(s.size // 2 - 1 if s.kind == "attention_qk" else s.size // 2))
        for s in description
        if s.kind.startswith("attention_")
    }
    plan = vlprune.Plan(keep=keep, attention="qk_vo", fingerprint=description.fingerprint)
    return vlprune.rewrite(model, description, plan, verify=inputs)


@pytest.mark.parametrize(
    "family",
    [
        "radio",
        pytest.param("rf_detr", marks=pytest.mark.slow),
        pytest.param("tipsv2", marks=pytest.mark.slow),
        "kimi_k25",  # which turns the rows of the heads that its config counts
        pytest.param("qianfan_ocr", marks=pytest.mark.slow),
        pytest.param("step3p7", marks=pytest.mark.slow),
    ],
)
def test_what_a_class_joins_as_it_saves_may_be_cut_unevenly(family: str, tmp_path: Path) -> None:
    sample = build(family)
    small = uneven(sample.model, sample.inputs)
    vlprune.save(small, tmp_path / "first")
    again = vlprune.load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    last = type(small).from_pretrained(tmp_path / "second").eval()
    state = small.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in last.state_dict().items())
    with torch.no_grad():
        outputs = [tensors_of(model(**sample.inputs)) for model in (small, last)]
    for one, other in zip(*outputs, strict=True):
        assert torch.allclose(one, other, atol=1e-5, equal_nan=True)


def test_a_tower_of_a_cut_model_may_be_saved_alone(tmp_path: Path) -> None:
    small = uneven((sample := build("qianfan_ocr")).model, sample.inputs)
    vlprune.save(small, tmp_path / "whole")
    again = vlprune.load(tmp_path / "whole")
    for number, model in enumerate((small, again)):
        tower = model.model.vision_tower
        vlprune.save(tower, tmp_path / str(number))
        loaded = type(tower).from_pretrained(tmp_path / str(number))
        state = tower.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())


def test_a_model_that_is_not_cut_is_saved_as_ever(tmp_path: Path) -> None:
    """A cut that is undone leaves how the class saves its weights as it was."""
    model = build("radio").model
    assert isinstance(model, T.PreTrainedModel)
    with ExitStack() as undo:
        save_apart(model, undo)
        assert not any("Chunk" in str(rule.operations) for rule in conversions(model))
    assert "_weight_conversions" not in vars(model)
    model.save_pretrained(tmp_path)
    loaded = T.AutoModel.from_pretrained(tmp_path)
    joined = conversions(loaded)
    assert joined
    with ExitStack() as undo:
        save_apart(loaded, undo)
        assert conversions(loaded) != joined
    assert conversions(loaded) == joined


def conversions(model: Any) -> list[Any]:
    return [rule for rule in model._weight_conversions if hasattr(rule, "operations")]
