"""MDETR and GLIP: sizes, losses by hand, operators against slow ones, foreign checkpoints."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers.loss.loss_for_object_detection import box_iou

from vlprune import discover
from vlprune.models import GlipConfig, GlipForGrounding, MdetrConfig, MdetrForGrounding, atss
from vlprune.models.atss import anchors, assign_places, centerness, decode, encode, suppress
from vlprune.models.dynamic_head import sampled_convolution
from vlprune.models.set_loss import (
    SetWeights,
    assign,
    focal_loss,
    focal_set_losses,
    paired_giou,
    set_losses,
)
from vlprune.tasks.grounders import grounding_dino_loss
from vlprune.testing import build

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}


def params(make: Any) -> float:
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters()) / 1e6


# -- sizes -------------------------------------------------------------------------------


def test_vit_mdetr_large_has_the_published_size() -> None:
    config = MdetrConfig(
        backbone_config=T.DeiTConfig(image_size=384), text_config=T.RobertaConfig(**ROBERTA)
    )
    assert params(lambda: MdetrForGrounding(config)) == pytest.approx(229, rel=0.01)


def test_vit_mdetr_small_has_the_published_size_without_its_word_embeddings() -> None:
    """80 M: DeiT-S 22, CLIP's text transformer 40, DETR 18; CLIP's word embeddings are extra."""
    config = MdetrConfig(
        backbone_config=T.DeiTConfig(
            image_size=384, hidden_size=384, num_attention_heads=6, intermediate_size=1536
        ),
        text_config=T.CLIPTextConfig(),
    )
    words = 49408 * 512 / 1e6
    total = params(lambda: MdetrForGrounding(config))
    assert total - words == pytest.approx(80, rel=0.04)
    assert total == pytest.approx(102.8, rel=0.01)


def test_mdetr_with_a_resnet_has_its_own_papers_size() -> None:
    """185 M with ResNet-101, as MDETR's paper says; the 205 M of later papers are not found."""
    resnet = T.ResNetConfig(depths=[3, 4, 23, 3], out_features=["stage4"])
    config = MdetrConfig(backbone_config=resnet, text_config=T.RobertaConfig(**ROBERTA))
    assert params(lambda: MdetrForGrounding(config)) == pytest.approx(185, rel=0.01)


def test_glip_tiny_has_the_published_size() -> None:
    swin = T.SwinConfig(window_size=7, out_features=["stage2", "stage3", "stage4"])
    config = GlipConfig(backbone_config=swin)
    assert params(lambda: GlipForGrounding(config)) == pytest.approx(231, rel=0.005)
    with torch.device("meta"):
        towers = {s.tower for s in discover(GlipForGrounding(config))}
    assert towers == {"vision", "text", "fusion"}


# -- the losses of MDETR -----------------------------------------------------------------

LOGITS = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 2.0, 0.0]]])
BOXES = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2], [0.7, 0.7, 0.4, 0.4]]])
TARGETS = [
    {
        "boxes": torch.tensor([[0.7, 0.7, 0.4, 0.4], [0.5, 0.5, 0.2, 0.2]]),
        "tokens": torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
    }
]


def test_boxes_are_matched_by_what_they_say_and_where_they_are() -> None:
    ((queries, matched),) = assign(LOGITS, BOXES, TARGETS, SetWeights())
    assert dict(zip(queries.tolist(), matched.tolist(), strict=True)) == {0: 1, 2: 0}


def price(pairs: Any, logits: Tensor, boxes: Tensor, wanted: Tensor, tokens: Tensor) -> float:
    """What a set of (query, target) pairs costs."""
    total = 0.0
    for q, t in pairs:
        total -= float(logits[0, q].softmax(-1) @ tokens[t])
        total += 5 * float((boxes[0, q] - wanted[t]).abs().sum())
        total -= 2 * float(paired_giou(boxes[0, q : q + 1], wanted[t : t + 1]))
    return total


