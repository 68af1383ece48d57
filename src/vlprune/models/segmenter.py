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
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTLayer,
    ViTModel,
    ViTPreTrainedModel,
)

from .configs import SegmenterConfig

__all__ = ["SegmenterForSemanticSegmentation"]


class SegmenterEmbeddings(ViTEmbeddings):
    """ViT's embeddings, with positions resized as ``config.position_resizing`` says."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.resizing = config.position_resizing

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Position embeddings (1, 1 + patches, width) of a picture of ``height`` x ``width``."""
        positions: Tensor = self.position_embeddings
        side = round(self.patch_embeddings.num_patches**0.5)
        grid = (height // int(self.patch_size), width // int(self.patch_size))
        if not torch.jit.is_tracing() and grid == (side, side):  # type: ignore[attr-defined]
            return positions
        patches = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = nn.functional.interpolate(patches, grid, mode=self.resizing)
        return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


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
        self.vit.embeddings = SegmenterEmbeddings(config)
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
        """Logits (batch, classes, rows, columns), one per patch, and the loss with ``labels``.

        ``pixel_values`` are (batch, channels, height, width). A picture that patches do not fill
        is padded with zeros on the right and below, and the last row or column of logits covers the
        padding as well; :meth:`enlarge` leaves it out. ``labels`` (batch, height, width) are class
        numbers, or ``config.semantic_loss_ignore_index`` for pixels of unknown class.
        """
        patch = int(self.config.patch_size)
        height, width = pixel_values.shape[2:]
        if height % patch or width % patch:
            pixel_values = nn.functional.pad(pixel_values, (0, -width % patch, 0, -height % patch))
        rows, columns = pixel_values.shape[2] // patch, pixel_values.shape[3] // patch
        states = self.vit(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        scores = self.decoder(states[:, 1:])  # without the class token
        logits = scores.transpose(1, 2).reshape(scores.shape[0], -1, rows, columns)
        loss = None
        if labels is not None:
            full = self.enlarge(logits, labels.shape[1], labels.shape[2])
            ignored = int(self.config.semantic_loss_ignore_index)
            total = nn.functional.cross_entropy(full, labels, ignore_index=ignored, reduction="sum")
            # the mean over no pixel would be NaN, and all weights with it after one step
            loss = total / (labels != ignored).sum().clamp(min=1)
        return SemanticSegmenterOutput(loss=loss, logits=logits)

    def enlarge(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Logits of each pixel, (batch, classes, height, width), from those of each patch.

        ``height`` and ``width`` are those of the pictures.
        """
        patch = int(self.config.patch_size)
        size = (logits.shape[2] * patch, logits.shape[3] * patch)
        full = nn.functional.interpolate(logits, size, mode="bilinear")
        return full[:, :, :height, :width]
