"""Models with experts, whose weights are parameters of one module, and with latent attention."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn

from .families import (
    IMAGE_TOKEN,
    PATCH,
    Sample,
    _family,
    _ids,
    _language_model,
    _ones,
    _pixels,
    _prompt,
    _qwen,
    _variant,
    _vision,
)


def _routed(model: Any, inputs: dict[str, Any], **more: Any) -> Sample:
    """A sample whose experts matter."""
    for name, weight in model.named_parameters():
        if weight.dim() == 3 and ("expert" in name or "linear" in name):
            nn.init.normal_(weight, std=min(weight.shape[1:]) ** -0.5)
    return Sample(model, inputs, **more)


def _words() -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": _ones()}


def _decoder(model_class: Any, **more: Any) -> Sample:
    return _routed(model_class(model_class.config_class(**_language_model(**more))), _words())


_FEW: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
_DEEPSEEK: dict[str, Any] = {
    **_FEW,
    **_LATENT,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_INDEXER: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}


@_variant
def mixtral() -> Sample:
    return _decoder(T.MixtralForCausalLM, head_dim=8, num_local_experts=4)


@_variant
def qwen2_moe() -> Sample:
    return _decoder(
        T.Qwen2MoeForCausalLM, **_FEW, num_experts=4, shared_expert_intermediate_size=24
    )


@_variant
def qwen3_moe() -> Sample:
    return _decoder(T.Qwen3MoeForCausalLM, **_FEW, head_dim=8, num_experts=4)


@_variant
def qwen3_vl_moe() -> Sample:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    sample = _qwen(
        T.Qwen3VLMoeConfig,
        T.Qwen3VLMoeForConditionalGeneration,
        vision,
        **_FEW,
        num_experts=4,
    )
    return _routed(sample.model, sample.inputs, generate=sample.generate)


@_variant
def qwen3_5_moe() -> Sample:
    return _decoder(
        T.Qwen3_5MoeForCausalLM, **_FEW, head_dim=8, num_experts=4,
        shared_expert_intermediate_size=24, layer_types=["full_attention", "linear_attention"],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, linear_conv_kernel_dim=2,
    )  # fmt: skip


@_variant
def olmoe() -> Sample:
    return _decoder(T.OlmoeForCausalLM, num_experts=4, num_experts_per_tok=2)


@_variant
def phimoe() -> Sample:
    return _decoder(T.PhimoeForCausalLM, num_local_experts=4)


@_variant
def granitemoe() -> Sample:
    return _decoder(T.GraniteMoeSharedForCausalLM, num_local_experts=4, shared_intermediate_size=24)


@_variant
def granitemoehybrid() -> Sample:
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
    return _decoder(
        T.GraniteMoeHybridForCausalLM, num_local_experts=4, shared_intermediate_size=24,
        layer_types=["attention", "mamba"], **mamba,
    )  # fmt: skip


@_variant
def jetmoe() -> Sample:
    return _decoder(
        T.JetMoeForCausalLM, num_local_experts=4, num_experts_per_tok=2, kv_channels=8,
        num_key_value_heads=4,
    )  # fmt: skip


@_variant
def jamba() -> Sample:
    return _decoder(
        T.JambaForCausalLM, num_experts=4, expert_layer_period=2, expert_layer_offset=1,
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4,
        mamba_dt_rank=4,
    )  # fmt: skip


@_variant
def gpt_oss() -> Sample:
    """Gate and up of each neuron lie side by side, in transposed weights with biases."""
    return _decoder(
        T.GptOssForCausalLM, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip


@_variant
def nemotron_h() -> Sample:
    """Experts without a gate."""
    return _decoder(
        T.NemotronHForCausalLM, **_FEW, head_dim=8, layers_block_type=["attention", "moe"],
        n_routed_experts=4, n_shared_experts=1, moe_shared_expert_intermediate_size=24,
        n_group=1, topk_group=1,
    )  # fmt: skip


@_variant
def llama4() -> Sample:
    """Experts that compute on every token, of which all but one are zero."""
    sample = _decoder(
        T.Llama4ForCausalLM, head_dim=8, num_local_experts=4, intermediate_size_mlp=40,
        interleave_moe_layer_step=2, attention_chunk_size=16,
    )  # fmt: skip
    sample.rounding = 1e-6  # positions are turned in float32
    return sample


@_variant
def aria() -> Sample:
    text = _language_model(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    config = T.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **_vision()},
        text_config={"model_type": "aria_text", **text},
        projector_patch_to_query_dict={4: 2},
        image_token_index=IMAGE_TOKEN,
    )
    inputs = {"input_ids": _prompt(2), "pixel_values": _pixels()}
    return _routed(T.AriaForConditionalGeneration(config), inputs)


@_variant
def glm4v_moe() -> Sample:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": PATCH,
    }
    more = {key: value for key, value in _DEEPSEEK.items() if key not in _LATENT}
    more["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [1, 1],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }
    sample = _qwen(
        T.Glm4vMoeConfig, T.Glm4vMoeForConditionalGeneration, vision, **more,
    )  # fmt: skip
    return _routed(sample.model, sample.inputs)


@_variant
def ernie4_5_vl_moe() -> Sample:
    """Two sets of experts per layer, of different widths: for words and for images."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
    }
    sample = _qwen(
        T.Ernie4_5_VLMoeConfig, T.Ernie4_5_VLMoeForConditionalGeneration, vision,
        moe_num_experts=4, moe_k=2, moe_intermediate_size=[20, 12], moe_num_shared_experts=1,
    )  # fmt: skip
    sample.inputs["pixel_values"] = _pixels(16, 3 * PATCH * PATCH)
    sample.inputs["moe_mm_token_type_ids"] = sample.inputs["mm_token_type_ids"]
    return _routed(sample.model, sample.inputs)


