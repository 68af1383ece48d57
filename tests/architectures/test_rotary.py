"""Heads under rotary embeddings: pairs of dimensions, and query heads in KV groups."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.architectures import discover_apart
from vlprune.architectures.layouts import NATIVE, Native
from vlprune.architectures.rotary import RotaryPairs, WholeNorm, pairing_of
from vlprune.cutting.padded import PaddedLinear
from vlprune.errors import VerificationError
from vlprune.structures.structure import Description
from vlprune.testing import build
from vlprune.testing.families import Sample


def thinned(described: Description) -> vlprune.Plan:
    """A plan that keeps two units of three, never a run of neighbours from the first one on."""
    keep = {s.name: [u for u in range(s.size) if u % 3 != 1] or [0] for s in described}
    return vlprune.Plan(keep, attention=described.attention, fingerprint=described.fingerprint)


def cut(family: str, described: Any = vlprune.discover, unit: str = "head_dim") -> Sample:
    sample = build(family)
    structures = described(sample.model, unit)
    vlprune.rewrite(sample.model, structures, thinned(structures), verify=sample.inputs)
    sample.model.eval()
    return sample


def logits(model: Any, sample: Sample) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**sample.inputs).logits
    return found


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava"])
def test_head_dimensions_leave_the_attention_core_and_the_cache(family: str) -> None:
    model = cut(family).model
    attention = model.model.language_model.layers[0].self_attn
    assert not any(isinstance(m, PaddedLinear) for m in attention.modules())
    assert attention.head_dim == 2 * len(attention.pairs) < attention.config.hidden_size // 4
    ids = torch.tensor([[5, 6, 7]])
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape[-1] == attention.head_dim


def test_scores_are_fewer_operations_than_in_a_padded_cut() -> None:
    sample = build("qwen2_vl")
    described = {"native": vlprune.discover, "padded": discover_apart}
    macs = {"uncut": vlprune.cost.macs(sample.model, (), sample.inputs)}
    for layout, describe in described.items():
        found: Any = describe(sample.model, "head_dim")
        assert {s.layout for s in found if s.kind != "ffn"} == {layout}
        halves = {s.name: range(s.size // 2) for s in found if s.kind != "ffn"}
        small = copy.deepcopy(sample.model)
        plan = vlprune.Plan(halves, attention="head_dim", fingerprint=found.fingerprint)
        vlprune.rewrite(small, found, plan)
        macs[layout] = vlprune.cost.macs(small, (), sample.inputs)
    assert macs["native"] < macs["padded"] < macs["uncut"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "dinov3"])
def test_a_folder_in_which_each_dimension_was_a_unit_still_loads(
    family: str, tmp_path: Any
) -> None:
    """Folders of before vlprune knew pairs: padded, twice the number of units."""
    old = cut(family, discover_apart)
    vlprune.save(old.model, tmp_path)
    loaded = type(old.model).from_pretrained(tmp_path).eval()
    assert any(isinstance(m, PaddedLinear) for m in loaded.modules())
    for name, weight in old.model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_copies_and_pickles_keep_the_pairs() -> None:
    sample = cut("qwen3_vl")
    before = logits(sample.model, sample)
    for again in (copy.deepcopy(sample.model), pickle.loads(pickle.dumps(sample.model))):
        assert torch.equal(logits(again, sample), before)
        kinds = {type(m).__name__ for m in again.modules()}
        assert {"CutQwen3VLTextAttention", "CutQwen3VLTextRMSNorm"} <= kinds


@pytest.mark.parametrize(
    ("family", "broken"), [("qwen2_vl", RotaryPairs), ("internvl_qwen3", WholeNorm)]
)
def test_the_proof_notices_wrong_pairs(
    family: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first pairs in place of those that stay, a cut is refused and undone."""
    stock = broken.forward

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.pairs = torch.arange(len(self.pairs))
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(broken, "forward", first)
    with pytest.raises(VerificationError, match="differ"):
        cut(family)


def test_a_norm_that_subtracts_the_mean_keeps_heads_padded() -> None:
    """After such a norm a dimension that is gone is no longer zero."""
    sample = build("internvl_qwen3")
    for layer in sample.model.model.language_model.layers:
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, torch.nn.LayerNorm(norm.weight.numel()))
    found = vlprune.discover(sample.model)
    layouts = {s.layout for s in found if s.kind != "ffn" and "language" in s.name}
    assert layouts == {"padded"}


def test_query_heads_go_while_their_keys_stay() -> None:
    model = cut("llava", unit="query_head").model
    attention = model.model.language_model.layers[0].self_attn
    config = model.config.text_config
    size = config.hidden_size // config.num_attention_heads
    assert attention.q_proj.weight.shape[0] == config.num_key_value_heads * size
    assert attention.k_proj.weight.shape[0] == config.num_key_value_heads * size
    assert attention.num_key_value_groups == 1 < config.num_attention_heads // 2


def test_where_keys_are_not_shared_query_heads_are_heads() -> None:
    model = build("clip").model
    heads, queries = (vlprune.discover(model, unit).structures for unit in ("head", "query_head"))
    assert heads == queries


def test_what_all_query_heads_read_says_so() -> None:
    dense = vlprune.discover(build("llava").model, "query_head").dense
    assert "query heads" in dense["model.language_model.layers.0.self_attn.k_proj"]


@pytest.mark.parametrize(
    ("module", "layout"),
    [
        ("llama.modeling_llama.LlamaAttention", "halves halves"),
        ("qwen2_vl.modeling_qwen2_vl.VisionAttention", "halves halves"),
        ("dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention", "halves halves"),
        ("cohere2.modeling_cohere2.Cohere2Attention", "neighbours neighbours"),
        ("glm.modeling_glm.GlmAttention", "neighbours halves"),
        ("gpt_oss.modeling_gpt_oss.GptOssAttention", "halves once"),
        ("llama4.modeling_llama4.Llama4TextAttention", ""),  # complex numbers
        ("clip.modeling_clip.CLIPAttention", ""),
    ],
)
def test_pairs_are_found_by_running_the_rotation(module: str, layout: str) -> None:
    path, _, name = module.rpartition(".")
    cls = getattr(importlib.import_module(f"transformers.models.{path}"), name)
    assert pairing_of(cls) == layout


def test_neighbours_that_are_turned_together_are_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Cohere2Config(
        vocab_size=60, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, sliding_window=8,
    )  # fmt: skip
    model = transformers.Cohere2ForCausalLM(config)
    sample = Sample(model, {"input_ids": torch.arange(5, 11)[None]})
    monkeypatch.setitem(NATIVE, "Cohere2Attention", Native("", rotary=True))
    structures = vlprune.discover(sample.model)
    assert {(s.layout, s.size) for s in structures if s.kind != "ffn"} == {("native", 4)}
    vlprune.rewrite(sample.model, structures, thinned(structures), verify=sample.inputs)
    assert sample.model.model.layers[0].self_attn.head_dim == 6


def test_heads_that_are_turned_in_part_stay_padded() -> None:
    sample = build("llava")
    for layer in sample.model.model.language_model.layers:
        layer.self_attn.config = copy.copy(layer.self_attn.config)
        layer.self_attn.config.rope_parameters = {"partial_rotary_factor": 0.5}
    layouts = {s.layout for s in vlprune.discover(sample.model) if s.tower == "text"}
    assert layouts == {"native", "padded"}  # FFNs and attention
