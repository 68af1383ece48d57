"""The influence of a layer's error on the outputs, against errors that are really made."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from looped import batches, looped
from vlprune.architectures import discover
from vlprune.calibration.batches import batches_of
from vlprune.calibration.consumers import consumers_of
from vlprune.calibration.influence import influence_of, main_outputs
from vlprune.errors import UnsupportedError
from vlprune.testing import FAMILIES, build

STEP = 1e-3


def measured(model: Any, given: list[dict[str, Tensor]], path: str, out: int) -> float:
    """The relative squared error of the logits per mean squared error of a layer's output.

    The error is random, independent in every channel and token, and of the same size in each.
    """
    g = torch.Generator().manual_seed(5)

    def move(_m: nn.Module, _a: Any, output: Tensor) -> Tensor:
        return output + STEP * torch.randn(output.shape, generator=g, dtype=output.dtype)

    apart = whole = 0.0
    with torch.no_grad():
        for batch in given:
            plain = model(**batch).logits
            hook = model.get_submodule(path).register_forward_hook(move)
            moved = model(**batch).logits
            hook.remove()
            apart += float((moved - plain).square().sum())
            whole += float(plain.square().sum())
    return apart / whole / STEP**2 / out


@pytest.mark.parametrize("which", ["vit", "looped"])
def test_the_prediction_is_the_measured_error(which: str) -> None:
    model: Any = looped() if which == "looped" else build("vit").model.double()
    structures = discover(model, "head_dim").structures
    given = batches(24, 32)
    influence = influence_of(model, structures, batches_of(model, given)).outputs
    consumers = [c for s in structures for c in consumers_of(model, s)]
    assert influence.keys() == {c.module for c in consumers}
    for c in consumers:
        found = influence[c.module]
        assert found.shape == (c.out,)
        predicted = float(found.mean())
        assert predicted == pytest.approx(measured(model, given, c.module, c.out), rel=0.3)


def test_query_key_dimensions_are_scored_and_the_rest_of_the_model_is_left_alone() -> None:
    model: Any = build("clip").model.train()
    model.vision_model.embeddings.class_embedding.requires_grad_(False)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    structures = discover(model, "qk_vo").structures
    with torch.no_grad():
        found = influence_of(model, structures, batches_of(model, [build("clip").inputs] * 2))
    assert found.scores.keys() == {s.name for s in structures if s.kind == "attention_qk"}
    assert all((score > 0).all() for score in found.scores.values())
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    again = influence_of(model, structures, batches_of(model, [build("clip").inputs] * 2))
    assert all(torch.equal(again.outputs[n], found.outputs[n]) for n in found.outputs)


MAIN = {
    "clip": {"image_embeds", "text_embeds"},
    "owlvit": {"logits", "pred_boxes"},
    "blip_captioning": {"logits"},
    "blip_vqa": {"loss", "last_hidden_state"},
    "blip_retrieval": {"itm_score"},
    "vit": {"logits"},
    "detr": {"logits", "pred_boxes"},
    "llava": {"logits"},
}


@pytest.mark.parametrize("family", MAIN)
def test_main_outputs_are_what_the_model_is_used_for(family: str) -> None:
    sample = build(family)
    with torch.no_grad():
        assert main_outputs(sample.model(**sample.inputs)).keys() == MAIN[family]
    assert family in FAMILIES


@pytest.mark.parametrize("family", [*MAIN, "grounding_dino"])
def test_every_layer_that_matters_has_an_influence(family: str) -> None:
    """Minus infinity in masked places is no obstacle."""
    sample = build(family)
    structures = discover(sample.model, "head_dim").structures
    found = influence_of(sample.model, structures, batches_of(sample.model, [sample.inputs] * 2))
    assert all(t.isfinite().all() for t in (*found.outputs.values(), *found.scores.values()))
    reached = {n for n, t in found.outputs.items() if t.any()}
    for s in structures:
        if family != "blip" and s.tower != "fusion":
            assert {c.module for c in consumers_of(sample.model, s)} <= reached, s.name


def test_minus_infinity_in_masked_logits_does_not_hide_the_others() -> None:
    sample = build("grounding_dino")
    with torch.no_grad():
        assert sample.model(**sample.inputs).logits.isinf().any()
    structures = discover(sample.model, "head_dim").structures
    given = batches_of(sample.model, [sample.inputs] * 2)
    found = influence_of(sample.model, structures, given, lambda o: {"logits": o.logits})
    assert sum(bool(t.any()) for t in found.outputs.values()) > 0.9 * len(found.outputs)


@pytest.mark.parametrize("family", ["siglip", "blip", "vit"])
def test_every_query_is_watched_wherever_it_is_computed(family: str) -> None:
    """In modules of their own, in one fused projection, and inside an nn.MultiheadAttention."""
    sample = build(family)
    structures = discover(sample.model, "qk_vo").structures
    given = batches_of(sample.model, [sample.inputs])
    scores = influence_of(sample.model, structures, given).scores
    for structure in structures:
        if structure.kind == "attention_qk" and not re.search(sample.idle or "$^", structure.name):
            assert (scores[structure.name] > 0).all(), structure.name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_computes_without_gradients_is_refused(mode: Any) -> None:
    """SAM 2 does, when it follows a video."""
    sample = build("vit")
    model: Any = sample.model
    stock = model.forward

    def forward(pixel_values: Tensor, **more: Any) -> Any:
        with mode():
            return stock(pixel_values, **more)

    model.forward = forward
    given = batches_of(model, [sample.inputs])
    with pytest.raises(UnsupportedError, match="without gradients"):
        influence_of(model, discover(model).structures, given)


def test_neurons_that_see_nothing_but_zeros_are_no_cheap_ones() -> None:
    """DiffusionGemma's first step of denoising has no guess of a step before it."""
    sample = build("vit")
    model: Any = sample.model
    silent = "vit.layers.1.mlp.fc1"
    nn.init.zeros_(model.get_submodule(silent).weight)
    nn.init.zeros_(model.get_submodule(silent).bias)
    compressor = vlprune.Compressor(
        model, vlprune.OBS(fold=False), {"params": 0.8}, calibration=[sample.inputs] * 2
    )
    small: Any = compressor.finish()
    assert small.vit.layers[1].mlp.fc1.out_features == 48 > small.vit.layers[0].mlp.fc1.out_features
    assert any(silent in note for note in compressor.notes())
