"""Whole experts: routers that leave some out, the cut that matches them, prices and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from typer.testing import CliRunner

import vlprune
from ranks import HEAD, launch
from vlprune.commands.main import app
from vlprune.cutting import routers
from vlprune.cutting.difference import difference, tensors_of
from vlprune.cutting.gates import gated, ones
from vlprune.errors import BudgetError, PlanError, UnsupportedError
from vlprune.folders.ordinary import ordinary
from vlprune.measuring import sensitivity
from vlprune.methods.walk import walk
from vlprune.prices import cost
from vlprune.prices.prices import Prices
from vlprune.prices.select import select
from vlprune.streaming.cut import stream_cut
from vlprune.structures.plan import Plan
from vlprune.structures.structure import Description, Structure
from vlprune.testing import CHECKS, Sample, build, conformance
from vlprune.testing import experts as families
from vlprune.testing.conformance import make_plan

discover = partial(vlprune.discover, attention="head", experts="expert")


def glm4_moe() -> Sample:
    """All experts in one group, and a bias of the choice that is a buffer."""
    torch.manual_seed(0)
    more = {"n_routed_experts": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    sample: Sample = families._decoder(
        transformers.Glm4MoeForCausalLM, **families._FEW, **more, head_dim=8,
        first_k_dense_replace=1,
    )  # fmt: skip
    return _noisy(sample)


def gemma4() -> Sample:
    """The router and the experts are children of the layer, and the rows those of a grandchild."""
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(
        **families._language_model(
            enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=20,
            head_dim=8, global_head_dim=8, layer_types=["sliding_attention", "full_attention"],
            hidden_size_per_layer_input=0, vocab_size_per_layer_input=32, num_kv_shared_layers=0,
        )
    )  # fmt: skip
    model = transformers.Gemma4ForCausalLM(config)
    return _noisy(families._routed(model, families._words()))


def afmoe() -> Sample:
    """The router takes three axes, and is handed a bias that its block holds as a parameter."""
    torch.manual_seed(0)
    return _noisy(
        families._decoder(
            transformers.AfmoeForCausalLM, **families._FEW, num_experts=5, num_dense_layers=1,
            num_shared_experts=1, head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
        )
    )  # fmt: skip


def _noisy(sample: Sample) -> Sample:
    """Routers as they are after a training: rows and biases that are not all zero."""
    sample.model.eval()
    for name, tensor in (*sample.model.named_parameters(), *sample.model.named_buffers()):
        if "bias" in name or ".gate." in name or "router" in name:
            nn.init.uniform_(tensor, 0.1, 0.9) if tensor.dim() == 1 else nn.init.normal_(tensor)
    return sample


def grouped() -> Sample:
    """Two groups of the best three are chosen first, by the sum of the two best of each."""
    torch.manual_seed(0)
    more = {**families._DEEPSEEK, "n_routed_experts": 12, "n_group": 3, "topk_group": 2}
    more["num_experts_per_tok"] = 3
    return _noisy(families._decoder(transformers.DeepseekV3ForCausalLM, **more))


def limited() -> Sample:
    """Groups by the one best of each, and a softmax."""
    torch.manual_seed(0)
    more = {**families._DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 4}
    more |= {"topk_group": 2, "q_lora_rank": None}
    sample = _noisy(families._decoder(transformers.DeepseekV2ForCausalLM, **more))
    sample.rounding = 1e-6
    return sample


OWN = {make.__name__: make for make in (glm4_moe, gemma4, afmoe, grouped, limited)}
QUICK = ("mixtral",)
ALL = (
    *QUICK, "glm4_moe", "grouped", "limited", "gpt_oss", "afmoe", "gemma4", "qwen2_moe",
    "qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "olmoe", "phimoe", "granitemoe", "jamba",
    "nemotron_h", "aria", "deepseek_v3", "mistral4", "mistral_large4", "glm4v_moe", "glm4_moe_lite",
    "deepseek_v32", "llama4",
)  # fmt: skip
FEW = ("glm4_moe", "grouped", "gpt_oss", "qwen3_vl_moe", "llama4")
BRIEFLY = ("masked_equals_cut", "costs_agree", "folders_round_trip")


def made(family: str) -> Sample:
    return OWN[family]() if family in OWN else build(family)


def the_experts(description: Description) -> list[Structure]:
    return [s for s in description if s.kind == "experts"]


def outputs(sample: Sample) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(sample.model(**sample.inputs))


def plan_for(description: Description, *counts: int) -> Plan:
    """A plan that keeps the last ``counts`` of the experts, layer by layer."""
    layers = the_experts(description)
    keep = {s.name: (*range(s.size - n, s.size),) for s, n in zip(layers, counts, strict=True)}
    return Plan(keep=keep, attention="head", experts="expert")


# -- exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "check"),
    [
        *((family, check) for family in QUICK for check in CHECKS),
        *((family, check) for family in FEW for check in BRIEFLY),
        *(
            pytest.param(family, check, marks=pytest.mark.slow)
            for family in ALL[len(QUICK) :]
            for check in CHECKS
            if family not in FEW or check not in BRIEFLY
        ),
    ],
)
def test_the_suite_holds_for_whole_experts(
    family: str, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "discover", partial(vlprune.discover, experts="expert"))
    CHECKS[check](partial(made, family), "head")


@pytest.mark.parametrize(
    "family", [name for name in ALL if name not in ("qwen3_5_moe", "limited", "llama4")]
)
def test_all_of_these_routers_are_understood(family: str) -> None:
    model = made(family).model
    found = the_experts(discover(model))
    assert found
    for structure in found:
        assert structure.least == 2 < structure.size
        assert {attr.name for attr in structure.attrs} == {"num_experts"}
        assert not structure.name.startswith(tuple(discover(model).dense))


def test_a_mask_that_does_not_route_anew_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent experts that tokens still go to are not experts that are gone."""

    def silent(_router: Any, values: Tensor, forward: Any, args: Any, kwargs: Any) -> Any:
        logits, weights, chosen, *rest = forward(*args, **kwargs)
        return logits, weights * values[chosen].to(weights.dtype), chosen, *rest

    monkeypatch.setattr(conformance, "discover", partial(vlprune.discover, experts="expert"))
    monkeypatch.setattr("vlprune.cutting.gates.routed", silent)
    with pytest.raises(AssertionError, match="apart"):
        CHECKS["masked_equals_cut"](partial(build, "mixtral"), "head")


