"""Layers that read the keys and values of another layer (Gemma 3n, Gemma 4), and layers whose keys
are the values (Gemma 4)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import vlprune
from vlprune.testing import CHECKS
from vlprune.testing.families import Sample

SIZES = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
BORROWING = ("model.layers.2.self_attn", "model.layers.3.self_attn")


def built(name: str) -> Sample:
    torch.manual_seed(0)
    if name.startswith("gemma4"):
        more: dict[str, Any] = {"attention_k_eq_v": name == "gemma4-k_eq_v"}
        model: Any = T.Gemma4ForCausalLM(T.Gemma4TextConfig(**SIZES, global_head_dim=8, **more))
    else:
        few = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
        model = T.Gemma3nForCausalLM(T.Gemma3nTextConfig(**SIZES, **few))
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    return Sample(model.eval(), {"input_ids": ids}, generate={"input_ids": ids[:, :4]})


@pytest.mark.parametrize(
    "unit",
    [
        "head",
        *(pytest.param(u, marks=pytest.mark.slow) for u in ("query_head", "head_dim", "qk_vo")),
    ],
)
@pytest.mark.parametrize("name", ["gemma4", "gemma4-k_eq_v", "gemma3n"])
def test_the_checks(name: str, unit: str) -> None:
    checks = ("order_is_execution_order", "masked_equals_cut", "generation_agrees")
    for check in (*checks, "every_structure_alone_equals_its_mask"):
        CHECKS[check](partial(built, name), unit)


@pytest.mark.parametrize("name", ["gemma4", "gemma3n"])
def test_their_query_heads_go_one_by_one(name: str, tmp_path: Any) -> None:
    sample = built(name)
    description = vlprune.discover(sample.model)
    own = [s for s in description.structures if s.name in BORROWING]
    assert [s.size for s in own] == [4, 4]
    assert not [p for p in description.dense if p.startswith(BORROWING) and p.endswith("_proj")]
    keep = {BORROWING[0]: (1, 2, 3), BORROWING[1]: (0,)}  # not the same in each group
    plan = vlprune.Plan(
        keep=keep, attention=description.attention, fingerprint=description.fingerprint
    )
    small = vlprune.rewrite(sample.model, description, plan, verify=sample.inputs)
    for layer, heads in zip(BORROWING, (3, 1), strict=True):
        assert small.get_parameter(f"{layer}.q_proj.weight").shape == (8 * heads, 32)
        assert small.get_parameter(f"{layer}.o_proj.weight").shape == (32, 8 * heads)
    vlprune.save(small, tmp_path / "small")
    with torch.no_grad():
        again = vlprune.load(tmp_path / "small").eval()(**sample.inputs).logits
        torch.testing.assert_close(again, small(**sample.inputs).logits)


def test_keys_that_are_the_values_go_with_their_queries() -> None:
    model = built("gemma4-k_eq_v").model
    for unit in ("head", "head_dim", "qk_vo"):
        description = vlprune.discover(model, unit)
        (own,) = (s for s in description.structures if s.name == "model.layers.1.self_attn")
        assert {slot.param.split(".")[-2] for slot in own.slots} == {"q_proj", "k_proj", "o_proj"}
        assert own.size == (2 if unit == "head" else 8)


def test_calibration_repairs_them() -> None:
    sample = built("gemma4")
    ids = [torch.randint(3, 60, (4, 9)) for _ in range(4)]
    compressor = vlprune.Compressor(
        sample.model, vlprune.OBS(), {"params": 0.85}, attention="head",
        calibration=[{"input_ids": one} for one in ids],
    )  # fmt: skip
    compressor.finish()
    assert compressor.verification is not None
    assert compressor.verification.difference < 1e-9


def test_queries_beside_other_names_are_no_such_block() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
            self.head_dim = 4

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.o_proj(self.q_proj(x).softmax(-1))
            return result

    assert not vlprune.discover(nn.Sequential(Pair())).structures
