"""Peak memory of a cut in memory, as a multiple of the model, with and without its proof.

    python benchmarks/memory.py

A language model of 71 M parameters in float32 (285 MB) loses half of its units.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path


def anonymous() -> int:
    """Bytes that this process holds and that are not pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(proved: bool) -> None:
    """Cut a new model, and print the peak while it is cut."""
    import torch
    import transformers

    import vlprune

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.randint(0, 2000, (1, 8))
    with torch.no_grad():
        model(input_ids=ids)
    description = vlprune.discover(model, "head")
    keep = {s.name: tuple(range(s.size // 2)) for s in description}
    plan = vlprune.Plan(keep=keep, attention="head")
    before = peak = anonymous()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    vlprune.rewrite(model, description, plan, {"input_ids": ids} if proved else None)
    seconds = time.monotonic() - started
    ended.set()
    watcher.join()
    how = "proved" if proved else "not proved"
    print(f"| {how} | {(peak - before + size) / size:.2f} x | {seconds:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", choices=("proved", "bare"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(given.one == "proved")
        return
    print("| cut | peak, model = 1 | seconds |\n|---|---:|---:|", flush=True)
    for one in ("bare", "proved"):
        subprocess.run([sys.executable, __file__, "--one", one], check=True)


if __name__ == "__main__":
    main()
