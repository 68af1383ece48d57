"""Batches and models that are unusual or wrong: they work, or one message says what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import vlprune
from looped import batches
from vlprune.architectures import discover
from vlprune.errors import BudgetError, DataError, VlpruneError
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def plan_of(model: Any) -> vlprune.Plan:
    return make_plan(discover(model, "head_dim"), lambda size: max(1, size // 2))


def folded(model: Any, given: Any) -> Any:
    return vlprune.fold(model, plan_of(model), given)


def compressed(model: Any, given: Any) -> Any:
    compressor = vlprune.Compressor(
        model, vlprune.OBS(rotate=True), {"params": 0.75}, calibration=given
    )
    compressor.finish()
    return compressor.session.errors  # type: ignore[union-attr]


def turned(model: Any, given: Any) -> Any:
    return vlprune.rotate(model, given)


WAYS: list[Callable[[Any, Any], Any]] = [turned, folded, compressed]


def pixels(*shape: int, value: float | None = None) -> dict[str, Tensor]:
    if value is not None:
        return {"pixel_values": torch.full(shape, value)}
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty list": (list, "no calibration batches"),
    "a used generator": (lambda: iter(()), "no calibration batches"),
    "a number": (lambda: 3, "not a int"),
    "tensors": (lambda: [torch.ones(2, 3, 16, 16)], "calibration batch 0 is a Tensor"),
    "a file name": (lambda: ["a.jpg"], "calibration batch 0 is a str"),
    "other keys": (lambda: [{"pixels": torch.ones(2, 3)}], "has nothing that ViT"),
    "an empty batch": (lambda: [{}], "no keys"),
    "labels alone": (lambda: [{"labels": torch.ones(2)}], "has nothing that ViT"),
    "NaN": (lambda: [pixels(2, 3, 16, 16, value=float("nan"))] * 2, "NaN or infinite"),
    "infinity": (lambda: [pixels(2, 3, 16, 16, value=float("inf"))] * 2, "NaN or infinite"),
    "NaN in the last": (
        lambda: [pixels(2, 3, 16, 16), pixels(2, 3, 16, 16, value=float("nan"))],
        "NaN or infinite",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", WRONG)
def test_batches_that_cannot_be_used(way: Callable[[Any, Any], Any], case: str) -> None:
    given, message = WRONG[case]
    model: Any = build("vit").model.train()
    before = state(model)
    with pytest.raises(DataError, match=message):
        way(model, given())
    after = state(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert model.training
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_without_what_the_forward_needs(way: Callable[[Any, Any], Any]) -> None:
    """Pictures alone for a whole CLIP: the message names the batch and the reason."""
    model: Any = build("clip").model
    before = state(model)
    with pytest.raises(DataError, match=r"CLIPModel does not run on calibration batch [01] "):
        way(model, [pixels(2, 3, 16, 16)] * 2)
    assert all(torch.equal(before[n], t) for n, t in state(model).items())
    with pytest.raises(DataError, match="calibration batch 1 "):  # text without pictures
        way(build("blip").model, [build("blip").inputs, {"input_ids": torch.ones(2, 3).long()}])


def generator() -> Iterator[dict[str, Tensor]]:
    yield from ({n: t.float() for n, t in batch.items()} for batch in batches(3, 4))


class Items(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        picture = batches(1, 12)[0]["pixel_values"][number].float()
        return {"pixel_values": picture, "labels": torch.tensor(number % 5)}


USABLE: dict[str, Callable[[], Any]] = {
    "a generator": generator,
    "one batch": lambda: [pixels(6, 3, 16, 16)],
    "one mapping": lambda: pixels(6, 3, 16, 16),
    "one item": lambda: [pixels(1, 3, 16, 16)],
    "batches of one item": lambda: [pixels(1, 3, 16, 16), pixels(1, 3, 16, 16)],
    "zeros": lambda: [pixels(2, 3, 16, 16, value=0.0)] * 2,
    "constants": lambda: [pixels(2, 3, 16, 16, value=100.0)] * 3,
    "a DataLoader": lambda: DataLoader(Items(), batch_size=4),
    "keys the model does not take": lambda: [{**pixels(4, 3, 16, 16), "path": ["a"] * 4}] * 2,
    "batches of unlike sizes": lambda: [pixels(3, 3, 16, 16), pixels(1, 3, 16, 16)],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", USABLE)
def test_batches_that_are_unusual(way: Callable[[Any, Any], Any], case: str) -> None:
    model: Any = build("vit").model
    found = way(model, USABLE[case]())
    assert all(p.isfinite().all() for p in model.parameters())
    if way is turned:
        assert not found
    else:
        assert found.after["logits"] <= found.before["logits"] < 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_half_precision(way: Callable[[Any, Any], Any], dtype: torch.dtype) -> None:
    model: Any = build("vit").model.to(dtype)
    found = way(model, batches(4, 16))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in model.parameters())
    if way is not turned:
        assert found.after["logits"] < found.before["logits"]


def test_modes_and_frozen_parameters_stay() -> None:
    model: Any = build("vit").model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.vit.embeddings.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    model.vit.layers[0].requires_grad_(False)
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    assert not vlprune.rotate(model, batches(2, 4))
    error = folded(model, batches(4, 8))
    assert error.after["logits"] < error.before["logits"]
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == frozen


def test_a_method_without_statistics_is_repaired_too() -> None:
    small, plain = build("vit").model.double(), build("vit").model.double()
    given, unseen = batches(6, 16), batches(1, 32, seed=7)[0]
    with torch.no_grad():
        dense = small(**unseen).logits
    compressor = vlprune.Compressor(small, vlprune.Magnitude(), {"params": 0.7}, calibration=given)
    compressor.finish()
    bare = vlprune.Compressor(plain, vlprune.Magnitude(), {"params": 0.7})
    bare.finish(verify=False)
    assert compressor.plan() == bare.plan()
    with torch.no_grad():
        apart = [float((m(**unseen).logits - dense).norm() / dense.norm()) for m in (small, plain)]
    assert apart[0] < 0.7 * apart[1]
    report = compressor.report()
    assert report["calibration"]["outputs"]["kept"]


def test_obs_without_calibration_is_refused_at_once() -> None:
    with pytest.raises(VlpruneError, match="learns from calibration batches"):
        vlprune.Compressor(build("vit").model, vlprune.OBS(), {"params": 0.7})


@pytest.mark.parametrize("across", ["outputs", "layers", "uniform"])
def test_a_tower_that_no_batch_reaches_stays_whole(across: Any) -> None:
    """A LLaVA that reads no picture: its image tower is not judged, and the report says so."""
    model: Any = build("llava").model
    texts = [{"input_ids": torch.randint(6, 60, (4, 12))} for _ in range(4)]
    compressor = vlprune.Compressor(
        model, vlprune.OBS(across=across), {"params": 0.8}, calibration=texts
    )
    vision = [s for s in compressor.structures if s.tower == "vision"]
    plan = compressor.plan()
    assert all(plan.kept(s) == tuple(range(s.size)) for s in vision)
    compressor.finish()
    assert any("no calibration batch reached" in note for note in compressor.notes())
    refused = vlprune.rotate(build("llava").model, texts)
    assert {s.name for s in discover(build("llava").model, "qk_vo") if "vision" in s.name} - {
        s.name for s in discover(build("llava").model, "qk_vo") if s.kind == "ffn"
    } <= refused.keys()


def test_a_budget_that_only_a_tower_without_statistics_could_meet() -> None:
    texts = [{"input_ids": torch.randint(6, 60, (4, 12))} for _ in range(2)]
    compressor = vlprune.Compressor(
        build("llava").model, vlprune.OBS(), {"params": 0.4}, calibration=texts
    )
    with pytest.raises(BudgetError, match="structures stay whole, because no calibration"):
        compressor.plan()
