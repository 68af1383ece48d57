"""The documents say what is true: the example runs, the tables agree, the links lead somewhere."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from vlprune.testing import FAMILIES, VARIANTS, build
from vlprune.testing.__main__ import table

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


def test_the_readmes_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    sample = build("clip")
    sample.model.save_pretrained(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "args": transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True,
            disable_tqdm=True, save_strategy="no", remove_unused_columns=False,
            per_device_train_batch_size=2,
        ),
        "collate": lambda items: {**sample.inputs, "return_loss": True},
        "data": [0, 1, 2, 3],
    }  # fmt: skip
    exec(code.replace("openai/clip-vit-base-patch32", str(tmp_path / "clip")), names)
    assert (tmp_path / "clip-half" / "plan.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_blank_line_tears_a_table(page: Path) -> None:
    """A row without a heading above it is shown as text."""
    lines = page.read_text().splitlines()
    for number, (above, line) in enumerate(itertools.pairwise(["", *lines]), 1):
        if line.startswith("|") and not above.startswith("|"):
            assert re.fullmatch(r"\|[-: |]+\|", lines[number]), f"{page}, line {number}"


@pytest.mark.parametrize(
    "families",
    [FAMILIES, pytest.param(VARIANTS, marks=pytest.mark.slow)],
    ids=["families", "variants"],
)
def test_the_tables_of_families_are_what_the_code_says(families: Any) -> None:
    supported = (ROOT / "docs" / "supported.md").read_text()
    assert table(families) in supported, "print it again: python -m vlprune.testing"


def test_every_variant_has_a_line_in_the_table() -> None:
    text = (ROOT / "docs" / "supported.md").read_text()
    lines = [name for name in re.findall(r"^\| `(\w+)` \|", text, re.M) if name not in FAMILIES]
    assert lines == [*VARIANTS]


def test_the_families_are_counted_alike_everywhere() -> None:
    for page, words, named in (
        ("README.md", r"\[(\d+) more tested families\]", 6),  # six are named in the sentence
        ("docs/index.md", r"\[(\d+) families of models\]", 0),
        ("CHANGELOG.md", r"structures of (\d+) tested families", 0),
    ):
        (count,) = re.findall(words, (ROOT / page).read_text())
        assert int(count) + named == len(FAMILIES), page
    assert f"{len(VARIANTS)} further models" in (ROOT / "README.md").read_text()


def test_every_recipe_key_is_documented() -> None:
    from vlprune.recipe.spec import CalibrationSpec, DataSpec, ModelSpec, Recipe, Training

    text = (ROOT / "docs" / "recipes.md").read_text()
    for cls in (Recipe, ModelSpec, DataSpec, Training, CalibrationSpec):
        for spec in fields(cls):
            assert re.search(rf"\b{spec.name}\b", text), f"{cls.__name__}.{spec.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_readmes_picture_is_drawn_from_its_numbers(tmp_path: Path) -> None:
    pictures = ROOT / "docs" / "pictures"
    (tmp_path / "demo.json").write_text((pictures / "demo.json").read_text())
    script = ROOT / "benchmarks" / "picture.py"
    subprocess.run([sys.executable, str(script), "-o", str(tmp_path)], check=True)
    readme = (ROOT / "README.md").read_text()
    for name in ("demo-light.svg", "demo-dark.svg"):
        assert (tmp_path / name).read_text() == (pictures / name).read_text(), name
        assert f"docs/pictures/{name}" in readme


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = re.findall(r"^make (\w+) +\w.*$", done.stdout, flags=re.MULTILINE)
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed == targets.split()


def _commands() -> dict[str, set[str]]:
    """{command: its options}, as the command line knows them."""
    import typer

    from vlprune.commands.main import app

    group: Any = typer.main.get_command(app)
    return {
        name: {opt for p in command.params for opt in (*p.opts, *p.secondary_opts) if "-" in opt}
        | {p.name for p in command.params if p.param_type_name == "argument"}
        for name, command in group.commands.items()
        if not command.hidden
    }


def test_the_page_of_commands_is_what_the_command_line_says() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    sections = dict(re.findall(r"## `vlprune (\w+)`\n(.*?)(?=\n## |\Z)", text, flags=re.DOTALL))
    commands = _commands()
    assert list(sections) == list(commands)
    for name, options in commands.items():
        told = set(re.findall(r"^\* `([^`]+)`", sections[name], flags=re.MULTILINE))
        words = {word.strip(",[].") for line in told for word in line.split()}
        for option in options:
            assert option in words, f"{name}: {option} is not in docs/commands.md"
        for word in words:
            if word.startswith("-") and word != "--help":
                assert word in options, f"{name}: docs/commands.md tells of {word}"


def fenced(text: str) -> list[tuple[str, str]]:
    """The language and the text of every code block."""
    return re.findall(r"^```(.*)\n((?s:.*?))^```$", text, flags=re.MULTILINE)


def test_commands_in_the_documents_exist() -> None:
    """Every line that begins with vlprune, in any code block of any page."""
    commands, seen = _commands(), 0
    for page in PAGES:
        for language, block in fenced(page.read_text()):
            if language:
                continue
            for line in re.findall(
                r"^(?:\$ )?vlprune (.*?)(?:\s+#.*)?$", block, flags=re.MULTILINE
            ):
                name, *words = line.split()
                assert name in commands, f"{page.name}: vlprune {name}"
                for word in words:
                    if word.startswith("-"):
                        assert word in commands[name], f"{page.name}: vlprune {line}"
                seen += 1
    assert seen >= 20


@pytest.mark.slow
@pytest.mark.parametrize("exports", [False, True])
def test_the_tutorial_runs(
    exports: bool, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its commands, in order, with fewer steps; then its Python."""
    from small_runs import TINY
    from vlprune.measuring import bench

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "NOISE", 1e9)  # other tests run beside this one
    monkeypatch.setattr(bench, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(bench, "alone", functools.cache(bench.alone))  # it starts processes
    text = (ROOT / "docs" / "tutorial.md").read_text()
    lines = re.findall(r"^vlprune (.*)$", text, flags=re.MULTILINE)
    assert len(lines) >= 9
    if not exports:  # they take most of the time, and so does what is timed with them
        lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("export"))]
    less = [option for option in TINY if not option.startswith("budget")]
    for line in lines:
        words = line.split()
        if words[0] == "demo":
            given = any(word.startswith("budget") for word in words)
            words += [*less, *([] if given else ["budget.params=0.5"])]
        if words[0] == "bench":
            words += ["--seconds", "0.1"]
        code, stdout, stderr = run(*words)
        assert code == 0, f"{line}: {stderr}"
        assert stdout or "-o" in words, line
    (code_block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code_block, {})


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "tutorial.html", "api.html", "commands.html"} <= pages
    api = (tmp_path / "site" / "api.html").read_text()
    assert "The same model object, really smaller" in api
    assert not re.search(r":(?:meth|func|class):", api)
    import vlprune

    for name in vlprune.__all__:
        modules = ("cost", "errors", "testing", "VlpruneError")
        assert f'id="vlprune.{name}"' in api or name in modules, name
    home = (tmp_path / "site" / "index.html").read_text()
    outside = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?://[^"]+)"', home)
    assert outside == []  # it opens without a network
