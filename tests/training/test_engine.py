"""What a recipe says to Accelerate's engines before anything trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import vlprune
from vlprune.errors import RecipeError, UnsupportedError
from vlprune.recipe.spec import Recipe, Training
from vlprune.training import engines
from vlprune.training.engines import deepspeed


def recipe(**train: Any) -> Recipe:
    return Recipe(task="vqa", budget={"params": 0.5}, train=Training(steps=1, **train))


def wanted(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Any) -> None:
    """As ``accelerate launch`` sets it, with DeepSpeed as if it were installed."""
    (folder / "ds.json").write_text(json.dumps(config))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(folder / "ds.json"))
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: object())


def test_fsdp_needs_devices_that_accelerate_uses_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engines.need_engine(recipe(ema=0.9), vlprune.UPop())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    engines.need_engine(recipe(ema=0.9), vlprune.UPop())  # on a CPU nothing is divided


def test_deepspeed_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vlprune\[deepspeed\]'"):
        engines.need_engine(recipe(), vlprune.UPop())


def test_everything_that_stands_against_deepspeed_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 3, "optimizer": {}, "train_batch_size": 8,
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 3},
    }  # fmt: skip
    wanted(monkeypatch, tmp_path, config)
    with pytest.raises(RecipeError) as caught:
        engines.need_engine(recipe(ema=0.9, batch_size=4), vlprune.JSP())
    said = str(caught.value).splitlines()
    for start in (
        "train.ema",
        "train: DeepSpeed's config has its own optimizer",
        "train: DeepSpeed's config has a train_batch_size",
        "train: DeepSpeed's config says train_micro_batch_size_per_gpu = 3, the recipe 4",
        "train: DeepSpeed's config says bf16.enabled = True, the recipe False",
        "the method",
    ):
        assert sum(line.startswith(start) for line in said) == 1, said
    assert len(said) == 7


def test_the_recipe_fills_in_what_the_config_leaves_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}
    assert deepspeed.config_of(Training()) is None
    wanted(monkeypatch, tmp_path, config)
    spec = Training(steps=1, batch_size=5, accumulate=2, clip=0.7, bf16=True)
    engines.need_engine(recipe(batch_size=5, accumulate=2), vlprune.JSP())  # at stage 2
    found = deepspeed.config_of(spec)
    assert found is not None
    assert found["train_micro_batch_size_per_gpu"] == 5
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.7
    assert found["bf16"] == {"enabled": True}
    assert found["fp16"] == {"enabled": False}
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True}


def test_a_config_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted(monkeypatch, tmp_path, {})  # accelerate asks for a ZeRO section
    with pytest.raises(RecipeError, match=r"ds\.json cannot be used"):
        engines.need_engine(recipe(), vlprune.UPop())
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(RecipeError, match=r"ds\.json cannot be used"):
        engines.need_engine(recipe(), vlprune.UPop())
