"""The model families that find boxes for words, behind one interface.

A grounder builds a small new model, phrases its prompts, prepares it to train on boxes and token
maps, and reads its output as one probability for each query and token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..errors import RecipeError, did_you_mean
from ..models.set_loss import SetWeights, focal_set_losses
from ..recipe.options import fusion_width
from ..recipe.spec import ModelSpec
from .new_models import bert_settings, clip_image_processor, vit_settings, word_tokenizer

__all__ = ["GROUNDERS", "Grounder", "grounder_of"]

NEW_POSITIONS = 32
"""Text positions of a small new model."""


class Grounder(ABC):
    """One family of models; ``model_types`` are the model types in their configs."""

    model_types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def new_config(self, spec: ModelSpec, tokenizer: Any, options: Mapping[str, Any]) -> Any:
        """The config of a small new model."""

    @abstractmethod
    def model_class(self) -> Any:
        """The model class of the family."""

    def new_processor(self, spec: ModelSpec, texts: Sequence[str]) -> Any:
        """A processor for a small new model."""
        from transformers import CLIPProcessor

        return CLIPProcessor(clip_image_processor(spec), word_tokenizer(texts))

    def positions(self, config: Any) -> int:
        """The number of text positions over which a query has probabilities."""
        return int(config.max_text_len)

    def prompt(self, text: str) -> str:
        """The text as the family expects it; begins with ``text`` unchanged, so that spans hold."""
        return text

    def ready(self, model: Any) -> Any:
        """The model itself, made to take ``labels`` of boxes and token maps in its forward."""
        return model

    suppresses: ClassVar[bool] = False
    """Whether several queries may find one object, so that detections need suppression."""

    @abstractmethod
    def read(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Probabilities (batch, queries, positions), and boxes (batch, queries, 4) as fractions."""

    def score(self, probabilities: Tensor, tokens: Tensor) -> Tensor:
        """How well each query fits a phrase: (queries,), from (queries, positions), (positions,).

        By default the mean over the phrase's tokens, whose probabilities are independent, as in
        Grounding DINO's evaluation of detection (``PostProcessCocoGrounding``).
        """
        return probabilities @ tokens[: probabilities.shape[-1]]

    def score_expression(self, probabilities: Tensor, tokens: Tensor) -> Tensor:
        """As :meth:`score`, for the one phrase of a referring expression."""
        return self.score(probabilities, tokens)


class MdetrGrounder(Grounder):
    """MDETR and ViTMDETR; a query's probabilities sum to 1 over all tokens and "no object"."""

    model_types = ("vlprune_mdetr",)

    def new_config(self, spec: ModelSpec, tokenizer: Any, options: Mapping[str, Any]) -> Any:
        from transformers import DeiTConfig, RobertaConfig

        from ..models import MdetrConfig

        width = options["fusion_width"] or spec.width
        return MdetrConfig(
            backbone_config=DeiTConfig(
                **vit_settings(spec), initializer_range=0.8 * spec.width**-0.5
            ),
            text_config=RobertaConfig(**bert_settings(spec, tokenizer)),
            **_detr_settings(spec, width, options),
            text_positions=NEW_POSITIONS,
            alignment_size=min(64, width),
        )

    def model_class(self) -> Any:
        from ..models import MdetrForGrounding

        return MdetrForGrounding

    def positions(self, config: Any) -> int:
        return int(config.text_positions)

    def read(self, outputs: Any) -> tuple[Tensor, Tensor]:
        return outputs.logits.float().softmax(-1), outputs.pred_boxes.float()

    def score(self, probabilities: Tensor, tokens: Tensor) -> Tensor:
        """The probability of the likeliest of the phrase's tokens.

        So the authors evaluate phrases of captions (``PostProcessFlickr``).
        """
        return (probabilities * (tokens > 0)).amax(-1)

    def score_expression(self, probabilities: Tensor, tokens: Tensor) -> Tensor:
        """The probability that the query has found anything: 1 less that of "no object".

        So the authors evaluate referring expressions (``PostProcess``), whichever tokens of the
        text name the box.
        """
        return 1 - probabilities[:, -1]


class GroundingDinoGrounder(Grounder):
    """transformers' Grounding DINO and MM Grounding DINO; each token has its own sigmoid."""

    model_types = ("grounding-dino", "mm-grounding-dino")

    def new_processor(self, spec: ModelSpec, texts: Sequence[str]) -> Any:
        from transformers import CLIPProcessor

        return CLIPProcessor(clip_image_processor(spec), _bert_like(texts))

    def new_config(self, spec: ModelSpec, tokenizer: Any, options: Mapping[str, Any]) -> Any:
        from transformers import GroundingDinoConfig

        width = fusion_width("grounding-dino", options["fusion_width"] or spec.width)
        return GroundingDinoConfig(
            backbone_config=small_swin(spec),
            text_config={"model_type": "bert", **bert_settings(spec, tokenizer)},
            **_detr_settings(spec, width, options),
            fusion_droppath=0.0,
            max_text_len=NEW_POSITIONS,
            auxiliary_loss=True,
        )

    def model_class(self) -> Any:
        from transformers import GroundingDinoForObjectDetection

        return GroundingDinoForObjectDetection

    def prompt(self, text: str) -> str:
        return text if text.endswith(".") else text + " ."

    def ready(self, model: Any) -> Any:
        model.loss_function = grounding_dino_loss
        return model

    def read(self, outputs: Any) -> tuple[Tensor, Tensor]:
        return outputs.logits.float().sigmoid(), outputs.pred_boxes.float()


