"""Recovery by adapters, in a whole recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_runs import DEMO, TINY
from vlprune.commands.pipeline.compress import compress
from vlprune.recipe.spec import load_recipe


def test_adapters_train_while_layers_are_recomputed(tmp_path: Path) -> None:
    """BLIP adds to its embeddings in place, so these must not be leaves that want a gradient."""
    pytest.importorskip("peft")
    more = ["retrain.lora.rank=2", "retrain.gradient_checkpointing=true"]
    report = compress(load_recipe(DEMO, [*TINY, *more]), tmp_path / "out")
    assert "retrained" in report["metrics"]
