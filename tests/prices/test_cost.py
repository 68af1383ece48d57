"""Parameters and MACs against arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch

from vlprune import Plan, cost, discover
from vlprune.testing import build

HIDDEN, FFN, HEADS, SIZE, TOKENS, BATCH = 32, 48, 4, 8, 5, 2


def test_params_of_a_vit_by_hand() -> None:
    model = build("vit").model
    description = discover(model)
    dense = sum(p.numel() for p in model.parameters())
    assert cost.params(model, description.structures) == dense
    keep = {
        "vit.layers.0.attention": (0, 1, 2),  # loses 5 of 8 dimensions in each of 4 heads
        "vit.layers.1.mlp.fc1": (7,),  # loses 47 of 48 neurons
    }
    attention_unit = HEADS * (3 * (HIDDEN + 1) + HIDDEN)  # q, k, v rows with bias; o columns
    ffn_unit = HIDDEN + 1 + HIDDEN
    want = dense - 5 * attention_unit - 47 * ffn_unit
    assert cost.params(model, description.structures, Plan(keep=keep)) == want


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_macs_of_a_vit_by_hand(implementation: str) -> None:
    sample = build("vit")
    sample.model.set_attn_implementation(implementation)
    description = discover(sample.model)
    profile = cost.measure_macs(sample.model, description.structures, sample.inputs)
    tokens = BATCH * TOKENS
    layer = tokens * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN)
    scores = 2 * BATCH * HEADS * TOKENS * TOKENS * SIZE  # q.k and weights.v
    patches = BATCH * (TOKENS - 1) * 3 * 8 * 8 * HIDDEN
    head = BATCH * HIDDEN * 5
    assert profile.total == patches + 2 * (layer + scores) + head
    attention = profile.unit["vit.layers.0.attention"]
    assert attention == tokens * 4 * HIDDEN * HEADS + scores / SIZE
    assert profile.unit["vit.layers.0.mlp.fc1"] == tokens * 2 * HIDDEN
    assert profile.not_counted == ()


def test_what_has_no_price_is_named() -> None:
    sample = build("grounding_dino")
    structures = discover(sample.model).structures
    assert (
        "aten.grid_sampler_2d"
        in cost.measure_macs(sample.model, structures, sample.inputs).not_counted
    )


def test_a_model_that_remembers_costs_as_much_each_time() -> None:
    """OmDet-Turbo keeps its text embeddings, so that a second pass is cheaper by its text tower."""
    sample = build("omdet_turbo")
    found = [cost.measure_macs(sample.model, (), sample.inputs).total for _ in range(2)]
    assert found[0] == found[1]


def test_soft_params_have_the_unit_price_as_gradient() -> None:
    model = build("clip").model
    structures = discover(model).structures
    gates = {s.name: torch.full((s.size,), 0.7, requires_grad=True) for s in structures}
    total = cost.params(model, structures, gates)
    assert isinstance(total, torch.Tensor)
    total.backward()
    prices = cost.param_prices(model, structures)
    for name, gate in gates.items():
        assert torch.allclose(gate.grad, torch.full_like(gate, prices.unit[name]))


def test_measuring_leaves_the_model_alone() -> None:
    sample = build("siglip")
    sample.model.train()
    fast = torch.backends.mha.get_fastpath_enabled()
    structures = discover(sample.model).structures
    profile = cost.measure_macs(sample.model, structures, sample.inputs)
    assert sample.model.training
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sample.model.modules())
    # the pooling head asks with one token and reads many: queries cost less than keys
    head = profile.unit["vision_model.head.attention"]
    tokens, width, heads, size = 4, 32, 4, 8
    rows = 2 * heads * width * (1 + 2 * tokens) + 2 * heads * width  # q, k, v rows; o columns
    assert head == rows + 2 * 2 * heads * tokens * size / size
