"""BLIP for visual reasoning: whether a statement is true of two images (NLVR2).

transformers has no such class, so this module builds it from transformers' BLIP parts, following
BLIP (Li et al., ICML 2022, section 4.5 and figure 5). The text encoder has two cross-attentions in
every layer, one per image. Their outputs are averaged in the lower layers and merged by a linear
layer in the upper ones, and a two-layer head reads the first token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.blip.modeling_blip import BlipPreTrainedModel, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel, BlipTextSelfAttention

from .configs import BlipNlvrConfig

__all__ = ["BlipForVisualReasoning"]


class BlipNlvrProjection(nn.Module):
    """The output projection of one cross-attention, with names as in BLIP's other attentions."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


class BlipNlvrCrossAttention(nn.Module):
    """Attention from text to one image, without residual or norm."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self = BlipTextSelfAttention(config, is_cross_attention=True, layer_idx=layer_idx)
        self.output = BlipNlvrProjection(config)

    def forward(self, hidden_states: Tensor, image_states: Tensor) -> Tensor:
        """(batch, tokens, width), from text of that shape and an image (batch, patches, width)."""
        context, _ = self.self(hidden_states, encoder_hidden_states=image_states)
        attended: Tensor = self.output.dense(context)
        return attended


class BlipNlvrTwinAttention(nn.Module):
    """Two cross-attentions side by side, in place of the single one of a BLIP layer."""

    def __init__(self, config: Any, layer_idx: int, merge: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.first = BlipNlvrCrossAttention(config, layer_idx)
        self.second = BlipNlvrCrossAttention(config, layer_idx)
        self.merge = nn.Linear(2 * width, width) if merge else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        """(batch, tokens, width); ``encoder_hidden_states`` is (batch, 2, patches, width)."""
        assert encoder_hidden_states is not None
        first = self.first(hidden_states, encoder_hidden_states[:, 0])
        second = self.second(hidden_states, encoder_hidden_states[:, 1])
        if self.merge is None:
            both = (first + second) / 2
        else:
            both = self.merge(torch.cat([first, second], dim=-1))
        return self.LayerNorm(self.dropout(both) + hidden_states), None


class BlipForVisualReasoning(BlipPreTrainedModel):
    """Classifies whether a statement is true of a pair of images."""

    config_class = BlipNlvrConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["BlipEncoderLayer", "BlipTextLayer"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        for number, layer in enumerate(self.text_encoder.encoder.layer):
            merge = number >= config.merge_from_layer
            layer.crossattention = BlipNlvrTwinAttention(text, number, merge)
        self.classifier = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size),
            nn.ReLU(),
            nn.Linear(text.hidden_size, config.num_labels),
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text's word embeddings."""
        embeddings: nn.Module = self.text_encoder.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the text's word embeddings."""
        self.text_encoder.set_input_embeddings(value)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (batch, 2) for false and true, and the loss if ``labels`` are given.

        ``pixel_values`` (batch, 2, channels, height, width), ``input_ids`` and ``attention_mask``
        (batch, tokens), ``labels`` (batch,) 0 or 1.
        """
        batch, pair = pixel_values.shape[:2]
        images = self.vision_model(pixel_values.flatten(0, 1)).last_hidden_state
        states = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=images.reshape(batch, pair, *images.shape[1:]),
        ).last_hidden_state
        logits = self.classifier(states[:, 0])
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits)

    @classmethod
    def from_blip(cls, blip: Any) -> BlipForVisualReasoning:
        """A model with the weights of a BLIP whose text encoder has cross-attention.

        ``blip`` is a BlipForImageTextRetrieval or BlipForQuestionAnswering. Both twins start
        equal, the merging layers start as the average of the twins, and the head is new.
        """
        model = cls(BlipNlvrConfig(**{**blip.config.to_dict(), "architectures": None}))
        model.vision_model.load_state_dict(blip.vision_model.state_dict())
        state = {}
        for name, value in blip.text_encoder.state_dict().items():
            if ".crossattention.output.LayerNorm." in name:
                state[name.replace(".output.LayerNorm.", ".LayerNorm.")] = value
            elif ".crossattention." in name:
                for twin in ("first", "second"):
                    state[name.replace(".crossattention.", f".crossattention.{twin}.")] = value
            else:
                state[name] = value
        model.text_encoder.load_state_dict(state, strict=False)
        with torch.no_grad():
            for layer in model.text_encoder.encoder.layer:
                merge: Any = getattr(layer.crossattention, "merge")  # noqa: B009
                if merge is not None:
                    half = torch.eye(merge.out_features) / 2
                    merge.weight.copy_(torch.cat([half, half], dim=1))
                    merge.bias.zero_()
        return model
