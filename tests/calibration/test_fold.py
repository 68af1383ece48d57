"""Folding a plan: where outputs land, what is repaired, and that any failure is undone."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlprune
from looped import batches, looped
from vlprune.architectures import discover
from vlprune.calibration.batches import batches_of
from vlprune.calibration.blocks import blocks_of
from vlprune.calibration.landing import OUTPUT, Landing, Replay, landing_of
from vlprune.calibration.passes import calls_of
from vlprune.calibration.session import Calibration
from vlprune.calibration.streams import streams
from vlprune.cutting.difference import difference, tensors_of
from vlprune.cutting.gates import gated
from vlprune.errors import DataError, UnsupportedError, VlpruneError
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def landings(model: Any, inputs: dict[str, Any]) -> dict[str, Landing | None]:
    """The landing of every consumer, {module: landing}."""
    structures = discover(model, "head_dim").structures
    calls = calls_of(model, batches_of(model, [inputs, inputs]))[:1]
    found = {}
    with torch.no_grad():
        blocks = blocks_of(model, structures, calls)
        with streams(model, [b.path for b in blocks], calls) as passes:
            for block in blocks:
                assert passes[0].advance(block.path)
                replay = Replay(model.get_submodule(block.path), passes[0].args, passes[0].kwargs)
                for consumer in block.consumers:
                    layer = model.get_submodule(consumer.module)
                    found[consumer.module] = landing_of(replay, layer)
    return found


@pytest.mark.parametrize(
    ("family", "consumer", "place"),
    [
        ("clip", "vision_model.encoder.layers.0.self_attn.out_proj", "layer_norm2"),
        ("clip", "vision_model.encoder.layers.0.mlp.fc2", OUTPUT),
        ("bert", "bert.encoder.layer.0.attention.output.dense", "attention.output.LayerNorm"),
        ("bert", "bert.encoder.layer.0.output.dense", "output.LayerNorm"),
        ("dinov2", "dinov2.encoder.layer.0.attention.o_proj", "norm2"),
        ("gpt2", "transformer.h.0.attn.c_proj", "ln_2"),
        ("llava", "model.language_model.layers.0.mlp.down_proj", OUTPUT),
    ],
)
def test_the_landing_is_the_sum_with_the_residual(family: str, consumer: str, place: str) -> None:
    sample = build(family)
    double = {k: v.double() if v.is_floating_point() else v for k, v in sample.inputs.items()}
    found = landings(sample.model.double(), double)
    names = {n for n in found if n.endswith(consumer.rpartition("0.")[2])}
    assert consumer in found, sorted(found)
    landing = found[consumer]
    assert landing is not None, names
    assert landing.place == place
    if family == "dinov2":
        scale = sample.model.get_parameter("dinov2.encoder.layer.0.layer_scale1.lambda1").double()
        torch.testing.assert_close(landing.scale, scale.detach())
    else:
        torch.testing.assert_close(landing.scale, torch.ones_like(landing.scale))


class Parallel(nn.Module):
    """x + attention(norm(x)) + ffn(norm(x)): both join at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.a(y) + 0.5 * self.b(torch.relu(y))


def test_parallel_branches_land_at_the_output() -> None:
    block = Parallel().double()
    replay = Replay(block, (torch.randn(2, 5, 8).double(),), {})
    with torch.no_grad():
        for layer, scale in ((block.a, 1.0), (block.b, 0.5)):
            landing = landing_of(replay, layer)
            assert landing is not None
            assert landing.place == OUTPUT
            torch.testing.assert_close(landing.scale, torch.full((8,), scale).double())


def test_windows_do_not_join_in_place_and_are_repaired_all_the_same() -> None:
    """Swin's attention output is moved from windows to the picture before it joins."""
    sample = build("swin")
    found = landings(sample.model, sample.inputs)
    places = {n.rpartition(".")[2]: landing and landing.place for n, landing in found.items()}
    assert places == {"o_proj": "dropout", "fc2": OUTPUT}
    assert errors("swin", 16).after["logits"] < 0.9 * errors("swin", 16).before["logits"]


