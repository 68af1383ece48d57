"""Tiny models of any model type, from the names of the sizes in its config."""

from __future__ import annotations

import pytest
import torch
import transformers as T

from vlprune.testing import VARIANTS, build
from vlprune.testing.tiny import images, tiny_config, variant


def test_sizes_are_small_by_their_names_in_every_part_of_a_config() -> None:
    config = tiny_config(T.MllamaConfig, {"text_config": {"cross_attention_layers": [1]}})
    assert (config.text_config.hidden_size, config.text_config.num_key_value_heads) == (32, 2)
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (16, 8)
    assert config.text_config.num_hidden_layers == config.vision_config.num_hidden_layers == 2
    assert config.text_config.cross_attention_layers == [1]


def test_what_a_row_says_comes_before_the_table_of_sizes() -> None:
    config = tiny_config(T.ViTConfig, {"hidden_size": 24, "num_attention_heads": 3})
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (24, 3, 48)


def test_a_size_per_side_stays_one_per_side_and_a_fraction_a_fraction() -> None:
    config = tiny_config(T.InternVLVisionConfig, {})
    assert [*config.image_size] == [16, 16]
    assert isinstance(tiny_config(T.SwinConfig, {}).mlp_ratio, float)


def test_a_part_of_any_type_is_of_the_type_that_the_row_names() -> None:
    config = tiny_config(T.LlavaConfig, {"text_config": {"model_type": "qwen2"}})
    assert isinstance(config.text_config, T.Qwen2Config)
    assert config.text_config.vocab_size == 64


def test_a_model_type_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprune.testing.tiny.VARIANTS", own := {})
    variant("of_tomorrow", dict)
    assert not own
    images("vit")
    assert [*own] == ["vit"]
    assert own["vit"]().inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_no_row_takes_the_place_of_another() -> None:
    with pytest.raises(ValueError, match="a variant 'beit' already"):
        images("beit")


def test_a_row_can_ask_for_another_attention_implementation() -> None:
    stock, eager = build("sam_hq").model, build("sam_hq_eager").model
    kinds = [type(m.vision_encoder.layers[0].attn).__name__ for m in (stock, eager)]
    assert kinds == ["SamHQVisionSdpaAttention", "SamHQVisionAttention"]


def test_a_row_is_the_same_model_each_time() -> None:
    assert VARIANTS["convnext"] is not None
    one, two = (build("convnext").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
