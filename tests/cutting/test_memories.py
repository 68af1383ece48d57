"""A proof is about the weights: neither what a model remembers nor what it leaves out counts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import vlprune
from vlprune.cutting import rewrite as cutting
from vlprune.cutting.memories import forgetful, memories
from vlprune.errors import VerificationError
from vlprune.structures.plan import Plan
from vlprune.testing import build


class Cache:
    def __init__(self) -> None:
        self.held: dict[Any, Tensor] = {}


class Remembering(T.CLIPModel):
    """A CLIP that computes the embedding of a text only once."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.texts = Cache()

    def forward(self, input_ids: Any, pixel_values: Any, **_: Any) -> Any:
        key = tuple(input_ids.flatten().tolist())
        if key not in self.texts.held:
            self.texts.held[key] = self.text_model(input_ids=input_ids).pooler_output
        image = self.vision_model(pixel_values=pixel_values).pooler_output
        return {"text": self.texts.held[key], "image": image}


class Tabled(T.CLIPModel):
    """A CLIP with a table of tensors that it cannot do without."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = {"one": torch.ones(1)}

    def forward(self, input_ids: Any, pixel_values: Any, **_: Any) -> Any:
        image = self.vision_model(pixel_values=pixel_values).pooler_output
        text = self.text_model(input_ids=input_ids).pooler_output
        return {"image": image * self.table["one"].to(image), "text": text}


def made(cls: Any) -> tuple[Any, dict[str, Any]]:
    sample = build("clip")
    model = cls(sample.model.config).eval()
    return model, {n: sample.inputs[n] for n in ("input_ids", "pixel_values")}


def halved(model: Any) -> tuple[Any, Plan]:
    description = vlprune.discover(model)
    keep = {s.name: tuple(range(max(1, s.size // 2))) for s in description}
    return description, Plan(keep=keep, attention=description.attention)


def test_a_cut_is_not_proved_by_what_the_dense_model_remembers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = made(Remembering)
    with torch.no_grad():
        dense = model(**inputs)["text"].clone()
    carry_out = cutting.carry_out

    def wrongly(model: Any, *rest: Any) -> Any:
        result = carry_out(model, *rest)
        with torch.no_grad():
            model.text_model.encoder.layers[0].mlp.fc1.weight.mul_(2)
        return result

    with monkeypatch.context() as broken:
        broken.setattr(cutting, "carry_out", wrongly)
        with pytest.raises(VerificationError, match="masked and cut model differ by"):
            vlprune.rewrite(model, *halved(model), verify=inputs)
    # the weights that stay are put back from the small model, so the fault is in them
    with torch.no_grad():
        assert not model(**inputs)["text"].equal(dense)

    model, inputs = made(Remembering)
    with torch.no_grad():
        dense = model(**inputs)["text"].clone()
        small = vlprune.rewrite(model, *halved(model), verify=inputs)
        assert not memories(small)
        assert not small(**inputs)["text"].allclose(dense, atol=1e-4)


class Looking(Tabled):
    """One that does not fail without its table."""

    def forward(self, input_ids: Any, pixel_values: Any, **_: Any) -> Any:
        image = self.vision_model(pixel_values=pixel_values).pooler_output
        text = self.text_model(input_ids=input_ids).pooler_output
        one = self.table.get("one", torch.zeros(1))
        return {"image": image * one.to(image), "text": text}


@pytest.mark.parametrize("cls", [Tabled, Looking])
def test_a_table_is_no_memory(cls: Any) -> None:
    model, inputs = made(cls)
    vlprune.rewrite(model, *halved(model), verify=inputs)
    with torch.no_grad():
        assert model(**inputs)["image"].abs().max() > 0


def test_omdet_turbo_answers_with_its_own_weights() -> None:
    model = T.OmDetTurboForObjectDetection(
        T.OmDetTurboConfig(
            text_config={
                "model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
                "max_position_embeddings": 16, "projection_dim": 16, "eos_token_id": 2,
            },
            backbone_config={
                "model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1],
                "num_heads": [1, 2, 4, 8], "window_size": 2, "image_size": 32, "patch_size": 4,
                "out_features": ["stage2", "stage3", "stage4"],
            },
            use_timm_backbone=False, backbone=None, text_projection_in_dim=32,
            text_projection_out_dim=32, class_embed_dim=32, encoder_hidden_dim=16,
            decoder_hidden_dim=16, vision_features_channels=[16, 16, 16],
            encoder_in_channels=[16, 32, 64], decoder_num_heads=2, encoder_attention_heads=2,
            encoder_dim_feedforward=24, decoder_dim_feedforward=24, task_encoder_hidden_dim=24,
            num_queries=6, decoder_num_layers=1, num_projection_layers=1,
            apply_layernorm_after_vision_backbone=False, encoder_layers=1,
        )
    ).eval()  # fmt: skip
    words = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]])
    inputs = {
        "pixel_values": torch.rand(1, 3, 32, 32), "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words), "classes_structure": torch.tensor([2]),
        "tasks_input_ids": words[:1], "tasks_attention_mask": torch.ones_like(words[:1]),
    }  # fmt: skip
    with torch.no_grad():
        before = model(**inputs).decoder_coord_logits
        assert memories(model)
        small = vlprune.rewrite(model, *halved(model), verify=inputs)
        assert not memories(small)
        after = small(**inputs).decoder_coord_logits
    assert not after.allclose(before)


# -- structures that a proof does not use ------------------------------------------------------


def test_a_batch_that_leaves_a_tower_out_is_told() -> None:
    sample = build("clip")
    model: Any = sample.model

    class Pictures(type(model)):  # type: ignore[misc]
        def forward(self, pixel_values: Any, **_: Any) -> Any:
            return self.vision_model(pixel_values=pixel_values)

    model.__class__ = Pictures
    batch = {"pixel_values": sample.inputs["pixel_values"]}
    compressor = vlprune.Compressor(
        model, vlprune.Magnitude(), {"params": 0.8}, example_inputs=batch
    )
    with pytest.warns(UserWarning, match=r"does not use text_model\S+ and \d+ more, which were"):
        compressor.finish()
    unseen = compressor.report()["verified"]["unseen"]
    assert unseen
    assert all(name.startswith("text_model") for name in unseen)


def test_a_gate_that_a_forward_passes_by_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = build("clip")
    model: Any = sample.model
    mlp = model.vision_model.encoder.layers[0].mlp

    def forward(hidden: Tensor) -> Tensor:
        inside = nn.functional.linear(hidden, mlp.fc1.weight, mlp.fc1.bias)
        return nn.functional.linear(mlp.activation_fn(inside), mlp.fc2.weight, mlp.fc2.bias)

    monkeypatch.setattr(mlp, "forward", forward)
    description = vlprune.discover(model)
    name = next(s.name for s in description if s.kind == "ffn" and s.tower == "vision")
    keep = {s.name: tuple(range(s.size)) for s in description}
    plan = Plan(keep={**keep, name: (0, 1)}, attention=description.attention)
    with pytest.raises(VerificationError, match="differ"):  # the gates change nothing, the cut does
        vlprune.rewrite(model, description, plan, verify=sample.inputs)


def test_a_whole_proof_tells_nothing() -> None:
    sample = build("clip")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vlprune.rewrite(sample.model, *halved(sample.model), verify=sample.inputs)


def test_a_memory_that_counts_its_entries_counts_from_none() -> None:
    """OmDet-Turbo drops its oldest entry when the count says that it is full."""

    class Remembered:
        def __init__(self) -> None:
            self.entries = {"a": torch.ones(1), "b": torch.ones(1)}
            self.capacity = self.load = 2

    model: Any = nn.Linear(1, 1)
    model.cache = Remembered()
    with forgetful(model):
        assert (model.cache.load, model.cache.capacity, model.cache.entries) == (0, 2, {})
        model.cache.entries["c"], model.cache.load = torch.ones(1), 1
    assert (model.cache.load, model.cache.capacity, model.cache.entries) == (0, 2, {})