@pytest.mark.parametrize("forgotten", ["attrs", "buffers"])
def test_a_number_or_a_bias_that_does_not_follow_is_seen(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(*args: Any) -> Description:
        found = vlprune.discover(*args, experts="expert")  # type: ignore[misc]
        return replace(found, structures=tuple(replace(s, **{forgotten: ()}) for s in found))

    monkeypatch.setattr(conformance, "discover", careless)
    with pytest.raises((AssertionError, RuntimeError)):
        CHECKS["masked_equals_cut"](glm4_moe, "head")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_the_load_balancing_loss_is_that_of_the_masked_model(family: str) -> None:
    """Though layers keep different numbers of experts, and the loss knows one number for all."""
    sample = made(family)
    model = sample.model.double()
    inputs = {**sample.inputs, "labels": sample.inputs["input_ids"], "output_router_logits": True}
    description = discover(model)
    plan = plan_for(description, 3, 2)
    with gated(model, description.structures, plan):
        masked: Any = model(**inputs)
    cut: Any = vlprune.rewrite(model, description, plan, verify=inputs)(**inputs)
    assert masked.aux_loss.isfinite()
    assert torch.equal(masked.aux_loss, cut.aux_loss)
    for logits, kept in zip(cut.router_logits, (3, 2), strict=True):
        assert logits.shape[-1] == 4
        assert logits.isfinite().sum(-1).eq(kept).all()
    cut.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_gate_scales_an_expert_and_zero_takes_it_away() -> None:
    """In proportion down to 0, where it jumps: the token then goes to another expert."""
    sample = build("mixtral")
    block: Any = sample.model.double().get_submodule("model.layers.0.mlp")
    description = discover(sample.model)
    structure = the_experts(description)[0]
    hidden = torch.randn(1, 40, 32, dtype=torch.float64)

    def under(value: float) -> Tensor:
        gates = ones([structure])
        gates[structure.name][1] = value
        with gated(sample.model, [structure], gates), torch.no_grad():
            return block(hidden)

    whole, half, nearly, gone = (under(value) for value in (1.0, 0.5, 1e-12, 0.0))
    with torch.no_grad():
        assert torch.equal(whole, block(hidden))
    assert torch.allclose(half, (whole + nearly) / 2, atol=1e-10)
    chosen = block.gate(hidden)[2].eq(1).any(-1)
    assert (whole - half)[0, chosen].abs().amax(-1).min() > 1e-3
    assert 0 < int(chosen.sum()) < len(chosen)
    assert torch.allclose(gone[0, ~chosen], whole[0, ~chosen], atol=1e-12)
    assert (gone - nearly)[0, chosen].abs().amax(-1).min() > 1e-3


# -- groups of experts that are chosen first -----------------------------------------------


@pytest.mark.parametrize(
    ("family", "groups", "size", "least"),
    [("grouped", 3, 4, 2), ("limited", 4, 2, 1), ("deepseek_v3", 2, 4, 2)],
)
def test_groups_keep_equally_many_experts_and_enough(
    family: str, groups: int, size: int, least: int
) -> None:
    """The two best of a group must be there; of 2 groups with 1 best each a token finds its 2."""
    model = made(family).model
    (structure,) = the_experts(discover(model))
    assert (structure.size, structure.least, structure.gates[0].repeat) == (size, least, groups)
    assert {slot.repeat for slot in (*structure.slots, *structure.buffers)} == {groups}
    if least > 1:
        plan = plan_for(discover(model), least - 1)
        with pytest.raises(PlanError, match=f"in each of the {groups} groups"):
            plan.check(discover(model).structures)


def test_what_goes_of_a_group_is_none_that_it_can_choose() -> None:
    sample = made("grouped")
    model: Any = sample.model.double()
    description = discover(model)
    gate = model.get_submodule("model.layers.1.mlp.gate")
    hidden = torch.randn(40, 32, dtype=torch.float64)
    plan = plan_for(description, 2)
    with gated(model, description.structures, plan), torch.no_grad():
        masked = gate(hidden)
    vlprune.rewrite(model, description, plan, verify=sample.inputs)
    with torch.no_grad():
        logits, weights, chosen = gate(hidden)
    stays = torch.tensor([2, 3, 6, 7, 10, 11])  # the last two of each four
    assert logits.shape == (40, 12)
    assert logits.isfinite().nonzero()[:, 1].unique().equal(stays)
    assert torch.equal(stays[chosen], masked[2])
    assert torch.equal(weights, masked[1])
    assert gate.kept_experts.tolist() == [2, 3]
    (smaller,) = the_experts(discover(model))
    assert (smaller.size, smaller.least) == (2, 2)


def test_the_config_follows_experts_of_groups(tmp_path: Path) -> None:
    sample = made("grouped")
    description = discover(sample.model)
    vlprune.rewrite(sample.model, description, plan_for(description, 3), verify=sample.inputs)
    expected = outputs(sample)
    plain = ordinary(sample.model)
    assert (plain.config.num_local_experts, plain.config.n_group) == (9, 3)
    assert difference(expected, outputs(replace(sample, model=plain))).relative < 1e-6
    plain.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert difference(expected, outputs(replace(sample, model=loaded))).relative < 1e-6


# -- experts that compute on every token ---------------------------------------------------


def test_a_router_that_gives_scores_gives_none_to_experts_that_are_gone() -> None:
    """Llama 4's multiplies what every expert is handed, by 0 where it is not chosen."""
    sample = made("llama4")
    model: Any = sample.model.double()
    description = discover(model)
    (structure,) = the_experts(description)
    assert (structure.size, structure.least) == (4, 1)
    router = model.get_submodule("model.layers.1.feed_forward.router")
    hidden = torch.randn(40, 32, dtype=torch.float64)
    plan = plan_for(description, 2)
    with gated(model, description.structures, plan), torch.no_grad():
        masked = router(hidden)
    vlprune.rewrite(model, description, plan, verify=sample.inputs)
    with torch.no_grad():
        scores, logits = router(hidden)
    assert torch.equal(masked[0], torch.cat([torch.zeros_like(scores), scores], 1))
    assert torch.equal(masked[1], logits)
    assert logits.isfinite().any(0).tolist() == [False, False, True, True]
    assert (scores != 0).sum(1).eq(1).all()
    plain = ordinary(model)
    assert plain.config.num_local_experts == 2
    expected = outputs(sample)
    assert difference(expected, outputs(replace(sample, model=plain))).relative < 1e-6


def test_llama_4_is_cut_from_folder_to_folder(tmp_path: Path) -> None:
    """Experts alone: what else a cut changes, its positions in float32 round."""
    model: Any = build("llama4").model
    model.save_pretrained(tmp_path / "dense")
    plan = plan_for(discover(model), 3)
    stream_cut(tmp_path / "dense", plan, tmp_path / "streamed", tmp_path / "work")
    vlprune.rewrite(model, discover(model), plan)
    loaded = vlprune.load(tmp_path / "streamed").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_experts_that_compute_on_every_token_save_macs() -> None:
    sample = made("llama4")
    options: Any = {"example_inputs": sample.inputs, "skip": ("*.self_attn", "*_proj")}
    compressor = _compressor(sample, vlprune.Magnitude(), {"macs": 0.9}, **options)
    before = cost.macs(sample.model, (), sample.inputs)
    compressor.finish()
    assert cost.macs(sample.model, (), sample.inputs) <= 0.9 * before
    with pytest.raises(BudgetError, match="save no latency"):
        _compressor(made("llama4"), vlprune.Magnitude(), {"latency": 0.9}, **options)


# -- in folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["glm4_moe", "grouped", pytest.param("qwen3_vl_moe", marks=pytest.mark.slow)]
)
def test_a_model_is_cut_from_folder_to_folder(family: str, tmp_path: Path) -> None:
    sample = made(family)
    sample.model.save_pretrained(tmp_path / "dense")
    description = discover(sample.model)
    plan = make_plan(description, lambda size: size // 2)
    stream_cut(tmp_path / "dense", plan, tmp_path / "streamed", tmp_path / "work")
    vlprune.save(vlprune.rewrite(sample.model, description, plan), tmp_path / "whole")
    first, second = (vlprune.load(tmp_path / name).state_dict() for name in ("streamed", "whole"))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.endswith("kept_experts") for name in first)
    assert Plan.load(tmp_path / "whole" / "plan.json").experts == "expert"


