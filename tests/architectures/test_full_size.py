"""Real sizes: on the meta device in seconds, with real memory under the marker `slow`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.testing.conformance import make_plan


def clip_large() -> Any:
    config = transformers.CLIPConfig(
        text_config={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        vision_config={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
        },
        projection_dim=768,
    )  # fmt: skip
    return transformers.CLIPModel(config)


def blip_vqa() -> Any:
    config = transformers.BlipConfig(
        vision_config={"image_size": 224, "hidden_size": 768, "intermediate_size": 3072},
        text_config={
            "hidden_size": 768, "num_attention_heads": 12, "encoder_hidden_size": 768,
            "intermediate_size": 3072,
        },
    )  # fmt: skip
    return transformers.BlipForQuestionAnswering(config)


def test_clip_large_is_described_and_cut_without_weights() -> None:
    with torch.device("meta"):
        model = clip_large()
    description = vlprune.discover(model)
    assert len(description) == 2 * (24 + 12)
    assert sum(s.size for s in description if s.kind == "ffn") == 24 * 4096 + 12 * 3072
    plan = make_plan(description, lambda size: size // 2)
    want = vlprune.cost.params(model, description.structures, plan)
    dense = sum(p.numel() for p in model.parameters())
    small = vlprune.rewrite(model, description, plan)
    assert sum(p.numel() for p in small.parameters()) == want < 0.55 * dense


def image_and_text(side: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, side, side), "input_ids": torch.ones(1, 8).long()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "blip"])
def test_full_size_models_are_cut_proved_and_reloaded(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if family == "clip":
        model, inputs = clip_large().eval(), image_and_text(336)
    else:
        model, inputs = blip_vqa().eval(), image_and_text(224)
        inputs["decoder_input_ids"] = torch.ones(1, 4).long()
    compressor = vlprune.Compressor(
        model, vlprune.Magnitude(), {"macs": 0.5}, example_inputs=inputs
    )
    small = compressor.finish()
    report = compressor.report()
    assert report["macs"]["after"] <= 0.5 * report["macs"]["before"]
    assert report["verified"]["dtype"] == "float32"
    assert report["verified"]["difference"] <= 1e-4 * max(1.0, report["verified"]["scale"])
    vlprune.save(small, tmp_path / "m")
    again = vlprune.load(tmp_path / "m").eval()
    with torch.no_grad():
        a, b = small(**inputs), again(**inputs)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    first = next(iter(k for k in a if isinstance(a[k], torch.Tensor)))
    torch.testing.assert_close(a[first], b[first])  # where weights lie in memory changes last bits
