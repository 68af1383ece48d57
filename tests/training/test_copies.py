"""While a search runs, copies of the model are ordinary models, and nothing outlives it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import vlprune
from vlprune.cutting.gates import GATES, has_gates
from vlprune.errors import UnsupportedError
from vlprune.testing import build
from vlprune.training.gating import _Hook


def searching(family: str = "clip", shared: bool = False) -> tuple[Any, Any, vlprune.Compressor]:
    """A model, its inputs, and a Compressor whose gates lie between 0 and 1."""
    sample = build(family)
    model: Any = sample.model
    if shared:
        description = vlprune.discover(model)
        source, target = [s for s in description if s.kind == "ffn" and s.tower == "vision"][:2]
        plan = vlprune.Plan(
            keep={},
            share={target.name: (source.name, (0, 2), (1, 2))},
            attention=description.attention,
            fingerprint=description.fingerprint,
        )
        vlprune.rewrite(model, description, plan)
    compressor = vlprune.Compressor(model, vlprune.Taylor(), {"params": 0.7})
    compressor.attach()
    generator = torch.Generator().manual_seed(0)
    compressor._gating.set(
        {n: torch.rand(len(g), generator=generator) for n, g in compressor.gates.items()}
    )
    return model, sample.inputs, compressor


def numbers(model: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return vlprune.cutting.difference.tensors_of(model(**inputs))


def untouched(module: nn.Module) -> bool:
    """Whether a module has no gates, no hook that acts, and only stock classes that pickle."""
    hooks = [
        hook
        for m in module.modules()
        for table in (m._forward_pre_hooks, m._load_state_dict_pre_hooks, m._forward_hooks)
        for hook in table.values()
    ]
    inner = [getattr(h, "hook", h) for h in hooks]  # torch wraps those of load_state_dict
    acting = [h for h in inner if isinstance(h, _Hook) and h.owner is not None]
    classes = [type(m) for m in module.modules() if "gated_base" in vars(type(m))]
    return not has_gates(module) and not acting and not classes


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "torch.save": by_torch,
    "average": lambda model: AveragedModel(model).module,
}
FAMILIES = ["clip", "siglip", "bridgetower", "gpt2", "blip", "shared", "llava"]


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_have_weights_of_their_own_and_no_gates(family: str) -> None:
    shared = family == "shared"
    plain = build("clip" if shared else family)
    model, inputs, compressor = searching("clip" if shared else family, shared)
    gated, stock = numbers(model, inputs), [type(m) for m in plain.model.modules()]
    if shared:
        compressor.detach()
        expected = numbers(model, inputs)
        compressor.attach()
    else:
        expected = numbers(plain.model, inputs)
    assert any(not torch.equal(a, b) for a, b in zip(gated, expected, strict=True))
    for name, make in COPIES.items():
        if name in ("pickle", "torch.save") and family in ("shared", "llava"):
            continue  # torch cannot pickle parametrized modules, nor transformers' own hooks
        other = make(model)
        assert untouched(other), name
        assert list(other.state_dict()) == list(model.state_dict()), name
        if not shared:  # torch makes a class for each parametrized module
            assert [type(m) for m in other.modules()] == stock, name
        kept = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        for one, two in zip(numbers(other, inputs), expected, strict=True):
            assert torch.equal(one, two), name
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), kept, strict=True):
                parameter.copy_(before)
    for one, two in zip(numbers(model, inputs), gated, strict=True):
        assert torch.equal(one, two)  # copying has not disturbed the search


def test_a_tower_and_a_layer_alone() -> None:
    model, inputs, _compressor = searching()
    plain = build("clip").model
    pixels = {"pixel_values": inputs["pixel_values"]}
    tower, layer = copy.deepcopy(model.vision_model), model.vision_model.encoder.layers[0].mlp.fc1
    assert untouched(tower)
    assert torch.equal(numbers(tower, pixels)[0], numbers(plain.vision_model, pixels)[0])
    x = torch.ones(1, layer.in_features)
    for other in (copy.deepcopy(layer), copy.copy(layer), by_pickle(layer)):
        assert type(other) is nn.Linear
        assert GATES not in other.__dict__
        assert torch.equal(other(x), plain.vision_model.encoder.layers[0].mlp.fc1(x))
    assert has_gates(layer)
    assert not torch.equal(layer(x), plain.vision_model.encoder.layers[0].mlp.fc1(x))


def test_a_moving_average_follows_the_weights_alone() -> None:
    model, inputs, compressor = searching()
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5), use_buffers=False)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update_parameters(model)
    for ours, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, theirs - 0.5, atol=1e-5)
    assert untouched(average.module)
    assert compressor._gating.attached
    del inputs


def test_replicas_of_data_parallel_compute_alike() -> None:
    model, _, _compressor = searching()
    layer = model.vision_model.encoder.layers[0].mlp.fc1
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight * 2, layer.bias
    x = torch.ones(1, layer.in_features)
    assert replica(x).shape == layer(x).shape
    del replica
    assert has_gates(layer)


def test_states_casts_and_moves_keep_the_gates() -> None:
    model, inputs, _compressor = searching()
    plain = build("clip", seed=3).model
    gated = numbers(model, inputs)
    assert list(model.state_dict()) == list(plain.state_dict())
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(model.state_dict()[n], t) for n, t in plain.state_dict().items())
    model.load_state_dict(own)
    model.to("cpu").double().float()
    assert torch.equal(numbers(model, inputs)[0], gated[0])
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in inputs.items()}
    assert numbers(model.bfloat16(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("order", ["hook first", "gates first"])
def test_hooks_of_accelerate_live_beside_gates(order: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return args, kwargs

    Counting.calls = 0
    sample = build("clip")
    layers = [m for m in sample.model.modules() if isinstance(m, nn.Linear)]
    compressor = vlprune.Compressor(sample.model, vlprune.Taylor(), {"params": 0.7})
    expected = numbers(build("clip").model, sample.inputs)[0]

    def hook() -> None:
        for layer in layers:
            add_hook_to_module(layer, Counting())

    if order == "hook first":
        hook()
    compressor.attach()
    if order == "gates first":
        hook()
    compressor._gating.set({n: torch.zeros(len(g)) for n, g in compressor.gates.items()})
    assert not torch.allclose(numbers(sample.model, sample.inputs)[0], expected)
    used = Counting.calls
    assert used > 0
    compressor.detach()
    assert torch.equal(numbers(sample.model, sample.inputs)[0], expected)
    assert Counting.calls == 2 * used
    for layer in layers:
        remove_hook_from_module(layer)
        assert type(layer).forward is nn.Linear.forward
    assert torch.equal(numbers(sample.model, sample.inputs)[0], expected)
    assert not has_gates(sample.model)


def test_torch_compile_sees_the_gates() -> None:
    model, _, compressor = searching("vit")
    mlp, plain = model.vit.layers[0].mlp, build("vit").model.vit.layers[0].mlp
    fast, x = torch.compile(mlp, backend="eager"), torch.ones(1, 2, mlp.fc1.in_features)
    assert not torch.allclose(mlp(x), plain(x))
    assert torch.allclose(fast(x), mlp(x))
    compressor._gating.set({n: torch.ones(len(g)) for n, g in compressor.gates.items()})
    assert torch.allclose(fast(x), plain(x))
    compressor.detach()
    assert torch.allclose(fast(x), plain(x))


# -- one search at a time ----------------------------------------------------------------


def compressor_of(model: Any, method: Any = None) -> vlprune.Compressor:
    return vlprune.Compressor(model, method or vlprune.Taylor(), {"params": 0.75})


def test_a_second_compressor() -> None:
    model, inputs, first = searching()
    second = compressor_of(model)
    with pytest.raises(UnsupportedError, match=r"finish\(\).*detach\(\)"):
        second.attach()
    with pytest.raises(UnsupportedError, match=r"finish\(\).*detach\(\)"):
        second.step(0.5)
    magnitude = compressor_of(model, vlprune.Magnitude())
    with pytest.raises(UnsupportedError, match=r"finish\(\) or detach\(\)"):
        magnitude.finish()
    first.detach()
    with second:
        numbers(model, inputs)
    assert untouched(model)
    magnitude.finish()


@pytest.mark.parametrize("which", ["tower", "parent"])
def test_a_second_compressor_on_a_part_or_on_the_whole(which: str) -> None:
    model = build("clip").model
    one, other = (model, model.vision_model) if which == "tower" else (model.vision_model, model)
    first = compressor_of(one)
    first.attach()
    second = compressor_of(other)
    with pytest.raises(UnsupportedError, match="another Compressor"):
        second.attach()
    with pytest.raises(UnsupportedError, match="search is running"):
        compressor_of(other, vlprune.Magnitude()).finish()
    first.detach()
    second.attach()
    second.detach()
    assert untouched(model)


def test_a_compressor_that_is_deleted_leaves_nothing() -> None:
    sample = build("clip")
    model, before = sample.model, [dict(m.__dict__) for m in sample.model.modules()]
    classes = [type(m) for m in model.modules()]
    compressor: Any = compressor_of(model)
    assert untouched(model)
    callback: Any = compressor.callback()
    assert not untouched(model)
    del compressor, callback
    gc.collect()
    assert untouched(model)
    assert [type(m) for m in model.modules()] == classes
    assert [m.__dict__.keys() for m in model.modules()] == [old.keys() for old in before]
    with pytest.raises(ZeroDivisionError), compressor_of(model):
        raise ZeroDivisionError
    assert untouched(model)


def test_jsp_and_magnitude_leave_nothing_either() -> None:
    sample = build("clip")
    batch = {**sample.inputs, "return_loss": True}
    compressor: Any = vlprune.Compressor(
        sample.model,
        vlprune.JSP(base="text", other="vision", mismatch="skip"),
        {"params": 0.8},
        held_out=[batch],
    )
    compressor.attach()
    copied = copy.deepcopy(sample.model)
    assert untouched(copied)
    del compressor
    gc.collect()
    assert untouched(sample.model)
