"""Attention blocks that match a row of the layout table and are not quite what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import vlprune
from vlprune.architectures.fused import row_order
from vlprune.testing import build

ORDERS = {
    "blip": "blocks", "qwen2_vl": "blocks", "instructblip": "blocks", "sam": "blocks",
    "modernbert": "blocks", "phi3": "blocks", "gpt2": "blocks", "fuyu": "heads",
    "imagegpt": "blocks",
}  # fmt: skip


@pytest.mark.parametrize("family", ORDERS)
def test_the_source_says_how_a_fused_projection_is_taken_apart(family: str) -> None:
    names = ("qkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn")
    cores = [
        module
        for module in build(family).model.modules()
        if any(isinstance(getattr(module, name, None), nn.Module) for name in names)
    ]
    assert cores
    assert {row_order(core) for core in cores} == {ORDERS[family]}


def test_a_class_of_ones_own_says_nothing() -> None:
    class Attention(nn.Module):
        """qkv.reshape(batch, length, 3, self.num_heads, -1)"""

    assert row_order(Attention()) == ""


def kosmos2(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    text = {"vocab_size": 64, "embed_dim": 24, "layers": 2, "ffn_dim": 40, "attention_heads": 3}
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = T.Kosmos2Config(
        text_config={**text, "max_position_embeddings": 64}, vision_config=vision,
        latent_query_num=3,
    )  # fmt: skip
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[:, 1:4] = 1
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16), "input_ids": torch.arange(12).reshape(2, 6) + 3,
        "attention_mask": torch.ones(2, 6).long(), "image_embeds_position_mask": mask,
    }  # fmt: skip
    return T.Kosmos2Model(config).to(dtype).eval(), inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_makes_float32_tensors_is_proved_in_float64(dtype: torch.dtype) -> None:
    """Its masks hold float32's smallest number. Norms behind its values leave attention dense."""
    model, inputs = kosmos2(dtype)
    description = vlprune.discover(model)
    reasons = {r for name, r in description.dense.items() if ".self_attn." in name}
    assert "inner_attn_ln (LayerNorm) sits between its values and its output projection" in reasons
    compressor = vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": 0.8}, example_inputs=inputs
    )
    compressor.finish()
    assert compressor.verification.dtype == "float64"


def test_a_model_that_does_not_run_in_float64_is_proved_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """... which is the last resort: also with float64 in place of the float32 it asks for."""
    model, inputs = kosmos2(torch.float32)

    def fails(module: nn.Module, args: Any) -> None:
        if any(p.dtype == torch.float64 for p in module.parameters()):
            raise RuntimeError("no kernel for double")

    next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).register_forward_pre_hook(fails)
    compressor = vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": 0.8}, example_inputs=inputs
    )
    compressor.finish()
    assert compressor.verification.dtype == "float32"


def test_a_query_that_holds_its_gate_is_cut_with_it() -> None:
    """Qwen3.5 and Qwen3-Next: half of the rows of q_proj are a gate of the output."""
    model = build("qwen3_5").model
    (block,) = [s for s in vlprune.discover(model, "head") if s.kind == "attention"]
    (query,) = [s for s in block.slots if s.param.endswith("q_proj.weight")]
    assert block.size == 2  # KV groups of two heads, each with 8 query rows and 8 of its gate
    assert query.inner == 2 * 2 * 8


def block(query: int, key: int, value: int, out: int, heads: int = 4) -> nn.Module:
    """A module with the projections of attention, of these widths, around a residual stream."""
    module = nn.Module()
    module.q_proj, module.k_proj = nn.Linear(16, query), nn.Linear(16, key)
    module.v_proj, module.o_proj = nn.Linear(16, value), nn.Linear(out, 16)
    module.head_dim, module.num_heads = query // heads, heads
    return nn.ModuleDict({"attention": module, "mlp": ffn()})


def ffn() -> nn.Module:
    module = nn.Module()
    module.fc1, module.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)
    return module


def test_value_heads_of_another_size() -> None:
    """MiMo: four heads of 8, two of which share a value head of 4."""
    model = block(32, 16, 8, 16)
    (found,) = [s for s in vlprune.discover(model, "head") if s.kind == "attention"]
    widths = {s.param.split(".")[1]: s.inner for s in found.slots if s.param.endswith("weight")}
    assert found.size == 2
    assert widths == {"q_proj": 16, "k_proj": 8, "v_proj": 4, "o_proj": 8}
    assert "another size" in vlprune.discover(model).dense["attention.q_proj"]


@pytest.mark.parametrize(
    "widths", [(32, 16, 16, 16), (32, 16, 12, 32), (32, 24, 16, 32)], ids=["o", "v", "k"]
)
def test_what_does_not_fit_stays_dense_and_nothing_else(widths: tuple[int, ...]) -> None:
    for unit in ("head_dim", "qk_vo", "head"):
        found = vlprune.discover(block(*widths), unit)  # type: ignore[arg-type]
        assert [s.kind for s in found] == ["ffn"]
        assert found.dense["attention.q_proj"]


