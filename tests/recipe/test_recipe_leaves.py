"""Every leaf of a recipe and every option, with values that nobody should give: never a crash."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import vlprune
from vlprune.errors import BudgetError, RecipeError, UnsupportedError
from vlprune.methods import METHODS
from vlprune.methods.upop import IMPORTANCE
from vlprune.recipe.checks import Checked, Text
from vlprune.recipe.machine import LOGGERS, need_logger
from vlprune.recipe.options import METHOD_OPTIONS, TASK_OPTIONS, TeacherOptions
from vlprune.recipe.spec import (
    AugmentSpec,
    CalibrationSpec,
    DataSpec,
    LoraSpec,
    ModelSpec,
    Recipe,
    Training,
    load_recipe,
)
from vlprune.tasks import TASKS
from vlprune.tasks.grounders import GROUNDERS

DEMO = Path(vlprune.__file__).parent / "demo.yaml"
DOCS = Path(__file__).parents[2] / "docs"
STRANGE: list[Any] = [
    math.nan, math.inf, -math.inf, -1, -0.5, 0, 10**30, -(10**30), 1e308, 5e-324, 0.5, True, False,
    None, "", "1e400", "nan", "x" * 10**5, "\x1b[2J", "\0", "\ud800", [], {}, [[]], {"": 1},
    {1: 2}, ["a"], {"a": "b"}, {"a": math.nan}, b"\0", {3}, object(),
]  # fmt: skip
SECTIONS = {"model": ModelSpec, "data": DataSpec, "train": Training, "search": Training,
            "retrain": Training, "calibration": CalibrationSpec}  # fmt: skip


def places() -> Iterator[tuple[str, ...]]:
    """The path of every leaf of a recipe."""
    for one in dataclasses.fields(Recipe):
        if one.name not in SECTIONS:
            yield (one.name,)
        for leaf in dataclasses.fields(SECTIONS[one.name]) if one.name in SECTIONS else ():
            yield (one.name, leaf.name)
    yield from [("budget", "params"), ("budget", "latency"), ("teacher", "logits")]
    yield from [("retrain", "lora", one.name) for one in dataclasses.fields(LoraSpec)]
    yield from [("data", "augment", one.name) for one in dataclasses.fields(AugmentSpec)]
    yield from [("train", "drop_path", "a*"), ("train", "dropout", "a*")]
    yield from [("train", "rates", "a*"), ("data", "train", "images"), ("method", "name")]


def finite(value: Any) -> bool:
    """Whether all numbers at any depth are, and not enormous."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float | int) or abs(value) <= 1e9 or value == 2**32 - 1


