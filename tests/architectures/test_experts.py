"""Experts held as one parameter, and latent attention: recognised, cut exactly, priced, refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlprune
from vlprune.architectures import experts
from vlprune.architectures.attention import Leave
from vlprune.calibration.store import Originals
from vlprune.cutting.difference import difference, tensors_of
from vlprune.cutting.gates import gated, ones
from vlprune.cutting.grouped import is_aligned
from vlprune.cutting.sharing.mixed import mixed
from vlprune.folders.ordinary import ordinary
from vlprune.prices import cost
from vlprune.structures.plan import Plan
from vlprune.structures.structure import Gate, Slot, Structure
from vlprune.structures.units import laid_out, positions, span, spread, unit_squares
from vlprune.testing import CHECKS, build
from vlprune.training.gating import Gating

KERNELS = ("eager", "batched_mm", "grouped_mm")


def the_experts(description: vlprune.Description) -> list[Any]:
    return [s for s in description if s.name.endswith("experts")]


# -- which rows belong to a neuron -----------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "order"),
    [("mixtral", (2, 1)), ("gpt_oss", (1, 2)), ("aria", (2, 1)), ("nemotron_h", (1, 1))],
)
def test_the_order_of_fused_rows_is_found_by_running_them(
    family: str, order: tuple[int, int]
) -> None:
    found = the_experts(vlprune.discover(build(family).model))
    assert found
    for structure in found:
        rows = structure.slots[:-1]
        assert {(slot.repeat, slot.inner) for slot in rows} == {order}
        assert structure.attrs


class Own(nn.Module):
    """Experts of one's own, whose forward ``_apply_gate`` finishes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = 3, 8, 12
        self.gate_up_proj = nn.Parameter(torch.randn(3, 24, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """(tokens, hidden) -> the same shape."""
        total = torch.zeros_like(hidden)
        for place in range(index.shape[1]):
            up = torch.einsum("th,toh->to", hidden, self.gate_up_proj[index[:, place]])
            down = self.down_proj[index[:, place]]
            out = torch.einsum("to,tho->th", self.combined(up), down)
            total = total + out * weights[:, place, None]
        return total

    def combined(self, up: Tensor) -> Tensor:
        """(tokens, 2 x neurons) -> (tokens, neurons)."""
        gate, up = up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


class Reversed(Own):
    """The ups in the opposite order of the gates: a neuron's rows are not where any row says."""

    def combined(self, up: Tensor) -> Tensor:
        """(tokens, 2 x neurons) -> (tokens, neurons)."""
        gate, up = up.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up.flip(-1)


class Fixed(Own):
    """Takes no other width."""

    def combined(self, up: Tensor) -> Tensor:
        """(tokens, 2 x neurons) -> (tokens, neurons)."""
        return super().combined(up.reshape(-1, 2, 12).flatten(1))


class Normed(Own):
    """A norm over all neurons: a silent one is not an absent one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)


def test_a_class_of_ones_own_is_cut_only_if_its_forward_takes_it() -> None:
    model = nn.ModuleDict({"experts": Own()})
    (structure,) = vlprune.discover(model)
    assert (structure.size, structure.slots[0].repeat) == (12, 2)
    for strange, why in (
        (Reversed, "is not known"),
        (Fixed, "is not known"),
        (Normed, "norm sits"),
    ):
        description = vlprune.discover(nn.ModuleDict({"experts": strange()}))
        assert not description.structures
        assert why in description.dense["experts"]


def test_weights_that_do_not_fit_and_weights_beside_them() -> None:
    odd = Own()
    odd.down_proj = nn.Parameter(torch.randn(3, 8, 11))
    more = Own()
    more.scale = nn.Parameter(torch.ones(3, 12))
    for module, why in ((odd, "do not fit each other"), (more, "scale sits in its experts")):
        assert why in vlprune.discover(nn.ModuleDict({"experts": module})).dense["experts"]


def test_discovery_leaves_random_numbers_and_the_default_device_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = transformers.MixtralModel(transformers.MixtralConfig(
            vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=2,
        ))  # fmt: skip
        experts._READ.clear()
        assert the_experts(vlprune.discover(model))
    assert torch.equal(before, torch.get_rng_state())


class AnyConfig:
    """Answers every question that an experts class asks of its config with a small number."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for part, answer in ANSWERS.items():
            if re.search(part, name):
                return answer
        return 8


ANSWERS = {
    "act$|activation": "silu", "interm|ffn": 12, "zero_expert": 2, "expert(?!.*per)": 4,
    "latent": None, "eps": 1e-5, "limit|alpha|cap": 3.0,
}  # fmt: skip


@pytest.mark.slow
def test_every_class_of_transformers_that_holds_experts_so_is_understood() -> None:
    known, strange = 0, []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^class (\w*Experts\w*)\(nn\.Module\)", path.read_text(), re.M):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            try:
                one = getattr(module, name)(AnyConfig())
            except (TypeError, AttributeError):  # JetMoE's parts of a layer, DBRX's flat weights
                assert name in ("JetMoeParallelExperts", "DbrxExperts")
                continue
            row = experts.experts_at(one)
            if row is None:
                assert name == "AriaSharedExpertsMLP"  # of three Linears
                continue
            try:
                experts.experts_structure("x", one, row, "")
                known += 1
            except Leave:
                strange.append(name)
    assert not strange
    assert known > 60


# -- exact under every kernel ----------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("width", [8, 7])
def test_masked_is_cut_under_every_implementation(family: str, kernel: str, width: int) -> None:
    sample = build(family)
    sample.model.set_experts_implementation(kernel)  # type: ignore[operator]
    description = vlprune.discover(sample.model)
    chosen = the_experts(description)
    plan = Plan({s.name: tuple(range(1, 2 * width, 2)) for s in chosen})
    with torch.no_grad():
        dense = sample.model(**sample.inputs).logits
        with gated(sample.model, description.structures, plan):
            masked = sample.model(**sample.inputs).logits
        vlprune.rewrite(sample.model, description, plan, verify=sample.inputs)
        cut = sample.model(**sample.inputs).logits
    assert (masked - cut).abs().max() < 1e-5 < (dense - cut).abs().max()
    for structure in chosen:
        module = sample.model.get_submodule(structure.name)
        assert getattr(module, structure.attrs[0].name) == width


def test_a_width_that_the_kernel_does_not_take_runs_expert_by_expert() -> None:
    moe = importlib.import_module("transformers.integrations.moe")
    sample = build("mixtral")
    description = vlprune.discover(sample.model)
    chosen = the_experts(description)
    plan = Plan({s.name: tuple(range(7)) for s in chosen})
    vlprune.rewrite(sample.model, description, plan)
    module: Any = sample.model.get_submodule(chosen[0].name)
    assert not is_aligned(module)
    x, index = torch.randn(5, 32), torch.tensor([[0, 1]] * 5)
    given = (x, index, torch.ones(5, 2))
    with pytest.raises(RuntimeError, match="16 bytes"):
        moe.grouped_mm_experts_forward(module, *given)
    module.config._experts_implementation = "grouped_mm"
    under = module(*given)
    module.config._experts_implementation = "batched_mm"
    assert torch.allclose(under, module(*given), atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "jetmoe", "deepseek_v3"])
def test_gates_written_into_weights_do_what_they_did(family: str) -> None:
    sample = build(family)
    structures = vlprune.discover(sample.model, "qk_vo").structures
    gating = Gating(sample.model, structures, with_gates=True)
    gating.set({s.name: torch.linspace(0, 1, s.size) for s in structures})
    with torch.no_grad():
        with gated(sample.model, structures, gating.gates):
            wanted = sample.model(**sample.inputs).logits
        gating.write_into_weights(Originals(sample.model))
        found = sample.model(**sample.inputs).logits
    assert torch.allclose(wanted, found, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "bridgetower"])