def test_layers_inside_an_ffn_are_no_ffn() -> None:
    """SAM 2 has FFNs of three and more layers: the hidden width is theirs, too."""
    module: Any = nn.Module()
    module.proj_in, module.proj_out = nn.Linear(16, 24), nn.Linear(24, 16)
    module.layers = nn.ModuleList([nn.Linear(24, 24)])
    found = vlprune.discover(nn.ModuleDict({"mlp": module}))
    assert not found.structures
    assert "layers (ModuleList) sits between" in found.dense["mlp.proj_in"]


def test_a_list_of_two_layers_is_an_ffn_and_a_longer_one_is_not() -> None:
    """D-FINE: FFNs and heads that predict boxes are lists of the same class."""
    model = build("d_fine").model
    found = {s.name for s in vlprune.discover(model) if s.kind == "ffn"}
    layers = (
        "encoder.aifi.0.layers.0",
        "encoder.aifi.0.layers.1",
        "decoder.layers.0",
        "decoder.layers.1",
    )
    assert found == {f"model.{layer}.mlp.layers.0" for layer in layers}
    three: Any = nn.Module()
    three.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    assert not vlprune.discover(nn.ModuleDict({"mlp": three})).structures


@pytest.mark.parametrize(
    ("variant", "leaf", "reason"),
    [
        ("d_fine", "encoder_attn.sampling_offsets", "deformable attention: where each head looks"),
        ("rt_detr", "encoder_attn.attention_weights", "deformable attention: how much each place"),
        ("conditional_detr", "self_attn.q_pos_proj", "sums of two projections"),
        ("conditional_detr", "encoder_attn.q_pos_sine_proj", "content and of position"),
        ("dab_detr", "self_attn.self_attn.output_proj", "from projections of its layer"),
    ],
)
def test_what_a_detector_keeps_has_its_own_reason(variant: str, leaf: str, reason: str) -> None:
    dense = vlprune.discover(build(variant).model).dense
    assert reason in dense[f"model.decoder.layers.0.{leaf}"]


class Normed(nn.Module):
    """Attention with a norm, before the projections or behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out_proj, self.norm, self.num_heads = nn.Linear(16, 16), nn.LayerNorm(16), 2


class Before(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.out_proj(self.query(y) * self.key(y) * self.value(y))


class Behind(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.norm(self.query(x) * self.key(x) * self.value(x)))


class Twice(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.out_proj(self.norm(self.query(y) * self.key(y) * self.value(y)))


class Elsewhere(Normed):
    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.value(x)
        return self.out_proj(self.prepare(self.query(x) * self.key(x) * values))


class After(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out_proj(self.query(x) * self.key(x) * self.value(x))
        return self.norm(x + y)


def test_a_norm_of_the_input_or_of_the_output_is_not_one_of_the_values() -> None:
    for kind in (Before, After):
        assert vlprune.discover(nn.ModuleDict({"attention": kind()})).structures, kind
    for kind in (Behind, Twice, Elsewhere):
        found = vlprune.discover(nn.ModuleDict({"attention": kind()}))
        assert not found.structures, kind
        assert "norm (LayerNorm) sits between" in found.dense["attention.query"]


@pytest.mark.parametrize("variant", ["glpn", "pvt", "segformer"])
def test_fewer_keys_and_values_are_no_obstacle(variant: str) -> None:
    """A convolution makes the input of keys and values smaller; its width is that of the block."""
    model = build(variant).model
    found = {s.name for s in vlprune.discover(model) if s.kind == "attention"}
    assert len(found) == 4  # one per stage, those with such a convolution among them


def test_a_norm_of_any_shape_between_two_layers_of_an_ffn() -> None:
    """ConvNeXt V2 normalises its neurons together, by parameters of shape (1, 1, 1, neurons)."""
    config = T.ConvNextV2Config(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    found = vlprune.discover(T.ConvNextV2Model(config))
    assert not found.structures
    reason = found.dense["encoder.stages.0.layers.0.pwconv1"]
    assert reason == "grn (ConvNextV2GRN) sits between its projections and has their width"


def test_a_projection_in_a_wrapper_counts_if_the_wrapper_is_known() -> None:
    class Wrapper(nn.Module):
        def __init__(self, width: int, out: int) -> None:
            super().__init__()
            self.linear = nn.Linear(width, out)

    class Gemma4ClippableLinear(Wrapper):
        pass

    for kind in (Wrapper, Gemma4ClippableLinear):
        module: Any = nn.Module()
        module.gate_proj, module.up_proj = kind(16, 24), kind(16, 24)
        module.down_proj = kind(24, 16)
        found = vlprune.discover(nn.ModuleDict({"mlp": module}))
        assert bool(found.structures) == (kind is not Wrapper)
        if found.structures:
            assert found.structures[0].gates[0].module == "mlp.up_proj.linear"
            assert not found.dense


def test_an_output_beside_the_queries_comes_before_one_of_the_same_shape_behind_them() -> None:
    """TVP's attention holds its own output; that of the FFN has the name of BERT's."""
    config = T.TvpConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64, backbone_config=build("tvp").model.config.backbone_config,
    )  # fmt: skip
    attention, ffn = vlprune.discover(T.TvpModel(config))
    layer = "encoder.layer.0"
    assert attention.slots[-1].param == f"{layer}.attention.dense.weight"
    assert ffn.slots[-1].param == f"{layer}.output.dense.weight"


def test_heads_that_read_one_cache_stay_as_many_and_as_large() -> None:
    """PI0's actions attend to the keys that its language model left in the cache."""
    for unit in ("head_dim", "head"):
        found = vlprune.discover(build("pi0").model, unit)
        blocks = {s.core: s for s in found if s.kind == "attention"}
        layouts = {path.split(".layers.")[0]: s.layout for path, s in blocks.items()}
        assert layouts["model.dit"] == layouts["model.vlm.language_model"] == "padded"
        (action,) = (s for path, s in blocks.items() if path == "model.dit.layers.0.self_attn")
        gated = {gate.module.rpartition(".")[2]: gate.at for gate in action.gates}
        assert gated["o_proj"] == "input"
        assert gated.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_scores_that_leave_a_block_count_as_well() -> None:
    """LiLT adds the scores of words to those of places: a head is gone when both are."""
    (layer, *_) = vlprune.discover(build("lilt").model, "head")
    gated = {gate.module.rpartition(".")[2] for gate in layer.gates}
    assert gated == {"query", "key", "value"}


