"""MDETR: boxes for the phrases of a text, with a convolutional or a transformer image backbone.

transformers has no such class, so this module builds it from transformers' parts, following MDETR
(Kamath et al., ICCV 2021). A DETR encoder reads image and text tokens together, a decoder turns
learned queries into boxes, and each query predicts which tokens of the text name its box. With a
DeiT in place of the ResNet the model is ViTMDETR, the base model of joint share and prune.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import AutoModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.detr.modeling_detr import (
    DetrConvEncoder,
    DetrDecoder,
    DetrDecoderLayer,
    DetrEncoder,
    DetrEncoderLayer,
    DetrMLPPredictionHead,
    DetrPreTrainedModel,
    DetrSinePositionEmbedding,
)
from transformers.utils.generic import ModelOutput

from .configs import MdetrConfig
from .set_loss import SetWeights, set_losses

__all__ = ["MdetrForGrounding", "MdetrOutput"]


@dataclass
class MdetrOutput(ModelOutput):
    """MDETR's output for a batch.

    ``logits`` (batch, queries, text positions; the last one means "no object"), ``pred_boxes``
    (batch, queries, 4) as centre, width and height in fractions of the image, ``answers``
    {head: (batch, classes)} if the model has answer heads, and ``queries`` (batch, queries, size)
    and ``text`` (batch, tokens, size), the unit-length embeddings that training aligns.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    answers: dict[str, Tensor] | None = None
    queries: Tensor | None = None
    text: Tensor | None = None


