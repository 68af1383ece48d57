"""`make check` leaves out what starts a process, a Trainer or an export, whoever starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from test_conformance import QUICK

from lanes import quick_lane
from small_runs import DEMO, TINY
from vlprune.commands.pipeline.compress import compress
from vlprune.folders.exported.write import export
from vlprune.recipe.spec import load_recipe
from vlprune.testing import FAMILIES, build


def start_a_process(_folder: Path) -> None:
    subprocess.run([sys.executable, "-c", "pass"])


def start_a_trainer(folder: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True)
    transformers.Trainer(model=build("vit").model, args=arguments)


def start_a_run(folder: Path) -> None:
    compress(load_recipe(DEMO, TINY), folder / "small")


def start_an_export(folder: Path) -> None:
    export(build("vit").model, [{}], "torch-export", folder / "out")


@pytest.mark.parametrize("start", [start_a_process, start_a_trainer, start_a_run, start_an_export])
def test_what_takes_long_leaves_the_quick_lane(start: Any, tmp_path: Path) -> None:
    with quick_lane(), pytest.raises(pytest.skip.Exception, match="`make test` runs it"):
        start(tmp_path)


def test_outside_the_quick_lane_nothing_is_kept_from_starting() -> None:
    before = subprocess.Popen.__init__, transformers.Trainer.__init__
    with quick_lane():
        pass
    assert before == (subprocess.Popen.__init__, transformers.Trainer.__init__)


def test_the_quick_families_exist() -> None:
    assert QUICK.keys() < FAMILIES.keys()