def test_scores_that_are_averaged_over_heads_count_as_well() -> None:
    """Autoformer attends at the lags that the mean over all heads finds."""
    config = T.AutoformerConfig(
        prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    )  # fmt: skip
    (layer, *_) = vlprune.discover(T.AutoformerModel(config), "head")
    gated = {gate.module.rpartition(".")[2] for gate in layer.gates}
    assert gated == {"q_proj", "k_proj", "v_proj"}


def test_a_unit_that_a_forward_ties_to_another_stays_dense() -> None:
    """DiffLlama subtracts heads in pairs: their dimensions are units, the heads are not."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    config = T.DiffLlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model = T.DiffLlamaModel(config)
    for unit, kinds in {
        "head_dim": {"attention", "ffn"},
        "qk_vo": {"attention_qk", "attention_vo", "ffn"},
        "head": {"ffn"},
        "query_head": {"ffn"},
    }.items():
        description = vlprune.discover(model, unit)  # type: ignore[arg-type]
        assert {s.kind for s in description} == kinds
        told = description.dense.get("layers.0.self_attn.q_proj", "")
        assert ("take head_dim" in told) == (kinds == {"ffn"})


@pytest.mark.parametrize("unit", ["head_dim", "head"])
def test_a_gate_of_what_heads_give_goes_with_them(unit: Any) -> None:
    """Its rows are laid out as the columns of the output projection are."""
    model = build("muse_glimmer").model
    description = vlprune.discover(model, unit)
    layer = "model.language_model.layers.0.self_attn"
    (block,) = [s for s in description if s.name == layer]
    slots = {s.param.removeprefix(f"{layer}."): s for s in block.slots}
    gate, out = slots["gate_proj.weight"], slots["o_proj.weight"]
    assert (gate.axis, out.axis) == (0, 1)
    assert (gate.repeat, gate.inner, gate.start) == (out.repeat, out.inner, out.start)
    assert f"{layer}.gate_proj" not in description.dense


def test_projections_for_some_tokens_are_cut_with_those_for_all() -> None:
    """Longformer projects the tokens that see all others by weights of their own."""
    (attention, _ffn, *_) = vlprune.discover(build("longformer").model)
    cut = {slot.param.split(".")[-2] for slot in attention.slots}
    assert cut == {"dense"} | {
        f"{name}{more}" for name in ("query", "key", "value") for more in ("", "_global")
    }


def test_what_a_whole_model_holds_is_no_part_of_a_block() -> None:
    """The language head of FalconMamba is not recurrent, though its class says Mamba."""
    config = T.FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)
    dense = vlprune.discover(T.FalconMambaForCausalLM(config)).dense
    assert dense["lm_head"] == "a projection outside attention and FFN"
    assert "a recurrent block" in dense["backbone.layers.0.mixer.in_proj"]


def test_what_no_row_takes_says_which_kind_of_block_it_is_part_of() -> None:
    dense = vlprune.discover(build("lilt").model).dense
    layer = "encoder.layer.0"
    assert "an attention block (LiltSelfAttention)" in dense[f"{layer}.attention.self.layout_query"]
    assert "an FFN (LiltIntermediate)" in dense[f"{layer}.layout_intermediate.dense"]
    dense = vlprune.discover(build("qwen3_5").model).dense
    assert "a recurrent block" in dense["model.layers.1.linear_attn.out_proj"]