def test_a_mixture_outlives_the_gates_of_one_pass(family: str) -> None:
    sample = build(family)
    description = vlprune.discover(sample.model, "head")
    of_weights = {s.name: s for s in description if s.gates[0].at == "weight"}
    target, source = [*of_weights][1::-1]
    plan = Plan(share={target: (source, (0, 1))}, attention="head")
    with torch.no_grad(), mixed(sample.model, description.structures, plan):
        alone = tensors_of(sample.model(**sample.inputs))
        with gated(sample.model, description.structures, ones(description.structures)):
            passes = [tensors_of(sample.model(**sample.inputs)) for _ in range(2)]
        passes.append(tensors_of(sample.model(**sample.inputs)))
    for found in passes:
        assert difference(alone, found).relative < 1e-6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_vl_moe"])
def test_folders_with_experts_are_loaded_by_plain_from_pretrained(family: str) -> None:
    CHECKS["folders_round_trip"](lambda: build(family), "head")


# -- what it costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_implementation_costs_a_token_its_own_experts_only(kernel: str) -> None:
    sample = build("mixtral")
    sample.model.set_experts_implementation(kernel)  # type: ignore[operator]
    structures = vlprune.discover(sample.model).structures
    profile = cost.measure_macs(sample.model, structures, sample.inputs)
    assert not profile.not_counted
    tokens, chosen, hidden = 12, 2, 32
    for structure in structures:
        if structure.name.endswith("experts"):
            assert profile.unit[structure.name] == 3 * tokens * chosen * hidden
    gates = [m for n, m in sample.model.named_modules() if n.endswith("mlp.gate")]
    linear = sum(m.weight.numel() for m in sample.model.modules() if isinstance(m, nn.Linear))
    routers = sum(m.weight.numel() for m in gates)  # type: ignore[union-attr, operator, misc]
    experts_macs = 2 * 48 * 3 * chosen * hidden
    attention = 2 * 2 * 2 * 4 * 6 * 6 * 8  # layers, products, batch, heads, queries, keys, size
    assert profile.total == tokens * (linear + routers + experts_macs) + attention


# -- latent attention ------------------------------------------------------------------------


