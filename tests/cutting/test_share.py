"""Sharing: stored once, tied through training, saving and loading, given up on request."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import vlprune
from alike import nearly, same_model
from small_models import clip, inputs
from vlprune import Plan, cost, discover, materialize, rewrite
from vlprune.cutting.gates import gated
from vlprune.cutting.sharing.mixed import mixed
from vlprune.cutting.sharing.rules import shareable, similarity
from vlprune.cutting.sharing.ties import is_shared, ties_in
from vlprune.errors import CheckpointError, PlanError, UnsupportedError
from vlprune.structures.units import named_weights
from vlprune.testing import build

V, TX = "vision_model.encoder.layers.{}.mlp.fc1", "text_model.encoder.layers.{}.mlp.fc1"
VA, TA = (
    "vision_model.encoder.layers.{}.self_attn",
    "text_model.encoder.layers.{}.self_attn",
)


def out(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model(**inputs(dtype)).logits_per_image


def chain() -> dict[str, Any]:
    """vision 3 -> text 1 -> text 0, some units each; whole layers from vision 1 to vision 0."""
    return {
        V.format(3): (TX.format(1), (0, 4, 7, 11)),
        TX.format(1): (TX.format(0), (4, 5, 6, 7, 12)),
        V.format(1): (V.format(0), tuple(range(32))),
        VA.format(1): (VA.format(0), tuple(range(8))),
    }


# -- the plan ------------------------------------------------------------------------------


def test_a_unit_shared_from_one_that_goes_goes_too() -> None:
    structure = {s.name: s for s in discover(clip())}
    keep = {TX.format(0): tuple(u for u in range(20) if u != 4), TX.format(1): (0, 4, 5, 11)}
    plan = Plan(keep=keep, share=chain())
    assert plan.shared(structure[TX.format(1)]) == {5: 5}  # 4 went at the base, 6 and 7 here
    assert plan.kept(structure[TX.format(1)]) == (0, 5, 11)
    assert plan.shared(structure[V.format(3)]) == {0: 0, 11: 11}  # 4 and 7 have no source left
    assert plan.kept(structure[V.format(3)]) == tuple(u for u in range(32) if u not in (4, 7))


@pytest.mark.parametrize(
    ("share", "says"),
    [
        ({"a": ("b", (0,)), "b": ("a", (0,))}, "in a circle"),
        ({"a": ("c", (0,))}, "does not have"),
        ({"a": ("b", (3,))}, "only 3 units"),
        ({"a": ("b", (0, 1), (0,))}, "2 units of 'a' from 1"),
        ({"a": ("b", (0, 0))}, "more than once"),
        ({"a": "b"}, "must be \\[source, units\\]"),
    ],
)
def test_impossible_sharing_is_one_sentence(share: Any, says: str) -> None:
    from vlprune.structures.structure import Structure

    structures = [Structure(n, "ffn", 3, "text", (), ()) for n in ("a", "b")]
    with pytest.raises(PlanError, match=says):
        Plan(share=share).check(structures)


def test_a_structure_must_keep_something() -> None:
    plan = Plan(
        keep={TX.format(0): (1,), TX.format(1): (4, 5)},
        share={TX.format(1): (TX.format(0), (4, 5))},
    )
    model = clip()
    with pytest.raises(PlanError, match="leaves nothing of"):
        rewrite(model, discover(model), plan)


def test_json_keeps_the_pairing() -> None:
    plan = Plan(share={"y": ("x", (5, 2), (0, 9)), "z": ("x", (1,))})
    assert plan.share["y"] == ("x", (2, 5), (9, 0))
    assert Plan.from_json(plan.to_json()) == plan


# -- the cut -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["head_dim", "qk_vo", "head"])
def test_chains_and_whole_layers_are_exact(attention: Any) -> None:
    model = clip().double()
    description = discover(model, attention)
    share = {n: e for n, e in chain().items() if n in {s.name for s in description}}
    if attention == "head":
        share[VA.format(1)] = (VA.format(0), (0, 1, 2))
    plan = Plan(keep={TX.format(0): tuple(range(1, 20))}, share=share, attention=attention)
    structures = description.structures
    with mixed(model, structures, plan), gated(model, structures, plan):
        masked = out(model, torch.float64)
    dense = out(model, torch.float64)
    small = rewrite(copy.deepcopy(model), description, plan, verify=inputs())
    assert float((masked - dense).abs().max()) > 1e-3  # sharing does change the model
    assert float((masked - out(small, torch.float64)).abs().max()) < 1e-12
    stored = sum(p.numel() for p in small.parameters())
    assert stored == cost.params(model, structures, plan)
    # a whole layer is shared: of its weights nothing is stored, its biases are its own
    assert (
        small.vision_model.encoder.layers[1].mlp.fc1.parametrizations.weight.original.numel() == 0
    )
    assert small.vision_model.encoder.layers[1].mlp.fc1.bias.shape == (32,)


def test_shared_units_are_one_parameter_for_gradients_and_optimizers() -> None:
    model = clip()
    plan = Plan(share={V.format(2): (TX.format(1), (0, 3))})
    small = rewrite(model, discover(model), plan).train()
    source = small.get_submodule(TX.format(1)).weight
    target = small.get_submodule(V.format(2))
    before = source.detach().clone()
    loss = small(**inputs(), return_loss=True).loss
    loss.backward()
    both = source.grad[[0, 3]].clone()
    assert target.parametrizations.weight.original.shape == (30, 24)

    # against the same model with two copies: the gradients of both uses add up
    free = materialize(copy.deepcopy(small))
    free.zero_grad()
    free(**inputs(), return_loss=True).loss.backward()
    one = free.get_submodule(TX.format(1)).weight.grad[[0, 3]]
    other = free.get_submodule(V.format(2)).weight.grad[[0, 3]]
    assert float(other.abs().max()) > 0
    torch.testing.assert_close(both, one + other)

    torch.optim.AdamW(small.parameters(), lr=1e-2).step()
    now = small.get_submodule(TX.format(1)).weight
    assert not torch.equal(before[[0, 3]], now[[0, 3]])
    assert torch.equal(now[[0, 3]], target.weight[[0, 3]])  # still tied


def test_tied_through_two_folders_and_training_between(tmp_path: Path) -> None:
    model = clip()
    small = rewrite(model, discover(model), Plan(share=chain()))
    vlprune.save(small, tmp_path / "one")
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    again = T.CLIPModel.from_pretrained(tmp_path / "one")
    same_model(small, again, inputs())
    again.train()
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again(**inputs(), return_loss=True).loss.backward()
    optimizer.step()
    again.eval().save_pretrained(tmp_path / "two")
    last = T.AutoModel.from_pretrained(tmp_path / "two")
    same_model(again, last, inputs())
    assert ties_in(last) == ties_in(small)
    chained = last.get_submodule(V.format(3)).weight, last.get_submodule(TX.format(0)).weight
    assert torch.equal(chained[0][[4, 7]], chained[1][[4, 7]])  # vision -> text -> block base

    whole = materialize(last)
    assert whole is last
    nearly([out(again)], [out(whole)])
    assert not is_shared(whole)
    assert type(whole.get_submodule(V.format(3))) is nn.Linear
    vlprune.save(whole, tmp_path / "three")  # an ordinary dense folder again
    assert (tmp_path / "three" / "model.safetensors").stat().st_size > size
    same_model(whole, vlprune.load(tmp_path / "three"), inputs())


def test_a_tower_alone_says_where_its_weights_are(tmp_path: Path) -> None:
    model = clip()
    vlprune.save(
        rewrite(model, discover(model), Plan(share={V.format(0): (TX.format(0), (1,))})), tmp_path
    )
    with pytest.raises(CheckpointError, match="takes weights from text_model"):
        T.CLIPVisionModel.from_pretrained(tmp_path)
    T.CLIPTextModel.from_pretrained(tmp_path)  # the source needs nothing


def test_half_precision_and_a_copy_stay_tied(tmp_path: Path) -> None:
    model = clip()
    small = rewrite(model, discover(model), Plan(share=chain()))
    twin = copy.deepcopy(small)
    with torch.no_grad():
        twin.get_submodule(TX.format(0)).weight.add_(1)
    assert not torch.equal(
        twin.get_submodule(V.format(3)).weight, small.get_submodule(V.format(3)).weight
    )
    materialize(twin)
    assert is_shared(small)  # the original is as it was
    out(small)
    vlprune.save(small, tmp_path)
    half = T.CLIPModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.get_submodule(V.format(3)).weight.dtype == torch.bfloat16
    assert ties_in(half) == ties_in(small)


def test_unlike_layers_are_refused_with_the_reason() -> None:
    model = clip(widths=(24, 36))
    share = {V.format(0): (TX.format(0), (0,))}
    with pytest.raises(PlanError, match=r"36 wide, those of .* 24"):
        rewrite(model, discover(model), Plan(share=share))
    model = clip()
    with pytest.raises(PlanError, match=r"laid out unlike|weights per unit"):
        rewrite(model, discover(model), Plan(share={V.format(0): (VA.format(0), (0,))}))
    assert not is_shared(model)
    # unequal sizes share the block that both have
    small = rewrite(model, discover(model), Plan(share={V.format(0): (TX.format(0), range(20))}))
    assert small.get_submodule(V.format(0)).parametrizations.weight.original.shape == (12, 24)


def test_a_cut_by_one_method_then_sharing_then_another_cut(tmp_path: Path) -> None:
    """UPop's plan, then sharing between units that it left, then Magnitude under a budget."""
    model = clip()
    searched = vlprune.Compressor(model, vlprune.UPop(), {"params": 0.8})
    model.train()
    for step in range(4):
        model(**inputs(), return_loss=True).loss.backward()
        searched.step((step + 1) / 4)
        model.zero_grad()
    small = searched.finish().eval()
    left = {s.name: s for s in discover(small)}
    shapes = {name: tuple(p.shape) for name, p in named_weights(small).items()}
    target, source = left[V.format(2)], left[TX.format(1)]
    assert not shareable(target, source, shapes)
    count = min(target.size, source.size) // 2
    plan = Plan(share={target.name: (source.name, range(count))})
    small = rewrite(small, discover(small), plan, verify=inputs())
    stored = sum(p.numel() for p in small.parameters())
    compressor = vlprune.Compressor(small, vlprune.Magnitude(), {"params": 0.7})
    assert compressor.prices.total == stored
    smaller = compressor.finish()
    report = compressor.report()
    after = sum(p.numel() for p in smaller.parameters())
    assert report["params"] == {"before": stored, "after": after}
    assert after <= 0.7 * stored
    assert report["budget"]["reached"] == pytest.approx(after / stored)
    assert is_shared(smaller)
    vlprune.save(smaller.eval(), tmp_path)
    same_model(smaller, vlprune.load(tmp_path), inputs())


