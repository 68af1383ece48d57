"""Cutting: what is proved on the spot, what is put back, and what is left alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import vlprune
from vlprune import Plan, discover, rewrite
from vlprune.cutting import apply as surgery
from vlprune.cutting.difference import tensors_of
from vlprune.cutting.padded import PaddedLinear
from vlprune.cutting.rewrite import perform
from vlprune.cutting.settle import settle
from vlprune.errors import UnsupportedError, VerificationError
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def half(description: Any) -> Plan:
    return make_plan(description, lambda size: max(1, size // 2))


def test_the_proof_says_how_close_it_was() -> None:
    sample = build("blip_vqa")
    description = discover(sample.model)
    cut = settle(sample.model, description, half(description))
    proof = perform(sample.model, cut, sample.inputs)
    assert proof.dtype == "float64"
    assert proof.compared == 1.0
    assert proof.difference <= 1e-12 * max(1, proof.scale)
    assert all(p.dtype == torch.float32 for p in sample.model.parameters())


def test_a_wrong_cut_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = build("siglip")  # class swaps, native cuts
    before_class = {n: type(m) for n, m in sample.model.named_modules()}
    before = copy.deepcopy(sample.model.state_dict())
    description = discover(sample.model)
    monkeypatch.setattr(surgery, "slices_of", _shifted(surgery.slices_of))
    with pytest.raises(VerificationError, match="put back"):
        rewrite(sample.model, description, half(description), verify=sample.inputs)
    after = sample.model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[k].equal(after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert before_class == {n: type(m) for n, m in sample.model.named_modules()}
    assert discover(sample.model) == description
    assert getattr(sample.model.config, "quantization_config", None) is None


def _shifted(real: Any) -> Any:
    def broken(*args: Any) -> Any:
        slices = real(*args)
        index = {
            name: {
                axis: ((index + 1) % length if axis == 1 else index, length)
                for axis, (index, length) in axes.items()
            }
            for name, axes in slices.index.items()
        }
        return dataclasses.replace(slices, index=index)

    return broken


@pytest.mark.parametrize("unit", ["head_dim", "qk_vo"])
def test_indices_are_put_back_too(unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rotary pairs, and those of padded layers."""
    sample = build("qwen3_vl")
    description = discover(sample.model, unit)
    before = copy.deepcopy(sample.model.state_dict())
    monkeypatch.setattr(surgery, "slices_of", _shifted(surgery.slices_of))
    with pytest.raises(VerificationError):
        rewrite(sample.model, description, half(description), verify=sample.inputs)
    assert not any(isinstance(m, PaddedLinear) for m in sample.model.modules())
    after = sample.model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[k].equal(after[k]) for k in before)
    assert not any(type(m).__name__.startswith("Cut") for m in sample.model.modules())


def test_every_module_keeps_its_mode() -> None:
    sample = build("llava")
    sample.model.train()
    sample.model.model.vision_tower.eval()  # frozen by its owner
    before = {path: m.training for path, m in sample.model.named_modules()}
    compressor = vlprune.Compressor(
        sample.model,
        vlprune.Magnitude(),
        {"params": 0.6},
        example_inputs=sample.inputs,
        attention="qk_vo",
    )
    compressor.finish()
    assert any(isinstance(m, PaddedLinear) for m in sample.model.modules())
    assert before == {path: m.training for path, m in sample.model.named_modules()}


def test_half_precision_survives_the_proof() -> None:
    sample = build("clip")
    sample.model.to(torch.bfloat16)
    description = discover(sample.model)
    small = rewrite(sample.model, description, half(description), verify=sample.inputs)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


def test_another_quantizer_is_refused_politely() -> None:
    model = build("vit").model
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    description = discover(model)
    with pytest.raises(UnsupportedError, match="already quantized with 'bitsandbytes'"):
        rewrite(model, description, half(description))
    with pytest.raises(UnsupportedError, match="already quantized"):
        vlprune.Compressor(model, vlprune.Magnitude(), {"params": 0.5})


def test_no_second_copy_of_the_model_is_held() -> None:
    model = build("clip").model
    description = discover(model)
    old = {name: p.data_ptr() for name, p in model.named_parameters()}
    rewrite(model, description, half(description))
    touched = {s.param for x in description for s in x.slots}
    for name, parameter in model.named_parameters():
        assert (parameter.data_ptr() == old[name]) == (name not in touched)
        assert parameter.is_contiguous()


class Odd(nn.Module):
    """A block nobody has seen: familiar names, a forward of its own."""

    def __init__(self, between: nn.Module | None = None, activation: nn.Module | None = None):
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.mlp.act = activation or nn.GELU()
        self.mlp.norm = between or nn.Identity()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).reshape(*x.shape[:2], 2, 4).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = (q @ k.mT / 2).softmax(-1) @ v
        x = x + self.o_proj(y.transpose(1, 2).reshape(x.shape))
        x = x + self.mlp.fc2(self.mlp.norm(self.mlp.act(self.mlp.fc1(x))))
        return self.head(x)