def values_at(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The values of the demo with one leaf replaced."""
    body = yaml.safe_load(DEMO.read_text())
    *parents, leaf = place
    inner = body
    for name in parents:
        inner = inner.setdefault(name, {})
    if parents == ["budget"]:
        inner.clear()
    inner[leaf] = value
    return body


@pytest.mark.parametrize("place", [*places()], ids=".".join)
def test_no_value_of_any_leaf_makes_anything_but_a_recipe_or_one_error(
    place: tuple[str, ...],
) -> None:
    refused = 0
    for value in STRANGE:
        recipe, message = made_or_refused(Recipe, values_at(place, value))
        if recipe is None:
            assert place[0] in message
            assert len(message) < 1000
            assert message.isprintable()
            refused += 1
        else:
            assert finite(dataclasses.asdict(recipe)), (place, value)
            yaml.safe_load(recipe.to_yaml())
    assert refused > len(STRANGE) / 2


def made_or_refused(cls: Any, values: dict[str, Any]) -> tuple[Any, str]:
    """An object of these values, or the message that refuses them; whatever else fails the test."""
    try:
        return cls(**values), ""
    except (RecipeError, BudgetError) as error:
        return None, str(error)


OPTIONS = [
    (name, cls, one.name)
    for name, cls in [*METHODS.items(), *TASK_OPTIONS.items()]
    for one in dataclasses.fields(cls)
]


@pytest.mark.parametrize(
    ("name", "cls", "leaf"), OPTIONS, ids=[f"{name}.{leaf}" for name, _, leaf in OPTIONS]
)
def test_no_value_of_any_option_does_either(name: str, cls: Any, leaf: str) -> None:
    refused = 0
    for value in STRANGE:
        made, message = made_or_refused(cls, {leaf: value})
        if made is not None:
            assert finite(dataclasses.asdict(made)), (leaf, value)
            continue
        assert leaf in message
        refused += 1
        part = {"task": name, "options": {leaf: value}}
        if name in METHODS:
            part = {"task": "vqa", "method": {"name": name, leaf: value}}
        _, message = made_or_refused(Recipe, {"budget": {"params": 0.5}, **part})
        assert leaf in message  # a recipe refuses it as well
    assert refused > len(STRANGE) / 2


def simple() -> st.SearchStrategy[Any]:
    """Values that YAML can hold."""
    leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(
        [math.nan, math.inf, -1.5, 0.5, 1e300, "1e-3", "$HOME/x", "${", "$$", "~", "auto", "none"]
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )


LEAVES = [*places(), *[("method", o) for _, c, o in OPTIONS if issubclass(c, METHODS["upop"])]]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(LEAVES), simple()), min_size=1, max_size=4))
def test_random_values_at_random_leaves(tmp_path_factory: Any, changes: list[Any]) -> None:
    """A file with them is a recipe, or one error that names a changed leaf."""
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    body = yaml.safe_load(DEMO.read_text())
    for place, value in changes:
        *parents, leaf = place
        inner = body
        for name in parents:
            below = inner.get(name)
            inner[name] = inner = below if isinstance(below, dict) else {}
        inner[leaf] = value
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    recipe, message = made_or_refused(load_recipe, {"path": path})
    if recipe is None:
        assert any(place[-1] in message or place[0] in message for place, _ in changes)
        return
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe or "~" in str(body)


# -- all at once ---------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: vqa\nbudget: {params: 2}\nmethod: {name: upop, intervall: 3, paper_ratio: .nan}\n"
        "model: {heads: 5, patch_size: 17}\ntrain: {steps: 1, steps: 2, warmup: 2, 3: 4}\n"
        "data: {format: vqav2, folder: $NOT_SET_ANYWHERE/x}\noptions: {beams: 3}\n"
        "threads: 1000000\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["retrain.clip=-1", "nonsense", "teacher.logit=1", "search.decay=cosin"])
    title, *lines = str(caught.value).splitlines()
    assert title == f"{len(lines)} mistakes in {path} and the command line:"
    assert tuple(line.strip() for line in lines) == caught.value.problems
    for says in (
        "budget.params must be the fraction", "'method.intervall'. Did you mean 'interval'",
        "method.paper_ratio must be a number above 0", "model.heads must divide the width 96",
        "model.patch_size must divide the image_size 64", "train.steps is there twice",
        "train.warmup must be a number of at least 0 and at most 1, not 2", "the key 3 of train",
        "data.folder uses $NOT_SET_ANYWHERE", "'options.beams'", "threads must be a whole number",
        "retrain.clip must be", "'nonsense' is not of the form", "Did you mean 'logits'",
        "search.decay must be one of cosine, constant, not 'cosin'. Did you mean 'cosine'",
    ):  # fmt: skip
        assert sum(says in line for line in lines) == 1, says
    assert len(lines) == 15


def test_the_command_line_prints_them_as_json_too(run: Any) -> None:
    code, stdout, stderr = run("demo", "train.steps=-1", "search.clip=-1", "--json")
    assert code == 2
    body = json.loads(stdout)
    assert body["error"] == "RecipeError"
    assert [line.split()[0] for line in body["problems"]] == ["train.steps", "search.clip"]
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 3


def test_nothing_heavy_is_loaded_to_refuse_a_recipe() -> None:
    code = (
        "import sys\nfrom vlprune.recipe.spec import load_recipe\n"
        f"try: load_recipe({str(DEMO)!r}, ['method.interval=0', 'task=vqq'])\n"
        "except ValueError as error: assert 'interval' in str(error), error\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- the tables agree ----------------------------------------------------------------------


def test_the_tables_agree() -> None:
    assert {*METHOD_OPTIONS} == {*METHODS}
    for name, method in METHODS.items():
        assert issubclass(method, METHOD_OPTIONS[name])
    assert {*TASK_OPTIONS} == {*TASKS}
    for name, task in TASKS.items():
        assert task.takes is TASK_OPTIONS[name]
    upop = {*IMPORTANCE}
    for word in upop:
        METHODS["upop"](importance=word)
    assert {*GROUNDERS} == {"mdetr", "grounding-dino", "glip"}
    assert {*LOGGERS} == {*INTEGRATION_TO_CALLBACK}
    need_logger("none")
    need_logger("all")
    with pytest.raises(UnsupportedError, match=r"wandb.*not installed.*installed here"):
        need_logger("wandb")


def ranges() -> Iterator[str]:
    """The table of docs/recipes.md: what every leaf and option may be."""
    parts: dict[str, Any] = {"": Recipe, "model.": ModelSpec, "data.": DataSpec, "*.": Training}
    parts |= {"teacher.": TeacherOptions, "calibration.": CalibrationSpec}
    parts |= {"retrain.lora.": LoraSpec, "data.augment.": AugmentSpec}
    parts |= {f"{name}: ": cls for name, cls in [*METHOD_OPTIONS.items(), *TASK_OPTIONS.items()]}
    rows: dict[str, list[str]] = {}
    for part, cls in parts.items():
        for leaf, hint in get_type_hints(cls, include_extras=True).items():
            (allowed,) = getattr(hint, "__metadata__", [None])
            if allowed and not isinstance(allowed, Text) and leaf != "threads":
                rows.setdefault(allowed.says, []).append(f"`{part}{leaf}`")
    for says, leaves in rows.items():
        yield f"| {says} | {', '.join(leaves)} |"


def test_the_documents_say_what_is_allowed() -> None:
    text = (DOCS / "recipes.md").read_text()
    for row in ranges():
        assert row in text, "print the rows again"


# -- values that cannot go together --------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.bf16=true", "train.fp16=true"], "train.fp16 and bf16"),
        (["retrain.lora.rank=2", "retrain.drop_path={a: 0.1}"], "retrain.drop_path must be empty"),
        (["model.image_size=4096", "model.patch_size=1"], "more than 16,384 patches"),
        (["model.width=8192", "model.vision_layers=1000"], "more than 1,000,000,000 parameters"),
        (["data.train_items=100000000"], "data.train_items must be from 2 to 1,000,000 generated"),
        (["data.test_items=1"], "data.test_items must be from 2 to 1,000,000 generated"),
        (["task=grounding", "options.fusion_width=50"], "multiple of 4 and of the 4 heads"),
        (
            ["task=detection", "options.queries=341", "model.image_size=64"],
            "options.queries must be at most 340, the places of 64 px",
        ),
        (["method.name=jsp", "method.warmup=0.5"], "method.warmup 0.5 must come before freeze"),
        (["data.format=vqav2", "data.train={questions: a, images: b}"], "data.train.annotations"),
        (["data.format=vqav2", "data.folder=x", "data.test.imges=b"], "Did you mean 'images'"),
        (["method.round_to=auto", "method.l1={atention: 1}"], "Did you mean 'attention'"),
        (["device=cuda:-1"], "device must be auto, cpu, cuda"),
        (["report_to=tensorbord"], "Did you mean 'tensorboard'. Installed here: .*tensorboard"),
        (["method.round_to=auto", "method.name=jsp"], "unknown key 'method.round_to'"),
    ],
)  # fmt: skip
def test_conflicts_are_refused(overrides: list[str], says: str) -> None:
    if overrides[0] == "method.name=jsp" or overrides[-1] == "method.name=jsp":
        overrides = ["method={name: upop}", *overrides]
    with pytest.raises(RecipeError, match=says.replace("'tensorboard'.", "'tensorboard'.*")):
        load_recipe(DEMO, overrides)


def test_a_class_checks_itself_from_python() -> None:
    for make in (
        lambda: METHODS["upop"](interval=-1),
        lambda: Training(steps=-1),
        lambda: DataSpec("shapes", train_items=-1),
        lambda: dataclasses.replace(Recipe("vqa", {"params": 0.5}), device="gpu 1"),
        lambda: dataclasses.replace(METHODS["random"](), seed=2**32),
    ):
        with pytest.raises(RecipeError):
            make()
    assert issubclass(METHODS["jsp"], Checked)


def test_bench_refuses_what_would_end_the_process(run: Any, tmp_path: Path) -> None:
    code, _, stderr = run(
        "bench",
        str(tmp_path),
        "--threads",
        "1000000",
        "--seconds",
        "nan",
        "--batch-sizes",
        "1,99999",
    )
    assert code == 2
    for says in ("threads must be", "seconds must be a number", "batch_sizes.1 must be"):
        assert says in stderr


# -- the file ------------------------------------------------------------------------------

LAUGHS = "".join(
    f"{name}: &{name} [{', '.join(f'*{before}' for _ in range(9))}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + LAUGHS, "more than 10,000 values"),
        ("a: &a {k: 1}\n" + LAUGHS.replace("[", "{<<: [").replace("]", "]}"), "more than 10,000"),
        ("a: &a [*a]\n", "more than|found undefined"),
        ("a: " + "[" * 100_000, "more than 10,000 values, or more than 20"),
        ("a: " + "{b: " * 100_000, "more than 10,000 values, or more than 20"),
        ("".join(f"{'  ' * n}a{n}:\n" for n in range(500)), "more than 20"),
        ("- x\n" * 250_000, "more than 10,000 values"),
        ("x" * 2**21, "at most 1 MiB"),
        ("task: !!python/object/apply:os.system [touch owned]\n", "tag .*os.system"),
        ("task: !!python/name:os.system\n", "the tag"),
        ("task: !mine x\n", "line 1: the tag !mine is not read"),
        ("task: !!int ''\n", "a value is not what its tag says"),
        ("task: !!bool x\n", "a value is not what its tag says"),
        ("task: vqa\n---\ntask: vqa\n", "line 2, column 1: not valid YAML"),
        ("task:\tvqa\n\tx: 1\n", "line 1, column 6: not valid YAML"),
        ("task: v\x00qa\n", "not valid YAML"),
        ('task: "v\\e[2Jqa"\nbudget: {params: 0.5}\n', r"printable characters|one of"),
        ("task: vqa\ntask: gqa\nbudget: {params: 0.5}\n", "task is there twice, on lines 1 and 2"),
        ("1: 2\n", "line 1: the key 1 is not text"),
        ("? [a]\n: b\n", "of several values is not text"),
        ("no: 2\n", "line 1: the key no is not text: put it in quotes"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("seed: 0x" + "f" * 9000, "seed must be a whole number"),
        ("", "must be a mapping"),
        ("seed: 2020-01-01", "seed must be a whole number from 0 to 4,294,967,295, not '2020"),
        ("\ufeff- a", "must be a mapping"),
    ],
    ids=range(26),
)
def test_files_of_strangers_get_one_message_at_once(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(RecipeError, match=says) as caught:
        load_recipe(path)
    assert time.process_time() - started < 3
    assert len(str(caught.value)) < 1000
    assert not Path("owned").exists()


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b"task: caf\xe9\n")
    for path, says in (
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path, "not a regular file|directory"),
        (tmp_path / "latin", "not UTF-8"),
        (f"{tmp_path}/\x1b[2J", r"there is no recipe .*\\x1b"),
    ):
        with pytest.raises(RecipeError, match=says):
            load_recipe(path)


def test_aliases_and_merges_still_serve(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: vqa\nbudget: {params: 0.5}\ntrain: &t {steps: 5, clip: 2}\n"
        "search: *t\nretrain: {<<: *t, steps: 7}\n"
    )
    recipe = load_recipe(path, ["search.steps=9"])  # and nothing else with it
    assert [p.steps for p in (recipe.train, recipe.search, recipe.retrain)] == [5, 9, 7]
    assert recipe.retrain.clip == 2


def test_a_dollar_sign_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: captioning\nbudget: {params: 0.5}\noptions: {prompt: for $$5 in $WHERE}\n"
    )
    monkeypatch.setenv("WHERE", "here")
    recipe = load_recipe(path)
    assert recipe.options["prompt"] == "for $5 in here"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    with pytest.raises(RecipeError, match=r"options.prompt 'a \$5' holds a \$ that begins no name"):
        load_recipe(path, ["options.prompt=a $5"])