def test_matching_is_the_cheapest_of_all_pairings() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits, boxes = torch.randn(1, 4, 5, generator=g), torch.rand(1, 4, 4, generator=g) + 0.05
        wanted = torch.rand(3, 4, generator=g) + 0.05
        tokens = torch.rand(3, 5, generator=g).softmax(-1)
        ((queries, matched),) = assign(
            logits, boxes, [{"boxes": wanted, "tokens": tokens}], SetWeights()
        )
        facts = (logits, boxes, wanted, tokens)
        found = price(zip(queries.tolist(), matched.tolist(), strict=True), *facts)
        every = [zip(p, range(3), strict=True) for p in itertools.permutations(range(4), 3)]
        assert found == pytest.approx(min(price(pairs, *facts) for pairs in every), abs=1e-5)


def test_soft_token_loss_by_hand() -> None:
    """Matched queries say their phrase, the third says "no object" at a tenth of the weight."""
    losses = set_losses({"logits": LOGITS, "boxes": BOXES}, TARGETS, SetWeights(), 2.0)
    each = -math.log(math.e**2 / (math.e**2 + 2))
    assert float(losses["tokens"]) == pytest.approx((2 * each + 0.1 * each) / 2, rel=1e-5)
    assert float(losses["l1"]) == pytest.approx(0, abs=1e-6)
    assert float(losses["giou"]) == pytest.approx(0, abs=1e-5)
    assert "alignment" not in losses


def test_a_phrase_of_two_tokens_is_said_by_both() -> None:
    target = [{"boxes": BOXES[0, :1], "tokens": torch.tensor([[0.5, 0.5, 0.0]])}]
    even = torch.tensor([[[9.0, 9.0, -9.0]]])
    losses = set_losses({"logits": even, "boxes": BOXES[:, :1]}, target, SetWeights(), 1.0)
    assert float(losses["tokens"]) == pytest.approx(math.log(2), abs=1e-3)


def test_alignment_loss_by_hand() -> None:
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    text = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]])
    target = [{"boxes": BOXES[0, :1], "tokens": torch.tensor([[1.0, 0.0, 0.0, 0.0]])}]
    logits = torch.tensor([[[9.0, 0, 0, 0], [0, 0, 0, 9.0]]])
    outputs = {"logits": logits, "boxes": BOXES[:, :2], "queries": queries, "text": text}
    weights = SetWeights(temperature=0.5)
    near, far = math.exp(2), 1.0
    over_queries = -math.log(near / (near + far))  # token 0 against both queries
    over_tokens = -math.log(near / (near + 2 * far))  # query 0 against the three tokens
    found = float(set_losses(outputs, target, weights, 1.0)["alignment"])
    assert found == pytest.approx((over_queries + over_tokens) / 2, rel=1e-5)


def test_giou_by_hand() -> None:
    one = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0], [0.1, 0.1, 0.2, 0.2]])
    two = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.75, 0.5, 0.5, 1.0], [0.9, 0.9, 0.2, 0.2]])
    expected = [1.0, 0.0, -(1 - 0.08)]
    assert paired_giou(one, two).tolist() == pytest.approx(expected, abs=1e-6)


def test_an_image_without_objects_has_a_loss() -> None:
    empty = [{"boxes": torch.zeros(0, 4), "tokens": torch.zeros(0, 3)}]
    losses = set_losses({"logits": LOGITS, "boxes": BOXES}, empty, SetWeights(), 1.0)
    assert all(bool(value.isfinite()) for value in losses.values())
    assert float(losses["l1"]) == 0


def test_a_model_that_has_diverged_has_a_loss_that_says_so() -> None:
    """Not an error from inside the matching: training stops with its own sentence."""
    lost = {"logits": LOGITS * float("nan"), "boxes": BOXES * float("nan")}
    losses = set_losses(lost, TARGETS, SetWeights(), 1.0)
    assert all(bool(value.isnan()) for value in losses.values())


def test_answers_count_only_where_their_head_applies() -> None:
    sample = build("mdetr")
    model: Any = sample.model
    right = {"answer_type": torch.tensor([0, 2]), "answer_obj": torch.tensor([-1, 1])}
    out = model(**sample.inputs, answers=right)
    alone = nn.functional.cross_entropy(out.answers["answer_obj"][1:], torch.tensor([1]))
    assert float(out.losses["answer_obj"]) == pytest.approx(float(alone), rel=1e-5)
    none = {name: torch.full((2,), -1) for name in right}
    assert float(model(**sample.inputs, answers=none).loss) == 0


