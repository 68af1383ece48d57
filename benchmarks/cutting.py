"""Cut CLIP ViT-L/14 336 px at full size: seconds, peak memory, and folder round trip.

    .venv/bin/pip install -c constraints.txt -e '.[benchmarks]'
    .venv/bin/python benchmarks/cutting.py

Random weights, two CPU threads. Every measurement runs in a process of its own, so that its
peak memory is its own; memory is resident set size over that of the dense model alone. The
comparable tool, Torch-Pruning, gets the vision tower (it traces one forward pass of one
tower; BLIP- or CLIP-sized dual towers are beyond its example) with the same share of FFN
neurons and head dimensions removed by magnitude.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = "2"


def peak() -> float:
    """Peak resident memory of this process, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clip_large(vision_only: bool = False) -> Any:
    """CLIP ViT-L/14 at 336 px with random weights."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    if vision_only:
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).eval()
    text = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=768)
    return transformers.CLIPModel(config).eval()


def count(model: Any) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def run_dense(vision_only: bool) -> dict[str, float]:
    """What the dense model alone takes."""
    model = clip_large(vision_only)
    return {"params": count(model), "peak": peak()}


def run_vlprune(vision_only: bool) -> dict[str, float]:
    """Discover, plan by magnitude, cut."""
    import vlprune

    model = clip_large(vision_only)
    vlprune.Compressor  # noqa: B018 - imported before the clock starts
    start = time.perf_counter()
    method = vlprune.Magnitude(scope="uniform")
    compressor = vlprune.Compressor(model, method, {"params": 0.5})
    small = compressor.finish(verify=False)
    seconds = time.perf_counter() - start
    return {"params": count(small), "seconds": seconds, "peak": peak()}


def run_save(folder: str) -> dict[str, float]:
    """Save the cut model."""
    import vlprune

    model = clip_large()
    small = vlprune.Compressor(model, vlprune.Magnitude(scope="uniform"), {"params": 0.5}).finish()
    start = time.perf_counter()
    vlprune.save(small, folder)
    return {"params": count(small), "seconds": time.perf_counter() - start, "peak": peak()}


def run_load(folder: str) -> dict[str, float]:
    """Load it by its stock class."""
    import transformers

    import vlprune

    transformers.utils.logging.disable_progress_bar()
    vlprune.load  # noqa: B018
    cls = transformers.CLIPModel
    start = time.perf_counter()
    small = cls.from_pretrained(folder)
    return {"params": count(small), "seconds": time.perf_counter() - start, "peak": peak()}


def run_torch_pruning() -> dict[str, float]:
    """Torch-Pruning on the vision tower: group magnitude, half of FFN and head dimensions."""
    import torch
    import torch_pruning as tp

    model = clip_large(vision_only=True)
    example = {"pixel_values": torch.zeros(1, 3, 336, 336)}
    layers = model.encoder.layers
    ratios = {layer.mlp.fc1: 0.5 for layer in layers}
    ratios |= {layer.self_attn.q_proj: 0.5 for layer in layers}
    heads = {
        p: 16 for x in layers for p in (x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj)
    }
    keep = [
        model.embeddings.patch_embedding,
        *(x.mlp.fc2 for x in layers),
        *(x.self_attn.out_proj for x in layers),
    ]
    start = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=ratios,
        num_heads=heads,
        prune_head_dims=True,
        ignored_layers=keep,
        output_transform=lambda out: out.pooler_output,
    )
    pruner.step()
    for layer in layers:  # its own examples do this by hand
        layer.self_attn.head_dim = layer.self_attn.q_proj.out_features // 16
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model(**example)
    return {"params": count(model), "seconds": seconds, "peak": peak()}


def child(*arguments: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--only", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": THREADS, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:90]}  # type: ignore[dict-item]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    if options.only:
        what, *rest = options.only
        runs = {
            "dense": lambda: run_dense(False), "dense-vision": lambda: run_dense(True),
            "vlprune": lambda: run_vlprune(False), "vlprune-vision": lambda: run_vlprune(True),
            "torch-pruning": run_torch_pruning,
            "save": lambda: run_save(*rest), "load": lambda: run_load(*rest),
        }  # fmt: skip
        print(json.dumps(runs[what]()))
        return
    import torch

    print(f"torch {torch.__version__}, {THREADS} threads, {platform.machine()}")
    print("| model | what | params M | seconds | peak GiB | x dense |")
    print("|---|---|---|---|---|---|")
    dense, tower = child("dense"), child("dense-vision")
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch) / "m")
        rows = [
            ("whole CLIP-L/14", "dense, built", dense, dense),
            ("whole CLIP-L/14", "vlprune: discover + plan + cut", child("vlprune"), dense),
            ("whole CLIP-L/14", "vlprune: save", child("save", folder), dense),
            ("whole CLIP-L/14", "from_pretrained of it", child("load", folder), dense),
            ("vision tower", "dense, built", tower, tower),
            ("vision tower", "vlprune: discover + plan + cut", child("vlprune-vision"), tower),
            ("vision tower", "Torch-Pruning: trace + plan + cut", child("torch-pruning"), tower),
        ]
    for model, what, got, base in rows:
        if "error" in got:
            print(f"| {model} | {what} | {got['error']} | | | |")
            continue
        seconds = f"{got['seconds']:.2f}" if "seconds" in got else ""
        print(
            f"| {model} | {what} | {got['params'] / 1e6:.1f} | {seconds} | {got['peak']:.2f} | "
            f"{got['peak'] / base['peak']:.2f} |"
        )


if __name__ == "__main__":
    main()
