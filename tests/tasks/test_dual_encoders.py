"""CLIP, SigLIP and relatives: their inputs, their losses over all pairs, and zero-shot classes."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from PIL import Image

import vlprune
from ranks import HEAD, launch
from vlprune.commands.pipeline.compress import compress
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError, RecipeError, UnsupportedError
from vlprune.recipe.spec import DataSpec, ModelSpec, Recipe, Training
from vlprune.tasks import RetrievalTask, ZeroShotTask
from vlprune.tasks.contrast import PairContrast
from vlprune.tasks.new_models import word_tokenizer
from vlprune.testing import build
from vlprune.training.teacher import Taught

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)
TEMPLATES = ["a photo of a {}.", "a drawing of the {}"]
QUIET = lambda done: None  # noqa: E731
RELATIVES = (
    "clip", "altclip", "chinese_clip", "metaclip2", "aimv2", "siglip", "siglip2",
    "vision_text_dual_encoder",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("scenes"), train=24, test=12)


def data(scenes: Path) -> DataSpec:
    return DataSpec(folder=str(scenes), train_items=24, test_items=12)


def published(name: str, folder: Path) -> ModelSpec:
    """A folder with a tiny model of the family, and a processor whose words it has."""
    sample = build(name)
    config: Any = sample.model.config
    config.text_config.eos_token_id = 3  # the tokenizer's, where CLIP reads the text off
    words = "a photo drawing of the . - small big red green blue yellow circle square triangle"
    tokenizer = word_tokenizer([words], max_length=12)
    side = {"height": 16, "width": 16}
    if name == "siglip2":
        images: Any = T.Siglip2ImageProcessor(patch_size=8, max_num_patches=4)
        processor: Any = T.Siglip2Processor(images, tokenizer)
    else:
        processor = T.CLIPProcessor(T.CLIPImageProcessor(size=side, crop_size=side), tokenizer)
    vlprune.save(sample.model, folder, processor=processor)
    return ModelSpec(path=str(folder))


# -- every dual encoder ----------------------------------------------------------------------


@pytest.mark.parametrize("name", RELATIVES)
def test_a_published_model_classifies_and_retrieves(
    name: str, scenes: Path, tmp_path: Path
) -> None:
    spec = published(name, tmp_path)
    for cls, options in ((ZeroShotTask, {"templates": TEMPLATES}), (RetrievalTask, {})):
        task: Any = cls(spec, data(scenes), scenes, options)
        model = task.dense_model()
        assert type(model) is type(build(name).model)
        assert model(**task.example_inputs(2)).logits_per_image.shape == (2, 2)
        loss = task.objective(model)(**task.collate(list(task.train[:6]), random.Random(0)))["loss"]
        loss.backward()
        assert loss.isfinite()
        figures = task.evaluate(model, QUIET, batch_size=5)
        assert figures == pytest.approx(task.evaluate(model, QUIET, batch_size=12))
        assert task.metric in figures


def test_texts_of_siglip_are_padded_to_one_length_without_a_mask(
    scenes: Path, tmp_path: Path
) -> None:
    for task in (
        ZeroShotTask(SMALL, data(scenes), scenes, {"model": "siglip"}),
        ZeroShotTask(published("siglip", tmp_path), data(scenes), scenes),
    ):
        made = task.words(["a photo", "a photo of a square ."])
        assert set(made) == {"input_ids"}
        assert made["input_ids"].shape == (2, 16 if task.model_spec.path else 64)
    clip = ZeroShotTask(SMALL, data(scenes), scenes).words(["a photo", "a photo of a square ."])
    assert clip["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]


def test_a_new_siglip_begins_with_its_authors_temperature_and_bias(scenes: Path) -> None:
    model = RetrievalTask(SMALL, data(scenes), scenes, {"model": "siglip"}).new_model()
    assert float(model.logit_scale.exp()) == pytest.approx(10)
    assert float(model.logit_bias) == -10


def test_models_that_cannot_compare_are_refused(scenes: Path, tmp_path: Path) -> None:
    vlprune.save(build("bert").model, tmp_path)
    with pytest.raises(UnsupportedError, match="of the type bert, which has no features of images"):
        ZeroShotTask(ModelSpec(path=str(tmp_path)), data(scenes), scenes).model_type()
    with pytest.raises(UnsupportedError, match="Linear has no logit_scale to contrast with"):
        PairContrast(torch.nn.Linear(1, 1))


def test_siglip_takes_no_queue(scenes: Path, tmp_path: Path) -> None:
    said = r"options\.queue must be 0 for"
    with pytest.raises(RecipeError, match=said + " siglip, whose"):
        Recipe(task="retrieval", budget={"params": 0.5}, options={"model": "siglip", "queue": 8})
    with pytest.raises(RecipeError, match=said + " .*, a SigLIP"):
        RetrievalTask(published("siglip", tmp_path), data(scenes), scenes, {"queue": 8})


# -- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_with_different_keys_the_loss_is_the_models_own(name: str) -> None:
    sample: Any = build(name)
    own = sample.model(**sample.inputs, return_loss=True)
    found = PairContrast(sample.model)(**sample.inputs, keys=torch.tensor([4, 9]))
    assert float(found["loss"]) == pytest.approx(float(own.loss), rel=1e-5)
    assert torch.allclose(found["logits_per_image"], own.logits_per_image, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_pairs_with_one_key_belong_together(name: str) -> None:
    sample: Any = build(name)
    batch = {k: torch.cat([v, v.flip(-1)])[:3] for k, v in sample.inputs.items()}
    found = PairContrast(sample.model)(**batch, keys=torch.tensor([4, 9, 4]))
    logits = sample.model(**batch).logits_per_image
    same = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    if name == "siglip":
        want = -(same * F.logsigmoid(logits) + (1 - same) * F.logsigmoid(-logits)).sum() / 3
    else:
        share = same / torch.tensor([[2.0], [1], [2]])
        rows, columns = logits.log_softmax(1), logits.T.log_softmax(1)
        want = -(share * (rows + columns)).sum() / 6
    assert float(found["loss"]) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(("name", "bounded"), [("clip", True), ("siglip", False)])
def test_clips_temperature_learns_at_its_bound(name: str, bounded: bool) -> None:
    """Checkpoints of CLIP have 4.6052, just beyond ln 100, where a clamp lets no gradient pass."""
    sample = build(name)
    scale = sample.model.logit_scale
    scale.data.fill_(4.6052)
    run = PairContrast(sample.model)
    run.begin(1)
    batch = {k: v for k, v in sample.inputs.items() if k in ("pixel_values", "input_ids")}
    run(**batch, keys=torch.arange(len(batch["input_ids"])))["loss"].backward()
    assert scale.grad.abs() > 0
    scale.data.fill_(5.0)
    run.stepped()
    assert float(scale) == pytest.approx(math.log(100) if bounded else 5.0)


PAIRS = (
    HEAD
    + """
