"""The teacher: each term is zero for the teacher itself, and what it says by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from vlprune.architectures import discover
from vlprune.errors import RecipeError, UnsupportedError
from vlprune.testing import build
from vlprune.training.objective import Trainee
from vlprune.training.teacher import Taught, _divergence, last_blocks


def pair(family: str, weights: dict[str, float], seed: int = 0) -> tuple[Any, Any, Any]:
    """(the taught student, its batch, the plain loss): the teacher is build(family, seed)."""
    sample = build(family)
    teacher = build(family, seed).model if seed else copy.deepcopy(sample.model)
    structures = discover(teacher).structures
    batch = dict(sample.inputs)
    if family == "clip":
        batch["return_loss"] = True
    elif family == "vit":
        batch["labels"] = torch.tensor([0, 1])
    elif family == "blip_vqa":
        batch["labels"] = batch["decoder_input_ids"] = batch["input_ids"]
    plain = sample.model(**batch).loss
    return Taught(sample.model, sample.model, teacher, weights, structures), batch, plain


CASES = [
    ("vit", "logits"), ("vit", "features"), ("clip", "similarities"), ("clip", "features"),
    ("blip_vqa", "logits"), ("blip_vqa", "features"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "term"), CASES)
def test_a_teacher_equal_to_the_student_adds_nothing(family: str, term: str) -> None:
    taught, batch, plain = pair(family, {term: 10.0})
    assert float(taught(**batch)["loss"]) == pytest.approx(float(plain), abs=1e-4)


@pytest.mark.parametrize(("family", "term"), CASES)
def test_another_teacher_adds_a_loss_that_reaches_the_student_only(family: str, term: str) -> None:
    taught, batch, plain = pair(family, {term: 1.0}, seed=1)
    loss = taught(**batch)["loss"]
    assert float(loss) > float(plain) + 1e-3
    loss.backward()
    student, teacher = taught._pair
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for m in teacher.modules())
    assert len(taught.state_dict()) == len(Trainee(student).state_dict())  # no teacher in it


def test_the_divergence_by_hand() -> None:
    ours = torch.tensor([[0.5, 0.5]]).log()
    truth = torch.tensor([[0.9, 0.1]]).log()
    want = 0.9 * torch.log(torch.tensor(0.9 / 0.5)) + 0.1 * torch.log(torch.tensor(0.1 / 0.5))
    assert _divergence(ours, truth)[0] == pytest.approx(float(want))


def test_what_a_model_does_not_show_is_refused() -> None:
    taught, batch, _ = pair("vit", {"similarities": 1.0})
    with pytest.raises(UnsupportedError, match="shows no similarities"):
        taught(**batch)
    with pytest.raises(RecipeError, match="Did you mean 'logits'"):
        pair("vit", {"logit": 1.0})
    with pytest.raises(RecipeError, match="at least 0"):
        pair("vit", {"logits": -1.0})


def test_the_last_block_of_every_tower_is_found() -> None:
    blocks = last_blocks(discover(build("blip_vqa").model).structures)
    assert blocks == (
        "vision_model.encoder.layers.1", "text_encoder.encoder.layer.1",
        "text_decoder.bert.encoder.layer.1",
    )  # fmt: skip


def test_a_cut_student_still_fits_its_teacher() -> None:
    import vlprune

    sample = build("clip")
    teacher = copy.deepcopy(sample.model)
    structures = discover(teacher).structures
    small = vlprune.Compressor(sample.model, vlprune.Magnitude(), {"params": 0.6}).finish()
    taught = Taught(small, small, teacher, {"features": 1.0, "similarities": 1.0}, structures)
    taught(**sample.inputs, return_loss=True)["loss"].backward()