def test_a_failed_proof_puts_the_tied_model_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.cutting import rewrite as cutting

    model = clip()
    small = rewrite(model, discover(model), Plan(share=chain()))
    before, ties = copy.deepcopy(small), ties_in(small)
    monkeypatch.setattr(cutting, "compare", lambda *_: 1 / 0)
    plan = Plan(keep={TX.format(0): tuple(range(10))})
    with pytest.raises(ZeroDivisionError):
        rewrite(small, discover(small), plan, verify=inputs())
    assert ties_in(small) == ties
    same_model(before, small, inputs())


def test_an_attention_that_is_called_by_its_parent_can_share() -> None:
    """nn.MultiheadAttention never calls its projections as modules."""
    sample = build("bridgetower")
    model = sample.model.double()
    description = discover(model)
    kinds = [s for s in description if s.core and "attn" in s.name and "visual" in s.name]
    plan = Plan(share={kinds[1].name: (kinds[0].name, range(kinds[0].size // 2))})
    probe = {k: v.double() if v.is_floating_point() else v for k, v in sample.inputs.items()}
    small = rewrite(model, description, plan, verify=probe)
    assert is_shared(small)
    with (
        pytest.raises(UnsupportedError, match="materialize"),
        gated(small, discover(small).structures, Plan(keep={kinds[1].name: (0,)})),
    ):
        pass


def test_similarity_is_the_cosine_of_all_weights_of_a_unit() -> None:
    model = clip()
    by_name = {s.name: s for s in discover(model)}
    found = similarity(model, by_name[V.format(0)], by_name[TX.format(1)])
    assert found.shape == (32, 20)
    rows = [
        torch.cat([m.fc1.weight[u], m.fc2.weight[:, u]])
        for m, u in (
            (model.vision_model.encoder.layers[0].mlp, 5),
            (model.text_model.encoder.layers[1].mlp, 7),
        )
    ]
    expected = nn.functional.cosine_similarity(rows[0], rows[1], dim=0)
    torch.testing.assert_close(found[5, 7], expected)


def test_memory_and_macs_are_told_apart() -> None:
    """Sharing lowers what is stored; it lowers no MACs."""
    model = clip()
    description = discover(model)
    plan = Plan(share={V.format(1): (V.format(0), range(32))})
    profile = cost.measure_macs(model, description.structures, inputs())
    assert cost.macs_of(profile, description.structures, plan) == profile.total
    small = rewrite(model, description, plan)
    assert cost.measure_macs(small, (), inputs()).total == profile.total


def test_a_softmax_temperature_that_was_folded_is_told_apart() -> None:
    """BLIP's text attention divides by the head size, so a cut multiplies the query weights."""
    sample = build("blip")
    model = sample.model.double()
    description = discover(model)
    first, second = [s for s in description if s.folds and s.tower == "text"][:2]
    keep = {first.name: tuple(range(first.size)), second.name: (0, 1, 2)}
    plan = Plan(keep=keep, share={second.name: (first.name, (0, 2))})
    probe = {k: v.double() if v.is_floating_point() else v for k, v in sample.inputs.items()}
    small = rewrite(model, description, plan, verify=probe)  # raises if they differ
    (query,) = [one for one in ties_in(small) if one.target.endswith("query.weight")]
    assert query.scale == pytest.approx((3 / second.size) ** 0.5)


def test_sharing_more_of_a_layer_that_shares(tmp_path: Path) -> None:
    model = clip()
    name, source = V.format(2), TX.format(1)
    small = rewrite(model, discover(model), Plan(share={name: (source, (0, 3))}))
    for share, says in (
        ({name: (source, (3, 5))}, "already, unit 3 among them"),
        ({name: (TX.format(0), (5,))}, "takes weights from text_model.* already"),
        ({source: (name, (1,))}, "in a circle"),
    ):
        with pytest.raises(PlanError, match=says):
            rewrite(small, discover(small), Plan(share=share))
    # more units, and one that goes at the source: its user goes as well
    plan = Plan(keep={source: tuple(range(1, 20))}, share={name: (source, (5, 6), (8, 9))})
    smaller = rewrite(small, discover(small), plan, verify=inputs())
    fc1 = smaller.get_submodule(name)
    assert fc1.weight.shape == (31, 24)
    assert fc1.parametrizations.weight.original.shape == (28, 24)  # without 3, 5 and 6
    vlprune.save(smaller, tmp_path)
    same_model(smaller, vlprune.load(tmp_path), inputs())


def test_temperatures_folded_apart_cannot_be_shared_later() -> None:
    model = build("blip").model
    first, second = [s for s in discover(model) if s.folds and s.tower == "text"][:2]
    small = rewrite(model, discover(model), Plan(keep={second.name: (0, 1, 2)}))
    plan = Plan(share={second.name: (first.name, (0, 2))})
    with pytest.raises(PlanError, match="folded another softmax temperature"):
        rewrite(small, discover(small), plan)