class MdetrResizer(nn.Module):
    """Projects text states to the width of the DETR transformer."""

    def __init__(self, width_in: int, width_out: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Linear(width_in, width_out)
        self.layer_norm = nn.LayerNorm(width_out, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        """(batch, tokens, width in) -> (batch, tokens, width out)."""
        resized: Tensor = self.dropout(self.layer_norm(self.fc(states)))
        return resized


class MdetrDecoder(DetrDecoder):
    """DETR's decoder, which returns the queries after every layer.

    When asked for these, transformers' own decoder feeds each layer the normalised output of the
    layer before, which neither DETR nor MDETR does, so published checkpoints would answer wrongly.
    """

    def forward(
        self, queries: Tensor, memory: Tensor, memory_mask: Tensor, places: Tensor
    ) -> Tensor:
        """(layers, batch, queries, width), normalised, from query embeddings of that shape."""
        states = torch.zeros_like(queries)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=memory_mask,
            encoder_hidden_states=memory,
        )
        after = []
        for layer in self.layers:
            states = layer(states, None, places, queries, memory, encoder_attention_mask=mask)
            after.append(self.layernorm(states))
        return torch.stack(after)


class MdetrForGrounding(DetrPreTrainedModel):
    """Finds the boxes that a text names in an image; with answer heads, answers questions too."""

    config_class = MdetrConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities: Any = ("image", "text")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width, vision = config.d_model, config.backbone_config
        self.convolutional = vision.model_type in ("resnet", "timm_backbone")
        if self.convolutional:
            self.vision_model = DetrConvEncoder(config)
            vision_width = self.vision_model.intermediate_channel_sizes[-1]
            self.input_proj: nn.Module = nn.Conv2d(vision_width, width, kernel_size=1)
        else:
            self.vision_model = AutoModel.from_config(
                vision, add_pooling_layer=False, trust_remote_code=False
            )
            self.input_proj = nn.Linear(vision.hidden_size, width)
        self.text_encoder = AutoModel.from_config(
            config.text_config, trust_remote_code=False, **_without_pooler(config)
        )
        self.resizer = MdetrResizer(config.text_config.hidden_size, width, config.dropout)
        self.position = DetrSinePositionEmbedding(width // 2, normalize=True)
        self.fusion_encoder = DetrEncoder(config)
        self.decoder = MdetrDecoder(config)
        # sorted, since a saved config does not keep the order of the dict
        self.answer_names = tuple(sorted(config.answer_heads))
        self.query_embed = nn.Embedding(config.num_queries, width)
        self.class_embed = nn.Linear(width, config.text_positions)
        self.bbox_embed = DetrMLPPredictionHead(width, width, 4, 3)
        self.align_queries = nn.Linear(width, config.alignment_size)
        self.align_text = nn.Linear(width, config.alignment_size)
        self.answer_queries = (
            nn.Embedding(len(self.answer_names), width) if config.answer_heads else None
        )
        self.answer_heads = nn.ModuleDict(
            {name: nn.Linear(width, config.answer_heads[name]) for name in self.answer_names}
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, DetrEncoderLayer | DetrDecoderLayer):
            for layer in module.modules():  # as in DETR; a deviation of 0.02 is far too small
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
        elif isinstance(module, DetrMLPPredictionHead | MdetrResizer):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.kaiming_uniform_(layer.weight, a=5**0.5)
        elif isinstance(module, nn.Embedding) and module is self.query_embed:
            nn.init.normal_(module.weight)

    # -- the parts of a forward pass -----------------------------------------------------

    def _see(self, pixels: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens (batch, places, width), their positions, and a mask, False at padding."""
        batch, _, height, side = pixels.shape
        if self.convolutional:
            if pixel_mask is None:
                pixel_mask = pixels.new_ones(batch, height, side, dtype=torch.long)
            features, mask = self.vision_model(pixels, pixel_mask)[-1]
            features = self.input_proj(features)
            rows, columns = features.shape[-2:]
            tokens = features.flatten(2).transpose(1, 2)
        else:
            vision: Any = self.config.backbone_config
            patch = vision.patch_size
            rows, columns = height // patch, side // patch
            states = self.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
            tokens = self.input_proj(states[:, states.shape[1] - rows * columns :])
            mask = tokens.new_ones(batch, rows, columns, dtype=torch.bool)
            if pixel_mask is not None:
                small = F.interpolate(pixel_mask[None].float(), size=(rows, columns))
                mask = small.to(torch.bool)[0]
        shape = torch.Size((batch, self.config.d_model, rows, columns))
        places = self.position(
            shape, tokens.device, tokens.dtype, mask if pixel_mask is not None else None
        )
        return tokens, places.flatten(2).transpose(1, 2), mask.flatten(1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        answers: Mapping[str, Tensor] | None = None,
        **_kwargs: Any,
    ) -> MdetrOutput:
        """Boxes with their token logits, answers, and the loss if there are targets.

        ``pixel_values`` (batch, 3, height, width). ``labels`` hold for each image ``boxes`` (n, 4)
        and ``tokens`` (n, text positions), see :mod:`vlprune.models.set_loss`. ``answers`` hold for
        each answer head the class of each question (batch,), -1 where the head does not apply. The
        loss is the sum over the targets that are given.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        image, places, image_mask = self._see(pixel_values, pixel_mask)
        words = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        words = self.resizer(words)
        mask = torch.cat([image_mask, attention_mask.bool()], dim=1)
        places = torch.cat([places, torch.zeros_like(words)], dim=1)
        memory = self.fusion_encoder(
            inputs_embeds=torch.cat([image, words], dim=1),
            attention_mask=mask,
            spatial_position_embeddings=places,
        ).last_hidden_state
        wanted = self.query_embed.weight
        if self.answer_queries is not None:
            wanted = torch.cat([wanted, self.answer_queries.weight])
        wanted = wanted.unsqueeze(0).expand(image.shape[0], -1, -1)
        layers = self.decoder(wanted, memory, mask, places)
        states, boxed = layers[-1], self.config.num_queries
        text = F.normalize(self.align_text(memory[:, image.shape[1] :]), dim=-1)
        asked = layers[0 if self.config.answer_layer == "first" else -1]
        said = {
            name: self.answer_heads[name](asked[:, boxed + i])
            for i, name in enumerate(self.answer_names)
        }
        final = self._read(states[:, :boxed], text)
        losses = {}
        if labels is not None:
            earlier = layers[:-1] if self.config.auxiliary_loss else ()
            said_before = [self._read(layer[:, :boxed], text) for layer in earlier]
            losses = self._box_losses(final, said_before, labels)
        if answers is not None:
            losses |= _answer_losses(said, answers)
        return MdetrOutput(
            loss=torch.stack([*losses.values()]).sum() if losses else None,
            losses=losses or None,
            logits=final["logits"],
            pred_boxes=final["boxes"],
            answers=said or None,
            queries=final["queries"],
            text=text,
        )

    def _read(self, states: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Logits, boxes and embeddings of queries, (batch, queries, ...) each, with ``text``."""
        return {
            "logits": self.class_embed(states),
            "boxes": self.bbox_embed(states).sigmoid(),
            "queries": F.normalize(self.align_queries(states), dim=-1),
            "text": text,
        }

    def _box_losses(
        self, final: Mapping[str, Tensor], earlier: Sequence[Mapping[str, Tensor]], labels: Any
    ) -> dict[str, Tensor]:
        """The losses of the last decoder layer, and of each earlier layer with its number."""
        config = self.config
        weights = SetWeights(
            tokens=config.class_cost,
            l1=config.bbox_loss_coefficient,
            giou=config.giou_loss_coefficient,
            no_object=config.eos_coefficient,
            temperature=config.alignment_temperature,
        )
        count = torch.tensor(float(sum(len(t["boxes"]) for t in labels)), device=self.device)
        if PartialState._shared_state:
            count = reduce(count, "mean")
        boxes = count.clamp(min=1)
        if config.positive_map == "published":
            labels = [{**t, "tokens": (t["tokens"] > 0).float()} for t in labels]
        losses = set_losses(final, labels, weights, boxes)
        for number, said in enumerate(earlier):
            more = set_losses(said, labels, weights, boxes)
            losses |= {f"{name}_{number}": value for name, value in more.items()}
        return losses


def _without_pooler(config: Any) -> dict[str, Any]:
    """Arguments that leave out the pooler, which nothing here reads; none for CLIP."""
    return {} if config.text_config.model_type.startswith("clip") else {"add_pooling_layer": False}


def _answer_losses(said: Mapping[str, Tensor], answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy of every answer head over the questions it applies to."""
    losses = {}
    for name, logits in said.items():
        right = answers[name]
        total = F.cross_entropy(logits.float(), right, ignore_index=-1, reduction="sum")
        losses[name] = total / (right >= 0).sum().clamp(min=1)
    return losses