def _detr_settings(spec: ModelSpec, width: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of encoder and decoder, under the names that DETR and its relatives share."""
    return {
        "d_model": width,
        "encoder_layers": options["fusion_layers"],
        "decoder_layers": options["decoder_layers"],
        "encoder_attention_heads": spec.heads,
        "decoder_attention_heads": spec.heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "dropout": 0.0,
        "num_queries": options["queries"],
    }


class GlipGrounder(Grounder):
    """GLIP: each place of the pyramid is a query, and each token has its own sigmoid."""

    model_types = ("vlprune_glip",)
    suppresses = True

    def new_config(self, spec: ModelSpec, tokenizer: Any, options: Mapping[str, Any]) -> Any:
        from transformers import BertConfig

        from ..models import GlipConfig

        width = fusion_width("glip", options["fusion_width"] or spec.width)
        return GlipConfig(
            backbone_config=small_swin(spec),
            text_config=BertConfig(**bert_settings(spec, tokenizer)),
            d_model=width,
            fusion_layers=options["fusion_layers"],
            fusion_size=width,
            fusion_heads=spec.heads,
            fusion_dropout=0.0,
            max_text_len=NEW_POSITIONS,
            strides=[4, 8, 16, 32, 64],
            anchor_scale=4,
        )

    def model_class(self) -> Any:
        from ..models import GlipForGrounding

        return GlipForGrounding

    def read(self, outputs: Any) -> tuple[Tensor, Tensor]:
        central = outputs.centerness.float().sigmoid()
        return outputs.logits.float().sigmoid() * central[..., None], outputs.pred_boxes.float()

    def score(self, probabilities: Tensor, tokens: Tensor) -> Tensor:
        """The geometric mean of a place's centerness and the mean probability of the tokens."""
        return super().score(probabilities, tokens).sqrt()


def small_swin(spec: ModelSpec) -> Any:
    """The config of a small new four-stage Swin."""
    from transformers import SwinConfig

    return SwinConfig(
        embed_dim=spec.width // 4,
        depths=[1, 1, max(1, spec.vision_layers - 2), 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        image_size=spec.image_size,
        patch_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )


def grounding_dino_loss(
    logits: Tensor,
    labels: Sequence[Mapping[str, Tensor]],
    device: Any,
    pred_boxes: Tensor,
    config: Any,
    label_maps: Any,
    text_mask: Tensor,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    encoder_logits: Tensor | None = None,
    encoder_pred_boxes: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], None]:
    """Grounding DINO's loss on token maps, with the signature of transformers' own loss.

    That loss, in transformers 5.23, finds the label map of an image by adding the number of the
    image's own classes, not of those of all images before it. From the third image of a batch on,
    it reads another image's map wherever their texts differ. ``labels`` here hold the maps
    themselves. Returns the total, the weighted terms by name, and None.
    """
    weights = SetWeights(
        tokens=config.class_cost,
        l1=config.bbox_loss_coefficient,
        giou=config.giou_loss_coefficient,
    )
    count = max(1.0, float(sum(len(target["boxes"]) for target in labels)))
    layers = [("", logits, pred_boxes)]
    if config.auxiliary_loss and outputs_class is not None and outputs_coord is not None:
        earlier = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        layers += [(f"_{i}", c, b) for i, (c, b) in enumerate(earlier)]
    if config.two_stage and encoder_logits is not None and encoder_pred_boxes is not None:
        layers.append(("_encoder", encoder_logits, encoder_pred_boxes))
    losses: dict[str, Tensor] = {}
    for suffix, said, boxes in layers:
        mask = text_mask[:, :1] if text_mask.dim() == 3 else text_mask
        part = focal_set_losses(said, boxes, labels, mask, weights, count)
        losses |= {name + suffix: value for name, value in part.items()}
    return torch.stack([*losses.values()]).sum(), losses, None


def _bert_like(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word tokenizer whose special tokens have BERT's ids, on which Grounding DINO relies."""
    return word_tokenizer(texts, special={"[PAD]": 0, "[BOS]": 101, "[EOS]": 102, ".": 1012})


GROUNDERS: dict[str, Grounder] = {
    "mdetr": MdetrGrounder(),
    "grounding-dino": GroundingDinoGrounder(),
    "glip": GlipGrounder(),
}
"""Grounders by the names that a recipe may give under ``options: model:``."""


def grounder_of(name: str) -> Grounder:
    """The grounder that ``name`` names, itself or as a ``model_type``. Raises RecipeError."""
    for key, grounder in GROUNDERS.items():
        if name == key or name in grounder.model_types:
            return grounder
    raise RecipeError(
        f"options.model must be one of {', '.join(GROUNDERS)}, not {name!r}."
        f"{did_you_mean(name, GROUNDERS)}"
    )