def test_padding_of_text_and_image_changes_nothing() -> None:
    for family in ("mdetr", "vit_mdetr", "glip"):
        sample = build(family)
        model: Any = sample.model.double()
        inputs = dict(sample.inputs)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            full = model(**inputs)
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][1, 4:] = 9  # only where the mask is 0
            again = model(**inputs)
        torch.testing.assert_close(full.pred_boxes, again.pred_boxes)


def test_the_decoder_feeds_on_what_it_decoded() -> None:
    """Not on its normalised output, as transformers' DETR does when it shows every layer."""
    model: Any = build("mdetr").model
    queries, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask, places = torch.ones(2, 7, dtype=torch.bool), torch.randn(2, 7, 16)
    every = model.decoder(queries, memory, mask, places)
    first = model.decoder.layers[0](
        torch.zeros_like(queries), None, places, queries, memory, encoder_attention_mask=None
    )
    second = model.decoder.layers[1](
        first, None, places, queries, memory, encoder_attention_mask=None
    )
    torch.testing.assert_close(every[0], model.decoder.layernorm(first))
    torch.testing.assert_close(every[1], model.decoder.layernorm(second))


# -- the operators of GLIP ---------------------------------------------------------------


def slow_convolution(
    inputs: Tensor, weight: Tensor, offsets: Tensor, mask: Tensor, stride: int
) -> Tensor:
    """Modulated deformable convolution, number by number."""
    batch, channels, height, width = inputs.shape
    out = torch.zeros(batch, weight.shape[0], *offsets.shape[-2:], dtype=inputs.dtype)

    def at(b: int, c: int, y: int, x: int) -> float:
        inside = 0 <= y < height and 0 <= x < width
        return float(inputs[b, c, y, x]) if inside else 0.0

    for b, row, column, k in itertools.product(
        range(batch), range(offsets.shape[2]), range(offsets.shape[3]), range(9)
    ):
        y = row * stride - 1 + k // 3 + float(offsets[b, 2 * k, row, column])
        x = column * stride - 1 + k % 3 + float(offsets[b, 2 * k + 1, row, column])
        y0, x0 = math.floor(y), math.floor(x)
        for c in range(channels):
            value = sum(
                at(b, c, yy, xx) * (1 - abs(y - yy)) * (1 - abs(x - xx))
                for yy in (y0, y0 + 1)
                for xx in (x0, x0 + 1)
            )
            gated = value * float(mask[b, k, row, column])
            out[b, :, row, column] += weight[:, c, k // 3, k % 3] * gated
    return out


@pytest.mark.parametrize(("size", "stride"), [((4, 5), 1), ((5, 4), 2), ((1, 1), 1), ((1, 3), 2)])
def test_the_deformable_convolution_is_exact(size: tuple[int, int], stride: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows, columns = (math.ceil(n / stride) for n in size)
    inputs = torch.randn(2, 3, *size, generator=g, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, generator=g, dtype=torch.float64)
    offsets = 1.5 * torch.randn(2, 18, rows, columns, generator=g, dtype=torch.float64)
    mask = torch.rand(2, 9, rows, columns, generator=g, dtype=torch.float64)
    found = sampled_convolution(inputs, weight, offsets, mask, stride)
    expected = slow_convolution(inputs, weight, offsets, mask, stride)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    still = sampled_convolution(inputs, weight, 0 * offsets, torch.ones_like(mask), stride)
    plain = nn.functional.conv2d(inputs, weight, stride=stride, padding=1)
    torch.testing.assert_close(still, plain, atol=1e-12, rtol=0)


def test_box_codes_come_back() -> None:
    grid = torch.cat(anchors([(3, 4), (2, 2)], [8, 16], 4))
    assert grid[0].tolist() == [-12.0, -12.0, 20.0, 20.0]
    g = torch.Generator().manual_seed(0)
    low = torch.rand(len(grid), 2, generator=g) * 20
    boxes = torch.cat([low, low + 3 + 20 * torch.rand(len(grid), 2, generator=g)], dim=1)
    torch.testing.assert_close(decode(grid, encode(grid, boxes)), boxes, atol=1e-4, rtol=1e-5)


def slow_places(levels: list[Tensor], boxes: Tensor, closest: int) -> list[int]:
    """ATSS as its algorithm is written, in plain Python."""

    def iou(a: list[float], b: list[float]) -> float:
        w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        area = lambda r: (r[2] - r[0]) * (r[3] - r[1])  # noqa: E731
        return w * h / (area(a) + area(b) - w * h)

    every = [a for level in levels for a in level.tolist()]
    owner, best = [-1] * len(every), [0.0] * len(every)
    for number, box in enumerate(boxes.tolist()):
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for level in levels:
            far = [
                (math.hypot((a[0] + a[2]) / 2 - centre[0], (a[1] + a[3]) / 2 - centre[1]), i)
                for i, a in enumerate(level.tolist())
            ]
            candidates += [start + i for _, i in sorted(far)[:closest]]
            start += len(level)
        values = [iou(every[i], box) for i in candidates]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        for i, value in zip(candidates, values, strict=True):
            x, y = (every[i][0] + every[i][2]) / 2, (every[i][1] + every[i][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if value >= mean + deviation and inside and value > best[i]:
                owner[i], best[i] = number, value
    return owner


def test_places_are_chosen_as_the_algorithm_says() -> None:
    levels = anchors([(8, 8), (4, 4), (2, 2)], [8, 16, 32], 4)
    g = torch.Generator().manual_seed(2)
    for _ in range(10):
        low = torch.rand(3, 2, generator=g) * 40
        boxes = torch.cat([low, low + 6 + 25 * torch.rand(3, 2, generator=g)], dim=1)
        found = assign_places(levels, boxes, closest=9).tolist()
        assert found == slow_places(levels, boxes, 9)
        assert max(found) >= 0
    assert assign_places(levels, torch.zeros(0, 4)).tolist() == [-1] * 84


def test_centerness_by_hand() -> None:
    anchor = torch.tensor([[4.0, 4, 6, 6], [1.0, 4, 3, 6]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 10]])
    assert centerness(anchor, boxes).tolist() == pytest.approx([1.0, math.sqrt(2 / 8)])


def test_suppression_keeps_the_best_of_each_heap() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 10, 10], [20.0, 20, 30, 30], [0.0, 0, 4, 4]])
    scores = torch.tensor([0.8, 0.9, 0.5, 0.7])
    assert suppress(boxes, scores, 0.6).tolist() == [1, 3, 2]
    assert suppress(boxes, scores, 1.0).tolist() == [1, 0, 3, 2]


