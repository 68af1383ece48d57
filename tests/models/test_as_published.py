"""What the authors' code computes where it differs from the papers, by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, BlipConfig, BlipTextConfig

from vlprune import save
from vlprune.folders.opening import open_config
from vlprune.models import BlipNlvrConfig, MdetrForGrounding, SegmenterConfig
from vlprune.models.atss import anchors, assign_places, centerness
from vlprune.models.dynamic_head import DynamicBlock
from vlprune.models.glip import GlipOutput, _spans
from vlprune.models.set_loss import paired_giou
from vlprune.tasks.gqa import ANSWER_TYPES, FORMER_TYPES, GqaTask
from vlprune.tasks.grounders import GROUNDERS
from vlprune.testing import build

# -- MDETR -------------------------------------------------------------------------------


def test_answers_are_read_from_the_layer_that_the_config_names() -> None:
    model: Any = build("mdetr").model
    inputs = build("mdetr").inputs
    layers: list[torch.Tensor] = []
    hook = model.decoder.register_forward_hook(lambda _m, _i, out: layers.append(out))
    said = {}
    for which in ("first", "last"):
        model.config.answer_layer = which
        said[which] = model(**inputs).answers
    hook.remove()
    queries = model.config.num_queries
    for number, name in enumerate(("answer_obj", "answer_type")):  # sorted by name
        head = model.answer_heads[name]
        for which, layer in (("first", layers[0][0]), ("last", layers[0][-1])):
            expected = head(layer[:, queries + number])
            torch.testing.assert_close(said[which][name], expected)
    assert not torch.allclose(said["first"]["answer_type"], said["last"]["answer_type"])


def test_older_folders_keep_their_layer_and_their_order_of_types(tmp_path: Path) -> None:
    save(build("mdetr").model, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("answer_layer", "answer_types", "positive_map"):
        del config[name]
    path.write_text(json.dumps(config))
    model: Any = MdetrForGrounding.from_pretrained(tmp_path)
    assert (model.config.answer_layer, model.config.positive_map) == ("last", "uniform")
    task = object.__new__(GqaTask)
    assert task.kinds == ANSWER_TYPES
    task.objective(model)
    assert task.kinds == FORMER_TYPES == ("obj", "rel", "attr", "cat", "global")


def test_published_positive_maps_are_rows_of_ones() -> None:
    """A phrase of two tokens: the mean of the two terms by the paper, their sum by the code."""
    sample = build("mdetr")
    model: Any = sample.model.eval()
    row = torch.zeros(1, model.config.text_positions)
    row[0, 1:3] = 0.5
    labels = [{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "tokens": row}] * 2
    model.config.eos_coefficient = 0.0  # queries without a box say nothing
    model.config.num_queries = 1
    model.query_embed.weight = torch.nn.Parameter(model.query_embed.weight[:1])
    losses = {}
    for name in ("uniform", "published"):
        model.config.positive_map = name
        losses[name] = model(**sample.inputs, labels=labels).losses
    said = -model(**sample.inputs).logits.log_softmax(-1)[:, 0, 1:3]
    weight = model.config.class_cost
    assert float(losses["published"]["tokens"]) == pytest.approx(float(weight * said.sum()) / 2)
    assert float(losses["uniform"]["tokens"]) == pytest.approx(float(weight * said.sum()) / 4)
    for name in ("l1", "giou", "alignment"):
        assert float(losses["uniform"][name]) == pytest.approx(float(losses["published"][name]))


TWO_TOKENS = {"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "tokens": torch.zeros(1, 5)}
TWO_TOKENS["tokens"][0, 1:3] = 0.5


@pytest.mark.parametrize(("positive_map", "matched"), [("uniform", 1), ("published", 0)])
def test_published_positive_maps_count_every_token_in_matching(
    positive_map: str, matched: int
) -> None:
    """Query 0 has .45 at both tokens but a box .012 aside; query 1 has .25, and the very box.

    The box costs .286: 5 x .012 and 2 x (1 - .188 / .212). Tokens are worth .45 - .25 = .2 by
    their mean, .4 by their sum.
    """
    model: Any = build("mdetr").model
    config = model.config
    config.positive_map, config.auxiliary_loss = positive_map, False
    config.class_cost, config.bbox_loss_coefficient, config.giou_loss_coefficient = 1, 5, 2
    said = torch.tensor([[0.02, 0.45, 0.45, 0.04, 0.04], [0.1, 0.25, 0.25, 0.3, 0.1]]).log()
    boxes = torch.tensor([[0.512, 0.5, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2]])
    unit = F.normalize(torch.ones(1, 3, 4), dim=-1)
    final = {"logits": said[None], "boxes": boxes[None], "queries": unit[:, :2], "text": unit}
    losses = model._box_losses(final, (), [TWO_TOKENS])
    assert float(losses["l1"]) == pytest.approx(5 * 0.012 if matched == 0 else 0.0, abs=1e-6)
    weight = 1.0 if positive_map == "published" else 0.5
    rest = -config.eos_coefficient * said[1 - matched, -1]
    wanted = -weight * said[matched, 1:3].sum() + rest
    assert float(losses["tokens"]) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("positive_map", ["uniform", "published"])
def test_queries_are_matched_as_by_trying_every_assignment(positive_map: str) -> None:
    """Four queries, two boxes: the cheapest of all twelve assignments, by a slow restatement."""
    model: Any = build("mdetr").model
    model.config.positive_map = positive_map
    config, generator = model.config, torch.Generator().manual_seed(0)
    chosen = set()
    for _ in range(20):
        logits = 2 * torch.randn(4, 7, generator=generator)
        boxes = 0.3 + 0.4 * torch.rand(6, 4, generator=generator)
        tokens = torch.zeros(2, 7)
        tokens[0, 0:3], tokens[1, 4:6] = 1 / 3, 1 / 2
        unit = F.normalize(torch.randn(1, 7, 4, generator=generator), dim=-1)
        final = {"logits": logits[None], "boxes": boxes[None, :4]}
        final |= {"queries": unit[:, :4], "text": unit}
        own = model._box_losses(final, (), [{"boxes": boxes[4:], "tokens": tokens}])
        maps = (tokens > 0).float() if positive_map == "published" else tokens
        best, found = float("inf"), (0, 0)
        for pair in itertools.permutations(range(4), 2):
            queries = boxes[list(pair)]
            cost = -config.class_cost * (logits.softmax(-1)[list(pair)] * maps).sum()
            cost = cost + config.bbox_loss_coefficient * (queries - boxes[4:]).abs().sum()
            cost = cost - config.giou_loss_coefficient * paired_giou(queries, boxes[4:]).sum()
            if float(cost) < best:
                best, found = float(cost), pair
        chosen.add(found)
        apart = (boxes[list(found)] - boxes[4:]).abs().sum()
        assert float(own["l1"]) == pytest.approx(
            float(config.bbox_loss_coefficient * apart) / 2, rel=1e-4
        )
    assert len(chosen) > 4


def test_mdetrs_phrase_is_as_likely_as_its_likeliest_token() -> None:
    probabilities = torch.tensor([[0.3, 0.3, 0.4], [0.5, 0.0, 0.5]])
    phrase = torch.tensor([0.5, 0.5, 0.0])
    assert GROUNDERS["mdetr"].score(probabilities, phrase).tolist() == pytest.approx([0.3, 0.5])


def test_mdetrs_referring_expression_is_ranked_by_what_is_not_no_object() -> None:
    """The words of the first query's object are spread over three tokens: .9 of it is an object."""
    probabilities = torch.tensor([[0.3, 0.3, 0.3, 0.1], [0.5, 0.0, 0.0, 0.5]])
    said = torch.tensor([0.5, 0.5, 0.0, 0.0])
    found = GROUNDERS["mdetr"].score_expression(probabilities, said)
    assert found.tolist() == pytest.approx([0.9, 0.5])
    for name in ("glip", "grounding-dino"):  # they have no "no object"
        family = GROUNDERS[name]
        assert torch.equal(
            family.score_expression(probabilities, said), family.score(probabilities, said)
        )


