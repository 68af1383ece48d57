"""Every recipe that ships, from end to end on generated data in its own format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import pytest

import vlprune
from vlprune.commands.pipeline.compress import compress
from vlprune.recipe.options import METHOD_OPTIONS, TASK_OPTIONS
from vlprune.recipe.spec import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = [
    path
    for name in ("upop", "jsp", "obs", "more")
    for path in sorted((FOLDER / name).glob("*.yaml"))
]


FOLDERS = (
    "BLIP_NLVR", "NLVR2", "COCO", "VQA", "FLICKR30K", "IMAGENET", "SEGMENTER", "ADE20K",
    "VIT_MDETR", "VIT_MDETR_GQA", "REFCOCO", "GQA", "GLIP", "CLIP_RETRIEVAL", "FOOD101",
)  # fmt: skip


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FOLDERS:
        monkeypatch.setenv(name, f"/data/{name}")


@dataclass(frozen=True)
class Published:
    """What the authors of UPop compress a model with, by their code, at the recipe's p."""

    p: float
    interval: int
    attention: float
    """The L1 weight of an attention gate; ``ffn`` is that of an FFN gate."""
    ffn: float
    rate: float
    weight_decay: float
    batch: int = 32
    """Items per process."""
    first_step: bool = True
    """Whether units are chosen after the first step too."""
    ratio: int = 36
    """The cost of an attention unit in FFN units."""
    optimizer: str = "adamw"
    decays: str = "all"
    epochs: tuple[int, int] | None = None
    """Of the search and of retraining."""
    options: Mapping[str, Any] = field(default_factory=dict)


QUEUE = {"queue": 57600, "alpha": 0.4}
PUBLISHED = {
    "nlvr2": Published(0.5, 50, 4.8e-3, 2e-4, 3e-6, 0.05, epochs=(15, 15)),
    "vqav2": Published(
        0.5, 1000, 1.44e-2, 5e-4, 2e-5, 0.05, epochs=(10, 10),
        options={"targets": "all", "smoothing": 0.1},
    ),
    "coco-caption": Published(
        0.5, 100, 3.2e-2, 1e-3, 1e-5, 0.05,
        options={"prompt": "a picture of", "beams": 3, "smoothing": 0.1},
    ),
    "coco-retrieval-blip": Published(
        0.5, 200, 6.4e-3, 2e-4, 1e-5, 0.05, options={**QUEUE, "momentum": 0.995, "rerank": 256}
    ),
    "flickr-retrieval-blip": Published(
        0.5, 50, 6.4e-3, 2e-4, 1e-5, 0.05, options={**QUEUE, "momentum": 0.995, "rerank": 128}
    ),
    "coco-retrieval-clip": Published(0.5, 200, 1.17e-2, 2e-4, 1e-5, 0.2, options=QUEUE),
    "flickr-retrieval-clip": Published(0.5, 50, 1.17e-2, 2e-4, 1e-5, 0.2, options=QUEUE),
    "imagenet-deit": Published(
        0.3, 800, 4.8e-3, 2e-4, 8e-4, 0.05, 512, False, 12, decays="weights", epochs=(60, 300),
        options={"mixup": 0.8, "smoothing": 0.1},
    ),
    "ade20k-segmenter": Published(
        0.2, 300, 4.8e-3, 2e-4, 4e-3, 0, 16, False, 12, "sgd", "weights", epochs=(16, 64),
        options={"multi_scale": True, "classes": 150},
    ),
}  # fmt: skip
"""The rate of imagenet-deit is 1e-4 per 512 items, for 8 processes of 512."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_has_the_published_values(name: str) -> None:
    recipe, wanted = load_recipe(FOLDER / "upop" / f"{name}.yaml"), PUBLISHED[name]
    assert recipe.budget == {"params": pytest.approx(1 - wanted.p)}
    assert METHOD_OPTIONS["upop"](**{k: v for k, v in recipe.method.items() if k != "name"}) == (
        METHOD_OPTIONS["upop"](
            interval=wanted.interval,
            cost="paper",
            paper_ratio=wanted.ratio,
            bill_last=True,
            first_step=wanted.first_step,
            importance="signed",
            l1={"attention": wanted.attention, "ffn": wanted.ffn},
        )
    )
    for phase, decay in ((recipe.search, "constant"), (recipe.retrain, "cosine")):
        assert (phase.learning_rate, phase.weight_decay) == (wanted.rate, wanted.weight_decay)
        assert (phase.optimizer, phase.weight_decay_on) == (wanted.optimizer, wanted.decays)
        assert (phase.batch_size, phase.accumulate) == (wanted.batch, 1)
        assert (phase.decay, phase.warmup, phase.clip) == (decay, 0, 0)
        assert not phase.rates
    if wanted.epochs:
        assert (recipe.search.epochs, recipe.retrain.epochs) == wanted.epochs
    options = asdict(TASK_OPTIONS[recipe.task](**recipe.options))
    assert {key: options[key] for key in wanted.options} == wanted.options
    if recipe.train.on:
        assert (recipe.train.learning_rate, recipe.train.weight_decay_on) == (wanted.rate, "all")


def test_every_recipe_of_upop_has_published_values() -> None:
    assert set(PUBLISHED) == {path.stem for path in (FOLDER / "upop").glob("*.yaml")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_is_whole(path: Path) -> None:
    recipe = load_recipe(path)
    if path.parent.name == "more":
        assert "\n# Not from a paper: " in path.read_text()
        assert recipe.search.epochs >= 2
        assert recipe.retrain.epochs >= 4
        return
    assert recipe.method["name"] == path.parent.name
    if recipe.method["name"] == "obs":
        assert recipe.calibration.items >= 256
        assert not any(phase.on for phase in (recipe.train, recipe.search, recipe.retrain))
        assert 0 < load_recipe(path, toy=True).calibration.items < 64
        return
    assert recipe.search.epochs >= (5 if path.parent.name == "upop" else 2)
    assert recipe.retrain.epochs >= (5 if path.parent.name == "upop" else 4)
    toy = load_recipe(path, toy=True)
    assert toy.data.like == recipe.data.format
    assert not toy.model.path


VISION, ENCODER, DECODER = ({f"{name}.*": 0.1} for name in
                            ("vision_model", "text_encoder", "text_decoder"))  # fmt: skip
REGULARISED: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "ade20k-segmenter": ({"vit.*": 0.1}, {"decoder.*": 0.1}),
    "coco-caption": ({}, DECODER),
    "coco-retrieval-blip": ({}, ENCODER),
    "coco-retrieval-clip": ({}, {}),
    "flickr-retrieval-blip": ({}, ENCODER),
    "flickr-retrieval-clip": ({}, {}),
    "imagenet-deit": ({"layers.*": 0.1}, {}),
    "nlvr2": (VISION, ENCODER),
    "vqav2": (VISION, {**ENCODER, **DECODER}),
}
"""The authors' drop path and dropout, in the search and in the retraining."""


