"""GLIP: detection as grounding, with deep fusion of image and text.

transformers has no such class, so this module builds it from transformers' parts, following GLIP
(Li et al., CVPR 2022, section 3). A Swin pyramid and a BERT feed a head of several layers. In each
layer image and text attend to each other, then the text passes through one more BERT layer and the
pyramid through a dynamic convolution. Every place of the pyramid predicts a box, the centerness of
the place in the box, and how well the place fits each token of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import AutoBackbone, AutoModel, PreTrainedModel
from transformers.image_transforms import center_to_corners_format
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoFusionLayer
from transformers.utils.generic import ModelOutput

from .atss import anchors, assign_places, centerness, decode
from .configs import GlipConfig
from .dynamic_head import DynamicBlock
from .set_loss import masked_focal_loss, paired_giou

__all__ = ["GlipForGrounding", "GlipOutput"]


@dataclass
class GlipOutput(ModelOutput):
    """GLIP's output for a batch; "places" are all places of all pyramid levels.

    ``logits`` (batch, places, tokens), ``centerness`` (batch, places) logits, ``pred_boxes``
    (batch, places, 4) as centre, width and height in fractions of the image.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    centerness: Tensor | None = None


class GlipFusionLayer(GroundingDinoFusionLayer):
    """Image and text attend to each other; each keeps its own width (GLIP, equations 4 to 6)."""

    def __init__(self, config: Any) -> None:
        sizes = SimpleNamespace(
            d_model=config.d_model,
            encoder_ffn_dim=2 * config.fusion_size,
            encoder_attention_heads=2 * config.fusion_heads,
            fusion_dropout=config.fusion_dropout,
            fusion_droppath=0.0,
            layer_norm_eps=config.layer_norm_eps,
        )
        super().__init__(sizes)
        text = config.text_config.hidden_size
        self.attn.text_dim = text
        self.attn.text_proj = nn.Linear(text, config.fusion_size)
        self.attn.values_text_proj = nn.Linear(text, config.fusion_size)
        self.attn.out_text_proj = nn.Linear(config.fusion_size, text)
        self.layer_norm_text = nn.LayerNorm(text, config.layer_norm_eps)
        share = 1 / config.fusion_layers
        self.vision_param = nn.Parameter(share * torch.ones(config.d_model))
        self.text_param = nn.Parameter(share * torch.ones(text))


