"""The answer lists of MDETR's authors, by which their checkpoints number GQA's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprune import save
from vlprune.commands.pipeline.notes import basis_of
from vlprune.data.questions import read_answer_lists
from vlprune.data.shapes.write import write_shapes
from vlprune.errors import DataError, UnsupportedError
from vlprune.recipe.spec import DataSpec, ModelSpec, Recipe, load_recipe
from vlprune.tasks.gqa import ANSWER_TYPES, GqaTask

TINY = ModelSpec(
    width=32, heads=4, vision_layers=1, text_layers=1, image_size=32, patch_size=16
)  # fmt: skip
LISTS: dict[str, Any] = {
    "answer_obj": {"yes": 1, "no": 0, "unknown": 2},
    "answer_attr": {"unknown": 0, "red": 2, "blue": 1},
    "answer_rel": {"circle": 0, "unknown": 1},
    "answer_cat": {"unknown": 0},
    "answer_global": {"indoors": 0},
    "another_key": "not read",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> DataSpec:
    folder = write_shapes(tmp_path_factory.mktemp("scenes"), train=24, test=12)
    return DataSpec(folder=str(folder), train_items=24, test_items=12)


def written(folder: Path, lists: Any) -> str:
    path = folder / "gqa_answer2id_by_type.json"
    path.write_text(json.dumps(lists))
    return str(path)


def test_answers_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert read_answer_lists(written(tmp_path, LISTS), ANSWER_TYPES) == {
        "obj": ["no", "yes", "unknown"],
        "attr": ["unknown", "blue", "red"],
        "rel": ["circle", "unknown"],
        "global": ["indoors"],
        "cat": ["unknown"],
    }


@pytest.mark.parametrize(
    ("key", "body", "says"),
    [
        ("answer_rel", None, r"json: 'answer_rel' must be an object, not null$"),
        ("answer_rel", {}, r"'answer_rel': there is no answer with the number 0: the 0 answers"),
        ("answer_rel", {"a": 0, "b": 2}, r"'answer_rel': no answer has the number 1: the 2 "),
        ("answer_rel", {"a": 1, "b": 2}, r"no answer has the number 0: the 2 answers must be"),
        ("answer_rel", {"a": 0, "b": 0}, r"'answer_rel', 'b': 0 is also the number of 'a': each"),
        ("answer_rel", {"a": -1}, r"'answer_rel', 'a' must be a whole number from 0, not -1$"),
        ("answer_rel", {"a": "0"}, r"'answer_rel', 'a' must be a whole number from 0, not '0'$"),
        ("answer_rel", ["a"], r"'answer_rel' must be an object, not \['a'\]$"),
        ("", [], r"json must be an object with 'answer_obj', not \[\]$"),
    ],
)
def test_other_files_are_refused_in_one_line(
    key: str, body: Any, says: str, tmp_path: Path
) -> None:
    path = written(tmp_path, {**LISTS, key: body} if key else body)
    with pytest.raises(DataError, match=says) as caught:
        read_answer_lists(path, ANSWER_TYPES)
    assert "\n" not in str(caught.value)
    lists = {name: value for name, value in LISTS.items() if name != "answer_cat"}
    with pytest.raises(DataError, match="has no 'answer_cat', which must be an object"):
        read_answer_lists(written(tmp_path, lists), ANSWER_TYPES)


def test_a_model_is_taught_and_answers_by_the_list(scenes: DataSpec, tmp_path: Path) -> None:
    task = GqaTask(TINY, scenes, tmp_path, {"answers": written(tmp_path, LISTS)})
    sizes = {"type": 5, "obj": 3, "attr": 3, "rel": 2, "global": 1, "cat": 1}
    assert task.heads == {f"answer_{name}": n for name, n in sizes.items()}
    asked = [next(q for q in task.train if q.answer == a) for a in ("yes", "red", "green")]
    answers = task.collate(asked)["answers"]
    assert answers["answer_obj"].tolist() == [1, -1, -1]
    assert answers["answer_attr"].tolist() == [-1, 2, 0]  # green is not listed: unknown
    assert answers["answer_rel"].tolist() == [-1, -1, -1]

    model = task.new_model()
    assert dict(model.config.answer_heads) == task.heads
    for name, number in (("answer_type", 1), ("answer_attr", 2)):
        torch.nn.init.constant_(model.answer_heads[name].bias[number], 100.0)
    assert task.predict(model, asked) == ["red"] * 3
    save(model, tmp_path / "model", processor=task.processor)
    assert task.predict(task.load(tmp_path / "model"), asked) == ["red"] * 3

    other = {**LISTS, "answer_rel": {"circle": 0}}
    wrong = GqaTask(TINY, scenes, tmp_path, {"answers": written(tmp_path, other)})
    says = r"has the answer heads .*'answer_rel': 2.*id_by_type.json lists .*'answer_rel': 1.*give"
    with pytest.raises(UnsupportedError, match=says):
        wrong.load(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=r"questions need .* as options\.answers$"):
        GqaTask(TINY, scenes, tmp_path, {}).load(tmp_path / "model")


def test_without_a_list_unseen_answers_are_no_target(scenes: DataSpec, tmp_path: Path) -> None:
    task = GqaTask(TINY, scenes, tmp_path, {})
    task.answers["attr"] = ["unknown", "red"]
    (green,) = [q for q in task.train if q.answer == "green"][:1]
    assert task.collate([green])["answers"]["answer_attr"].tolist() == [-1]


def test_a_run_notices_another_list_and_not_another_place(scenes: DataSpec, tmp_path: Path) -> None:
    def basis(folder: Path, lists: Any) -> Any:
        folder.mkdir(exist_ok=True)
        options = {"answers": written(folder, lists)}
        recipe = Recipe(
            task="gqa", budget={"params": 0.8}, model=TINY, data=scenes, options=options
        )
        return basis_of(recipe, GqaTask(TINY, scenes, tmp_path, options))

    first = basis(tmp_path / "a", LISTS)
    assert basis(tmp_path / "b", LISTS) == first
    changed = basis(tmp_path / "a", {**LISTS, "answer_cat": {"a": 0}})
    assert (changed.data, changed.model) == (first.data, first.model)
    assert changed.training != first.training


def test_a_toy_needs_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "recipes" / "jsp" / "gqa.yaml"
    monkeypatch.setenv("VIT_MDETR_GQA", "/models/gqa")
    monkeypatch.setenv("GQA", "/data/gqa")
    recipe = load_recipe(path, ["options.answers=/data/lists.json"])
    assert recipe.options == {"answers": "/data/lists.json"}
    assert recipe.toy().options == {}
    assert load_recipe(path, toy=True).options == {}
