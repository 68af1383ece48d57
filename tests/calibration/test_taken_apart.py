"""Experts that are one parameter: taken apart, watched, judged and repaired expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from vlprune.calibration.batches import batches_of
from vlprune.calibration.consumers import consumers_of
from vlprune.calibration.passes import moments_by_block
from vlprune.calibration.session import session_of
from vlprune.calibration.taken_apart import PARTS, taken_apart
from vlprune.errors import BudgetError
from vlprune.structures.plan import Plan
from vlprune.testing import build


def batches(count: int, seed: int = 5, tokens: int = 16) -> list[dict[str, Tensor]]:
    """Word ids, the first item padded."""
    numbers = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, tokens, dtype=torch.long)
    mask[0, tokens // 2 :] = 0
    return [
        {
            "input_ids": torch.randint(6, 58, (4, tokens), generator=numbers),
            "attention_mask": mask,
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "aria", "nemotron_h", "deepseek_v3"])
def test_experts_that_are_taken_apart_compute_what_they_did(family: str) -> None:
    sample = build(family)
    model = sample.model.double()
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in sample.inputs.items()}
    structures = vlprune.discover(model).structures
    names = [name for name, _ in model.named_modules()]
    with torch.no_grad():
        before = model(**inputs).logits
        with taken_apart(model, structures):
            assert any(PARTS in name for name, _ in model.named_modules())
            assert list(model.state_dict()) == list(build(family).model.state_dict())
            apart = model(**inputs).logits
            for structure in structures:  # the forward calls what a hook can watch
                for consumer in consumers_of(model, structure):
                    assert isinstance(model.get_submodule(consumer.module), nn.Linear)
        rounding = 1e-6 if family == "nemotron_h" else 1e-12  # its experts add up in float32
        assert torch.allclose(before, apart, rtol=0, atol=rounding)
        assert torch.equal(before, model(**inputs).logits)
    assert [name for name, _ in model.named_modules()] == names


def test_every_token_counts_for_the_experts_that_it_chooses_and_padding_does_not() -> None:
    model: Any = build("mixtral").model
    given = batches(3)
    structures = vlprune.discover(model).structures
    ready = batches_of(model, given)
    found = {
        name: moments
        for _, own in moments_by_block(model, structures, ready)
        for name, moments in own.items()
        if PARTS in name
    }
    layers = {name.partition(f".{PARTS}")[0] for name in found}
    assert len(found) == 4 * len(layers) == 8
    real = sum(int(batch["attention_mask"].sum()) for batch in given)
    for layer in layers:  # top 2 of 4
        counted = sum(m.weight for name, m in found.items() if name.startswith(layer + "."))
        assert counted == 2 * real


def relative_error(dense: Any, small: Any, given: list[dict[str, Tensor]]) -> float:
    wrong = whole = 0.0
    with torch.no_grad():
        for batch in given:
            mask = batch["attention_mask"].bool()
            wanted, found = (model(**batch).logits[mask] for model in (dense, small))
            wrong += float((wanted - found).square().sum())
            whole += float(wanted.square().sum())
    return wrong / whole


def test_obs_judges_and_repairs_experts() -> None:
    dense = build("mixtral").model
    errors = {}
    for name, method in {
        "obs": vlprune.OBS(), "unrepaired": vlprune.OBS(fold=False), "random": vlprune.Random(),
    }.items():  # fmt: skip
        model = build("mixtral").model
        compressor = vlprune.Compressor(
            model, method, {"params": 0.6}, attention="head", example_inputs=batches(1)[0],
            calibration=batches(12) if name != "random" else None,
        )  # fmt: skip
        small = compressor.finish()
        kept = {n: len(u) for n, u in compressor.plan().keep.items() if n.endswith("experts")}
        assert all(count < 48 for count in kept.values())
        errors[name] = relative_error(dense, small, batches(4, seed=9))
    assert errors["obs"] < errors["unrepaired"] < 0.6 * errors["random"]


def test_an_expert_that_no_token_chooses_just_loses_its_columns() -> None:
    model: Any = build("mixtral").model
    description = vlprune.discover(model)
    experts = [s for s in description if s.name.endswith("experts")]
    before = model.get_submodule(experts[0].name).down_proj.detach().clone()
    ids = torch.full((2, 1), 7)
    with torch.no_grad():
        chosen = model(input_ids=ids, output_router_logits=True).router_logits[0].topk(2).indices
    others = sorted({0, 1, 2, 3} - set(chosen.flatten().tolist()))
    assert len(others) == 2
    given = {"input_ids": ids, "attention_mask": torch.ones(2, 1).long()}
    vlprune.fold(model, Plan({s.name: tuple(range(20)) for s in experts}), [given, given])
    after = model.get_submodule(experts[0].name).down_proj
    assert not after[:, :, 20:].any()
    for other in others:
        assert torch.equal(after[other, :, :20], before[other, :, :20])
    assert not torch.equal(after[:, :, :20], before[:, :, :20])


def test_experts_are_gathered_in_parts_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded = []
    for room in (2**27, 1):
        monkeypatch.setattr("vlprune.calibration.expert_moments.AT_ONCE", room)
        model: Any = build("mixtral").model
        experts = [s for s in vlprune.discover(model) if s.name.endswith("experts")]
        vlprune.fold(model, Plan({s.name: tuple(range(20)) for s in experts}), batches(4))
        folded.append([model.get_submodule(s.name).down_proj.detach() for s in experts])
    for one, other in zip(*folded, strict=True):
        assert torch.equal(one, other)


def test_experts_of_a_kind_of_their_own_stay_whole_and_are_named() -> None:
    model: Any = build("llama4").model
    structures = vlprune.discover(model).structures
    (note,) = session_of(model, structures, batches(2)).notes()
    assert note.startswith(
        "the neurons of model.layers.1.feed_forward.experts are read by no layer"
    )
    compressor = vlprune.Compressor(model, vlprune.OBS(), {"params": 0.4}, calibration=batches(2))
    with pytest.raises(BudgetError, match=r"cannot be taken apart: .*feed_forward\.experts"):
        compressor.finish()