class GlipLayer(nn.Module):
    """One layer of the head: fusion, then a layer for the text and a block for the pyramid."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fusion = GlipFusionLayer(config)
        self.text_layer = BertLayer(config.text_config)
        self.dynamic = DynamicBlock(config.d_model, config.offsets == "published")

    def forward(
        self, levels: list[Tensor], words: Tensor, absent: Tensor, mask: Any
    ) -> tuple[list[Tensor], Tensor]:
        """Pyramid levels and text states to the same shapes; ``absent`` is True at padding."""
        sizes = [level.shape[-2:] for level in levels]
        flat = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        (flat, _), (words, _) = self.fusion(flat, words, attention_mask_text=absent)
        counts = [height * width for height, width in sizes]
        levels = [
            part.transpose(1, 2).unflatten(2, size)
            for part, size in zip(flat.split(counts, dim=1), sizes, strict=True)
        ]
        return self.dynamic(levels), self.text_layer(words, mask)


class GlipPyramid(nn.Module):
    """Three backbone stages to five levels of one width (FPN, with two strided levels on top)."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(own, width, 1) for own in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.extra = nn.ModuleList(nn.Conv2d(width, width, 3, 2, padding=1) for _ in range(2))

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Feature maps (batch, width, rows, columns) of all levels, finest first."""
        sides = [layer(stage) for layer, stage in zip(self.lateral, stages, strict=True)]
        for number in range(len(sides) - 2, -1, -1):
            above = F.interpolate(sides[number + 1], sides[number].shape[-2:], mode="nearest")
            sides[number] = sides[number] + above
        levels = [layer(side) for layer, side in zip(self.smooth, sides, strict=True)]
        levels.append(self.extra[0](levels[-1]))
        levels.append(self.extra[1](F.relu(levels[-1])))
        return levels


class GlipForGrounding(PreTrainedModel):
    """Finds the boxes that a text names; GLIP-T at the default sizes."""

    config_class = GlipConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities: Any = ("image", "text")
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width, text = config.d_model, config.text_config.hidden_size
        self.vision_model = AutoBackbone.from_config(
            config.backbone_config, trust_remote_code=False
        )
        self.text_encoder = AutoModel.from_config(
            config.text_config, add_pooling_layer=False, trust_remote_code=False
        )
        self.pyramid = GlipPyramid(self.vision_model.channels, width)
        self.fusion_layers = nn.ModuleList(GlipLayer(config) for _ in range(config.fusion_layers))
        self.box_head = nn.Conv2d(width, 4, 1)
        self.centerness_head = nn.Conv2d(width, 1, 1)
        self.box_scales = nn.Parameter(torch.ones(len(config.strides)))
        self.token_head = nn.Linear(text, width)
        self.token_bias = nn.Parameter(torch.zeros(text))
        self.bias = nn.Parameter(torch.full((1,), -4.59512))  # a token fits with probability 0.01
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, GlipForGrounding):
            nn.init.constant_(module.bias, -4.59512)
            nn.init.ones_(module.box_scales)
            for parameter in (module.token_bias, module.log_scale):
                nn.init.zeros_(parameter)
        elif isinstance(module, GlipPyramid):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_uniform_(layer.weight, a=1)
        elif isinstance(module, GlipFusionLayer):
            share = 1 / self.config.fusion_layers
            nn.init.constant_(module.vision_param, share)
            nn.init.constant_(module.text_param, share)
            for layer in module.attn.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
        elif isinstance(module, DynamicBlock):
            for part in (module.coarser, module.same, module.finer):
                nn.init.normal_(part.weight, std=0.01)
                nn.init.zeros_(part.bias)
            nn.init.zeros_(module.offset.weight)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        **_kwargs: Any,
    ) -> GlipOutput:
        """Boxes with their centerness and token logits, and the loss if ``labels`` are given.

        ``pixel_values`` (batch, 3, height, width) and, if images are padded on the right and
        below, ``pixel_mask`` (batch, height, width), 1 inside; boxes are fractions of the image
        without its padding. ``labels`` hold for each image ``boxes`` (n, 4) and ``tokens`` (n,
        positions), whose non-zero entries are the tokens of the phrase that names the box.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        absent = ~attention_mask.bool()
        levels = self.pyramid(self.vision_model(pixel_values).feature_maps)
        words = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        text_config: Any = self.config.text_config
        mask = create_bidirectional_mask(
            config=text_config, inputs_embeds=words, attention_mask=attention_mask
        )
        for layer in self.fusion_layers:
            levels, words = layer(levels, words, absent, mask)
        codes, central, places = [], [], []
        for level, scale in zip(levels, self.box_scales, strict=True):
            codes.append((self.box_head(level) * scale).flatten(2).transpose(1, 2))
            central.append(self.centerness_head(level).flatten(1))
            places.append(level.flatten(2).transpose(1, 2))
        logits = self._fit(torch.cat(places, dim=1), words)
        logits = logits.masked_fill(absent[:, None], -50000.0)
        height, width = pixel_values.shape[-2:]
        sizes = [(level.shape[-2], level.shape[-1]) for level in levels]
        grid = anchors(sizes, self.config.strides, self.config.anchor_scale)
        every = torch.cat(grid).to(pixel_values)
        boxes = decode(every, torch.cat(codes, dim=1))
        side = boxes.new_tensor([width, height, width, height]).expand(boxes.shape[0], 1, 4)
        if pixel_mask is not None:
            extent = [pixel_mask[:, 0].sum(1), pixel_mask[:, :, 0].sum(1)]
            side = torch.stack(2 * extent, dim=-1)[:, None].to(boxes)
        middle = torch.cat(central, dim=1)
        losses = None
        if labels is not None:
            there = attention_mask.bool()
            losses = self._losses(logits, boxes / side, middle, grid, every, side, labels, there)
        low, high = (boxes / side).chunk(2, dim=-1)
        return GlipOutput(
            loss=torch.stack([*losses.values()]).sum() if losses else None,
            losses=losses,
            logits=logits,
            pred_boxes=torch.cat([(low + high) / 2, high - low], dim=-1),
            centerness=middle,
        )

    def _fit(self, places: Tensor, words: Tensor) -> Tensor:
        """Alignment of ``places`` (batch, places, width) and ``words`` (batch, tokens, text width).

        Returns logits (batch, places, tokens).
        """
        normed = F.normalize(words, dim=-1)
        tokens = self.token_head(normed / 2)
        bias = normed @ self.token_bias + self.bias
        scores = places @ tokens.transpose(1, 2) / self.log_scale.exp() + bias[:, None]
        return scores.clamp(-50000, 50000)

    def _losses(
        self,
        logits: Tensor,
        boxes: Tensor,
        middle: Tensor,
        grid: Sequence[Tensor],
        every: Tensor,
        side: Tensor,
        labels: Sequence[Mapping[str, Tensor]],
        there: Tensor,
    ) -> dict[str, Tensor]:
        """Alignment by focal loss; GIoU of boxes and cross-entropy of centerness at ATSS places."""
        goal = torch.zeros_like(logits, dtype=torch.float32)
        inclusive = self.config.corners == "inclusive"
        sizes = [len(target["boxes"]) for target in labels]
        every_box = torch.cat([target["boxes"] for target in labels]).float()
        every_phrase = torch.cat([target["tokens"] for target in labels])
        of_image = torch.arange(len(labels)).repeat_interleave(torch.tensor(sizes))
        pixels = center_to_corners_format(every_box) * side[of_image.to(side.device), 0].float()
        each = pixels.cpu().split(sizes)  # at once: a GPU is waited for each time
        owners = [assign_places(grid, own, self.config.atss_candidates, inclusive) for own in each]
        rows, columns, which = _owned(owners, sizes).to(logits.device)
        right = pixels[which]
        goal[rows, columns] = (every_phrase[which] > 0).float()[:, : logits.shape[-1]]
        central = centerness(every[columns].float(), right, inclusive)
        count = _mean(torch.tensor(float(len(rows)), device=logits.device)).clamp(min=1)
        weight = _mean(central.sum()).clamp(min=1e-6)
        fits = masked_focal_loss(logits, goal, there[:, None]) / count
        pixels_of = side[rows, 0].float()
        found = [boxes[rows, columns].float(), right / pixels_of]
        said, true = (_spans(box, float(inclusive) / pixels_of[:, 2:]) for box in found)
        giou = ((1 - paired_giou(said, true)) * central).sum() / weight
        logit = middle[rows, columns].float()
        about = F.binary_cross_entropy_with_logits(logit, central, reduction="sum") / count
        return {"alignment": fits, "giou": 2 * giou, "centerness": about}


def _spans(boxes: Tensor, less: Tensor) -> Tensor:
    """Corners (n, 4) as centres and sizes (n, 4), where right and lower edges lie ``less`` inside.

    No box becomes smaller than nothing.
    """
    low, high = boxes.chunk(2, dim=-1)
    high = torch.maximum(low, high - less)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def _owned(owners: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Image, place and box of all pairs, (3, pairs); boxes are counted through the whole batch.

    ``owners`` hold for each image the box of each place, or -1; ``sizes`` how many boxes it has.
    """
    found, first = [], 0
    for number, (owner, size) in enumerate(zip(owners, sizes, strict=True)):
        at = (owner >= 0).nonzero()[:, 0]
        found.append(torch.stack([torch.full_like(at, number), at, owner[at] + first]))
        first += size
    return torch.cat(found, dim=1)


def _mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over all processes."""
    return reduce(value, "mean") if PartialState._shared_state else value