def errors(family: str, items: int) -> vlprune.OutputError:
    model: nn.Module = build(family).model.double()
    plan = make_plan(discover(model, "head_dim"), lambda size: max(1, size // 2))
    return vlprune.fold(model, plan, batches(4, items))


@pytest.mark.parametrize("unit", ["head_dim", "qk_vo", "head"])
def test_layers_that_run_several_times_are_repaired(unit: Any) -> None:
    model = looped()
    description = discover(model, unit)
    assert any("layers.1.only.0" in s.name for s in description)
    calls = calls_of(model, batches_of(model, batches(2, 2)))
    assert {b.path: b.again for b in blocks_of(model, description.structures, calls[:1])} == {
        "vit.layers.0": False,
        "vit.layers.1.only.0": True,
    }
    names = [s for s in description if "only" in s.name]
    plan = vlprune.Plan({s.name: tuple(range(s.size // 2)) for s in names}, attention=unit)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    error = vlprune.fold(model, plan, batches())
    assert error.kept
    assert error.after["logits"] < 0.75 * error.before["logits"]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("layers.1.only.0" in name for name in changed)
    inputs = batches(1, 2, seed=9)[0]
    with torch.no_grad(), gated(model, description.structures, plan):
        masked = tensors_of(model(**inputs))
    vlprune.rewrite(model, description, plan, verify=inputs)
    with torch.no_grad():
        assert difference(masked, tensors_of(model(**inputs))).relative < 1e-10


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Stop(VlpruneError):
    """Raised in the middle of things."""


def failing_after(model: nn.Module, path: str, calls: int, error: type[BaseException]) -> Any:
    """A hook that raises when the module at ``path`` is called for the nth time."""
    left = [calls]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise error("stop")

    return model.get_submodule(path).register_forward_pre_hook(hook)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("what", "calls"),
    [(w, c) for w, n in (("rotate", 8), ("fold", 14), ("finish", 34)) for c in range(1, n, 4)],
)
def test_whatever_fails_the_model_is_as_it_was(
    what: str, calls: int, error: type[BaseException]
) -> None:
    model: nn.Module = build("vit").model.double().train()
    before, given = state(model), batches(4, 4)
    plan = make_plan(discover(model, "head_dim"), lambda size: size // 2)
    compressor = vlprune.Compressor(
        model, vlprune.OBS(rotate=True), {"params": 0.7}, calibration=given
    )
    path = "vit.layers.1.mlp.fc2"
    hook = failing_after(model, path, calls, error)
    work: dict[str, Any] = {
        "rotate": lambda: vlprune.rotate(model, given),
        "fold": lambda: vlprune.fold(model, plan, given),
        "finish": compressor.finish,
    }
    with pytest.raises(error, match="stop"):
        work[what]()
    hook.remove()
    if what == "finish":
        compressor.detach()
    assert same(before, state(model))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def work_of(folder: Path, stop: int | None = None) -> Calibration:
    """A calibration that is stopped after as many steps."""

    class Told:
        @contextmanager
        def count(self, _what: str, _total: int) -> Any:
            def advance(done: int = 1) -> None:
                nonlocal stop
                if stop is not None:
                    stop -= done
                    if stop < 0:
                        raise Stop

            yield advance

    progress: Any = Told()
    return Calibration(batches(4, 4), work=folder, key="this run", progress=progress)


@pytest.mark.parametrize("stop", range(0, 12, 2))
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, stop: int) -> None:
    def run(calibration: Calibration) -> tuple[dict[str, Tensor], Any]:
        model: nn.Module = build("vit").model
        compressor = vlprune.Compressor(
            model, vlprune.OBS(rotate=True), {"params": 0.7}, calibration=calibration
        )
        compressor.finish()
        return state(model), compressor.report()

    whole, figures = run(work_of(tmp_path / "never stopped"))
    with pytest.raises(Stop):
        run(work_of(tmp_path / "work", stop))
    resumed, again = run(work_of(tmp_path / "work"))
    assert same(whole, resumed)
    assert figures["calibration"] == again["calibration"]


def test_steps_of_another_run_are_not_used(tmp_path: Path) -> None:
    model: nn.Module = build("vit").model
    vlprune.rotate(model, Calibration(batches(2, 4), work=tmp_path, key="a"))
    other: nn.Module = build("vit", seed=1).model
    before = state(other)
    vlprune.rotate(other, Calibration(batches(2, 4), work=tmp_path, key="b"))
    moved = [float((p - before[n]).abs().max()) for n, p in state(other).items()]
    assert max(moved) > 1e-3
    with torch.no_grad():
        x = batches(1, 2)[0]["pixel_values"].float()
        fresh = build("vit", seed=1).model(x).logits
        torch.testing.assert_close(other(x).logits, fresh, rtol=1e-4, atol=1e-5)


def test_a_plan_that_shares_is_refused_before_anything_changes() -> None:
    model: nn.Module = build("vit").model
    before = state(model)
    a, b = (s.name for s in discover(model, "head_dim") if s.kind == "ffn")
    plan = vlprune.Plan({a: (0, 1), b: (1, 3)}, {b: (a, (3,), (0,))})
    with pytest.raises(UnsupportedError, match="shares weights"):
        vlprune.fold(model, plan, batches(2, 2))
    assert same(before, state(model))


def test_a_model_without_weights_is_refused() -> None:
    model: nn.Module = build("vit").model.to("meta")
    with pytest.raises(UnsupportedError, match="load them first"):
        vlprune.rotate(model, batches(1))
    with pytest.raises(DataError, match="no calibration batches"):
        vlprune.rotate(build("vit").model, [])


def test_a_repair_that_does_not_help_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = build("vit").model.double()
    before = state(model)
    plan = make_plan(discover(model, "head_dim"), lambda size: size // 2)
    answers = iter([{"logits": 0.1}, {"logits": 0.2}])
    monkeypatch.setattr("vlprune.calibration.session.Session._apart", lambda *_: next(answers))
    error = vlprune.fold(model, plan, batches(2, 4))
    assert not error.kept
    assert error.after == error.before == {"logits": 0.1}
    assert same(before, state(model))


def test_looped_attention_is_repaired_towards_the_outputs_of_the_dense_model() -> None:
    model = looped()
    plan = vlprune.Plan(
        {s.name: (0, 1) for s in discover(model, "head") if "only" in s.name and s.kind != "ffn"},
        attention="head",
    )
    error = vlprune.fold(model, plan, batches())
    assert error.after["logits"] < 0.8 * error.before["logits"]