def test_the_command_line_takes_whole_experts(tmp_path: Path) -> None:
    build("mixtral").model.save_pretrained(tmp_path / "dense")
    words = ["compress", tmp_path / "dense", "--budget", "params=0.75", "--method", "magnitude"]
    words += ["--experts", "expert", "-o", tmp_path / "small"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["experts"] == "expert"
    assert "--experts expert" in report["command"]
    assert "whole experts" in (tmp_path / "small" / "README.md").read_text()
    assert Plan.load(tmp_path / "small" / "plan.json").experts == "expert"


def test_experts_go_and_then_neurons_of_those_that_are_left(tmp_path: Path) -> None:
    sample = build("mixtral")
    model: Any = sample.model
    description = discover(model)
    vlprune.rewrite(model, description, plan_for(description, 3, 3), verify=sample.inputs)
    neurons = vlprune.discover(model, "head")
    keep = {s.name: (1, 4, 6) for s in neurons if s.kind == "ffn"}
    vlprune.rewrite(model, neurons, Plan(keep=keep, attention="head"), verify=sample.inputs)
    vlprune.save(model, tmp_path / "small")
    loaded: Any = vlprune.load(tmp_path / "small").eval()
    expected = outputs(sample)
    assert difference(expected, outputs(replace(sample, model=loaded))).largest == 0
    plain = ordinary(loaded)
    assert (plain.config.num_local_experts, plain.config.intermediate_size) == (3, 3)
    assert not any("kept_experts" in name for name in plain.state_dict())
    assert difference(expected, outputs(replace(sample, model=plain))).relative < 1e-6


def test_layers_with_different_numbers_of_experts_have_no_ordinary_config() -> None:
    sample = build("mixtral")
    description = discover(sample.model)
    vlprune.rewrite(sample.model, description, plan_for(description, 3, 2))
    with pytest.raises(UnsupportedError, match="uniform=True"):
        ordinary(sample.model)
    other = build("mixtral").model
    options: Any = {"attention": "head", "experts": "expert", "uniform": True}
    vlprune.Compressor(other, vlprune.Random(), {"params": 0.7}, **options).finish()
    assert ordinary(other).config.num_local_experts in (2, 3)


# -- which routers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("ernie4_5_vl_moe", "in one tensor"),
        ("jetmoe", "sorts tokens by expert itself"),
    ],
)
def test_other_experts_stay_dense_for_a_reason(family: str, why: str) -> None:
    description = discover(build(family).model)
    assert not the_experts(description)
    reasons = [reason for reason in description.dense.values() if 'experts="neuron"' in reason]
    assert reasons
    assert all(why in reason for reason in reasons)


