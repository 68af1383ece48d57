"""Tiny processors and models of chat families, with templates of the published kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as T

from vlprune.folders.opening import open_processor

WORDS = "what is this a cat and dog yes no how many two three be kind one user assistant system"
PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + PARTS + "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# no token ends an answer, and pictures come first
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}"
    "{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
NAMED = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    + PARTS.replace("IMAGE", "<image>")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer(*special: str, **named: str) -> Any:
    """A byte-level tokenizer, as most language models have it; ``named`` tokens are attributes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = bytes_, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=bytes_.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator([WORDS] * 4, trainer)
    fast = T.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        **({"extra_special_tokens": named} if named else {}),
    )  # fmt: skip
    fast.add_special_tokens({"additional_special_tokens": [*special]})
    return fast


def _language(tokens: Any, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokens),
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def _vision(size: int, patch: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": size, "patch_size": patch, **more,
    }  # fmt: skip


def llava() -> tuple[Any, Any]:
    tokens = tokenizer("<image>")
    square = {"height": 28, "width": 28}
    processor = T.LlavaProcessor(
        T.CLIPImageProcessor(size=square, crop_size=square), tokens, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=VICUNA,
    )  # fmt: skip
    config = T.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_vision(28, 14)},
        text_config={"model_type": "llama", **_language(tokens)},
        image_token_index=tokens.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    return T.LlavaForConditionalGeneration(config), processor


def idefics3() -> tuple[Any, Any]:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokens = tokenizer(
        "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
        "<|im_start|>", *grid,
    )  # fmt: skip
    pictures = T.Idefics3ImageProcessor(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    processor = T.Idefics3Processor(pictures, tokens, image_seq_len=1, chat_template=NAMED)
    config = T.Idefics3Config(
        vision_config=_vision(28, 14),
        text_config={"model_type": "llama", **_language(tokens)},
        image_token_id=tokens.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return T.Idefics3ForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    names = {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }  # fmt: skip
    tokens = tokenizer("<|im_start|>", "<|im_end|>", **names)
    image, boi, eoi = tokens.convert_tokens_to_ids([*names.values()])
    processor = T.Gemma3Processor(
        T.Gemma3ImageProcessor(size={"height": 28, "width": 28}), tokens, image_seq_length=4,
        chat_template="{{ bos_token }}" + CHATML.replace("IMAGE", names["boi_token"]),
    )  # fmt: skip
    config = T.Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model", **_vision(28, 14, vision_use_head=False)
        },
        text_config={
            "model_type": "gemma3_text",
            **_language(tokens, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
        },
        mm_tokens_per_image=4, image_token_index=image, image_token_id=image,
        boi_token_index=boi, eoi_token_index=eoi,
    )  # fmt: skip
    return T.Gemma3ForConditionalGeneration(config), processor


def qwen2_vl(folder: Path) -> tuple[Any, Any]:
    """With a processor that also takes videos, opened from ``folder`` as a user would."""
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    tokens = tokenizer(*marks, "<|video_pad|>")
    tokens.eos_token = "<|im_end|>"
    start, end, image, video = (
        tokens.convert_tokens_to_ids(word)
        for word in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    )
    config = T.Qwen2VLConfig(
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2,
            "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
        },
        text_config=_language(
            tokens, head_dim=8,
            rope_parameters={
                "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0
            },
        ),
        image_token_id=image, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    folder.mkdir(parents=True)
    T.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(folder)
    tokens.save_pretrained(folder)
    config.save_pretrained(folder)
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    (folder / "chat_template.jinja").write_text(template)
    video_part = {"video_processor_type": "Qwen2VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video_part))
    return T.Qwen2VLForConditionalGeneration(config), open_processor(folder)


def internvl(folder: Path) -> tuple[Any, Any]:
    """With a processor that also takes videos, opened from ``folder`` as a user would."""
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokens = tokenizer("<|im_start|>", "<|im_end|>", **names)
    tokens.eos_token = "<|im_end|>"
    config = T.InternVLConfig(
        vision_config=_vision(28, 14) | {"image_size": [28, 28], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", **_language(tokens)}, downsample_ratio=0.5,
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    folder.mkdir(parents=True)
    pictures = T.GotOcr2ImageProcessor(
        size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=2
    )
    pictures.save_pretrained(folder)
    tokens.save_pretrained(folder)
    config.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"))
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 1}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    video_part = {"video_processor_type": "InternVLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video_part))
    return T.InternVLForConditionalGeneration(config), open_processor(folder)


def paligemma(folder: Path) -> tuple[Any, Any]:
    """Not a chat model by its processor, which takes an answer as a suffix of its prompt."""
    tokens = tokenizer("<image>")
    pictures = T.SiglipImageProcessor(size={"height": 28, "width": 28})
    pictures.image_seq_length = 4
    processor = T.PaliGemmaProcessor(pictures, tokens)
    config = T.PaliGemmaConfig(
        vision_config=_vision(28, 14, model_type="siglip_vision_model", vision_use_head=False),
        text_config={"model_type": "gemma", **_language(tokens, head_dim=8)},
        image_token_id=processor.image_token_id, image_token_index=processor.image_token_id,
        projection_dim=32,
    )  # fmt: skip
    return T.PaliGemmaForConditionalGeneration(config), processor


CHATS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "llava": lambda folder: llava(),
    "idefics3": lambda folder: idefics3(),
    "gemma3": lambda folder: gemma3(),
    "qwen2_vl": qwen2_vl,
    "internvl": internvl,
}
"""Model and processor of each family; a folder may be filled."""
ENDS = {
    "llava": "</s>", "idefics3": "<end_of_utterance>", "gemma3": "<|im_end|>",
    "qwen2_vl": "<|im_end|>", "internvl": "<|im_end|>",
}  # fmt: skip
"""The token that ends an answer."""
