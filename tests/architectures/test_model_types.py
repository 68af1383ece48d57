"""Our model types cannot clash with those of transformers, and folders of any age load as ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from transformers import configuration_utils
from transformers.models.auto import configuration_auto

from vlprune import Plan, discover, load, rewrite, save
from vlprune.folders import hook as transformers_hook
from vlprune.folders.opening import model_class, open_config, open_model
from vlprune.models import MODEL_TYPES, MODELS, PREFIX
from vlprune.testing import build

OURS = ["blip_nlvr", "segmenter", "mdetr", "glip"]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config class of a release of transformers that brings a model type ``glip``."""
    module = ModuleType("transformers.models.glip")
    home = {"model_type": "glip", "__module__": module.__name__}
    module.GlipConfig = type("GlipConfig", (transformers.PreTrainedConfig,), home)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = {**configuration_auto.CONFIG_MAPPING_NAMES, "glip": "GlipConfig"}
    monkeypatch.setattr(
        configuration_auto, "CONFIG_MAPPING", type(configuration_auto.CONFIG_MAPPING)(names)
    )
    transformers_hook._register_configs(configuration_auto)
    return module.GlipConfig


def saved(family: str, folder: Path, former: bool = False) -> Any:
    """A cut model, saved; with ``former`` as it was before model types had a prefix."""
    model = build(family).model
    description = discover(model)
    first = next(s for s in description if s.kind == "ffn")
    save(rewrite(model, description, Plan(keep={first.name: (0, 1)})), folder)
    if former:
        config = json.loads((folder / "config.json").read_text())
        config["model_type"] = family
        (folder / "config.json").write_text(json.dumps(config))
    return model


def test_every_model_type_has_the_prefix_and_its_config_agrees() -> None:
    assert len(MODEL_TYPES) == len(MODELS)
    for model in MODELS.values():
        model_type = model.config_class.model_type
        assert model_type.startswith(PREFIX)
        assert MODEL_TYPES[model_type] == model.config_class.__name__
        assert model_type not in configuration_auto.CONFIG_MAPPING_NAMES


@pytest.mark.parametrize("former", [False, True], ids=["today", "former"])
@pytest.mark.parametrize("family", OURS)
def test_a_folder_loads_as_ours_and_is_saved_with_todays_type(
    family: str, former: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(
        configuration_utils.logger, "warning", lambda text, *_: warnings.append(text)
    )
    cls = type(saved(family, tmp_path / "a", former))
    for model in (
        load(tmp_path / "a"),
        transformers.AutoModel.from_pretrained(tmp_path / "a"),
        cls.from_pretrained(tmp_path / "a"),
    ):
        assert type(model) is cls
        assert model.config.model_type == f"vlprune_{family}"
    assert not [text for text in warnings if "using a model of type" in text]
    model.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == (
        f"vlprune_{family}"
    )
    assert type(open_model(family, config_only=True)) is cls  # `vlprune inspect glip`


def test_a_model_type_of_transformers_stays_its_own(theirs: Any, tmp_path: Path) -> None:
    assert type(transformers.AutoConfig.for_model("glip")) is theirs
    cls = type(saved("glip", tmp_path))
    for model in (transformers.AutoModel.from_pretrained(tmp_path), open_model(str(tmp_path))):
        assert type(model) is cls
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is cls.config_class


def test_a_former_folder_is_ours_beside_a_model_type_of_transformers(
    theirs: Any, tmp_path: Path
) -> None:
    cls = type(saved("glip", tmp_path, former=True))
    for model in (load(tmp_path), open_model(str(tmp_path)), cls.from_pretrained(tmp_path)):
        assert type(model) is cls
    assert type(open_config(tmp_path)) is cls.config_class


def test_a_class_of_transformers_with_our_name_is_not_taken_for_ours(
    theirs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GlipForGrounding(transformers.PreTrainedModel):
        pass

    # transformers replaces its own module while it is imported: patch the one that is asked
    asked = "vlprune.folders.opening.transformers.GlipForGrounding"
    monkeypatch.setattr(asked, GlipForGrounding, raising=False)
    config = {"architectures": ["GlipForGrounding"], "model_type": "glip"}
    assert model_class(config, "a folder") is GlipForGrounding
    config["model_type"] = "vlprune_glip"
    assert model_class(config, "a folder") is MODELS["GlipForGrounding"]