class Block(nn.Module):
    """A router of one's own, beside experts of one's own."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__()
        self.router, self.experts = self.Router(experts), Own(experts)

    class Router(nn.Module):
        """The three best experts, weighed by a softmax over all."""

        def __init__(self, experts: int) -> None:
            super().__init__()
            self.num_experts, self.weight = experts, nn.Parameter(torch.randn(experts, 8))

        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """(tokens, hidden) -> logits, weights and numbers of the chosen experts."""
            logits = hidden @ self.weight.T
            return logits, *self.scored(logits).topk(3)

        def scored(self, logits: Tensor) -> Tensor:
            """(tokens, experts) -> the same shape."""
            return logits.softmax(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(tokens, hidden) -> the same shape."""
        _, weights, chosen = self.router(hidden)
        return self.experts(hidden, chosen, weights)


class Own(nn.Module):
    """Experts of one's own."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 24, 8))
        self.down_proj = nn.Parameter(torch.randn(experts, 8, 12))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """(tokens, hidden) -> the same shape."""
        gate, up = torch.einsum("th,tkoh->tko", hidden, self.gate_up_proj[index]).chunk(2, -1)
        down = self.down_proj[index]
        each = torch.einsum("tko,tkho->tkh", torch.nn.functional.silu(gate) * up, down)
        return (each * weights[..., None]).sum(1)


class ByNumber(Block):
    """Likes experts with high numbers, which change when others are gone."""

    class Router(Block.Router):
        def scored(self, logits: Tensor) -> Tensor:
            return (logits + torch.arange(logits.shape[-1])).softmax(-1)


class Capped(Block):
    """What an expert gets depends on how much all others get, also those that are not likely."""

    class Router(Block.Router):
        def scored(self, logits: Tensor) -> Tensor:
            return logits.softmax(-1) / logits.shape[-1]


def test_a_router_of_ones_own_is_cut_only_if_fewer_rows_are_unlikely_rows() -> None:
    model = nn.ModuleDict({"block": Block()})
    (structure,) = discover(model)
    assert (structure.size, structure.least, structure.gates[0].at) == (5, 3, "router")
    assert [slot.param for slot in structure.slots][-1] == "block.router.weight"
    for strange in (ByNumber, Capped):
        description = discover(nn.ModuleDict({"block": strange()}))
        assert not description.structures
        assert "is not known" in description.dense["block.experts"]
    (smallest,) = discover(nn.ModuleDict({"block": Block(3)}))
    assert (smallest.size, smallest.least) == (3, 3)


def test_descriptions_of_neurons_are_what_they_were() -> None:
    model = build("mixtral").model
    default, named = vlprune.discover(model), vlprune.discover(model, experts="neuron")
    assert default == named
    assert not the_experts(default)
    assert {s.name for s in default} != {s.name for s in discover(model)}
    with pytest.raises(UnsupportedError, match="experts must be one of neuron, expert, not"):
        vlprune.discover(model, experts="experts")  # type: ignore[arg-type]


# -- prices and floors -----------------------------------------------------------------------


def test_as_many_experts_stay_as_a_token_goes_to() -> None:
    description = discover(build("mixtral").model)
    plan = plan_for(description, 2, 1)
    with pytest.raises(PlanError, match="every token goes to 2"):
        plan.check(description.structures)
    prices = Prices("params", {"a": 1.0, "b": 1.0}, {"a": 4, "b": 4}, 0.0, at_least={"a": 2})
    scores = {"a": [0.0, 0.1, 0.2, 0.3], "b": [5.0, 6.0, 7.0, 8.0]}
    assert select(scores, prices, 0.75) == {"a": (2, 3), "b": (0, 1, 2, 3)}
    assert select(scores, prices, 0.375) == {"a": (2, 3), "b": (3,)}
    with pytest.raises(BudgetError, match="as many as a token goes to"):
        select(scores, prices, 0.3)
    # neurons go in blocks, experts one by one
    assert select(scores, prices, 0.9, round_to=4) == {"a": (1, 2, 3), "b": (0, 1, 2, 3)}
    groups = {"a": "layers", "c": "layers"}
    two = replace(prices, unit={**prices.unit, "c": 1.0}, sizes={**prices.sizes, "c": 4},
                  at_least={"a": 2, "c": 2})  # fmt: skip
    kept = select({**scores, "c": [0.4, 0.3, 0.2, 0.1]}, two, 8 / 12, groups=groups)
    assert kept == {"a": (2, 3), "b": (0, 1, 2, 3), "c": (0, 1)}
    assert walk(scores, prices, 0.5)["a"] == (2, 3)


def test_a_token_goes_to_as_many_experts_as_before() -> None:
    sample = build("mixtral")
    description = discover(sample.model)
    profile = cost.measure_macs(sample.model, description.structures, sample.inputs)
    tokens = sample.inputs["input_ids"].numel()
    for structure in the_experts(description):
        assert profile.unit[structure.name] == tokens * 32  # its row of the router
    with pytest.raises(BudgetError, match="save no macs"):
        _compressor(sample, vlprune.Random(), {"macs": 0.9}, example_inputs=sample.inputs)
    kept = _compressor(
        sample, vlprune.Random(), {"macs": 0.9}, example_inputs=sample.inputs, skip=["*.whole"]
    )
    assert not the_experts(Description(kept.structures))


def _compressor(sample: Sample, method: Any, budget: Any, **more: Any) -> vlprune.Compressor:
    options: Any = {"attention": "head", "experts": "expert", **more}
    return vlprune.Compressor(sample.model, method, budget, **options)


@pytest.mark.parametrize("method", [vlprune.Taylor(), vlprune.UPop(interval=2)], ids=["one", "up"])
def test_a_search_learns_which_experts_go(method: Any) -> None:
    sample = build("qwen3_vl_moe")
    inputs = {**sample.inputs, "labels": sample.inputs["input_ids"]}
    compressor = _compressor(sample, method, {"params": 0.8}, example_inputs=sample.inputs)
    with compressor:
        for step in range(4):
            sample.model(**inputs).loss.backward()
            compressor.step((step + 1) / 4)
        compressor.end()
        compressor.finish()
    report = compressor.report()
    assert report["params"]["after"] == sum(p.numel() for p in sample.model.parameters())
    assert report["budget"]["reached"] <= 0.8
    assert report["verified"]["difference"] < 1e-12
    rows = [row for row in report["layers"] if row["kind"] == "experts"]
    assert sum(row["kept"] for row in rows) < sum(row["units"] for row in rows)


def test_repairs_and_jsp_leave_whole_experts_alone() -> None:
    sample = build("mixtral")
    batches = [sample.inputs]
    with pytest.raises(UnsupportedError, match="no repair follows whole experts"):
        _compressor(sample, vlprune.Magnitude(), {"params": 0.7}, calibration=batches)
    with pytest.raises(UnsupportedError, match="still one that tokens go to"):
        _compressor(sample, vlprune.JSP(base="text"), {"params": 0.7}, held_out=batches)
    description = discover(sample.model)
    with pytest.raises(UnsupportedError, match="no repair follows whole experts"):
        vlprune.fold(sample.model, plan_for(description, 2, 3), batches)
    compressor = _compressor(sample, vlprune.OBS(), {"params": 0.95}, calibration=batches)
    compressor.finish()
    assert all(s.size == 4 for s in the_experts(discover(sample.model)))
    assert any("all of them stay" in note for note in compressor.notes())


def test_the_sensitivity_of_whole_experts_leaves_a_token_enough() -> None:
    sample = build("mixtral")
    structures = discover(sample.model).structures
    scores = {s.name: torch.arange(float(s.size)) for s in structures}
    masks = sensitivity._masks(structures, scores, 0.1)
    for structure in structures:
        assert masks[structure.name].sum() >= structure.least
    rows = sensitivity.error_curve(sample.model, structures, [sample.inputs] * 2, (0.97,))
    assert rows[0]["params"] <= 0.97


def test_a_plan_says_what_it_counts_experts_in() -> None:
    model = build("mixtral").model
    description = discover(model)
    plan = replace(plan_for(description, 2, 3), fingerprint=description.fingerprint)
    assert Plan.from_json(plan.to_json()) == plan
    assert "experts" not in Plan(keep={"a": (0,)}).to_json()
    with pytest.raises(PlanError, match="counts experts in 'expert', the description in 'neuron'"):
        vlprune.rewrite(model, vlprune.discover(model, "head"), plan)
    broken = plan.to_json().replace('"experts": "expert"', '"experts": "few"')
    with pytest.raises(PlanError, match="'experts' must be one of neuron, expert"):
        Plan.from_json(broken)


# -- in several processes ---------------------------------------------------------------------

SHARDED = (
    HEAD
    + """
