"""Tiny models of any model type: its config with every size made small, by the sizes' names.

transformers names the same things alike (``hidden_size``, ``num_attention_heads``, ...), so one
table of small numbers fits hundreds of model types. A row of ``encoders``, ``segmenters``,
``chats`` or ``texts`` names a model type and says only where its config differs from that table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as T
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .families import (
    IMAGE,
    IMAGE_TOKEN,
    PATCH,
    VARIANTS,
    VOCAB,
    Sample,
    _ids,
    _ones,
    _pixels,
    _prompt,
)

__all__ = ["chats", "images", "texts", "tiny_config", "variant"]

_WIDTHS = ("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "hidden_dim", "embed_dims")
_DEPTHS = (
    "num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "n_layers",
    "n_layer", "num_encoder_layers", "num_decoder_layers", "num_blocks",
)  # fmt: skip
_HEADS = (
    "num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
    "n_heads", "n_head", "attention_heads",
)  # fmt: skip
_FFNS = (
    "intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "mlp_dim", "d_ff",
    "dim_feedforward", "encoder_feedforward_dim", "hidden_dim_ffn",
)  # fmt: skip
_HEAD_SIZES = ("head_dim", "d_kv")

_KINDS = {  # width, depth, heads, FFN: unlike each other, so that a mix-up of towers shows
    "vision": (32, 2, 4, 48),
    "text": (24, 2, 3, 40),
    "decoder": (32, 2, 4, 48),
}
_ALWAYS = {
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": VOCAB,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "mlp_ratio": 2,
    "num_queries": 5,
    "num_labels": 5,
    "projection_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": IMAGE_TOKEN,
    "image_token_index": IMAGE_TOKEN,
    "video_token_id": 4,
    "video_token_index": 4,
    "decoder_start_token_id": 1,
}


SINGLE = 1e-5
"""How far apart two orders of a sum may end in float32, relative to outputs of order 1."""

Inputs = Callable[[], dict[str, Any]]


def variant(
    name: str,
    inputs: Inputs,
    *,
    kind: str = "",
    head: str | Callable[[], Any] = "AutoModel",
    generates: bool = False,
    idle: str = "",
    eager: bool = False,
    rounding: float = 0.0,
    single: bool = False,
    **more: Any,
) -> None:
    """Add the variant ``name``: a tiny model of the type ``kind`` under the class ``head``.

    ``kind`` is a model type of transformers (``name`` if empty), ``head`` one of its classes, an
    auto class, or a function that makes a class. ``inputs`` makes the inputs of a forward pass, and
    of ``generate`` where the model ``generates``. ``idle`` and ``rounding`` are as in
    :class:`~vlprune.testing.families.Sample`; ``single`` is for a model that does not run in
    float64. ``eager`` builds the model for the eager attention implementation. ``more`` goes into
    the config, nested as it is.
    Raises ValueError if there is a variant of that name.
    """
    if name in VARIANTS:
        raise ValueError(f"there is a variant {name!r} already")
    kind = kind or name
    if kind in CONFIG_MAPPING:  # an older transformers has fewer
        told: dict[str, Any] = {"idle": idle, "rounding": max(rounding, SINGLE * single)}
        told["dtype"] = torch.float32 if single else torch.float64
        VARIANTS[name] = partial(_sample, kind, head, more, inputs, generates, eager, told)


def _sample(
    kind: str,
    head: str | Callable[[], Any],
    more: dict[str, Any],
    inputs: Inputs,
    generates: bool,
    eager: bool,
    told: dict[str, Any],
) -> Sample:
    config = tiny_config(CONFIG_MAPPING[kind], more)
    model_class = getattr(T, head) if isinstance(head, str) else head()
    if eager:
        config._attn_implementation = "eager"
    if model_class.__name__.startswith("Auto"):
        model = model_class.from_config(config, trust_remote_code=False)
    else:
        model = model_class(config)
    for parameter in model.parameters():  # stock convolutions shrink what they pass on
        if parameter.dim() > 2 and float(parameter.detach().std(correction=0)) < 0.1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    if hasattr(model, "set_experts_implementation"):  # the other one has no float64
        model.set_experts_implementation("eager")
    given = inputs()
    return Sample(model, given, dict(given) if generates else None, **told)


def images(name: str, *shape: int, **more: Any) -> None:
    """Add an image encoder, whose pictures have the ``shape`` (2, 3, 16, 16), or as given."""
    also = more.pop("also", dict)
    variant(name, lambda: {"pixel_values": _pixels(*shape), **also()}, **more)


def texts(name: str, **more: Any) -> None:
    """Add a text model; the second of its two texts is shorter."""
    also = more.pop("also", dict)

    def inputs() -> dict[str, Any]:
        mask = _ones()
        mask[1, -2:] = 0
        return {"input_ids": _ids(), "attention_mask": mask, **also()}

    variant(name, inputs, **more)


def chats(name: str, tokens: int, *shape: int, **more: Any) -> None:
    """Add a model whose prompt holds ``tokens`` places for a picture."""
    also = more.pop("also", dict)
    more = {"head": "AutoModelForImageTextToText", "generates": True, **more}
    variant(
        name,
        lambda: {"input_ids": _prompt(tokens), "pixel_values": _pixels(*shape), **also()},
        **more,
    )


def tiny_config(config_class: Any, more: dict[str, Any]) -> Any:
    """A config of ``config_class`` with small sizes; ``more`` overrides them, nested as it is."""
    defaults = _defaults(config_class)
    values = {
        name: _like(defaults[name], value)
        for name, value in _sizes(config_class, defaults).items()
        if name in defaults
    }
    for name, sub in config_class.sub_configs.items():
        given = more.get(name, {})
        if not isinstance(given, dict):
            continue
        if sub is T.AutoConfig:
            kind = given.get("model_type") or _model_type(config_class, name)
            if not kind:
                continue
            given = {k: v for k, v in given.items() if k != "model_type"}
            sub = CONFIG_MAPPING[kind]
        values[name] = tiny_config(sub, given)
    values |= {
        k: v
        for k, v in more.items()
        if k not in config_class.sub_configs or not isinstance(v, dict)
    }
    return config_class(**values)


def _defaults(config_class: Any) -> dict[str, Any]:
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(config_class)
    }


def _model_type(config_class: Any, name: str) -> str:
    """The model type of a part of the default config."""
    return getattr(getattr(config_class(), name, None), "model_type", "")


def _sizes(config_class: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """Small sizes under all names that they have in transformers."""
    pictures = {"patch_size", "image_size", "backbone_config", "num_channels"}
    if pictures & {*defaults} or "vision" in config_class.__name__.lower():
        kind = "vision"
    else:
        kind = "decoder" if "num_key_value_heads" in defaults else "text"
    width, depth, heads, ffn = _KINDS[kind]
    sizes = dict(_ALWAYS)
    sizes |= dict.fromkeys(_WIDTHS, width) | dict.fromkeys(_DEPTHS, depth)
    sizes |= dict.fromkeys(_HEADS, heads) | dict.fromkeys(_HEAD_SIZES, width // heads)
    return sizes | dict.fromkeys(_FFNS, ffn)


def _like(default: Any, value: Any) -> Any:
    """``value``, as often as a default with a number per side has it."""
    if isinstance(default, list | tuple) and default and not isinstance(default[0], list | tuple):
        return type(default)([type(default[0])(value)] * len(default))
    return float(value) if isinstance(default, float) else value
