"""What a cut model remembers of its cut, whichever part of it was cut, saved or loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import vlprune
from vlprune.errors import UnsupportedError
from vlprune.structures.record import read_record
from vlprune.testing import build


def cut(model: Any, inputs: Any, fraction: float = 0.8, **more: Any) -> Any:
    compressor = vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": fraction}, example_inputs=inputs, **more
    )
    compressor.finish()
    assert compressor.verification is not None
    return model


def outputs(model: Any, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return vlprune.cutting.difference.tensors_of(model.eval()(**inputs))


def same(one: Any, other: Any, inputs: Any) -> bool:
    pairs = zip(outputs(one, inputs), outputs(other, inputs), strict=False)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def round_trips(model: Any, inputs: Any, folder: Path) -> Any:
    """The model by its own class and by vlprune.load, saved and loaded again."""
    vlprune.save(model, folder)
    state = model.state_dict()
    loaded = type(model).from_pretrained(folder)
    assert all(torch.equal(state[name], t) for name, t in loaded.state_dict().items())
    loaded.save_pretrained(folder.with_name(f"{folder.name}-again"))
    again = vlprune.load(folder.with_name(f"{folder.name}-again"))
    assert same(model, again, inputs)
    assert read_record(again) == read_record(loaded)
    return again


PARTS = {
    "clip": ("vision_model", "text_model"),
    "llava": ("model.vision_tower", "model.language_model"),
}


def inputs_of(part: str, sample: Any) -> dict[str, Any]:
    names = ("pixel_values",) if "vision" in part else ("input_ids", "attention_mask")
    return {name: sample.inputs[name] for name in names if name in sample.inputs}


@pytest.mark.parametrize("family", PARTS)
def test_one_tower_then_the_other_then_the_whole(family: str, tmp_path: Path) -> None:
    sample = build(family)
    model: Any = sample.model
    more: dict[str, Any] = {"attention": "head"} if family == "llava" else {}
    for part in PARTS[family]:
        inputs = inputs_of(part, sample)
        if family == "llava" and "language" in part:
            inputs = {"input_ids": torch.randint(6, 50, (2, 6))}
        cut(model.get_submodule(part), inputs, **more)
        round_trips(model, sample.inputs, tmp_path / part.rpartition(".")[2])
    before = sum(p.numel() for p in model.parameters())
    cut(model, sample.inputs, 0.9, **more)
    small = round_trips(model, sample.inputs, tmp_path / "whole")
    assert sum(p.numel() for p in small.parameters()) <= 0.9 * before
    if family == "clip":
        third = cut(small, sample.inputs, 0.95)
        round_trips(third, sample.inputs, tmp_path / "third")


@pytest.mark.parametrize("what", ["whole", "vision_model"])
def test_the_classes_of_parts_open_the_folder_of_the_whole(what: str, tmp_path: Path) -> None:
    sample = build("clip")
    model: Any = sample.model
    if what == "whole":
        cut(model, sample.inputs)
    else:
        cut(model.get_submodule(what), inputs_of(what, sample))
    vlprune.save(model, tmp_path / "small")
    vision, text = (inputs_of(part, sample) for part in ("vision_model", "text_model"))
    with torch.no_grad():
        pixels = model.vision_model(**vision).pooler_output
        words = model.text_model(**text).pooler_output
        expected = {
            T.CLIPVisionModel: (vision, "pooler_output", pixels),
            T.CLIPTextModel: (text, "pooler_output", words),
            T.CLIPVisionModelWithProjection: (
                vision, "image_embeds", model.visual_projection(pixels),
            ),
            T.CLIPTextModelWithProjection: (text, "text_embeds", model.text_projection(words)),
        }  # fmt: skip
    for cls, (inputs, name, values) in expected.items():
        part = cls.from_pretrained(tmp_path / "small").eval()
        with torch.no_grad():
            assert torch.allclose(part(**inputs)[name], values, atol=1e-5), cls
        folder = tmp_path / cls.__name__
        small = round_trips(part, inputs, folder)
        if what == "whole":
            round_trips(cut(small, inputs, 0.95), inputs, tmp_path / f"{cls.__name__}-2")
    whole = T.AutoModel.from_pretrained(tmp_path / "small")
    assert same(model, whole, sample.inputs)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_base_and_head_classes_open_each_others_folders(family: str, tmp_path: Path) -> None:
    sample = build(family)
    more: dict[str, Any] = {"attention": "head"} if family == "llava" else {}
    head: Any = cut(sample.model, sample.inputs, **more)
    vlprune.save(head, tmp_path / "head")
    base = T.AutoModel.from_pretrained(tmp_path / "head")
    if type(base) is type(head):
        head = {"bert": T.BertForMaskedLM}[family].from_pretrained(tmp_path / "head")
    assert type(base) is not type(head)
    inner = head.base_model
    assert same(inner, base, sample.inputs)
    vlprune.save(base, tmp_path / "base")
    again = type(head).from_pretrained(tmp_path / "base")
    assert same(again.base_model, base, sample.inputs)
    small = vlprune.load(tmp_path / "base")
    round_trips(cut(small, sample.inputs, 0.95, **more), sample.inputs, tmp_path / "twice")
    cut(again, sample.inputs, 0.95, **more)
    round_trips(again, sample.inputs, tmp_path / "last")


def test_models_of_one_config_object_are_cut_each_for_itself(tmp_path: Path) -> None:
    sample = build("clip")
    config = sample.model.config
    untouched = config.to_json_string()
    one, two, teacher = (T.CLIPModel(config).eval() for _ in range(3))
    cut(one, sample.inputs, 0.8)
    cut(two, sample.inputs, 0.6)
    assert config.to_json_string() == untouched
    assert read_record(teacher) is None
    for number, model in enumerate((one, two, teacher)):
        model.save_pretrained(tmp_path / str(number))
        loaded = T.CLIPModel.from_pretrained(tmp_path / str(number))
        assert same(model, loaded, sample.inputs)
        assert (read_record(loaded) is None) == (model is teacher)
    assert one.config.vision_config is one.vision_model.config
    assert teacher.config is config


def test_a_tower_cut_inside_two_models_of_one_config(tmp_path: Path) -> None:
    sample = build("clip")
    other = T.CLIPModel(sample.model.config).eval()
    cut(sample.model.vision_model, inputs_of("vision_model", sample))
    assert read_record(other) is None
    other.save_pretrained(tmp_path / "other")
    assert same(other, T.CLIPModel.from_pretrained(tmp_path / "other"), sample.inputs)


def test_a_model_built_from_the_config_of_a_cut_one() -> None:
    sample = build("clip")
    cut(sample.model, sample.inputs)
    full = T.CLIPModel(copy.deepcopy(sample.model.config))
    for action in (lambda: cut(full, sample.inputs), lambda: cut(full.vision_model, None)):
        with pytest.raises(UnsupportedError, match="built from the config of a cut model"):
            action()
    for part in (full, full.vision_model, full.text_model):
        del part.config.quantization_config
    cut(full.eval(), sample.inputs)


def test_towers_cut_with_different_units(tmp_path: Path) -> None:
    sample = build("clip")
    model: Any = sample.model
    cut(model.vision_model, inputs_of("vision_model", sample), attention="head")
    cut(model.text_model, inputs_of("text_model", sample), attention="head_dim")
    for action in (lambda: vlprune.save(model, tmp_path / "x"), lambda: cut(model, sample.inputs)):
        with pytest.raises(UnsupportedError, match="parts of this model were cut with"):
            action()
    assert not (tmp_path / "x").exists()


def test_an_ordinary_model_keeps_its_generation_config() -> None:
    sample = build("gpt2")
    model: Any = sample.model
    model.generation_config.max_new_tokens = 3
    model.generation_config.eos_token_id = 7
    cut(model, sample.inputs, 0.7, uniform=True, skip=("*attn*",))
    plain = vlprune.ordinary(model)
    assert plain.generation_config.max_new_tokens == 3
    assert plain.generation_config.eos_token_id == 7
    assert plain.generation_config is not model.generation_config
    assert same(model, plain, sample.inputs)


@pytest.mark.parametrize("tower", ["Vision", "Text"])
def test_auto_model_opens_a_tower_with_its_projection(tower: str, tmp_path: Path) -> None:
    """AutoModel makes the tower itself, whose names lack the prefix that the projection's has."""
    sample = build("clip")
    vlprune.save(sample.model, tmp_path / "whole")
    cls = getattr(T, f"CLIP{tower}ModelWithProjection")
    model = cls.from_pretrained(tmp_path / "whole").eval()
    inputs = inputs_of(f"{tower.lower()}_model", sample)
    cut(model, inputs)
    vlprune.save(model, tmp_path / "small")
    base = T.AutoModel.from_pretrained(tmp_path / "small").eval()
    assert type(base) is not cls
    assert same(getattr(model, f"{tower.lower()}_model"), base, inputs)
