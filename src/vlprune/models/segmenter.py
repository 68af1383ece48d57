"""Segmenter: a vision transformer with a mask-transformer decoder for semantic segmentation.

transformers has no such class, so this module builds it from transformers' ViT parts, following
Segmenter (Strudel et al., ICCV 2021, section 3.2). One learned embedding per class joins the
patches in a few more layers, and the scalar products of patches and classes are the masks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.vit.modeling_vit import ViTLayer, ViTModel, ViTPreTrainedModel

from .configs import SegmenterConfig

__all__ = ["SegmenterForSemanticSegmentation"]


class SegmenterMaskTransformer(nn.Module):
    """Decoder from patches to one mask per class."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, scale = config.hidden_size, config.hidden_size**-0.5
        self.project = nn.Linear(width, width)
        self.class_embeddings = nn.Parameter(torch.randn(1, config.num_labels, width) * 0.02)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.patch_projection = nn.Parameter(scale * torch.randn(width, width))
        self.class_projection = nn.Parameter(scale * torch.randn(width, width))
        self.mask_norm = nn.LayerNorm(config.num_labels, eps=config.layer_norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        """Scores (batch, patches, classes) from encoder states (batch, patches, width)."""
        states = self.project(patches)
        classes = self.class_embeddings.expand(states.shape[0], -1, -1)
        states = torch.cat([states, classes], dim=1)
        for layer in self.layers:
            states = layer(states, None)
        states = self.norm(states)
        count = self.class_embeddings.shape[1]
        pixels = nn.functional.normalize(states[:, :-count] @ self.patch_projection, dim=-1)
        masks = nn.functional.normalize(states[:, -count:] @ self.class_projection, dim=-1)
        scores: Tensor = self.mask_norm(pixels @ masks.transpose(1, 2))
        return scores


class SegmenterForSemanticSegmentation(ViTPreTrainedModel):
    """A ViT encoder and a mask-transformer decoder, which score the classes of every patch."""

    config_class = SegmenterConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.decoder = SegmenterMaskTransformer(config)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, SegmenterMaskTransformer):
            width = self.config.hidden_size
            nn.init.normal_(module.class_embeddings, std=0.02)
            nn.init.normal_(module.patch_projection, std=width**-0.5)
            nn.init.normal_(module.class_projection, std=width**-0.5)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **_kwargs: Any
    ) -> SemanticSegmenterOutput:
        """Logits (batch, classes, height / patch, width / patch), and the loss with ``labels``.

        ``pixel_values`` are (batch, channels, height, width), with sides that are multiples of
        the patch size; ``labels`` (batch, height, width) are class numbers, or
        ``config.semantic_loss_ignore_index`` for pixels of unknown class.
        """
        patch = int(self.config.patch_size)
        rows, columns = pixel_values.shape[2] // patch, pixel_values.shape[3] // patch
        states = self.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        scores = self.decoder(states[:, 1:])  # without the class token
        logits = scores.transpose(1, 2).reshape(scores.shape[0], -1, rows, columns)
        loss = None
        if labels is not None:
            full = nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
            ignored = int(self.config.semantic_loss_ignore_index)
            total = nn.functional.cross_entropy(full, labels, ignore_index=ignored, reduction="sum")
            # the mean over no pixel would be NaN, and all weights with it after one step
            loss = total / (labels != ignored).sum().clamp(min=1)
        return SemanticSegmenterOutput(loss=loss, logits=logits)
