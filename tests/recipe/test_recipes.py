"""Every recipe that ships, from end to end on generated data in its own format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import vlprune
from vlprune.commands.pipeline.compress import compress
from vlprune.recipe.spec import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = [
    path
    for name in ("upop", "jsp", "obs", "more")
    for path in sorted((FOLDER / name).glob("*.yaml"))
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_is_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "BLIP_NLVR",
        "NLVR2",
        "COCO",
        "VQA",
        "FLICKR30K",
        "IMAGENET",
        "SEGMENTER",
        "ADE20K",
        "VIT_MDETR",
        "VIT_MDETR_GQA",
        "REFCOCO",
        "GQA",
        "GLIP",
        "CLIP_RETRIEVAL",
        "FOOD101",
    ):
        monkeypatch.setenv(name, f"/data/{name}")
    recipe = load_recipe(path)
    if path.parent.name == "more":
        assert "\n# Not from a paper: " in path.read_text()
        assert recipe.search.epochs >= 2
        assert recipe.retrain.epochs >= 4
        return
    assert recipe.method["name"] == path.parent.name
    if recipe.method["name"] == "upop":
        assert recipe.method["cost"] == "paper"
        assert recipe.method["bill_last"]
        assert recipe.search.decay == "constant"
        assert recipe.search.warmup == recipe.search.clip == recipe.retrain.clip == 0
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
    assert dataclasses.astuple(recipe.data.augment) == wanted
    own = {"nlvr2": {"swap": True}, "ade20k-segmenter": {"distort": True, "largest_class": 0.75}}
    assert own.get(name, {}).items() <= recipe.options.items()


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_runs_as_a_toy(path: Path, tmp_path: Path) -> None:
    report = compress(load_recipe(path, ["threads=2"], toy=True), tmp_path)
    trained = {"retrained"} if load_recipe(path, toy=True).retrain.on else set()
    assert set(report["metrics"]) == {"dense", "cut", *trained}
    assert report["params"]["after"] < report["params"]["before"]
    model = vlprune.load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]
