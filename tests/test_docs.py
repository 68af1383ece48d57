"""The documents say what is true: the example runs, the tables agree, the links lead somewhere."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers

from vlprune.testing import build
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


def test_the_table_of_families_is_what_the_code_says() -> None:
    assert table() in (ROOT / "docs" / "supported.md").read_text()


def test_the_readme_counts_the_families() -> None:
    from vlprune.testing import FAMILIES

    (more,) = re.findall(r"\[(\d+) more tested families\]", (ROOT / "README.md").read_text())
    assert int(more) == len(FAMILIES) - 6  # six are named in the sentence


def test_every_recipe_key_is_documented() -> None:
    from vlprune.recipe import DataSpec, ModelSpec, Recipe, Training

    text = (ROOT / "docs" / "recipes.md").read_text()
    for cls in (Recipe, ModelSpec, DataSpec, Training):
        for spec in fields(cls):
            assert re.search(rf"\b{spec.name}\b", text), f"{cls.__name__}.{spec.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