@pytest.mark.parametrize("name", REGULARISED)
def test_the_authors_regularisation(name: str) -> None:
    recipe = load_recipe(FOLDER / "upop" / f"{name}.yaml", toy=True)
    for phase in (recipe.search, recipe.retrain):
        assert (phase.drop_path, phase.dropout) == REGULARISED[name]
    augment = {"imagenet-deit": (0.08, False, 2, 9, 0.5, "timm"),
               "ade20k-segmenter": (0, False, 0, 5, 0, "blip")}  # fmt: skip
    wanted = augment.get(name, (0.5, True, 2, 5, 0, "blip"))
    assert astuple(recipe.data.augment) == wanted
    own = {"nlvr2": {"swap": True}, "ade20k-segmenter": {"distort": True, "largest_class": 0.75}}
    assert own.get(name, {}).items() <= recipe.options.items()


@pytest.mark.parametrize(
    ("name", "captions", "steps"),
    [
        ("coco-caption", 566_747, 11_065),
        ("coco-retrieval-blip", 566_747, 13_278),
        ("coco-retrieval-clip", 566_747, 13_278),
        ("flickr-retrieval-blip", 145_000, 6_792),
        ("flickr-retrieval-clip", 145_000, 6_792),
    ],
)
def test_the_search_takes_the_authors_steps(name: str, captions: int, steps: int) -> None:
    """On 8 processes, or by accumulating 8 batches: epochs pass over all captions."""
    path = FOLDER / "upop" / f"{name}.yaml"
    recipe, alone = (load_recipe(path, more) for more in ([], ["search.accumulate=8"]))
    assert recipe.options["every_caption"]
    assert recipe.search.count(captions, 8) == alone.search.count(captions) == steps
    assert recipe.retrain.count(captions, 8) == steps
    assert f"{steps:,} steps" in " ".join(path.read_text().split("\n# "))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_runs_as_a_toy(path: Path, tmp_path: Path) -> None:
    report = compress(load_recipe(path, ["threads=1"], toy=True), tmp_path)
    trained = {"retrained"} if load_recipe(path, toy=True).retrain.on else set()
    assert set(report["metrics"]) == {"dense", "cut", *trained}
    assert report["params"]["after"] < report["params"]["before"]
    model = vlprune.load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]