def test_latent_attention_in_three_units() -> None:
    model = build("deepseek_v3").model
    name = "model.layers.0.self_attn"
    by_unit = {
        unit: {s.name: s for s in vlprune.discover(model, unit) if s.name.startswith(name)}  # type: ignore[arg-type]
        for unit in ("head", "head_dim", "qk_vo")
    }
    assert {u: {n: s.size for n, s in found.items()} for u, found in by_unit.items()} == {
        "head": {name: 4},
        "head_dim": {name: 6},
        "qk_vo": {f"{name}.qk": 6, f"{name}.vo": 6},
    }
    dense = vlprune.discover(model).dense
    for latent in ("q_a_proj", "kv_a_proj_with_mqa"):
        assert "latent" in dense[f"{name}.{latent}"]
    plan = Plan({f"{name}.qk": (1, 4), f"{name}.vo": (0, 2, 5)}, attention="qk_vo")
    core: Any = vlprune.rewrite(model, vlprune.discover(model, "qk_vo"), plan).get_submodule(name)
    assert (core.qk_nope_head_dim, core.qk_head_dim, core.v_head_dim) == (2, 6, 3)
    assert core.q_b_proj.weight.shape == (4 * 6, 12)
    assert core.kv_b_proj.weight.shape == (4 * 5, 10)
    assert core.o_proj.weight.shape == (32, 4 * 3)


@pytest.mark.parametrize("unit", ["head", "qk_vo"])
def test_an_indexer_beside_the_scores_costs_the_heads_nothing(unit: Any) -> None:
    CHECKS["costs_agree"](lambda: build("deepseek_v32"), unit)


def test_dimensions_without_position_cost_their_part_of_the_scores() -> None:
    sample = build("deepseek_v3")
    shares = {
        unit: sum(s.core_share for s in vlprune.discover(sample.model, unit) if s.core)  # type: ignore[arg-type]
        for unit in ("head", "head_dim", "qk_vo")
    }
    assert shares == pytest.approx({"head": 2.0, "head_dim": 2 * 12 / 16, "qk_vo": 2 * 12 / 16})


def test_latent_attention_that_stays_dense() -> None:
    model = build("glm4_moe_lite").model
    attention: Any = model.get_submodule("model.layers.0.self_attn")

    class Other(type(attention)):  # type: ignore[misc]
        """A forward of one's own, whose source says nothing of the order."""

    attention.__class__ = Other
    attention.kv_b_proj = nn.Linear(10, 4 * 14 + 1, bias=False)
    why = vlprune.discover(model, "head").dense["model.layers.0.self_attn.kv_b_proj"]
    assert why.startswith("its projections have 40, 57 and 32 rows and columns, which are not")
    attention.kv_b_proj = nn.Linear(10, 4 * 14, bias=False)
    assert vlprune.discover(model, "head").structures[0].layout == "padded"
    for unit in ("qk_vo", "head_dim"):
        why = vlprune.discover(model, unit).dense["model.layers.0.self_attn.kv_b_proj"]  # type: ignore[arg-type]
        assert why == "the row order of the heads in Other is not known"


def test_values_of_another_size_than_keys_are_cut_alone() -> None:
    structure = vlprune.discover(build("glm4_moe_lite").model, "head_dim").structures[0]
    assert structure.size == 8
    assert [slot.param.split(".")[-2] for slot in structure.slots] == ["kv_b_proj", "o_proj"]


# -- slots with other rows between their repeats ---------------------------------------------


def test_positions_of_a_slot_with_a_period() -> None:
    slot = Slot("w", 0, start=1, repeat=2, inner=1, period=5)
    assert laid_out(slot, 3).flatten(1).tolist() == [[1, 2, 3], [6, 7, 8]]
    assert positions(slot, 3, [2, 0]).tolist() == [3, 1, 8, 6]
    assert span(slot, 3) == 8
    gate = Gate("m", "output", 1, 2, 1, period=5)
    values = torch.tensor([2.0, 3.0, 4.0], requires_grad=True)
    wide = spread(values, gate, 10)
    assert wide.tolist() == [1, 2, 3, 4, 1, 1, 2, 3, 4, 1]
    wide.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2, 2, 2]


def test_squares_of_a_slot_with_a_period_are_those_of_its_own_rows() -> None:
    weight = torch.arange(10.0)[:, None]
    slot = Slot("w", 0, start=1, repeat=2, period=5)
    structure = Structure("s", "ffn", 3, "", (slot,), ())
    assert unit_squares(lambda name: weight, [structure])["s"].tolist() == [
        1 + 36, 4 + 49, 9 + 64,
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_experts_of_one_width_are_an_ordinary_model(family: str) -> None:
    sample = build(family)
    description = vlprune.discover(sample.model, "head")
    plan = Plan({s.name: tuple(range(8)) for s in the_experts(description)}, attention="head")
    small = vlprune.rewrite(sample.model, description, plan)
    plain = ordinary(small)
    assert plain is not small
    with torch.no_grad():
        wanted, found = (model(**sample.inputs).logits for model in (small, plain))
    assert torch.allclose(wanted, found, atol=1e-6)