def suppressed_one_by_one(boxes: Tensor, scores: Tensor, limit: float) -> list[int]:
    """The definition, on one class: ask the boxes in turn, best first."""
    overlap, stays = box_iou(boxes, boxes)[0], []
    for place in sorted(range(len(boxes)), key=lambda place: -float(scores[place])):
        if not any(overlap[other, place] > limit for other in stays):
            stays.append(place)
    return stays


@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize("seed", range(6))
def test_suppression_in_one_call_is_that_of_each_class_by_itself(
    seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a coarse grid, where scores are equal and overlaps lie exactly on the limit."""
    monkeypatch.setattr(atss, "BLOCK", block)
    g = torch.Generator().manual_seed(seed)
    count, limit = 120, (0.5, 0.6)[seed % 2]
    low = torch.randint(0, 4, (count, 2), generator=g)
    boxes = torch.cat([low, low + torch.randint(0, 5, (count, 2), generator=g)], dim=1).float()
    scores = torch.randint(0, (4, 1000)[seed % 2], (count,), generator=g) / 7
    classes = torch.randint(0, 3, (count,), generator=g)
    if seed < 2:
        classes.zero_()
    stays = suppress(boxes, scores, limit, classes)
    expected = []
    for number in range(3):
        own = (classes == number).nonzero()[:, 0]
        expected += own[suppressed_one_by_one(boxes[own], scores[own], limit)].tolist()
    assert sorted(stays.tolist()) == sorted(expected)
    assert len(stays) < count
    assert stays.tolist() == sorted(expected, key=lambda place: (-float(scores[place]), place))
    for most in (1, 10, count):
        assert suppress(boxes, scores, limit, classes, most).tolist() == stays[:most].tolist()


def test_suppression_of_a_long_chain_and_of_nothing() -> None:
    """Each box covers the next one only, so every second stays, however many rounds that takes."""
    left = torch.arange(100.0)[:, None]
    boxes = torch.cat([left, 0 * left, left + 5, 0 * left + 1], dim=1)
    scores = torch.arange(100.0, 0, -1)
    assert suppress(boxes, scores, 0.6).tolist() == list(range(0, 100, 2))
    assert suppress(boxes[:0], scores[:0]).tolist() == []


def test_focal_loss_by_hand() -> None:
    p = 1 / (1 + math.exp(-0.7))
    found = focal_loss(torch.tensor([0.7, 0.7]), torch.tensor([1.0, 0.0])).tolist()
    expected = [0.25 * (1 - p) ** 2 * -math.log(p), 0.75 * p**2 * -math.log(1 - p)]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_glip_learns_one_picture() -> None:
    sample = build("glip")
    model: Any = sample.model
    tokens = torch.zeros(1, 6)
    tokens[0, 1:3] = 0.5
    labels = [{"boxes": torch.tensor([[0.5, 0.4, 0.4, 0.5]]), "tokens": tokens}] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        out = model(**sample.inputs, labels=labels)
        out.loss.backward()
        optimizer.step()
    score = (out.logits.sigmoid() * out.centerness.sigmoid()[..., None])[0, :, 1]
    best = out.pred_boxes[0, score.argmax()]
    assert float(paired_giou(best[None], labels[0]["boxes"])) > 0.7


# -- Grounding DINO ----------------------------------------------------------------------


def test_each_image_is_taught_by_its_own_text() -> None:
    """transformers 5.23 takes another image's tokens from the third image on."""
    g = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(4, 3, 8, generator=g), torch.rand(4, 3, 4, generator=g) / 2 + 0.2
    labels, mask = [], torch.zeros(4, 8, dtype=torch.bool)
    for number in range(4):
        tokens = torch.zeros(1, 8)
        tokens[0, 1 : number + 2] = 1 / (number + 1)
        mask[number, : number + 3] = True
        labels.append({"boxes": boxes[number, :1], "tokens": tokens})
    one: Any = build("grounding_dino").model.config
    one.auxiliary_loss, one.two_stage = False, False
    whole, parts, _ = grounding_dino_loss(logits, labels, "cpu", boxes, one, None, mask[:, None])
    alone = [
        grounding_dino_loss(
            logits[i : i + 1], labels[i : i + 1], "cpu", boxes[i : i + 1], one, None,
            mask[i : i + 1, None],
        )[0]
        for i in range(4)
    ]  # fmt: skip
    assert float(whole) == pytest.approx(float(sum(alone)) / 4, rel=1e-5)
    assert set(parts) == {"tokens", "l1", "giou"}


def test_focal_matching_prefers_what_fits() -> None:
    logits = torch.tensor([[[-4.0, -4.0], [-4.0, 4.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]]])
    targets = [{"boxes": boxes[0, :1], "tokens": torch.tensor([[0.0, 1.0]])}]
    ((queries, _),) = assign(logits, boxes, targets, SetWeights(), focal=True)
    assert queries.tolist() == [1]
    mask = torch.ones(1, 2, dtype=torch.bool)
    good = focal_set_losses(logits, boxes, targets, mask, SetWeights(), 1.0)
    silent = torch.full_like(logits, -4.0)
    bad = focal_set_losses(silent, boxes, targets, mask, SetWeights(), 1.0)
    assert float(good["tokens"]) < 0.1 * float(bad["tokens"])
