"""Peak memory and seconds of a cut: in memory, and streamed from folder to folder.

    python benchmarks/streaming.py --layers 10
    python benchmarks/streaming.py --layers 32 --ways imports "samples stream" "samples memory"

A LLaVA in bfloat16 with random weights is written file by file to a temporary folder, which is
removed at the end; the ways on samples cut a ViT in float32. Each way to cut it runs in a process
of its own. ``anonymous`` is the memory that the system cannot take back; pages of mapped files
count in ``resident`` only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = ("imports", "stream", "stream proved", "compress", "memory", "memory proved")
ON_SAMPLES = ("samples stream", "samples memory")
SIZE = "200MB"


@dataclass(frozen=True)
class Size:
    """A LLaVA: its language model, and its vision tower of ``tower`` layers (heads of 64)."""

    layers: int
    width: int = 2048
    hidden: int = 5632
    vocabulary: int = 32000
    tower: int = 12
    tower_width: int = 1024


def make(folder: Path, size: Size) -> int:
    """Write the model, one file in memory at a time; returns the bytes of its weights."""
    import torch
    import transformers

    from vlprune.streaming.cut import bytes_of_model
    from vlprune.streaming.shards import Shards

    heads = max(2, size.width // 128)
    text = transformers.LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=size.tower_width, intermediate_size=4 * size.tower_width, image_size=224,
        num_hidden_layers=size.tower, num_attention_heads=size.tower_width // 64, patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=size.vocabulary - 1,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    class Random(Mapping[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            shape = shapes[name]
            if "norm" in name and name.endswith("weight"):
                return torch.ones(shape, dtype=torch.bfloat16)
            count = shape.numel()  # one block over and over: to draw every number takes minutes
            return block.repeat(-(-count // len(block)))[:count].reshape(shape).clone()

        def __iter__(self) -> Iterator[str]:
            return iter(shapes)

        def __len__(self) -> int:
            return len(shapes)

    from transformers.core_model_loading import revert_weight_conversion

    shapes = {n: t.shape for n, t in revert_weight_conversion(model, model.state_dict()).items()}
    with Shards(folder / "work", "random").instead(Random()):
        model.save_pretrained(folder / "dense", max_shard_size="500MB")
    return bytes_of_model(model)


def make_classifier(folder: Path, layers: int, count: int = 16) -> int:
    """Write a ViT with its processor, and pictures; returns the bytes of the weights."""
    import torch
    import transformers
    from PIL import Image

    config = transformers.ViTConfig(
        hidden_size=768, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=12,
        image_size=96, patch_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder / "vit", max_shard_size="200MB")
    transformers.ViTImageProcessor(size={"height": 96, "width": 96}).save_pretrained(folder / "vit")
    (folder / "pictures").mkdir()
    for number in range(count):
        pixels = torch.randint(0, 255, (96, 96, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{number}.png")
    return sum(p.nbytes for p in model.parameters())


def on_samples(folder: Path, stream: bool) -> None:
    """Cut the ViT by its calibration batches."""
    from collections import Counter

    from vlprune.commands.pipeline.on_samples import compress_on_samples
    from vlprune.commands.pipeline.untrained import Asked
    from vlprune.data.samples import read_samples

    samples = read_samples(folder / "pictures", Counter())
    asked = Asked(str(folder / "vit"), {"params": 0.7}, samples, device="cpu")
    out = folder / f"small-{stream}"
    compress_on_samples(asked, out, max_shard_size=SIZE, stream=stream)


def plan_of(folder: Path) -> Any:
    """Half of the units of every structure."""
    import vlprune
    from vlprune.streaming.source import open_source

    description = vlprune.discover(open_source(folder / "dense").model, "head")
    keep = {s.name: tuple(range(0, s.size, 2)) for s in description}
    return vlprune.Plan(keep=keep, attention="head", fingerprint=description.fingerprint)


def cut(way: str, folder: Path) -> None:
    """Cut the model in one of the ways."""
    import vlprune
    from vlprune.folders.opening import open_model
    from vlprune.streaming.cut import stream_cut

    dense, out = folder / "dense", folder / way.replace(" ", "-")
    if way == "imports":
        return
    if way in ON_SAMPLES:
        on_samples(folder, way.endswith("stream"))
        return
    if way == "compress":
        from vlprune.commands.pipeline.streamed import compress_streaming
        from vlprune.commands.pipeline.untrained import Asked

        asked = Asked(str(dense), {"params": 0.6}, (), method={"name": "magnitude"})
        compress_streaming(asked, out, max_shard_size=SIZE)
        return
    plan = vlprune.Plan.load(folder / "plan.json")
    proved = way.endswith("proved")
    if way.startswith("stream"):
        stream_cut(dense, plan, out, out / "work", verify=proved, max_shard_size=SIZE)
        return
    import torch

    model = open_model(str(dense))
    inputs = {"input_ids": torch.arange(16)[None]} if proved else None
    vlprune.rewrite(model, vlprune.discover(model, "head"), plan, inputs)
    vlprune.save(model, out, max_shard_size=SIZE)


def status(key: str) -> int:
    """Bytes of this process, as /proc/self/status names them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def measured(way: str, folder: Path) -> dict[str, Any]:
    """Peak resident and anonymous memory, and seconds, of one way to cut."""
    import torch
    import transformers

    import vlprune

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in ("rewrite", "save"):
        getattr(vlprune, name)  # imported where it is first asked for, and not to be measured
    peak, ended = {"RssAnon": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            peak["RssAnon"] = max(peak["RssAnon"], status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, cpu = time.monotonic(), time.process_time()
    cut(way, folder)
    seconds, cpu = time.monotonic() - started, time.process_time() - cpu
    ended.set()
    watcher.join()
    return {
        "way": way,
        "resident": status("VmHWM"),
        "anonymous": peak["RssAnon"],
        "seconds": seconds,
        "cpu": cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.one[0], Path(given.one[1]))))
        return
    with tempfile.TemporaryDirectory(prefix="vlprune-streaming-") as place:
        folder = Path(place)
        if set(given.ways) & set(ON_SAMPLES):
            size = make_classifier(folder, given.layers)
        else:
            size = make(folder, Size(given.layers))
            plan_of(folder).save(folder / "plan.json")
        print(f"a model of {size / 1e9:.2f} GB, weight files of {SIZE}\n", flush=True)
        print("| way | peak resident | peak anonymous | seconds | CPU seconds |")
        print("|---|---:|---:|---:|---:|", flush=True)
        for way in given.ways:
            command = [sys.executable, __file__, "--one", way, place]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                print(f"| {way} | failed: {ran.stderr.strip().splitlines()[-1][:200]} |")
                continue
            row = json.loads(ran.stdout.splitlines()[-1])
            print(
                f"| {way} | {row['resident'] / 1e6:,.0f} MB | {row['anonymous'] / 1e6:,.0f} MB "
                f"| {row['seconds']:.0f} | {row['cpu']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