# -- latent attention ------------------------------------------------------------------


@_variant
def deepseek_v2() -> Sample:
    """Positions are turned in float32, as pairs that must begin at even places."""
    more = {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "greedy"}
    sample = _decoder(T.DeepseekV2ForCausalLM, **more)
    sample.rounding = 1e-6
    return sample


@_family
def deepseek_v3() -> Sample:
    sample = _decoder(T.DeepseekV3ForCausalLM, **_DEEPSEEK)
    sample.generate = _words()
    return sample


@_variant
def glm4_moe_lite() -> Sample:
    """Values of another size than the part of the keys that has no positions."""
    return _decoder(T.Glm4MoeLiteForCausalLM, **{**_DEEPSEEK, "v_head_dim": 8})


@_variant
def mistral4() -> Sample:
    return _decoder(T.Mistral4ForCausalLM, **_DEEPSEEK)


@_variant
def deepseek_v32() -> Sample:
    """Each token attends to the tokens that an indexer chooses."""
    return _decoder(T.DeepseekV32ForCausalLM, **_DEEPSEEK, **_INDEXER)


@_variant
def glm_moe_dsa() -> Sample:
    return _decoder(T.GlmMoeDsaForCausalLM, **_DEEPSEEK, **_INDEXER)


@_variant
def mistral_large4() -> Sample:
    return _decoder(T.MistralLarge4TextModel, **_DEEPSEEK)


@_variant
def youtu() -> Sample:
    return _decoder(T.YoutuForCausalLM, **_LATENT)


@_variant
def minicpm3() -> Sample:
    return _decoder(T.MiniCPM3ForCausalLM, **_LATENT)


@_variant
def kimi_k25() -> Sample:
    vision = _vision(pos_emb_height=4, pos_emb_width=4, pos_emb_time=2)
    del vision["image_size"]
    config = T.Kimi_K25Config(
        vision_config=vision,
        text_config={"model_type": "deepseek_v3", **_language_model(**_DEEPSEEK)},
        projection_hidden_size=32,
        image_token_id=IMAGE_TOKEN,
        video_token_id=4,
    )
    inputs = {
        "input_ids": _prompt(1, batch=1),
        "pixel_values": _pixels(4, 3, PATCH, PATCH),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }
    return _routed(T.Kimi_K25ForConditionalGeneration(config), inputs)
