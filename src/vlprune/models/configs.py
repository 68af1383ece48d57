"""Configs of the models that transformers lacks."""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.blip.configuration_blip import BlipConfig
from transformers.models.detr.configuration_detr import DetrConfig
from transformers.models.vit.configuration_vit import ViTConfig

from . import PREFIX

__all__ = ["BlipNlvrConfig", "GlipConfig", "MdetrConfig", "SegmenterConfig"]


class _PrefixedType:
    """Lets a config read folders saved before its model type began with ``vlprune_``."""

    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, with an old model type replaced by the current one."""
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if PREFIX + str(found.get("model_type")) == cls.model_type:
            found = {**found, "model_type": cls.model_type}
        return found, rest

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # else it would hide that of the class
        super().__post_init__(**kwargs)  # type: ignore[misc]


class BlipNlvrConfig(_PrefixedType, BlipConfig):
    """A BlipConfig with the text layer from which on the cross-attentions are merged linearly.

    Where the parts do not say otherwise, the model is the authors': 12 text heads at the published
    width of 768, and vision layer norms with an eps of 1e-6 (transformers' BLIP has 8 and 1e-5).
    """

    model_type = "vlprune_blip_nlvr"

    text_config: Any = None
    vision_config: Any = None
    merge_from_layer: int = 6

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            text = self.text_config or {}
            heads = {"num_attention_heads": 12} if text.get("hidden_size", 768) == 768 else {}
            self.text_config = {**heads, **text}
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = {"layer_norm_eps": 1e-6, **(self.vision_config or {})}
        super().__post_init__(**kwargs)


class SegmenterConfig(_PrefixedType, ViTConfig):
    """A ViTConfig with the number of layers of the mask transformer.

    ``layer_norm_eps`` and ``position_resizing``, the interpolation that fits position embeddings to
    pictures of another size, are those of the authors' code by default. A saved config without
    ``position_resizing`` is older than these defaults and is read with bicubic.
    """

    model_type = "vlprune_segmenter"

    layer_norm_eps: float = 1e-5
    position_resizing: Literal["bilinear", "bicubic"] = "bilinear"
    decoder_layers: int = 2
    semantic_loss_ignore_index: int = 255

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, with what was computed before the settings that are missing."""
        former = {"position_resizing": "bicubic", "layer_norm_eps": 1e-12}
        return super().from_dict({**former, **config_dict}, **kwargs)


class MdetrConfig(_PrefixedType, DetrConfig):
    """A DetrConfig with the text encoder and the settings that MDETR adds.

    ``backbone_config`` is that of a convolutional backbone (ResNet) or of a vision transformer
    (DeiT or ViT, for ViTMDETR). ``text_positions`` is the number of positions over which a query
    has probabilities; the last one means "no object". ``answer_heads`` maps each answer head of
    question answering to its number of classes.

    Three settings are those of the authors' checkpoints at ``"first"``, ``("obj", "attr", "rel",
    "global", "cat")`` and ``"published"`` (see :mod:`vlprune.models.mdetr_weights`).
    ``answer_layer`` is the decoder layer that the answer heads read, the first or the last.
    ``answer_types`` names the classes of the head ``answer_type`` in order; None stands for obj,
    rel, attr, cat, global. ``positive_map`` says what a matched query is taught: the
    ``"uniform"`` distribution over its phrase's tokens, as the paper has it, or ``"published"``, a
    one at each token, since the authors' code stores the distribution as booleans.
    """

    model_type = "vlprune_mdetr"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig, model_type="resnet", init_kwargs={"out_features": ["stage4"]}
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="roberta"),
    }

    text_config: Any = None
    text_positions: int = 256
    alignment_size: int = 64
    alignment_temperature: float = 0.07
    answer_heads: dict[str, int] | None = None
    auxiliary_loss: bool = True
    answer_layer: Literal["first", "last"] = "last"
    answer_types: list[str] | tuple[str, ...] | None = None
    positive_map: Literal["uniform", "published"] = "uniform"

    def __post_init__(self, **kwargs: Any) -> None:
        self.answer_heads = self.answer_heads or {}
        super().__post_init__(**{**kwargs, "use_timm_backbone": False})


class GlipConfig(_PrefixedType, PreTrainedConfig):
    """The config of GLIP: a Swin backbone, a BERT, and the sizes of the head; GLIP-T by default.

    ``fusion_size`` and ``fusion_heads`` belong to the attention between image and text. An anchor
    is ``anchor_scale`` strides wide, and ``atss_candidates`` anchors per level compete for a box.

    Two settings compute what the authors' code computes, as converted checkpoints need
    (:mod:`vlprune.models.glip_weights`). With ``corners="inclusive"`` the right and
    lower edge of a box in training are its last pixels, as there, so that a box is one pixel
    smaller when places are assigned, in centerness and in GIoU. With ``offsets="published"`` the
    offsets with which a level reads the next coarser one are not resized but read as they lie in
    memory, as the authors' operator does; their weights were trained so.
    """

    model_type = "vlprune_glip"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="swin",
            init_kwargs={"out_features": ["stage2", "stage3", "stage4"]},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    backbone_config: Any = None
    text_config: Any = None
    d_model: int = 256
    fusion_layers: int = 6
    fusion_size: int = 2048
    fusion_heads: int = 8
    fusion_dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    max_text_len: int = 256
    strides: tuple[int, ...] | list[int] = (8, 16, 32, 64, 128)
    anchor_scale: float | int = 8
    atss_candidates: int = 9
    corners: Literal["continuous", "inclusive"] = "continuous"
    offsets: Literal["resized", "published"] = "resized"
    initializer_range: float = 0.02


class _Later:
    """A stand-in for a model class that is imported on first use."""

    def __init__(self, name: str, config_class: Any) -> None:
        self.__name__, self.config_class = name, config_class

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module("vlprune.models").MODELS[self.__name__], attribute)


for _config, _name in (
    (BlipNlvrConfig, "BlipForVisualReasoning"),
    (SegmenterConfig, "SegmenterForSemanticSegmentation"),
    (MdetrConfig, "MdetrForGrounding"),
    (GlipConfig, "GlipForGrounding"),
):
    AutoModel.register(_config, _Later(_name, _config), exist_ok=True)
