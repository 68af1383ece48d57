"""Recipes: strict, typed, and helpful about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_runs import DEMO, TINY
from vlprune.commands.pipeline.make import make_task, split
from vlprune.errors import BudgetError, RecipeError
from vlprune.recipe.spec import load_recipe

ROOT = Path(__file__).parents[2]
GOOD = "task: vqa\nbudget: {params: 0.5}\ntrain: {steps: 10, learning_rate: 1e-3}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults_are_filled_in_and_written_out(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD), ["budget.params=0.3", "method.name=random", "seed=7"]
    )
    assert recipe.train.learning_rate == 1e-3
    assert recipe.budget == {"params": 0.3}
    assert recipe.method == {"name": "random"}
    assert recipe.seed == 7
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    "path", ["src/vlprune/demo.yaml", *sorted(map(str, (ROOT / "recipes").glob("*.yaml")))]
)
def test_the_recipes_we_ship_are_valid(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPRUNE_DATA", "/somewhere")
    recipe = load_recipe(ROOT / path)
    assert "$" not in recipe.data.folder


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "metod: {}\n", "unknown key 'metod'.*Did you mean 'method'"),
        (GOOD.replace("steps", "step"), "unknown key 'train.step'.*Did you mean 'steps'"),
        (
            GOOD.replace("10", "ten"),
            "train.steps must be a whole number from 0 .*, not 'ten'",
        ),
        (GOOD.replace("10", "-1"), "train.steps must be a whole number from 0 to .*, not -1"),
        (GOOD.replace("10", "true"), "train.steps must be a whole number from 0 .*, not True"),
        (GOOD.replace("10", "1.5"), "must be a whole number"),
        (GOOD.replace("1e-3", "fast"), "must be a number"),
        (GOOD.replace("task: vqa\n", ""), "task is missing"),
        (GOOD.replace("{steps: 10, learning_rate: 1e-3}", "5"), "train must hold keys"),
        (GOOD + "data: {folder: $NOT_SET_ANYWHERE/x}\n", "NOT_SET_ANYWHERE, which is not set"),
        ("task: [", "not valid YAML"),
        ("just words", "must be a mapping"),
        (GOOD + "model: {width: wide}\n", "model.width must be a whole number"),
        (GOOD + "calibration: {item: 8}\n", "unknown key 'calibration.item'.*Did you mean 'items'"),
        (GOOD + "calibration: {items: -1}\n", "calibration.items must be a whole number from 0"),
        (GOOD + "method: {name: obs}\n", "calibration.items must be at least 1 for the method obs"),
        (
            GOOD + "method: {name: obs, rotated: true}\ncalibration: {items: 8}\n",
            "unknown key 'method.rotated'.*Did you mean 'rotate'",
        ),
        (
            GOOD + "method: {name: jsp}\ncalibration: {items: 8}\n",
            "calibration.items must be 0 for a method that shares weights.*families",
        ),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_calibration_needs_no_method_of_its_own(tmp_path: Path) -> None:
    for method in ("{name: obs, rotate: true}", "magnitude", "{name: jsp, families: [prune]}"):
        method = method if method.startswith("{") else f"{{name: {method}}}"
        text = GOOD + f"method: {method}\ncalibration: {{items: 256}}\n"
        recipe = load_recipe(write(tmp_path, text))
        assert (recipe.calibration.items, recipe.calibration.batch_size) == (256, 8)
        assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
        toy = recipe.toy()
        assert 0 < toy.calibration.items < 256
        assert toy.calibration.items > toy.calibration.batch_size  # a batch can be held out
    assert not load_recipe(write(tmp_path, GOOD)).toy().calibration.items


@pytest.mark.parametrize("budget", ["0", "1.5", "half", "true", "-1"])
def test_impossible_budgets_are_refused(tmp_path: Path, budget: str) -> None:
    with pytest.raises(BudgetError, match="fraction that stays"):
        load_recipe(write(tmp_path, GOOD), [f"budget.params={budget}"])


@pytest.mark.parametrize("override", ["budget", "=1", "task.x=1", "train.steps=["])
def test_malformed_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, GOOD), [override])


def test_a_missing_recipe_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_look_takes_a_quarter_of_a_batch(tmp_path: Path) -> None:
    """... of 16 items at least, where a batch has them."""
    sizes = {4: 4, 16: 16, 32: 16, 80: 20}
    recipes = [load_recipe(DEMO, [*TINY, f"search.batch_size={size}"]) for size in sizes]
    task = make_task(load_recipe(DEMO, [*TINY, "data.train_items=200"]), tmp_path)
    for recipe, looked in zip(recipes, sizes.values(), strict=True):
        kept, held_out = split(task, recipe)
        assert len(kept) + len(held_out.items) == len(task.train)
        assert len(held_out[0]["pixel_values"]) == held_out.batch_size == looked
