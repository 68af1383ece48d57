"""The commands on Hugging Face datasets: compressed, evaluated, resumed, refused in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet

from tables import captioned, json_lines, parquet, png
from vlprune.commands.pipeline import fingerprint
from vlprune.commands.pipeline.compress import compress
from vlprune.commands.pipeline.notes import deciding
from vlprune.data.datasets.records import captioned_image
from vlprune.data.datasets.sources import Asked, open_rows, open_stream
from vlprune.data.files import Left
from vlprune.recipe.columns import CAPTIONED
from vlprune.recipe.spec import DataSpec, ModelSpec, load_recipe
from vlprune.tasks import RetrievalTask

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)
RECIPE = """
task: retrieval
budget: {params: 0.8}
method: {name: upop, interval: 1}
model: {path: MODEL}
data:
  format: dataset
  train: {path: FOLDER/train.parquet}
  test: {path: FOLDER/test.parquet}
  columns: {text: caption}
search: {steps: 4, batch_size: 4}
retrain: {steps: 2, batch_size: 4}
threads: 1
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
    monkeypatch.setattr(Parquet, "SLEEP_ON_THREADS_SHUTDOWNS", False)  # five seconds


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The path of a recipe with its data and its model."""
    for split, count in (("train", 12), ("test", 5)):
        columns = captioned(count)
        columns["caption"] = columns.pop("text")
        parquet(tmp_path / f"{split}.parquet", columns)
    task = RetrievalTask(SMALL, DataSpec(train_items=4, test_items=2), tmp_path / "scenes")
    task.new_model().save_pretrained(tmp_path / "clip")
    task.processor.save_pretrained(tmp_path / "clip")
    path = tmp_path / "recipe.yaml"
    text = RECIPE.replace("FOLDER", str(tmp_path)).replace("MODEL", str(tmp_path / "clip"))
    path.write_text(text)
    return str(path)


STREAM = ["data.streaming=true", "data.test_items=4", "data.shuffle_buffer=5"]


@pytest.mark.parametrize(
    "more",
    [pytest.param([], id="table", marks=pytest.mark.slow), pytest.param(STREAM, id="stream")],
)
def test_a_run_on_a_dataset_is_the_same_with_workers(
    recipe: str, tmp_path: Path, more: list[str]
) -> None:
    workers = ["search.workers=2", "retrain.workers=1"]
    reports = [
        compress(load_recipe(recipe, [*more, *extra]), tmp_path / name)
        for name, extra in (("one", []), ("two", workers))
    ]
    for name in ("model.safetensors", "plan.json", "dense/model.safetensors"):
        one, two = (tmp_path / place / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
    one, two = (deciding(load_recipe(recipe, extra).search) for extra in ([], workers))
    assert one == two  # a run that is stopped goes on with another number of them
    assert reports[0]["data"]["train"]["items"] == (None if more else 12)
    assert reports[0]["data"]["test"]["items"] == (4 if more else 5)


def test_a_stream_calibrates_on_its_first_items(recipe: str, tmp_path: Path) -> None:
    given = [
        *STREAM,
        "method={name: obs}",
        "calibration={items: 8, batch_size: 2}",
        "search.steps=0",
    ]
    report = compress(load_recipe(recipe, [*given, "retrain.steps=0"]), tmp_path / "out")
    assert report["calibration"]["items"] == 8
    assert report["calibration"]["batches"] == 4


def refusal(run: Any, tmp_path: Path, *words: str) -> str:
    """The message with which `vlprune compress` ends with 2, and nothing written."""
    code, out, err = run("compress", *words, "-o", str(tmp_path / "out"))
    assert code == 2
    assert "Traceback" not in err
    assert not out
    assert not any((tmp_path / "out").glob("*.json"))
    return " ".join(err.split())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.columns={}"], "there is no column 'text' for text"),
        (["data.train.path=/nowhere/x.parquet"], "there is no file or folder /nowhere/x.parquet"),
        (["data.train.path=someone/something"], "the hub cannot be asked"),
        (["data.columns={txt: caption}"], "'data.columns.txt': retrieval reads image, text"),
        (["data.format=karpathy", "data.columns={}"], "unknown key 'data.train.path': karpathy"),
        (["data.streaming=true"], "data.test_items must be at least 1 with streaming"),
        ([*STREAM, "model.path=''"], "model.path must be given with data.streaming"),
        ([*STREAM, "search={epochs: 1}"], "search.epochs must be 0 with data.streaming"),
        ([*STREAM, "method={name: jsp}"], "method.name must not be jsp with data.streaming"),
        (["search.workers=65"], "search.workers must be a whole number from 0 to 64"),
    ],
)
def test_mistakes_are_one_message(
    recipe: str, tmp_path: Path, run: Any, changes: list[str], says: str
) -> None:
    assert says in refusal(run, tmp_path, recipe, *changes)


def test_a_picture_that_a_worker_cannot_decode_ends_the_run(
    recipe: str, tmp_path: Path, run: Any
) -> None:
    columns = captioned(12)
    columns["caption"] = columns.pop("text")
    columns["image"][7]["bytes"] = png(7)[:50]
    parquet(tmp_path / "train.parquet", columns)
    said = refusal(run, tmp_path, recipe, "search.workers=2", "search.steps=20")
    assert "train.parquet, row 7, image cannot be decoded" in said


def test_a_toy_of_a_recipe_needs_no_dataset(recipe: str, tmp_path: Path) -> None:
    toy = load_recipe(recipe, ["search.workers=0"], toy=True)
    assert (toy.data.format, toy.data.columns, toy.data.streaming) == ("shapes", {}, False)
    streaming = Path(recipe).read_text().replace("  columns", "  streaming: true\n  columns")
    (tmp_path / "s.yaml").write_text(streaming)
    assert load_recipe(tmp_path / "s.yaml", toy=True) == toy


def test_other_contents_are_noticed_and_other_places_are_not(tmp_path: Path) -> None:
    def of(folder: str, stream: bool = False, **changes: Any) -> str:
        columns = captioned(6) | changes
        (tmp_path / folder).mkdir(exist_ok=True)
        asked = Asked("train", str(parquet(tmp_path / folder / "a.parquet", columns)))
        if stream:
            return fingerprint.of_data(open_stream(asked, CAPTIONED, captioned_image))  # type: ignore[arg-type]
        return fingerprint.of_data(open_rows(asked, CAPTIONED, captioned_image, Left()))

    first = of("a")
    assert of("b") == first
    pictures = captioned(6)["image"]
    pictures[4] = {**pictures[4], "bytes": png(200)}
    assert of("c", image=pictures) != first
    assert of("d", text=["another", *captioned(6)["text"][1:]]) != first
    assert of("e", stream=True) == of("f", stream=True)
    assert of("g", stream=True, text=["another one", *captioned(6)["text"][1:]]) != of("e", True)


def test_answers_of_a_file_take_the_place_of_those_of_the_training_set(
    tmp_path: Path, run: Any
) -> None:
    from vlprune.tasks import VqaTask

    columns = {**captioned(4), "question": ["what?"] * 4, "answers": ["a", "b", "a", "c"]}
    columns.pop("text")
    path = str(parquet(tmp_path / "a.parquet", columns))
    spec = DataSpec("dataset", train={"path": path}, test={"path": path})
    assert VqaTask(SMALL, spec, tmp_path).answers == ["a", "b", "c"]
    (tmp_path / "answers.json").write_text(json.dumps(["c", "a", "é"]))
    options = {"answers": str(tmp_path / "answers.json")}
    task = VqaTask(SMALL, spec, tmp_path, options)
    assert task.answers == ["c", "a", "é"]
    assert task.contents() == {"answers": ["c", "a", "é"]}
    (tmp_path / "answers.json").write_text(json.dumps(["c", "a", "c"]))
    with pytest.raises(ValueError, match="the answer 'c' is there twice"):
        VqaTask(SMALL, spec, tmp_path, options)


def test_rows_of_paths_are_checked_before_anything_trains(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [{"image": f"{i}.png", "text": "a"} for i in range(2)]
    path = str(json_lines(tmp_path / "a.jsonl", rows))
    spec = DataSpec("dataset", train={"path": path}, test={"path": path})
    with pytest.raises(ValueError, match=r"1 of the 2 images of data\.train are missing"):
        RetrievalTask(SMALL, spec, tmp_path)
