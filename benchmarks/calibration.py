"""Compression without training at full size: seconds and peak memory of every step.

    python benchmarks/calibration.py --samples 16

The model is a CLIP ViT-L/14 at 336 px with random weights, and so is its input; neither changes how
long anything takes. Prints the seconds of each step, those of the forward passes alone, and the
process's peak memory next to that of the model. Time grows in proportion to the samples, memory
hardly does.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

import vlprune
from vlprune.status import Progress

TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
}


class Clock(Progress):
    """Notes the seconds of every step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Any]:
        began = time.monotonic()
        yield lambda done, note="": None
        self.seconds[title] = time.monotonic() - began
        print(f"{title:14} {self.seconds[title]:7.1f} s, peak {peak():.2f} GB", flush=True)


def peak() -> float:
    """The process's peak memory so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Compress, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--layers", type=int, default=24, help="of the vision tower")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    vision = {**VISION, "num_hidden_layers": options.layers}
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=768)
    model = transformers.CLIPModel(config).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    print(f"model {size:.2f} GB, process {peak():.2f} GB")
    batches = [
        {
            "pixel_values": torch.randn(options.batch, 3, 336, 336),
            "input_ids": torch.randint(0, 49000, (options.batch, 16)),
        }
        for _ in range(options.samples // options.batch)
    ]
    began = time.monotonic()
    with torch.no_grad():
        model(**batches[0])
    plain = (time.monotonic() - began) * len(batches)
    print(f"one plain forward pass of all samples {plain:7.1f} s")
    clock = Clock()
    compressor = vlprune.Compressor(
        model,
        vlprune.OBS(rotate=True),
        {"params": options.share},
        attention="qk_vo",
        calibration=vlprune.Calibration(batches, progress=clock),
    )
    began = time.monotonic()
    compressor.finish()
    took = time.monotonic() - began
    print(f"in all {took:.1f} s = {took / plain:.1f} plain passes; peak {peak():.2f} GB")
    print(
        f"peak / model {peak() / size:.2f}; outputs {compressor.report()['calibration']['outputs']}"
    )


if __name__ == "__main__":
    main()