from vlprune.tasks.contrast import PairContrast
for name in ("clip", "siglip"):
    sample = build(name)
    g = torch.Generator().manual_seed(5)
    batch = {
        "input_ids": torch.randint(6, 50, (6, 6), generator=g),
        "pixel_values": torch.randn(6, 3, 16, 16, generator=g),
        "keys": torch.tensor([1, 2, 3, 2, 5, 1]),
    }
    own = len(batch["keys"]) // world
    batch = {k: v[rank * own : (rank + 1) * own] for k, v in batch.items()}
    run = PairContrast(sample.model)
    if world > 1:
        run = torch.nn.parallel.DistributedDataParallel(run)
    loss = run(**batch)["loss"]
    loss.backward()
    total = loss.detach().clone()
    if world > 1:
        dist.all_reduce(total)
    grads = [p.grad.double().flatten() for p in sample.model.parameters() if p.grad is not None]
    result[name] = [float(total) / world, [float(g.norm()) for g in grads]]
    result[name + " sum"] = [float(g.sum()) for g in grads]
end()
"""
)


def test_the_pairs_of_two_processes_are_those_of_one(python: Any, tmp_path: Path) -> None:
    """The loss over all pairs, and the gradient of each weight."""
    (one,) = launch(python, tmp_path, PAIRS, processes=1)
    for two in launch(python, tmp_path, PAIRS, processes=2):
        for name in ("clip", "siglip"):
            assert two[name][0] == pytest.approx(one[name][0], rel=1e-4)
            assert two[name][1] == pytest.approx(one[name][1], rel=1e-3, abs=1e-6)
            assert two[name + " sum"] == pytest.approx(one[name + " sum"], rel=1e-3, abs=1e-4)


def test_a_teacher_shows_its_similarities(scenes: Path) -> None:
    task = RetrievalTask(SMALL, data(scenes), scenes, {"model": "siglip"})
    torch.manual_seed(0)
    student, teacher = task.new_model(), task.new_model()
    batch = task.collate(list(task.train[:4]), random.Random(0))
    plain = task.objective(student)(**batch)["loss"]
    structures = vlprune.discover(student).structures
    for other, more in ((student, False), (teacher, True)):
        objective = task.objective(student)
        taught = Taught(objective, student, other, {"similarities": 1.0}, structures)(**batch)
        assert (float(taught["loss"]) > float(plain) + 1e-6) == more
    inputs = {k: v for k, v in batch.items() if k != "keys"}
    shown = task.objective(student).teach(teacher, batch)["logits_per_image"]  # type: ignore[operator]
    assert torch.allclose(shown, teacher(**inputs).logits_per_image, atol=1e-5)


# -- zero-shot -------------------------------------------------------------------------------


def folder_of(root: Path, *classes: str) -> DataSpec:
    """An image folder with two pictures in each class."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            for copy in range(2):
                place = root / split / name / f"{copy}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (30 * number, 100 * copy, 0)).save(place)
    return DataSpec("image-folder", folder=str(root))


