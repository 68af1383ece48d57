"""Transformers of timm and open_clip follow the same table.

They need torchvision, which breaks transformers beside a CPU build of torch, so they live in
a folder of their own: `make other` installs them there and runs this file.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import vlprune
from vlprune.testing.conformance import make_plan

timm: Any = pytest.importorskip("timm", reason="timm is not installed: run `make other`")
open_clip: Any = pytest.importorskip(
    "open_clip", reason="open_clip is not installed: run `make other`"
)


def vit() -> tuple[Any, tuple[torch.Tensor, ...], str]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2)
    return model, (torch.randn(2, 3, 32, 32, dtype=torch.float64),), "padded"


def swiglu() -> tuple[Any, tuple[torch.Tensor, ...], str]:
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=28, num_classes=5, depth=2, qkv_bias=True
    )
    return model, (torch.randn(2, 3, 28, 28, dtype=torch.float64),), "padded"


def clip() -> tuple[Any, tuple[torch.Tensor, ...], str]:
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2},
    )
    inputs = (torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randint(1, 50, (2, 8)))
    return model, inputs, "native"


@pytest.mark.parametrize("unit", ["head_dim", "qk_vo", "head"])
@pytest.mark.parametrize("make", [vit, swiglu, clip], ids=lambda f: f.__name__)
def test_masked_equals_cut(make: Any, unit: Any) -> None:
    torch.manual_seed(0)
    model, inputs, layout = make()
    model.double().eval()
    description = vlprune.discover(model, unit)
    kinds = {s.kind.split("_")[0] for s in description}
    assert kinds == {"attention", "ffn"}
    assert {s.layout for s in description if s.kind != "ffn"} == {layout}
    plan = make_plan(description, lambda size: max(1, size // 2))
    small = vlprune.rewrite(copy.deepcopy(model), description, plan)
    with torch.no_grad():
        with vlprune.gated(model, description.structures, plan):
            masked = model(*inputs)
        cut, dense = small(*inputs), model(*inputs)
    if not isinstance(masked, tuple):
        masked, cut, dense = (masked,), (cut,), (dense,)
    assert torch.allclose(masked[0], cut[0], rtol=0, atol=1e-10)
    assert not torch.allclose(masked[0], dense[0], rtol=0, atol=1e-4)
    assert vlprune.cost.params(model, description.structures, plan) == sum(
        p.numel() for p in small.parameters()
    )
