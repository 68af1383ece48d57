"""Grounding, detection and GQA: their formats, their figures, and whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprune
from vlprune.commands.pipeline.compress import compress
from vlprune.data.files import Left
from vlprune.data.regions import (
    Grounding,
    Phrase,
    read_coco_instances,
    read_mdetr,
    read_nlvr1_objects,
    read_refer,
)
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError, RecipeError
from vlprune.models.atss import suppress
from vlprune.recipe.spec import DataSpec, ModelSpec, Recipe, Training
from vlprune.tasks import DetectionTask, GqaTask, GroundingTask
from vlprune.tasks.grounding import as_fractions, in_pixels, overlaps, pad_pictures
from vlprune.testing import build

TINY = ModelSpec(
    width=32, heads=4, vision_layers=2, text_layers=2, image_size=32, patch_size=16
)  # fmt: skip
QUIET = lambda done: None  # noqa: E731


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("scenes"), train=24, test=12)


def data(scenes: Path, like: str = "") -> DataSpec:
    return DataSpec(folder=str(scenes), like=like, train_items=24, test_items=12)


# -- formats -----------------------------------------------------------------------------


def test_the_same_expressions_in_both_layouts(scenes: Path) -> None:
    notes, images = scenes / "annotations", scenes / "images" / "train2014"
    mdetr = read_mdetr(notes / "mdetr_train2014.json", images)
    refer = read_refer(
        notes / "refs_train2014.json", notes / "instances_train2014.json", images, "train"
    )
    assert [(g.image, g.size, g.text, g.phrases) for g in mdetr] == [
        (g.image, g.size, g.text, g.phrases) for g in refer
    ]
    assert all(g.image.exists() for g in mdetr)
    assert mdetr[0].phrases[0].spans == ((0, len(mdetr[0].text)),)


def test_captions_name_every_object(scenes: Path) -> None:
    notes, images = scenes / "annotations", scenes / "images" / "val2014"
    told = read_mdetr(notes / "captions_mdetr_val2014.json", images)
    seen = {item.id: item for item in read_coco_instances(notes / "instances_val2014.json", images)}
    for item, scene in zip(told, seen.values(), strict=True):
        assert {box for phrase in item.phrases for box in phrase.boxes} == {*scene.boxes}
        for phrase in item.phrases:
            ((start, end),) = phrase.spans
            assert item.text[start:end].split()[-1] in ("circle", "square", "triangle")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"images": []}, "no 'annotations'"),
        ({"annotations": [], "images": []}, "holds no text with a box"),
        ({"annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}, "no 'tokens_positive'"),
        (
            {"annotations": [{"image_id": 1, "bbox": [0, 0], "tokens_positive": [[0, 1]]}]},
            "left, top, width, height",
        ),
        (
            {
                "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1], "tokens_positive": [[0, 9]]}],
                "images": [{"id": 1, "caption": "cat", "file_name": "a", "width": 4, "height": 4}],
            },
            "characters that its caption lacks",
        ),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, body: Any, says: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match=says):
        read_mdetr(path, tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(DataError, match=r"is a pickle.*convert it to JSON"):
        read_refer(path, tmp_path / "instances.json", tmp_path, "val")


def test_coco_and_nlvr1_are_real_data(real_data: Path) -> None:
    coco = real_data / "coco-cc"
    found = read_coco_instances(coco / "annotations/instances_val2017.json", coco / "val2017")
    assert len(found) == 25
    assert all(item.image.exists() for item in found)
    for item in found:
        for left, top, width, height in item.boxes:
            assert -1 <= left <= left + width <= item.size[0] + 1
            assert -1 <= top <= top + height <= item.size[1] + 1
    nlvr = read_nlvr1_objects(real_data / "nlvr1", "test")
    assert {label.split()[1] for item in nlvr for label in item.labels} == {
        "circle", "square", "triangle"
    }  # fmt: skip


def test_coco_is_detected_in_its_own_layout(real_data: Path) -> None:
    """Pictures of different shapes, 80 classes, prompts split to what the model reads."""
    spec = DataSpec(format="coco2017", folder=str(real_data / "coco-cc"))
    task = DetectionTask(TINY, spec, Path("."), {"model": "glip"})
    assert len(task.prompts) > 1
    assert {name for _, phrases in task.prompts for name in phrases} == {*task.classes}
    model = task.new_model()
    figures = task.evaluate(model, QUIET, batch_size=8)
    assert set(figures) == {"ap", "ap50", "ap75"}
    loss = model(**task.collate(list(task.train[:4]), random.Random(0))).loss
    assert bool(loss.isfinite())


# -- boxes -------------------------------------------------------------------------------


def test_boxes_there_and_back() -> None:
    boxes = [(10.0, 20.0, 30.0, 40.0)]
    fractions = as_fractions(boxes, (100, 200))
    assert fractions.tolist() == [pytest.approx([0.25, 0.2, 0.3, 0.2])]
    assert in_pixels(fractions, (100, 200)).tolist() == [pytest.approx([10, 20, 40, 60])]
    assert as_fractions([], (1, 1)).shape == (0, 4)


def test_overlaps_by_hand() -> None:
    one = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 1, 1]])
    two = torch.tensor([[0.0, 0, 2, 2], [1.0, 0, 3, 2], [5.0, 5, 6, 6]])
    assert overlaps(one, two).tolist() == [
        pytest.approx([1, 1 / 3, 0]), pytest.approx([0.25, 0, 0])
    ]  # fmt: skip


def test_pictures_of_different_shapes_are_padded() -> None:
    batch = pad_pictures([torch.ones(3, 2, 4), torch.ones(3, 3, 2)])
    assert batch["pixel_values"].shape == (2, 3, 3, 4)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [8, 6]
    assert torch.equal(batch["pixel_values"][:, 0] > 0, batch["pixel_mask"] > 0)
    assert "pixel_mask" not in pad_pictures([torch.ones(3, 2, 4)] * 2)


def test_boxes_of_a_padded_picture_are_fractions_of_the_picture() -> None:
    sample = build("glip")
    model: Any = sample.model.double()
    small = sample.inputs["pixel_values"][0, :, :16, :16]
    words = {k: v[:1] for k, v in sample.inputs.items() if k != "pixel_values"}
    padded = pad_pictures([small, torch.zeros(3, 32, 32)])
    padded["pixel_values"] = padded["pixel_values"].double()
    two = {k: v.repeat(2, 1) for k, v in words.items()}
    with torch.no_grad():
        alone = model(pixel_values=padded["pixel_values"][:1], **words).pred_boxes
        both = model(**padded, **two).pred_boxes
    # of 32 pixels the picture has 16: the same boxes are twice as large in its fractions
    torch.testing.assert_close(both[0], 2 * alone[0])


# -- figures -----------------------------------------------------------------------------


class Oracle:
    """A model that says what is true: stands for one in an evaluation."""

    device = torch.device("cpu")

    def __init__(self, task: Any, items: Any, wrong: int = 0) -> None:
        self.task, self.items, self.wrong, self.at = task, list(items), wrong, 0

    def eval(self) -> Oracle:
        return self

    def __call__(self, **inputs: Tensor) -> Any:
        count = len(inputs["input_ids"])
        labels = self.task.collate(self.items[self.at : self.at + count])["labels"]
        self.at += count
        most = max(len(target["boxes"]) for target in labels) + 1
        logits = torch.full((count, most, self.task.positions), -20.0)
        boxes = torch.full((count, most, 4), 0.001)
        for i, target in enumerate(labels):
            found = target["boxes"].clone()
            if i < self.wrong:
                found[:, :2] += 0.5
            boxes[i, : len(found)] = found
            logits[i, : len(found)][target["tokens"] > 0] = 20.0
        logits[:, -1, -1] = 20.0
        return type("Said", (), {"logits": logits, "pred_boxes": boxes, "centerness": None})()


def test_grounding_counts_right_boxes(scenes: Path) -> None:
    task = GroundingTask(TINY, data(scenes), scenes, {})
    figures = task.evaluate(Oracle(task, task.test), QUIET, batch_size=100)
    assert figures == {"accuracy": 1.0, "recall_at_5": 1.0, "recall_at_10": 1.0}
    figures = task.evaluate(Oracle(task, task.test, wrong=3), QUIET, batch_size=100)
    assert figures["accuracy"] == pytest.approx(1 - 3 / len(task.test))


def test_phrases_of_one_caption_are_told_apart(scenes: Path) -> None:
    task = GroundingTask(TINY, data(scenes, "mdetr-captions"), scenes, {})
    count = sum(len(item.phrases) for item in task.test)
    assert count > len(task.test)
    figures = task.evaluate(Oracle(task, task.test), QUIET, batch_size=100)
    assert figures["accuracy"] == 1.0


class Divided:
    """Of two queries, one is surer of the first token, the other of all tokens together."""

    device = torch.device("cpu")

    def __init__(self, positions: int) -> None:
        self.logits = torch.full((1, 2, positions), -20.0)
        self.logits[0, 0, [1, 2, 3, -1]] = torch.tensor([0.3, 0.3, 0.3, 0.1]).log()
        self.logits[0, 1, [1, -1]] = torch.tensor([0.5, 0.5]).log()

    def __call__(self, **inputs: Tensor) -> Any:
        boxes = torch.tensor([[[0.25, 0.25, 0.1, 0.1], [0.75, 0.75, 0.1, 0.1]]])
        return type("Said", (), {"logits": self.logits, "pred_boxes": boxes})()


@pytest.mark.parametrize(
    ("form", "dataset", "boxes", "refers"),
    [
        ("mdetr", "refcoco", 1, True),
        ("mdetr", None, 1, True),
        ("mdetr", None, 2, False),  # of two phrases
        ("mdetr", "flickr", 1, False),
        ("mdetr-captions", None, 1, False),
    ],
)
def test_a_referring_expression_is_ranked_as_a_whole(
    form: str, dataset: str | None, boxes: int, refers: bool, scenes: Path, tmp_path: Path
) -> None:
    """MDETR's best query: by "no object" for an expression, by the phrase's tokens otherwise."""
    task = GroundingTask(TINY, data(scenes), scenes, {})
    image = Path(task.train[0].image)
    entry = {
        "id": 1, "caption": "red square left of blue circle", "file_name": image.name,
        "width": 64, "height": 64, "dataset_name": dataset,
    }  # fmt: skip
    objects = [
        {"image_id": 1, "bbox": box, "tokens_positive": span}
        for span, box in (([[0, 10]], [1, 1, 9, 9]), ([[19, 30]], [20, 20, 9, 9]))
    ]
    path = tmp_path / "notes.json"
    path.write_text(json.dumps({"images": [entry], "annotations": objects[:boxes]}))
    part = {"annotations": str(path), "images": str(image.parent)}
    (item,) = task.read(form, part, Left())
    assert item.refers is refers
    best = task._ranked(Divided(task.positions), [item])[0][0][0]
    assert bool(best[0] < 0.5 * item.size[0]) is refers  # the first query's box is on the left


def test_expressions_of_the_original_layout_and_of_datasets_refer(scenes: Path) -> None:
    for like in ("refer", "mdetr"):
        assert all(item.refers for item in GroundingTask(TINY, data(scenes, like), scenes, {}).test)
    box = (0.0, 0.0, 1.0, 1.0)
    for phrases, refers in (
        ([Phrase(((0, 3),), (box,))], True),
        ([Phrase(((0, 3),), (box, box))], False),  # several objects
        ([Phrase(((0, 1),), (box,)), Phrase(((1, 3),), (box,))], False),
    ):
        assert Grounding(1, Path("a.png"), (4, 4), "cat", tuple(phrases)).refers is refers


def test_token_maps_follow_characters(scenes: Path) -> None:
    task = GroundingTask(TINY, data(scenes), scenes, {})
    ids, offsets = task.words(["the big red square"])
    row = task.token_map(offsets[0], Phrase(((8, 18),), ()))
    words = task.processor.tokenizer.convert_ids_to_tokens(ids["input_ids"][0].tolist())
    assert [w for w, value in zip(words, row.tolist(), strict=False) if value] == ["red", "square"]
    assert row.sum() == 1
    with pytest.raises(DataError, match="beyond the"):
        task.token_map(offsets[0], Phrase(((50, 60),), ()))


def test_detection_by_pycocotools(scenes: Path) -> None:
    task = DetectionTask(TINY, data(scenes), scenes, {"model": "grounding-dino"})
    figures = task.evaluate(Oracle(task, task.test), QUIET, batch_size=100)
    assert figures["ap"] == pytest.approx(1.0)
    oracle = Oracle(task, task.test)
    entry = task.results(oracle)[0]
    assert set(entry) == {"image_id", "category_id", "score", "bbox"}
    wrong = task.evaluate(Oracle(task, task.test, wrong=100), QUIET, batch_size=100)
    assert wrong["ap"] < 0.2


@pytest.mark.parametrize("model", ["glip", "grounding-dino"])
def test_the_best_detections_are_those_of_each_class_by_itself(model: str, scenes: Path) -> None:
    task = DetectionTask(TINY, data(scenes), scenes, {"model": model})
    g = torch.Generator().manual_seed(0)
    low = torch.randint(0, 2, (1200, 2), generator=g)  # so few differ that fewer than 100 stay
    places = torch.cat([low, low + torch.randint(1, 4, (1200, 2), generator=g)], dim=1).float()
    scores = torch.randint(0, 500, (2, 1200), generator=g) / 500  # many are equal
    places[7], scores[:, 7] = torch.tensor([20.0, 20, 30, 30]), -1  # alone, but the 1,200th
    places[8], scores[:, 8] = torch.tensor([40.0, 40, 50, 50]), 0.5  # alone, and about the 600th
    expected: list[tuple[float, int, list[float]]] = []
    for number, own in enumerate(scores):
        order = own.argsort(descending=True, stable=True)[:1000]
        if model == "glip":
            order = order[suppress(places[order], own[order])]
        expected += [(float(own[i]), number, places[i].tolist()) for i in order[:100]]
    expected = sorted(expected, key=lambda one: -one[0])[:100]
    found = task._best(scores, places)
    assert [(score, number, place.tolist()) for score, number, place in found] == expected


def test_gqa_has_an_answer_head_for_every_type(scenes: Path) -> None:
    task = GqaTask(TINY, data(scenes), scenes, {})
    assert task.heads["answer_type"] == 5
    assert task.answers["obj"] == ["no", "yes"]
    assert "red" in task.answers["attr"]
    batch = task.collate(list(task.train[:6]))
    assert set(batch["answers"]) == set(task.heads)
    model = task.new_model()
    assert bool(model(**batch).loss.isfinite())
    figures = task.evaluate(model, QUIET)
    assert 0 <= figures["accuracy"] <= figures["accuracy_of_types"] <= 1
    with pytest.raises(RecipeError, match="Did you mean 'mdetr'"):
        GqaTask(TINY, data(scenes), scenes, {"model": "mdeter"})


# -- whole runs --------------------------------------------------------------------------

SHORT = Training(steps=6, batch_size=8, learning_rate=3e-4, save_steps=0)


@pytest.mark.parametrize(
    ("task", "model", "skips"),
    [
        ("grounding", "mdetr", False),
        pytest.param("grounding", "glip", True, marks=pytest.mark.slow),
        pytest.param("detection", "grounding-dino", True, marks=pytest.mark.slow),
        pytest.param("gqa", "mdetr", False, marks=pytest.mark.slow),
    ],
)
def test_joint_share_and_prune_from_data_to_folder(
    task: str, model: str, skips: bool, scenes: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        task=task,
        budget={"params": 0.9 if skips else 0.75},
        method={
            "name": "jsp", "every": 1, "learning_rate": 0.05,
            **({"mismatch": "skip"} if skips else {}),
        },
        model=TINY,
        data=data(scenes),
        options={"model": model, "queries": 5, "fusion_layers": 1, "decoder_layers": 2},
        train=SHORT,
        search=Training(steps=20, batch_size=8, learning_rate=3e-4, save_steps=0),
        retrain=SHORT,
    )  # fmt: skip
    report = compress(recipe, tmp_path / "out")
    assert report["budget"]["reached"] <= (0.9 if skips else 0.75)
    assert report["verified"]["difference"] < 1e-9
    assert sum(group["shared"] for group in report["groups"]) > 0
    assert report["search_history"][-1]["progress"] == 1.0
    assert abs(report["search"]["gap"]) < 0.02 * report["search"]["full_loss"] + 1e-3
    size = report["weight_bytes"]
    assert size["small"] < size["materialised"] < size["dense"]
    assert set(report["latency_seconds"]) == {"dense", "small", "materialised"}
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size["small"] == pytest.approx(weights, rel=0.1)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"]["share"]


@pytest.mark.parametrize("name", ["grounding_dino", "mm_grounding_dino", "glip", "mdetr"])
def test_a_model_from_a_folder_is_asked_in_its_own_way(
    name: str, scenes: Path, tmp_path: Path
) -> None:
    """By model type: prompts, token positions and the loss."""
    words = {"mdetr": "mdetr", "glip": "glip"}.get(name, "grounding-dino")
    maker = GroundingTask(TINY, data(scenes), scenes, {"model": words})
    sample = build(name)
    config: Any = sample.model.config
    config.text_config.vocab_size = 1100
    if name in ("grounding_dino", "mm_grounding_dino"):
        config.max_text_len, config.auxiliary_loss = 16, True
    if name == "mdetr":
        config.text_config.pad_token_id = 0
    model: Any = type(sample.model)(config)
    vlprune.save(model, tmp_path, processor=maker.processor)
    spec = ModelSpec(path=str(tmp_path))
    task = GroundingTask(spec, data(scenes), scenes, {})
    loaded = task.dense_model()
    assert type(loaded) is type(model)
    loss = loaded(**task.collate(list(task.train[:5]))).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert set(task.evaluate(loaded, QUIET)) == {"accuracy", "recall_at_5", "recall_at_10"}


# -- learning rates of parts -------------------------------------------------------------


def test_parts_of_a_model_learn_at_rates_of_their_own(scenes: Path) -> None:
    from transformers import TrainerCallback

    from vlprune.training.fit import fit

    seen: dict[str, float] = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            names = {id(p): name for name, p in kwargs["model"].named_parameters()}
            for group in kwargs["optimizer"].param_groups:
                for parameter in group["params"]:
                    seen[names[id(parameter)]] = group["lr"]

    task = GroundingTask(TINY, data(scenes), scenes, {})
    model = task.new_model()
    rates = {"vision_model.*": 0.1, "text_encoder.*": 0.5}
    spec = Training(
        steps=1, batch_size=4, learning_rate=1e-3, warmup=0.0, decay="constant", rates=rates
    )
    fit(model, task.train, task.collate, spec, seed=0, callbacks=[Look()])
    assert len(seen) == len(list(model.parameters()))
    for name, rate in seen.items():
        part = name.split(".")[1]
        wanted = {"vision_model": 1e-4, "text_encoder": 5e-4}.get(part, 1e-3)
        assert rate == pytest.approx(wanted), name
    with pytest.raises(RecipeError, match="no weight's name matches 'visoin"):
        fit(
            model, task.train, task.collate,
            Training(steps=1, batch_size=4, rates={"visoin.*": 0.1}), seed=0,
        )  # fmt: skip
