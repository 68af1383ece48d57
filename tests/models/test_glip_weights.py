"""GLIP's published checkpoints: their names and shapes, and what a converted model computes.

``shapes`` lists the names and shapes that the modules of the authors' code have. ``Published``
computes slowly what that code computes, from weights under these names: attention in windows over
all pairs of places, deformable convolutions place by place, with offsets found by their addresses.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertTokenizerFast

from vlprune.data.shapes.write import write_shapes
from vlprune.errors import CheckpointError
from vlprune.models import GlipConfig, GlipForGrounding
from vlprune.models.glip_weights import convert_glip, published_settings
from vlprune.recipe.spec import DataSpec, ModelSpec
from vlprune.tasks.detection import DetectionTask

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Of a published model; GLIP-T by default."""

    swin: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    words: int = 30522
    text: int = 768
    layers: int = 12
    positions: int = 512
    width: int = 256
    fused: int = 2048
    fusions: int = 6


TINY = Sizes(8, (1, 2, 1, 1), (1, 1, 2, 2), 3, 40, 128, 2, 12, 32, 32, 2)


def shapes(of: Sizes) -> Shapes:
    """The names of a published state dict, without the prefix of distributed training."""
    found: Shapes = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def bert(path: str) -> None:
        for leaf in ("self.query", "self.key", "self.value", "output.dense"):
            add(f"{path}attention.{leaf}", of.text, of.text)
        add(f"{path}attention.output.LayerNorm", of.text)
        add(f"{path}intermediate.dense", 4 * of.text, of.text)
        add(f"{path}output.dense", of.text, 4 * of.text)
        add(f"{path}output.LayerNorm", of.text)

    body = "backbone.body."
    add(f"{body}patch_embed.proj", of.swin, 3, 4, 4)
    add(f"{body}patch_embed.norm", of.swin)
    for stage, (depth, heads) in enumerate(zip(of.depths, of.heads, strict=True)):
        width = of.swin * 2**stage
        for number in range(depth):
            block = f"{body}layers.{stage}.blocks.{number}."
            add(f"{block}norm1", width)
            found[f"{block}attn.relative_position_bias_table"] = ((2 * of.window - 1) ** 2, heads)
            found[f"{block}attn.relative_position_index"] = (of.window**2, of.window**2)
            add(f"{block}attn.qkv", 3 * width, width)
            add(f"{block}attn.proj", width, width)
            add(f"{block}norm2", width)
            add(f"{block}mlp.fc1", 4 * width, width)
            add(f"{block}mlp.fc2", width, 4 * width)
        if stage < 3:
            add(f"{body}layers.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
            add(f"{body}layers.{stage}.downsample.norm", 4 * width)
        if stage > 0:
            add(f"{body}norm{stage}", width)
            add(f"backbone.fpn.fpn_inner{stage + 1}", of.width, width, 1, 1)
            add(f"backbone.fpn.fpn_layer{stage + 1}", of.width, of.width, 3, 3)
    for top in ("p6", "p7"):
        add(f"backbone.fpn.top_blocks.{top}", of.width, of.width, 3, 3)

    language = "language_backbone.body.model."
    found[f"{language}embeddings.position_ids"] = (1, of.positions)
    for name, rows in (("word", of.words), ("position", of.positions), ("token_type", 2)):
        add(f"{language}embeddings.{name}_embeddings", rows, of.text, bias=False)
    add(f"{language}embeddings.LayerNorm", of.text)
    for number in range(of.layers):
        bert(f"{language}encoder.layer.{number}.")
    add(f"{language}pooler.dense", of.text, of.text)

    for number in range(of.fusions):
        fuse, read, see = (f"rpn.head.dyhead_tower.{3 * number + i}." for i in range(3))
        for side, width in (("v", of.width), ("l", of.text)):
            add(f"{fuse}b_attn.layer_norm_{side}", width)
            add(f"{fuse}b_attn.attn.{side}_proj", of.fused, width)
            add(f"{fuse}b_attn.attn.values_{side}_proj", of.fused, width)
            add(f"{fuse}b_attn.attn.out_{side}_proj", width, of.fused)
            found[f"{fuse}b_attn.gamma_{side}"] = (width,)
        bert(read)
        for which in range(3):
            add(f"{see}DyConv.{which}.conv", of.width, of.width, 3, 3)
            add(f"{see}DyConv.{which}.bn", of.width)
        add(f"{see}AttnConv.1", 1, of.width, 1, 1)
        add(f"{see}relu.fc.0", of.width // 4, of.width)
        add(f"{see}relu.fc.2", 4 * of.width, of.width // 4)
        add(f"{see}offset", 27, of.width, 3, 3)
    add("rpn.head.cls_logits", 80, of.width, 1, 1)
    add("rpn.head.bbox_pred", 4, of.width, 1, 1)
    add("rpn.head.centerness", 1, of.width, 1, 1)
    add("rpn.head.dot_product_projection_text", of.width, of.text)
    found["rpn.head.bias_lang"] = (of.text,)
    found["rpn.head.bias0"] = found["rpn.head.log_scale"] = (1,)
    for level in range(5):
        found[f"rpn.head.scales.{level}.scale"] = (1,)
        found[f"rpn.anchor_generator.cell_anchors.{level}"] = (1, 4)
    return found


IGNORED = ("relative_position_index", "position_ids", "pooler", "cls_logits", "cell_anchors")


def test_every_published_name_fills_a_weight_or_is_ignored_on_purpose() -> None:
    names = shapes(Sizes())
    state = {f"module.{n}": torch.empty(s, device="meta") for n, s in names.items()}
    config = GlipConfig(**published_settings(state))
    with torch.device("meta"):
        model = GlipForGrounding(config)
    found = convert_glip(state)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == wanted
    default = GlipConfig()
    for part, sizes in {
        "": ("d_model", "fusion_layers", "fusion_size", "fusion_heads"),
        "backbone_config": ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"),
        "text_config": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    }.items():
        mine, usual = (getattr(one, part) if part else one for one in (config, default))
        for size in sizes:  # depths are a list or a tuple
            assert [getattr(mine, size)] == [getattr(usual, size)] or (
                [*getattr(mine, size)] == [*getattr(usual, size)]
            )
    numbers = sum(tensor.numel() for tensor in found.values())
    used = sum(torch.Size(s).numel() for n, s in names.items() if not any(i in n for i in IGNORED))
    assert numbers == used + 2 * 768  # the norm at the end of transformers' Swin


def test_no_published_weight_is_dispensable() -> None:
    state = tiny()
    whole = {name: tensor.shape for name, tensor in convert_glip(state).items()}
    for name in state:
        try:
            less = convert_glip({n: t for n, t in state.items() if n != name})
        except CheckpointError:
            continue
        same = {n: tensor.shape for n, tensor in less.items()} == whole
        assert same == any(ignored in name for ignored in IGNORED), name


def test_glip_large_has_its_sizes() -> None:
    large = Sizes(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, fusions=8)
    state = {n: torch.empty(s, device="meta") for n, s in shapes(large).items()}
    found = published_settings(state)
    assert (found["fusion_layers"], found["fusion_size"], found["d_model"]) == (8, 2048, 256)
    swin = found["backbone_config"]
    assert (swin["embed_dim"], swin["window_size"], swin["patch_size"]) == (192, 12, 4)
    assert (swin["depths"], swin["num_heads"]) == ([2, 2, 18, 2], [6, 12, 24, 48])
    assert (found["offsets"], found["corners"]) == ("published", "inclusive")


def test_other_checkpoints_are_refused_in_one_sentence() -> None:
    state = {n: torch.empty(s, device="meta") for n, s in shapes(TINY).items()}
    for more, says in (
        ("rpn.head.dyhead_tower.0.DyConv.0.conv.weight", r"no deep fusion .* \(GLIP-T A\)"),
        ("rpn.tunable_linear.weight", "adds a tuned prompt"),
        ("roi_heads.box.weight", "'roi_heads.box.weight' is no weight of a GLIP: is this another"),
        ("rpn.head.dyhead_tower.0.b_attn.shrink_lang.fc.weight", "is no weight of a GLIP"),
    ):
        with pytest.raises(CheckpointError, match=says):
            convert_glip({**state, more: torch.zeros(1)})
    for function in (convert_glip, published_settings):
        with pytest.raises(
            CheckpointError, match=r"lacks 'backbone\.body\.\S*', which .*another model's, or"
        ):
            function({})


def test_the_documented_conversion_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (code,) = (code for code in codes if "convert_glip" in code)
    state = {f"module.{n}": t.float() for n, t in tiny().items()}
    torch.save({"model": state, "iteration": 3}, tmp_path / "glip_tiny_model_o365_goldg.pth")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert-base-uncased")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    saved, converted = GlipForGrounding.from_pretrained(tmp_path / "glip-tiny"), convert_glip(state)
    for name, tensor in saved.state_dict().items():
        assert tensor.equal(converted[name]), name
    spec = ModelSpec(path=str(tmp_path / "glip-tiny"))
    scenes = write_shapes(tmp_path / "scenes", train=4, test=2)
    data = DataSpec(folder=str(scenes), train_items=4, test_items=2)
    task = DetectionTask(spec, data, scenes, {"model": "glip"})
    batch = task.looks(task.test[:1])["pixel_values"]
    assert min(batch.shape[-2:]) == 800


# -- what the converted model computes -------------------------------------------------------


class Published:
    """The forward pass of the authors' code, restated slowly from published weights."""

    def __init__(self, state: dict[str, Tensor], sizes: Sizes) -> None:
        self.state, self.sizes = state, sizes

    def linear(self, x: Tensor, path: str) -> Tensor:
        return F.linear(x, self.state[f"{path}.weight"], self.state.get(f"{path}.bias"))

    def norm(self, x: Tensor, path: str, eps: float = 1e-5) -> Tensor:
        weight, bias = self.state[f"{path}.weight"], self.state[f"{path}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def conv(self, x: Tensor, path: str, **more: int) -> Tensor:
        return F.conv2d(x, self.state[f"{path}.weight"], self.state[f"{path}.bias"], **more)

    def windows(self, x: Tensor, path: str, heads: int, shift: int) -> Tensor:
        """Attention of (batch, rows, columns, width) in windows, over all pairs of places."""
        size = self.sizes.window
        high, wide, width = x.shape[1:]
        x = F.pad(x, (0, 0, 0, -wide % size, 0, -high % size))
        rows, columns = x.shape[1:3]
        every = torch.arange(rows * columns)
        y, at = every // columns, every % columns
        y, at = (y - shift) % rows, (at - shift) % columns  # where the shift puts them

        def region(place: Tensor, length: int) -> Tensor:
            if not shift:
                return torch.zeros_like(place)
            return (place >= length - size).long() + (place >= length - shift).long()

        window = (y // size) * columns + at // size
        area = region(y, rows) * 3 + region(at, columns)
        down, right = y[:, None] - y, at[:, None] - at
        inside = window[:, None] == window
        index = (down + size - 1) * (2 * size - 1) + right + size - 1
        table = self.state[f"{path}.relative_position_bias_table"]
        bias = table[torch.where(inside, index, 0)].permute(2, 0, 1)
        bias = bias - 100.0 * (area[:, None] != area)
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in self.linear(x.flatten(1, 2), f"{path}.qkv").chunk(3, dim=-1)
        )
        scores = q @ k.transpose(-1, -2) * (width // heads) ** -0.5
        scores = (scores + bias).masked_fill(~inside, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.linear(mixed, f"{path}.proj").unflatten(1, (rows, columns))[:, :high, :wide]

    def swin(self, pixels: Tensor) -> list[Tensor]:
        x = self.conv(pixels, "backbone.body.patch_embed.proj", stride=4).permute(0, 2, 3, 1)
        x, found = self.norm(x, "backbone.body.patch_embed.norm"), []
        for stage, (depth, heads) in enumerate(
            zip(self.sizes.depths, self.sizes.heads, strict=True)
        ):
            path = f"backbone.body.layers.{stage}."
            for number in range(depth):
                block = f"{path}blocks.{number}."
                shift = self.sizes.window // 2 if number % 2 else 0
                x = x + self.windows(self.norm(x, f"{block}norm1"), f"{block}attn", heads, shift)
                inner = F.gelu(self.linear(self.norm(x, f"{block}norm2"), f"{block}mlp.fc1"))
                x = x + self.linear(inner, f"{block}mlp.fc2")
            if stage:
                level = self.norm(x, f"backbone.body.norm{stage}")
                found.append(level.permute(0, 3, 1, 2))
            if stage < 3:
                x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
                fours = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # down, then right
                x = self.norm(torch.cat(fours, dim=-1), f"{path}downsample.norm")
                x = self.linear(x, f"{path}downsample.reduction")
        return found

    def pyramid(self, stages: list[Tensor]) -> list[Tensor]:
        path, above, found = "backbone.fpn.", None, list[Tensor]()
        for number in (4, 3, 2):
            side = self.conv(stages[number - 2], f"{path}fpn_inner{number}")
            if above is not None:
                side = side + F.interpolate(above, side.shape[-2:], mode="nearest")
            found.insert(0, self.conv(side, f"{path}fpn_layer{number}", padding=1))
            above = side
        found.append(self.conv(found[-1], f"{path}top_blocks.p6", stride=2, padding=1))
        last = F.relu(found[-1])
        return [*found, self.conv(last, f"{path}top_blocks.p7", stride=2, padding=1)]

    def bert(self, x: Tensor, path: str, there: Tensor) -> Tensor:
        heads = self.sizes.text // 64
        q, k, v = (
            self.linear(x, f"{path}attention.self.{n}").unflatten(-1, (heads, 64)).transpose(1, 2)
            for n in ("query", "key", "value")
        )
        scores = (q @ k.transpose(-1, -2) / 8).masked_fill(~there[:, None, None], -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        mixed = self.linear(mixed, f"{path}attention.output.dense")
        x = self.norm(x + mixed, f"{path}attention.output.LayerNorm", 1e-12)
        inner = F.gelu(self.linear(x, f"{path}intermediate.dense"))
        inner = self.linear(inner, f"{path}output.dense")
        return self.norm(x + inner, f"{path}output.LayerNorm", 1e-12)

    def words(self, ids: Tensor, there: Tensor) -> Tensor:
        path = "language_backbone.body.model."
        word, place, kind = (
            self.state[f"{path}embeddings.{n}_embeddings.weight"]
            for n in ("word", "position", "token_type")
        )
        x = word[ids] + place[: ids.shape[1]] + kind[0]
        x = self.norm(x, f"{path}embeddings.LayerNorm", 1e-12)
        for number in range(self.sizes.layers):
            x = self.bert(x, f"{path}encoder.layer.{number}.", there)
        return x

    def fused(self, v: Tensor, t: Tensor, path: str, there: Tensor) -> tuple[Tensor, Tensor]:
        v, t = self.norm(v, f"{path}layer_norm_v"), self.norm(t, f"{path}layer_norm_l")
        query, key, seen, read = (
            self.linear(x, f"{path}attn.{n}_proj").unflatten(-1, (8, -1)).transpose(1, 2)
            for x, n in ((v, "v"), (t, "l"), (v, "values_v"), (t, "values_l"))
        )
        scores = query @ key.transpose(-1, -2) * (self.sizes.fused // 8) ** -0.5
        to_v = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(-1) @ read
        to_t = scores.transpose(-1, -2).softmax(-1) @ seen
        more_v, more_t = (x.transpose(1, 2).flatten(2) for x in (to_v, to_t))
        v = v + self.state[f"{path}gamma_v"] * self.linear(more_v, f"{path}attn.out_v_proj")
        return v, t + self.state[f"{path}gamma_l"] * self.linear(more_t, f"{path}attn.out_l_proj")

    def deformed(self, x: Tensor, path: str, offset: Tensor, mask: Tensor, stride: int) -> Tensor:
        """A deformable convolution, place by place; offsets are numbers at addresses."""
        weight, bias = self.state[f"{path}.conv.weight"], self.state[f"{path}.conv.bias"]
        batch, _, high, wide = x.shape
        rows, columns = (high - 1) // stride + 1, (wide - 1) // stride + 1
        found = x.new_zeros(batch, len(weight), rows, columns)
        for b, r, c, k in itertools.product(range(batch), range(rows), range(columns), range(9)):
            numbers, weights = offset[b].reshape(-1), mask[b].reshape(-1)
            down = numbers[((2 * k) * rows + r) * columns + c]
            right = numbers[((2 * k + 1) * rows + r) * columns + c]
            y, at = r * stride - 1 + k // 3 + float(down), c * stride - 1 + k % 3 + float(right)
            taken = x.new_zeros(x.shape[1])
            for i, j in itertools.product((0, 1), (0, 1)):
                top, left = int(y // 1) + i, int(at // 1) + j
                if 0 <= top < high and 0 <= left < wide:
                    taken += x[b, :, top, left] * (1 - abs(y - top)) * (1 - abs(at - left))
            found[b, :, r, c] += (
                weight[:, :, k // 3, k % 3] @ taken * weights[(k * rows + r) * columns + c]
            )
        norm = self.state[f"{path}.bn.weight"], self.state[f"{path}.bn.bias"]
        return F.group_norm(found + bias[:, None, None], 16, *norm)

    def dynamic(self, levels: list[Tensor], path: str) -> list[Tensor]:
        found = []
        for number, own in enumerate(levels):
            told = self.conv(own, f"{path}offset", padding=1)
            given = told[:, :18], told[:, 18:].sigmoid()
            parts = [self.deformed(own, f"{path}DyConv.1", *given, 1)]
            if number:
                parts.append(self.deformed(levels[number - 1], f"{path}DyConv.2", *given, 2))
            if number + 1 < len(levels):
                up = self.deformed(levels[number + 1], f"{path}DyConv.0", *given, 1)
                parts.append(F.interpolate(up, own.shape[-2:], mode="bilinear", align_corners=True))
            total = torch.zeros_like(own)
            for part in parts:
                weight = self.conv(part.mean((2, 3), keepdim=True), f"{path}AttnConv.1").relu()
                total = total + part * (weight + 3).clamp(0, 6) / 6 / len(parts)
            lines = self.linear(total.mean((2, 3)), f"{path}relu.fc.0").relu()
            lines = (self.linear(lines, f"{path}relu.fc.2") + 3).clamp(0, 6) / 6 - 0.5
            a, b, c, d = (x[..., None, None] for x in lines.chunk(4, dim=1))
            found.append(torch.maximum(total * (2 * a + 1) + b, total * (2 * c) + d))
        return found

    def __call__(self, pixels: Tensor, ids: Tensor, there: Tensor) -> dict[str, Tensor]:
        """Token logits, centerness, and boxes whose corners are their first and last pixels."""
        levels, text = self.pyramid(self.swin(pixels)), self.words(ids, there)
        for number in range(self.sizes.fusions):
            fuse, read, see = (f"rpn.head.dyhead_tower.{3 * number + i}." for i in range(3))
            sizes = [level.shape[-2:] for level in levels]
            flat = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
            flat, text = self.fused(flat, text, f"{fuse}b_attn.", there)
            parts = [*flat.transpose(1, 2).split([s.numel() for s in sizes], dim=2)]
            text = self.bert(text, read, there)
            parts = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
            levels = self.dynamic(parts, see)
        text = F.normalize(text, dim=-1)
        keys = self.linear(text / 2, "rpn.head.dot_product_projection_text")
        bias = text @ self.state["rpn.head.bias_lang"] + self.state["rpn.head.bias0"]
        scale = self.state["rpn.head.log_scale"].exp()
        logits, central, boxes = [], [], []
        for number, (level, stride) in enumerate(zip(levels, (8, 16, 32, 64, 128), strict=True)):
            places = level.flatten(2).transpose(1, 2)
            logits.append(places @ keys.transpose(1, 2) / scale + bias[:, None])
            central.append(self.conv(level, "rpn.head.centerness").flatten(1))
            code = self.conv(level, "rpn.head.bbox_pred")
            code = code * self.state[f"rpn.head.scales.{number}.scale"]
            for r, c in itertools.product(*map(range, level.shape[-2:])):
                # the anchor's pixels go from -3.5 strides to 4.5 strides less one
                size, middle = 8 * stride, torch.tensor([c, r]) * stride + (stride - 1) / 2
                dx, dy, dw, dh = code[:, :, r, c].unbind(1)
                half = torch.stack([dw, dh], 1).div(5).exp() * size - 1
                centre = middle + torch.stack([dx, dy], 1) / 10 * size
                boxes.append(torch.cat([centre - half / 2, centre + half / 2], dim=1))
        return {
            "logits": torch.cat(logits, dim=1),
            "centerness": torch.cat(central, dim=1),
            "boxes": torch.stack(boxes, dim=1),
        }


def tiny() -> dict[str, Tensor]:
    """A published checkpoint of small sizes, with random numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(TINY).items():
        state[name] = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("scale") or ("norm" in name.lower() and name.endswith("weight")):
            state[name] += 1
    return state


def test_a_converted_checkpoint_computes_what_the_authors_code_computes() -> None:
    state = tiny()
    model: Any = GlipForGrounding(GlipConfig(**published_settings(state))).double().eval()
    model.load_state_dict(convert_glip(state))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 64, 48, generator=generator, dtype=torch.float64)  # as RGB
    ids = torch.randint(40, (2, 7), generator=generator)
    there = torch.arange(7) < torch.tensor([[7], [5]])
    with torch.no_grad():
        wanted = Published(state, TINY)(pixels.flip(1), ids, there)
        found = model(pixels, ids, attention_mask=there.long())
    logits = wanted["logits"].masked_fill(~there[:, None], -50000.0)
    torch.testing.assert_close(found.logits, logits, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.centerness, wanted["centerness"], rtol=1e-8, atol=1e-8)
    low, high = wanted["boxes"].chunk(2, dim=-1)  # last pixels: the edge lies one further
    side = torch.tensor([48.0, 64.0], dtype=torch.float64)
    boxes = torch.cat([(low + high + 1) / 2 / side, (high + 1 - low) / side], dim=-1)
    torch.testing.assert_close(found.pred_boxes, boxes, rtol=1e-8, atol=1e-8)
    assert float(logits[there[:, None].expand_as(logits)].std()) > 0.01
