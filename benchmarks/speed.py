"""Speed-up against MACs saved: full-size models cut to half their MACs by uneven plans.

    python benchmarks/speed.py [clip deit blip] [--exports]
    python benchmarks/speed.py clip-l blip --device cuda --dtype bfloat16 --batch 64

Each model has random weights (speed does not depend on them) and a plan whose layers keep very
different shares. Three columns are timed in turns in one process: the dense model; the cut one as
it was before this benchmark was written (any width, attention spelled out where the stock forward
spells it out); the cut one as it is now (widths in multiples of 8, fused attention). Then a
profile of one pass each, and with ``--exports`` ONNX Runtime, OpenVINO and their int8. On a GPU
nothing is profiled, and CUDA events measure the time.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as T
from torch.profiler import ProfilerActivity, profile

from vlprune import Plan, cost, discover, rewrite, select
from vlprune.cutting.apply import swap_forwards
from vlprune.device import choose, device_name, moved_to
from vlprune.folders.exported.model import Exported
from vlprune.folders.exported.write import export
from vlprune.measuring.bench import seconds_exported
from vlprune.measuring.inputs import made_up_inputs
from vlprune.prices.clock import seconds_of, take_turns

SHARE = 0.5


def clip() -> Any:
    return T.CLIPModel(T.CLIPConfig())  # ViT-B/32


def clip_l() -> Any:
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return T.CLIPModel(T.CLIPConfig(vision_config=vision, text_config=text, projection_dim=768))


def deit() -> Any:
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return T.DeiTForImageClassification(T.DeiTConfig(**sizes, num_labels=1000))


def blip() -> Any:
    text = {"hidden_size": 768, "encoder_hidden_size": 768, "num_attention_heads": 12}
    config = T.BlipConfig(text_config=text, vision_config={"image_size": 480})
    return T.BlipForQuestionAnswering(config)


MODELS: dict[str, Callable[[], Any]] = {
    "clip": clip, "clip-l": clip_l, "deit": deit, "blip": blip,
}  # fmt: skip


def uneven(description: Any, prices: Any, round_to: int, seed: int = 0) -> Plan:
    """A plan that keeps between an eighth and nearly all of a layer."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for structure in description:
        level = 0.6 * torch.randn(1, generator=generator)
        scores[structure.name] = (level + torch.randn(structure.size, generator=generator)).tolist()
    keep = select(scores, prices, SHARE, round_to)
    return Plan(keep=keep, fingerprint=description.fingerprint)


def spelled_out(model: Any, description: Any) -> Any:
    """A hook that looks at attention makes our forwards compute its maps, as stock ones do."""
    for path in {s.core for s in description if s.core}:
        module = model.get_submodule(path)
        if type(module).__module__.startswith("vlprune"):
            module.register_forward_hook(lambda *_: None)
    return model


def fused(model: Any, description: Any) -> Any:
    """The dense model with our forwards in place of those that spell attention out."""
    swap_forwards(model, description.structures, ExitStack())
    return model