class Sure(torch.nn.Module):
    """Features by hand: texts by their length in tokens, pictures by their mean red."""

    def __init__(self, texts: dict[int, torch.Tensor], images: torch.Tensor) -> None:
        super().__init__()
        self.texts, self.images = texts, images
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return torch.stack([self.texts[int(n)] for n in attention_mask.sum(1)])

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        return self.images[: len(pixel_values)]


def test_class_vectors_are_normalised_means_of_normalised_prompts(tmp_path: Path) -> None:
    spec = folder_of(tmp_path, "a", "b_c")
    task = ZeroShotTask(SMALL, spec, tmp_path, {"templates": ["{}", "an old {}"]})
    assert task.texts() == ["a", "an old a", "b c", "an old b c"]
    # tokens of each prompt, with [BOS] and [EOS]: 3, 5, 4, 6
    vectors = {3: [4.0, 0], 5: [0.0, 0.5], 4: [-7.0, 0], 6: [0.0, 1]}
    model = Sure({n: torch.tensor(v) for n, v in vectors.items()}, torch.zeros(0, 2))
    want = torch.tensor([[0.5**0.5, 0.5**0.5], [-(0.5**0.5), 0.5**0.5]])
    assert torch.allclose(task.class_features(model), want)
    assert torch.allclose(task.class_features(model, batch_size=3), want)


