"""What a search costs: a gated training step beside the plain one, time and memory.

    python benchmarks/gates.py [--batch 8] [--image 384] [--rounds 7] [--bf16]
    python benchmarks/gates.py --language 64 [--batch 1] [--compile]

BLIP question answering at full size (12 + 12 + 12 layers of width 768, random weights), or with
``--language`` a Qwen2 of 0.5 B parameters on so many tokens; one optimizer step with AdamW, on the
GPU where there is one. Plain and gated steps alternate in one
process; a gated step includes UPop's own work (adding up gradients, and its decisions). Memory
is the peak on a GPU; on a CPU what autograd keeps for the backward pass, by storage. With
``--compile`` both are compiled by torch.compile's default backend, and their graphs are counted;
the plain one is a copy of the model then.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
import transformers as T

import vlprune


def kept_for_backward(run: Any) -> int:
    """Bytes of all storages that autograd keeps in one forward pass."""
    storages: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    total = sum(size for size, _ in storages.values())
    del loss
    return total


def graphs_of(model: Any, batch: dict[str, torch.Tensor]) -> str:
    """Graphs and breaks of a compiled model's first forward pass."""
    torch._dynamo.utils.counters.clear()
    model(**batch)
    counters = torch._dynamo.utils.counters
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return f"{found[0]} graphs, {found[1]} breaks"


def question_answering(options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A BLIP for questions and answers, and a batch."""
    text = {"vocab_size": 30524, "num_hidden_layers": options.layers}
    vision = {"image_size": options.image, "num_hidden_layers": options.layers}
    model = T.BlipForQuestionAnswering(T.BlipConfig(vision_config=vision, text_config=text))
    return model, {
        "pixel_values": torch.randn(options.batch, 3, options.image, options.image),
        "input_ids": torch.randint(5, 2000, (options.batch, 20)),
        "decoder_input_ids": torch.randint(5, 2000, (options.batch, 6)),
        "labels": torch.randint(5, 2000, (options.batch, 6)),
    }


def language(options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A language model of the size of Qwen2-0.5B, and a batch."""
    config = T.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=2 * options.layers,
        num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(5, 2000, (options.batch, options.language))
    return T.Qwen2ForCausalLM(config), {"input_ids": ids, "labels": ids}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--language", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, batch = language(options) if options.language else question_answering(options)
    model = model.train().to(device)
    batch = {name: value.to(device) for name, value in batch.items()}
    plain = copy.deepcopy(model) if options.compile else model
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=50), {"params": 0.9})
    compressor.detach()
    run = {False: plain, True: model}
    if options.compile:
        compressor.attach()
        run = {gated: torch.compile(one) for gated, one in run.items()}
        graphs = {gated: graphs_of(one, batch) for gated, one in run.items()}
    optimizers = {g: torch.optim.AdamW(one.parameters(), lr=1e-5) for g, one in run.items()}

    def forward(gated: bool) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            return run[gated](**batch).loss

    steps = 0

    def step(gated: bool) -> None:
        nonlocal steps
        forward(gated).backward()
        if gated:
            steps += 1
            compressor.step(min(1.0, steps / 1000))
        optimizers[gated].step()
        optimizers[gated].zero_grad()

    def clock(gated: bool) -> float:
        if gated:
            compressor.attach()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step(gated)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if device.type == "cuda":
            peaks[gated] = max(peaks[gated], torch.cuda.max_memory_allocated())
        if not options.compile:
            compressor.detach()
        return seconds

    peaks = {False: 0, True: 0}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for gated in (False, True):
        clock(gated)
    for _ in range(options.rounds):
        for gated in (False, True):
            seconds[gated].append(clock(gated))
    if device.type == "cpu":
        peaks[False] = kept_for_backward(lambda: forward(False))
        compressor.attach()
        peaks[True] = kept_for_backward(lambda: forward(True))
        compressor.detach()
        fixed = sum(p.numel() for p in model.parameters()) * 16  # weights, gradients, AdamW
        peaks = {gated: size + fixed for gated, size in peaks.items()}
    inputs = f"{options.language} tokens" if options.language else f"{options.image} px"
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, "
    print(f"{where} {torch.get_num_threads()} threads, batch {options.batch}, {inputs}")
    print("| step | median s | fastest s | memory GB |\n|---|---|---|---|")
    for gated, name in ((False, "plain"), (True, "gated")):
        values = seconds[gated]
        print(
            f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} | "
            f"{peaks[gated] / 1e9:.3f} |"
        )
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    pairs = [b / a for a, b in zip(seconds[False], seconds[True], strict=True)]
    print(f"time x {ratio:.3f} (pairs: {min(pairs):.3f} to {max(pairs):.3f}), ", end="")
    print(f"memory x {peaks[True] / peaks[False]:.4f}")
    if options.compile:
        print(f"compiled: plain {graphs[False]}, gated {graphs[True]}")


if __name__ == "__main__":
    main()