def hot(model: Any, inputs: Any, rows: int = 6) -> list[tuple[str, float]]:
    """The operations that take most time in one pass, in milliseconds."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as found:
        model(**inputs)
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    return [(e.key, e.self_cpu_time_total / 1000) for e in events[:rows]]


def measure(name: str, batch: int, device: torch.device, dtype: torch.dtype, exports: bool) -> None:
    torch.manual_seed(0)
    dense = MODELS[name]().eval()
    description = discover(dense)
    profile_of = cost.measure_macs(dense, description.structures, made_up_inputs(dense))
    inputs = made_up_inputs(dense, batch)
    plans = {
        "cut, before": uneven(description, profile_of.prices, 1),
        "cut, now": uneven(description, profile_of.prices, 8),
    }
    models = {"dense": dense}
    if any(s.swaps for s in description):
        models["dense, fused attention"] = fused(copy.deepcopy(dense), description)
    for label, plan in plans.items():
        models[label] = rewrite(copy.deepcopy(dense), description, plan)
    spelled_out(models["cut, before"], description)
    for model in models.values():
        model.to(device, dtype)
    inputs = moved_to(dense, inputs)
    rounds = 5 if name == "blip" and device.type == "cpu" else 15
    timed = take_turns({n: partial(seconds_of, m, inputs) for n, m in models.items()}, rounds)
    kept = [len(plans["cut, now"].kept(s)) / s.size for s in description]
    print(f"\n### {type(dense).__name__}, batch {batch}, {dtype}\n")
    print(f"Layers keep {min(kept):.0%} to {max(kept):.0%} of their units.\n")
    print("| model | MACs | seconds (quartiles) | times as fast | of the ideal |")
    print("|---|---|---|---|---|")
    for label, values in timed.items():
        plan = plans.get(label, Plan())
        total = int(cost.macs_of(profile_of, description.structures, plan))
        low, middle, high = statistics.quantiles(values, n=4)
        pairs = zip(timed["dense"], values, strict=True)
        times = statistics.median(d / v for d, v in pairs)
        ideal = profile_of.total / total
        print(
            f"| {label} | {total / 1e9:.2f} G | {middle:.4f} ({low:.4f}-{high:.4f}) | "
            f"{times:.2f} | {times / ideal:.2f} |"
        )
    if device.type != "cpu":
        return
    print("\nMilliseconds of the operations that take most time in one pass:\n")
    for label, model in models.items():
        told = ", ".join(f"{key.removeprefix('aten::')} {ms:.0f}" for key, ms in hot(model, inputs))
        print(f"- {label}: {told}")
    if exports:
        exported({"dense": dense, "cut": models["cut, now"]}, inputs)


def exported(models: dict[str, Any], inputs: Any) -> None:
    """Runtimes beside eager PyTorch, float32 and int8; dense and cut in turns in each."""
    timers: dict[str, Any] = {}
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, model in models.items():
            timers[f"{label}, eager"] = partial(seconds_of, model, inputs)
            samples = [made_up_inputs(model, size, tokens) for size, tokens in ((2, 16), (3, 12))]
            for to, int8 in (("onnx", False), ("onnx", True), ("openvino", False)):
                place = Path(folder) / f"{label}-{to}-{int8}"
                facts = export(model, samples, to, place, int8=int8)
                key = f"{label}, {to}{' int8' if int8 else ''}"
                sizes[key] = (sum(facts["files"].values()), facts["checked"][0]["difference"])
                timers[key] = partial(seconds_exported, Exported(place), inputs)
        timed: dict[str, list[float]] = {}
        for engine in dict.fromkeys(key.partition(", ")[2] for key in timers):  # one thread pool
            pair = {key: timer for key, timer in timers.items() if key.endswith(f", {engine}")}
            timed |= take_turns(pair, 9, warm_up=2)
    print("\n| engine | MB | difference | seconds | times as fast as dense, eager |")
    print("|---|---|---|---|---|")
    for key, values in timed.items():
        times = statistics.median(timed["dense, eager"]) / statistics.median(values)
        size, difference = sizes.get(key, (0, 0.0))
        told = f"{size / 1e6:.0f} | {difference:.1g}" if size else "- | -"
        print(f"| {key} | {told} | {statistics.median(values):.3f} | {times:.2f} |")


def main() -> None:
    """Measure the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["clip", "deit", "blip"], choices=MODELS)
    parser.add_argument("--exports", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options = parser.parse_args()
    torch.set_num_threads(2)
    device = choose(options.device)
    print(
        f"torch {torch.__version__}, transformers {T.__version__}, {device_name(device)}, "
        f"{platform.machine()}, 2 threads"
    )
    for name in options.models:
        measure(name, options.batch, device, getattr(torch, options.dtype), options.exports)


if __name__ == "__main__":
    main()