for family, wrap in [("mixtral", "layer"), ("gpt_oss", "linear"), ("phimoe", "root")]:
    sample = build(family)
    model = sharded(sample.model.train(), wrap)
    compressor = vlprune.Compressor(
        model, vlprune.UPop(interval=2), {"params": 0.75}, attention="head", experts="expert",
        example_inputs=sample.inputs)
    labelled = {**sample.inputs, "labels": sample.inputs["input_ids"]}
    with compressor:
        for number in range(4):
            model(**labelled).loss.backward()
            compressor.step((number + 1) / 4)
        compressor.finish()
    model(**labelled).loss.backward()
    vlprune.save(model, f"{folder}/{family}")
    loaded = vlprune.load(f"{folder}/{family}").eval()
    with torch.no_grad():
        pair = [tensors_of(one(**sample.inputs)) for one in (model.eval(), loaded)]
    kept = [len(units) for name, units in compressor.plan().keep.items() if "whole" in name]
    result[family] = {"apart": difference(*pair).relative, "kept": kept,
                      "proof": compressor.verification.difference}
end()
"""
)


@pytest.mark.slow
def test_sharded_models_lose_experts_as_others_do(python: Any, tmp_path: Path) -> None:
    for found in launch(python, tmp_path, SHARDED):
        for family, told in found.items():
            assert told["apart"] < 1e-5, family
            assert told["proof"] < 1e-9, family
            assert min(told["kept"]) >= 2, family
            assert sum(told["kept"]) < 8, family


def test_a_router_in_parts_is_refused() -> None:
    class Part(nn.Parameter):
        full_tensor = None

    router = Block.Router(5)
    router.weight = Part(router.weight.detach())
    stays = torch.tensor([1.0, 0, 1, 1, 1])
    with pytest.raises(UnsupportedError, match="spread over processes while the router runs"):
        routers.routed(router, stays, router.forward, (torch.ones(2, 8),), {})