# -- Segmenter ---------------------------------------------------------------------------


def test_segmenters_positions_are_resized_bilinearly() -> None:
    """From 2 x 2 to 4 x 4: pixel centres of the new grid lie at -.25, .25, .75, 1.25 of the old."""
    model: Any = build("segmenter").model
    embeddings = model.vit.embeddings
    side = round(embeddings.patch_embeddings.num_patches**0.5)
    patch = int(model.config.patch_size)
    old = torch.arange(float(side))[:, None].expand(side, side)  # the number of the row
    with torch.no_grad():
        embeddings.position_embeddings[0, 1:] = old.reshape(-1, 1)
        wide = embeddings.interpolate_pos_encoding(None, 2 * side * patch, side * patch)
        same = embeddings.interpolate_pos_encoding(None, side * patch, side * patch)
    assert same is embeddings.position_embeddings
    assert torch.equal(wide[:, 0], same[:, 0])
    centres = [min(max((row + 0.5) / 2 - 0.5, 0), side - 1) for row in range(2 * side)]
    rows = wide[0, 1:, 0].unflatten(0, (2 * side, side))
    for column in range(side):
        assert rows[:, column].tolist() == pytest.approx(centres)
    embeddings.resizing = "bicubic"
    cubic = embeddings.interpolate_pos_encoding(None, 2 * side * patch, side * patch)
    stock = super(type(embeddings), embeddings).interpolate_pos_encoding(
        torch.zeros(1, 1 + 2 * side * side, 32), 2 * side * patch, side * patch
    )
    torch.testing.assert_close(cubic, stock)