@pytest.mark.parametrize("unit", ["head_dim", "qk_vo", "head"])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.Sigmoid()])
def test_an_unknown_family_is_cut_exactly(unit: str, activation: nn.Module) -> None:
    model = Odd(activation=activation).double()
    description = discover(model, unit)
    assert {s.layout for s in description if s.kind != "ffn"} == {"padded"}
    assert "head" in description.dense
    inputs = {"x": torch.randn(2, 5, 8, dtype=torch.float64)}
    before = sum(p.numel() for p in model.parameters())
    small = rewrite(model, description, half(description), verify=inputs)
    assert sum(p.numel() for p in small.parameters()) < before


def test_a_norm_inside_an_ffn_keeps_it_dense() -> None:
    description = discover(Odd(between=nn.LayerNorm(12)))
    assert not [s for s in description if s.kind == "ffn"]
    assert "LayerNorm" in description.dense["mlp.fc1"]


def test_a_convolution_inside_an_ffn_keeps_it_dense() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3, sr_ratios=[2, 1],
        patch_sizes=[7, 3], strides=[4, 2],
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    description = discover(model)
    assert {s.kind for s in description} == {"attention"}
    reasons = {r for path, r in description.dense.items() if path.endswith(("fc1", "dense1"))}
    assert reasons
    assert all("sits between" in reason for reason in reasons), reasons
    rewrite(
        model, description, half(description), verify={"pixel_values": torch.randn(1, 3, 32, 32)}
    )


@pytest.mark.parametrize("unit", ["head_dim", "qk_vo", "head"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "shared", "per head", "boolean", "padding"])
def test_multihead_attention_takes_every_mask(unit: Any, batch_first: bool, mask: str) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.attn = nn.MultiheadAttention(16, 4, batch_first=batch_first, dtype=torch.float64)
    model.eval()
    x, y = (torch.randn(2, n, 16, dtype=torch.float64) for n in (3, 5))
    if not batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    hidden = torch.rand(3, 5) < 0.4
    hidden[:, 0] = False
    options: dict[str, Any] = {
        "none": {},
        "shared": {"attn_mask": torch.randn(3, 5, dtype=torch.float64)},
        "per head": {
            "attn_mask": torch.randn(2, 1, 3, 5, dtype=torch.float64)
            .repeat(1, 4, 1, 1)
            .flatten(0, 1)
        },
        "boolean": {"attn_mask": hidden},
        "padding": {"key_padding_mask": hidden[:2]},
    }[mask]
    description = discover(model, unit)
    plan = half(description)
    with vlprune.gated(model, description.structures, plan):
        masked, weights = model.attn(x, y, y, **options)
    rewrite(model, description, plan)
    cut, small_weights = model.attn(x, y, y, **options)
    assert torch.allclose(masked, cut, rtol=0, atol=1e-12)
    assert weights.shape == small_weights.shape
    assert model.attn(x, y, y, need_weights=False, **options)[1] is None
    if mask == "none":  # the stock module refuses a causal hint without a mask, so must the cut one
        with pytest.raises(RuntimeError, match="attn_mask"):
            model.attn(x, x, x, is_causal=True)


def test_shared_weights_stay_dense_and_say_so() -> None:
    model = nn.ModuleDict({"a": Odd(), "b": Odd()})
    model["b"].mlp.fc1.weight = model["a"].mlp.fc1.weight
    description = discover(model)
    assert not [s for s in description if s.kind == "ffn"]
    assert "shares its weights with" in description.dense["a.mlp.fc1"]


def test_an_unknown_attention_unit_gets_a_hint() -> None:
    with pytest.raises(UnsupportedError, match="Did you mean 'head_dim'"):
        discover(Odd(), "head_dims")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["blip_captioning", "vilt"])
def test_fused_attention_still_gives_its_maps_to_who_asks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut forward calls one fused kernel; with output_attentions it spells the same maps out."""
    fused: list[int] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        fused.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    sample = build(family)
    model = sample.model.double()
    inputs = {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in sample.inputs.items()
    }
    with torch.no_grad():
        model(**inputs)
    stock_calls = len(fused)
    structures = discover(model)
    keep = {s.name: range(s.size - 1) for s in structures if "attention" in s.kind}
    plan = Plan(keep=keep, fingerprint=structures.fingerprint)
    with vlprune.gated(model, structures, plan), torch.no_grad():
        torch.manual_seed(0)  # ViLT draws patches
        masked = model(**inputs, output_attentions=True)
    small = rewrite(model, structures, plan)
    with torch.no_grad():
        fused.clear()
        torch.manual_seed(0)
        plain = small(**inputs)
        assert len(fused) > stock_calls
        torch.manual_seed(0)
        mapped = small(**inputs, output_attentions=True)
    maps = [name for name in mapped if "attentions" in name and mapped[name]]
    assert maps
    for a, b in zip(tensors_of(plain), tensors_of(mapped), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for name in maps:
        for a, b in zip(masked[name], mapped[name], strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
