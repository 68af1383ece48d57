"""Heads of which a rotary embedding turns a part: pairs, and the dimensions behind them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from vlprune.architectures import discover_apart
from vlprune.architectures.rotary import pairing_of, turned_dimensions
from vlprune.calibration.batches import batches_of
from vlprune.calibration.influence import influence_of
from vlprune.calibration.passes import moments_by_block
from vlprune.calibration.session import Calibration, Session
from vlprune.calibration.store import Originals
from vlprune.cutting.padded import PaddedLinear
from vlprune.errors import UnsupportedError
from vlprune.folders.ordinary import ordinary
from vlprune.streaming.cut import stream_cut
from vlprune.structures.structure import unit_of
from vlprune.testing import CHECKS, build
from vlprune.testing.conformance import make_plan

FAMILIES = {"glm": (2, 4), "nemotron": (2, 4), "phi": (2, 4), "gpt_neox": (4, 24)}
"""{family: (pairs, dimensions behind them) of each head}"""


def attention_of(model: Any) -> list[Any]:
    names = [s.core for s in vlprune.discover(model) if s.core]
    return [model.get_submodule(name) for name in dict.fromkeys(names)]


def halved(model: Any) -> vlprune.Plan:
    """A plan that keeps every second unit, the last one among them."""
    described = vlprune.discover(model)
    keep = {s.name: range(s.size - 1, -1, -2) for s in described}
    return vlprune.Plan({n: sorted(units) for n, units in keep.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_and_what_is_not_turned_are_two_structures(family: str) -> None:
    sample = build(family)
    pairs, behind = FAMILIES[family]
    found = [s for s in vlprune.discover(sample.model) if s.kind.startswith("attention")]
    assert [s.size for s in found] == [pairs, behind] * 2
    assert {s.layout for s in found} == {"native"}
    assert [s.name.endswith(".unturned") for s in found] == [False, True] * 2
    assert [s.kind for s in found] == ["attention", "attention_unturned"] * 2
    assert unit_of(found) == "head_dim"
    assert sum(s.core_share for s in found) == 2
    vlprune.rewrite(sample.model, vlprune.discover(sample.model), halved(sample.model))
    for core in attention_of(sample.model):
        assert not any(isinstance(m, PaddedLinear) for m in core.modules())
        size = getattr(core, "head_dim", None) or core.head_size
        assert size == pairs + behind // 2 < 2 * pairs + behind
        assert turned_dimensions(core) == 2 * len(core.pairs) == pairs
        assert getattr(core, "rotary_ndims", pairs) == pairs


@pytest.mark.parametrize(
    "check", ["folders_round_trip", "a_second_cut_composes", "costs_agree", "sharing_is_exact"]
)
@pytest.mark.parametrize("family", ["phi", "gpt_neox"])
def test_the_suite_holds(family: str, check: str) -> None:
    CHECKS[check](partial(build, family), "head_dim")


def test_a_folder_in_which_each_dimension_was_a_unit_still_loads(tmp_path: Path) -> None:
    sample = build("nemotron")
    model: Any = sample.model
    described = discover_apart(model, "head_dim")
    plan = make_plan(described, lambda size: size // 2)
    vlprune.save(vlprune.rewrite(model, described, plan), tmp_path)
    loaded = vlprune.load(tmp_path)
    assert any(isinstance(m, PaddedLinear) for m in loaded.modules())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_it_is_cut_from_folder_to_folder(tmp_path: Path) -> None:
    sample = build("glm")
    sample.model.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    plan = halved(sample.model)
    stream_cut(tmp_path / "dense", plan, tmp_path / "streamed", tmp_path / "work")
    vlprune.rewrite(sample.model, vlprune.discover(sample.model), plan)
    loaded = vlprune.load(tmp_path / "streamed").state_dict()
    assert {name for name in loaded if name.endswith("pairs")}
    for name, weight in sample.model.state_dict().items():
        assert torch.equal(weight, loaded[name]), name
    with pytest.raises(UnsupportedError):
        ordinary(sample.model)


def test_the_layer_behind_both_is_repaired_once() -> None:
    """Its statistics count each token once, and columns that either structure loses are gone."""
    sample = build("nemotron")
    model: Any = sample.model.double()
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(6, 58, (4, 9), generator=generator)} for _ in range(6)]
    plan = halved(model)
    plan = vlprune.Plan({n: units for n, units in plan.keep.items() if "attn" in n})
    structures = vlprune.discover(model).structures
    path = "model.layers.0.self_attn.o_proj"
    for block, moments in moments_by_block(model, structures, batches_of(model, batches)):
        if path.startswith(block.path):
            assert moments[path].count == 6 * 4 * 9
    session = Session(model, structures, Calibration(batches))
    assert session.fold(plan, Originals(model)).kept
    folded = session.layers_folded[path]
    assert 0 < folded["after"] < 0.95 * folded["before"]
    weight = model.get_submodule(path).weight.unflatten(1, (4, 8))
    left = weight.abs().sum((0, 1)) > 0
    assert left.tolist() == [False, False, True, True, False, True, False, True]


def test_pairs_and_single_dimensions_of_queries_are_scored() -> None:
    sample = build("gpt_neox")
    structures = vlprune.discover(sample.model).structures
    scores = influence_of(
        sample.model, structures, batches_of(sample.model, [sample.inputs])
    ).scores
    for structure in structures:
        if structure.kind.startswith("attention"):
            assert scores[structure.name].shape == (structure.size,)
            assert (scores[structure.name] > 0).all()


def test_classes_that_turn_all_they_are_given_take_no_dimensions_behind_the_pairs() -> None:
    for family, whole, partly in (("phi", True, False), ("glm", True, True)):
        cls = type(attention_of(build(family).model)[0])
        assert bool(pairing_of(cls)) is whole
        assert bool(pairing_of(cls, partly=True)) is partly


def test_pairs_are_not_kept_for_having_twice_the_weights() -> None:
    sample = build("gpt_neox")
    options: Any = {"example_inputs": sample.inputs}
    compressor = vlprune.Compressor(sample.model, vlprune.Magnitude(), {"params": 0.6}, **options)
    compressor.finish()
    kept = {s.name: len(compressor.plan().keep[s.name]) for s in compressor.structures}
    pairs = sum(n for name, n in kept.items() if name.endswith("attention"))
    behind = sum(n for name, n in kept.items() if name.endswith("unturned"))
    assert pairs < 2 * 4
    assert behind > 2 * 6


def test_norms_over_the_whole_head_keep_it_padded() -> None:
    sample = build("phi")
    for core in attention_of(sample.model):
        core.q_layernorm = torch.nn.LayerNorm(8)
    found = [s for s in vlprune.discover(sample.model) if s.kind.startswith("attention")]
    assert {s.layout for s in found} == {"padded"}
    assert len(found) == 2