def test_segmenter_pads_what_patches_do_not_fill() -> None:
    model: Any = build("segmenter").model.eval()
    patch = int(model.config.patch_size)
    height, width = 2 * patch - 1, 3 * patch - 3
    picture = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    filled = torch.zeros(1, 3, 2 * patch, 3 * patch)
    filled[:, :, :height, :width] = picture
    labels = torch.arange(height * width).reshape(1, height, width) % 5
    with torch.no_grad():
        found = model(picture, labels=labels)
        logits = model(filled).logits
    assert found.logits.shape[2:] == (2, 3)
    torch.testing.assert_close(found.logits, logits)
    full = torch.nn.functional.interpolate(logits, (2 * patch, 3 * patch), mode="bilinear")
    cut = full[:, :, :height, :width]
    torch.testing.assert_close(model.enlarge(logits, height, width), cut)
    assert float(found.loss) == pytest.approx(float(torch.nn.functional.cross_entropy(cut, labels)))


def test_new_segmenters_are_the_authors_and_older_folders_what_they_were(tmp_path: Path) -> None:
    config = SegmenterConfig()
    assert (config.layer_norm_eps, config.position_resizing) == (1e-5, "bilinear")
    model: Any = build("segmenter").model
    assert {n.eps for n in model.modules() if isinstance(n, torch.nn.LayerNorm)} == {1e-5}
    save(model, tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert (saved["layer_norm_eps"], saved["position_resizing"]) == (1e-5, "bilinear")
    former = {k: v for k, v in saved.items() if k != "position_resizing"}
    path.write_text(json.dumps({**former, "layer_norm_eps": 1e-12}))  # as written before
    for read in (SegmenterConfig.from_pretrained, AutoConfig.from_pretrained, open_config):
        old: Any = read(tmp_path)
        assert (old.layer_norm_eps, old.position_resizing) == (1e-12, "bicubic")


# -- BLIP for NLVR2 ----------------------------------------------------------------------


def test_blip_for_nlvr2_has_the_authors_heads_and_eps(tmp_path: Path) -> None:
    config = BlipNlvrConfig()
    assert (config.text_config.num_attention_heads, config.vision_config.layer_norm_eps) == (
        12,
        1e-6,
    )
    narrow = BlipNlvrConfig(text_config={"hidden_size": 64}, vision_config={"layer_norm_eps": 1e-5})
    assert narrow.text_config.num_attention_heads == BlipTextConfig().num_attention_heads == 8
    assert narrow.vision_config.layer_norm_eps == 1e-5
    # what transformers' BLIP has, and what folders were saved with before: both are written out
    former = BlipNlvrConfig(**BlipConfig().to_dict())
    former.save_pretrained(tmp_path)
    for found in (former, BlipNlvrConfig.from_pretrained(tmp_path), open_config(tmp_path)):
        assert found.text_config.num_attention_heads == 8
        assert found.vision_config.layer_norm_eps == 1e-5
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"]["num_attention_heads"] == 8
    assert saved["vision_config"]["layer_norm_eps"] == 1e-5


# -- GLIP --------------------------------------------------------------------------------


def test_glips_phrase_is_scored_under_one_root() -> None:
    """Probabilities .2 and .6, centerness .5: sqrt(.4 x .5), not the mean of sqrt(.1), sqrt(.3)."""
    said = GlipOutput(
        logits=torch.tensor([[[0.2, 0.6, 0.9]]]).logit(),
        pred_boxes=torch.zeros(1, 1, 4),
        centerness=torch.zeros(1, 1),
    )
    fit, _ = GROUNDERS["glip"].read(said)
    phrase = torch.tensor([0.5, 0.5, 0.0])
    assert GROUNDERS["glip"].score(fit[0], phrase).tolist() == pytest.approx([0.2**0.5])


def slow_inclusive(anchor: list[float], box: list[float]) -> tuple[float, float, float]:
    """IoU, the distance to the nearest edge and centerness of corners that name whole pixels."""
    a, b = ([*x[:2], x[2] - 1, x[3] - 1] for x in (anchor, box))

    def area(r: list[float]) -> float:
        return max(0.0, r[2] - r[0] + 1) * max(0.0, r[3] - r[1] + 1)

    both = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    x, y = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2
    left, top, right, bottom = x - b[0], y - b[1], b[2] - x, b[3] - y
    share = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
    iou = both / (area(a) + area(b) - both)
    return iou, min(left, top, right, bottom), max(0.0, share) ** 0.5


def test_inclusive_corners_move_the_edges_by_half_a_pixel() -> None:
    # a centre .3 inside the box: a candidate for the paper, outside for the code
    (near,) = anchors([(1, 1)], [8], 1)  # around (4, 4)
    box = torch.tensor([[3.7, 0.0, 11.7, 8.0]])
    level = torch.cat([near, near + 100, near + 200])
    assert assign_places([level], box).tolist() == [0, -1, -1]
    assert assign_places([level], box, inclusive=True).tolist() == [-1, -1, -1]
    # the square (0, 0, 10, 10) around (4, 4): distances 3.5 and 5.5
    square = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert centerness(near, square, inclusive=True).tolist() == pytest.approx([3.5 / 5.5])
    g = torch.Generator().manual_seed(0)
    (grid,) = anchors([(6, 6)], [8], 2)
    for _ in range(20):
        low = torch.rand(1, 2, generator=g) * 20
        box = torch.cat([low, low + 4 + 20 * torch.rand(1, 2, generator=g)], dim=1)
        facts = [slow_inclusive(one, box[0].tolist()) for one in grid.tolist()]
        ious = torch.tensor([iou for iou, _, _ in facts])
        bar = float(ious.mean() + ious.std())
        wanted = [0 if iou >= bar and edge > 0.01 else -1 for iou, edge, _ in facts]
        assert assign_places([grid], box, len(grid), inclusive=True).tolist() == wanted
        inside = [i for i, (_, edge, _) in enumerate(facts) if edge > 0]
        found = centerness(grid[inside], box.expand(len(inside), 4), inclusive=True)
        assert found.tolist() == pytest.approx([facts[i][2] for i in inside], abs=1e-5)


def test_inclusive_boxes_are_a_pixel_smaller_in_giou() -> None:
    """(0, 0, 5, 5) in (0, 0, 10, 10) is 4 x 4 in 9 x 9 pixels."""
    pixels = torch.tensor([[0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 10.0, 10.0], [3.0, 3.0, 3.5, 9.0]])
    side = torch.tensor([20.0, 40.0])
    boxes = _spans(pixels / side.repeat(2), 1 / side)
    assert float(paired_giou(boxes[:1], boxes[1:2])) == pytest.approx(16 / 81)
    assert boxes[2, 2:].tolist() == pytest.approx([0, 5 / 40])  # half a pixel becomes nothing
    sample = build("glip")
    model: Any = sample.model
    tokens = torch.zeros(1, 6)
    tokens[0, 1] = 1
    labels = [{"boxes": torch.tensor([[0.5, 0.4, 0.4, 0.5]]), "tokens": tokens}] * 2
    losses = {}
    for model.config.corners in ("continuous", "inclusive"):
        losses[model.config.corners] = model(**sample.inputs, labels=labels).losses
    for name in ("giou", "centerness"):
        first, second = (float(loss[name]) for loss in losses.values())
        assert first != second


def test_glips_boxes_are_averaged_by_centerness_however_small_it_is() -> None:
    """One place, at (2, 2) in the box from .64 to 3.84: a weight of 1.36 / 1.84, which cancels."""
    sample = build("glip")
    box, tokens = torch.tensor([[0.07, 0.07, 0.1, 0.1]]), torch.zeros(1, 6)
    inputs = {name: value[:1] for name, value in sample.inputs.items()}
    found: Any = sample.model(**inputs, labels=[{"boxes": box, "tokens": tokens}])
    central = found.losses["centerness"] - F.softplus(found.centerness[0, 0])
    assert float(central / -found.centerness[0, 0]) == pytest.approx(1.36 / 1.84, rel=1e-4)
    giou = paired_giou(found.pred_boxes[0, :1], box)
    assert float(found.losses["giou"]) == pytest.approx(float(2 * (1 - giou)), rel=1e-5)


def test_published_offsets_are_read_as_they_lie_in_memory() -> None:
    """Entry (channel, y, x) of 2 x 3 places is number (channel 2 + y) 3 + x of the 4 x 6 places."""
    told = torch.arange(2.0 * 18 * 4 * 6).reshape(2, 18, 4, 6)
    block = DynamicBlock(16, published=True)
    found = block._moved(torch.cat([told, told[:, :9]], dim=1)[:, :18], torch.Size((2, 3)))
    assert found.shape == (2, 18, 2, 3)
    for batch, channel, y, x in itertools.product(range(2), range(18), range(2), range(3)):
        flat = (channel * 2 + y) * 3 + x
        expected = told[batch, flat // 24, flat // 6 % 4, flat % 6]
        assert float(found[batch, channel, y, x]) == float(expected)
    levels = [torch.randn(1, 16, 4, 6), torch.randn(1, 16, 2, 3)]
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = DynamicBlock(16)
    ours.load_state_dict(block.state_dict())
    (fine, coarse), (other, same) = block(levels), ours(levels)
    torch.testing.assert_close(coarse, same)  # the coarsest level reads none above it
    assert not torch.allclose(fine, other)