def test_figures_by_hand(tmp_path: Path) -> None:
    words = [" ".join("abcdefg"[: n + 1]) for n in range(7)]  # prompts of 3 to 9 tokens
    spec = folder_of(tmp_path, *words)
    task = ZeroShotTask(SMALL, spec, tmp_path, {"templates": ["{}"]})
    texts = {n + 3: torch.eye(7)[n] for n in range(7)}
    images = torch.zeros(14, 7)
    ranks = [0, 0, 4, 5, 6, 1, 0] * 2
    for i, rank in enumerate(ranks):  # as many classes score better as its rank says
        others = [c for c in range(7) if c != i // 2]
        images[i, i // 2] = 0.5
        images[i, others[:rank]] = 0.9
    figures = task.evaluate(Sure(texts, images), QUIET, batch_size=14)
    assert figures == pytest.approx({"accuracy": 6 / 14, "top5": 10 / 14})
    said = task.predict(Sure(texts, images), list(task.test[:3]))
    assert said == [words[0], words[0], words[0]]


def test_names_of_classes(tmp_path: Path) -> None:
    spec = folder_of(tmp_path, "n01", "n02", "golden_retriever")
    options = {"names": {"n01": "tench", "n02": "great white shark"}}
    task = ZeroShotTask(SMALL, spec, tmp_path, options)
    assert task.classes == ["golden_retriever", "n01", "n02"]
    assert task.names == ["golden retriever", "tench", "great white shark"]
    rng = random.Random(0)
    batch = task.collate(list(task.train), rng)
    assert batch["keys"].tolist() == [0, 0, 1, 1, 2, 2]
    assert "keys" not in task.collate(list(task.train))
    with pytest.raises(RecipeError, match=r"names has a name for golden, which is no folder"):
        ZeroShotTask(SMALL, spec, tmp_path, {"names": {"golden": "x"}})
    with pytest.raises(DataError, match=r"the classes n01, n02 have the same name 'crane'"):
        ZeroShotTask(SMALL, spec, tmp_path, {"names": {"n01": "crane", "n02": "crane"}})


def test_a_template_is_drawn_for_each_picture(scenes: Path) -> None:
    task = ZeroShotTask(SMALL, data(scenes), scenes, {"templates": TEMPLATES})
    batch = task.collate(list(task.train[:12]), random.Random(0))
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) == 2
    again = task.collate(list(task.train[:12]), random.Random(0))
    assert torch.equal(batch["input_ids"], again["input_ids"])


def test_classes_of_pictures_that_are_not_used_are_candidates(tmp_path: Path) -> None:
    folder_of(tmp_path, "a", "b", "c")
    spec = DataSpec("image-folder", folder=str(tmp_path), train_items=2, test_items=2)
    task = ZeroShotTask(SMALL, spec, tmp_path)
    assert {item.label for item in (*task.train, *task.test)} == {"a"}
    assert task.classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("templates", "says"),
    [
        ([], "must hold at least one template"),
        (["a photo"], r"must hold \{\} once in each template, for the name, not 'a photo'"),
        (["{} and {}"], r"must hold \{\} once"),
        ("a {}", "a list of at most 1,000 texts"),
    ],
)
def test_templates_that_name_nothing_are_refused(templates: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=r"options\.templates.*" + says):
        Recipe(task="zero-shot", budget={"params": 0.5}, options={"templates": templates})


# -- whole runs --------------------------------------------------------------------------

SHORT = Training(steps=4, batch_size=8, learning_rate=3e-4, save_steps=0)


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("zero-shot", "siglip"),
        ("retrieval", "siglip"),
        pytest.param("zero-shot", "clip", marks=pytest.mark.slow),
    ],
)
def test_a_dual_encoder_from_data_to_folder(
    task: str, model: str, scenes: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        task=task,
        budget={"params": 0.7},
        method={"name": "upop", "interval": 1},
        model=ModelSpec(width=32, heads=2, vision_layers=2, text_layers=1, image_size=32),
        options={"model": model, **({"templates": TEMPLATES} if task == "zero-shot" else {})},
        data=data(scenes),
        train=SHORT,
        search=SHORT,
        retrain=SHORT,
        teacher={"similarities": 1, "features": 0.1},
    )
    report = compress(recipe, tmp_path / "out")
    assert report["params"]["after"] <= 0.7 * report["params"]["before"]
    loaded = T.AutoModel.from_pretrained(tmp_path / "out")
    assert type(loaded) is (T.SiglipModel if model == "siglip" else T.CLIPModel)
    assert sum(p.numel() for p in loaded.parameters()) == report["params"]["after"]
    cls: Any = ZeroShotTask if task == "zero-shot" else RetrievalTask
    again = cls(ModelSpec(path=str(tmp_path / "out")), data(scenes), scenes, {
        k: v for k, v in recipe.options.items() if k != "model"
    })  # fmt: skip
    assert again.evaluate(loaded, QUIET) == pytest.approx(report["metrics"]["retrained"])
