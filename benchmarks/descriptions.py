"""What ``vlprune inspect --config-only`` takes for the architectures of published models.

    python benchmarks/descriptions.py [MODEL_TYPE ...]

For each model type the config is the one that transformers gives it, which is that of a published
model. No weights are made. Each command is a process of its own, imports included, held to 8 GB of
memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from growth import run

TYPES = (
    "clip siglip siglip2 metaclip_2 chinese_clip altclip align blip blip-2 instructblip flava vilt "
    "bridgetower grounding-dino owlv2 omdet-turbo rt_detr d_fine sam sam2 segformer mask2former "
    "dinov2 dinov3_vit beit hiera swinv2 llava llava_onevision qwen2_vl qwen2_5_vl qwen3_vl "
    "qwen3_vl_moe internvl gemma3 paligemma idefics3 smolvlm mllama mistral3 glm4v kimi_k25 llama4"
).split()
LIMIT = 8 * 2**30


def described(kind: str, place: Path) -> dict[str, Any]:
    """Seconds, peak memory and what was found for one model type."""
    said = place / "said"
    command = [
        sys.executable, "-c", "from vlprune.commands.main import main; main()", "inspect", kind,
        "--config-only", "--json",
    ]  # fmt: skip
    seconds, peak, code = run(command, said)
    text = said.read_text()
    if code:
        return {"seconds": seconds, "peak": peak, "said": _message(text)}
    found = json.loads(text[text.index("{") :])
    structures = sum(group["structures"] for group in found["groups"])
    return {"seconds": seconds, "peak": peak, "params": found["params"], "structures": structures}


def _message(text: str) -> str:
    """The message of a refusal, the last line of what a command printed."""
    return str(json.loads(text.strip().splitlines()[-1])["message"])[:60]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=TYPES)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    print("| model type | parameters | structures | seconds | peak resident |")
    print("|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="vlprune-descriptions-") as folder:
        for kind in given.types:
            row = described(kind, Path(folder))
            cells = [row[k] for k in ("params", "structures") if k in row] or [row["said"], ""]
            print(
                f"| {kind} | {' | '.join(map(str, cells))} | {row['seconds']:.1f} "
                f"| {row['peak'] / 1e9:.2f} GB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
