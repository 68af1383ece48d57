"""Joint share and prune against its parts, magnitude pruning and whole-layer sharing.

    python benchmarks/jsp.py rec detection gqa -o jsp-runs

``rec`` is a small ViTMDETR on generated referring expressions, ``gqa`` the same on questions,
``detection`` a small Grounding DINO; ``deit`` is ``rec`` with towers of 12 layers of DeiT-S's
width. For each seed a dense model is trained and kept in OUT; every method then takes search +
retrain optimizer steps from it, and ``dense`` as many without being cut. Magnitude and whole-layer
sharing cut at once and retrain all the while. Seeds change the dense model, the order of the data
and the hypernetwork. ``scratch`` is a model of the small size from random weights, trained for as
long as the dense model and all that follows. Results are added to OUT/results.jsonl as they come,
so a run that is stopped goes on; the tables are printed at the end. Everything runs on ``--device``
(the CPU unless told otherwise); seconds are those of the CPU, or of the clock on a GPU.
``--costs`` prints disk, memory, MACs and latency, tied and materialised, and what a step costs;
``--steps`` only that.
``--larger`` prints what a search of DeiT-S and a text tower of 12 layers takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlprune
from vlprune import JSP, Compressor, Magnitude, Plan, cost, discover, materialize, rewrite
from vlprune.cutting.sharing.rules import shareable
from vlprune.device import choose, moved_to, place
from vlprune.measuring.bench import latencies
from vlprune.models.set_loss import focal_loss, paired_giou
from vlprune.recipe.spec import DataSpec, ModelSpec, Training
from vlprune.tasks import TASKS
from vlprune.training.fit import fit, prepare
from vlprune.training.objective import Trainee

TOWERS = ModelSpec(width=128, heads=4, vision_layers=4, text_layers=4, image_size=64, patch_size=16)


@dataclass(frozen=True)
class Experiment:
    """A task, how long its dense model trains, and what follows."""

    task: str
    model: ModelSpec = TOWERS
    options: dict[str, Any] = field(default_factory=dict)
    start: str = ""  # an experiment whose dense model this one goes on from
    dense: int = 3000
    search: int = 300
    retrain: int = 200
    rate: float = 5e-4
    after: float = 2e-4  # the learning rate of what follows, for every method
    batch: int = 64
    test: int = 500
    mismatch: str = "error"


MDETR = {
    "model": "mdetr",
    "queries": 6,
    "fusion_layers": 2,
    "decoder_layers": 3,
    "fusion_width": 64,
}
DINO = {
    "model": "grounding-dino", "queries": 12, "fusion_layers": 1, "decoder_layers": 2,
    "fusion_width": 64,
}  # fmt: skip
EXPERIMENTS = {
    "rec": Experiment("grounding", options=MDETR),
    "gqa": Experiment(
        "gqa", options=MDETR, start="rec", dense=2400, search=200, retrain=100
    ),
    "detection": Experiment(
        "detection", options=DINO, dense=5000, search=300, retrain=200, batch=16, test=500,
        model=replace(TOWERS, width=96, image_size=48), mismatch="skip",
    ),
    "deit": Experiment(
        "grounding", options={**MDETR, "fusion_width": 96}, rate=2e-4,
        model=replace(TOWERS, width=384, heads=6, vision_layers=12, text_layers=12),
    ),
}  # fmt: skip

LARGER = Experiment(
    "gqa", options={**MDETR, "fusion_width": 96}, batch=4,
    model=replace(TOWERS, width=384, heads=6, vision_layers=12, text_layers=12, image_size=224),
)  # fmt: skip
"""DeiT-S and a text tower of 12 layers, from random weights: what a search of that size takes."""

SEARCHES: dict[str, Sequence[str]] = {
    "jsp": ("prune", "cross", "block"),
    "prune-only": ("prune",),
    "share-only": ("cross", "block"),
    "cross-only": ("cross",),
    "block-only": ("block",),
    "prune-cross": ("prune", "cross"),
    "prune-block": ("prune", "block"),
}
METHODS = ("dense", *SEARCHES, "magnitude", "whole-layer", "scratch")


class Guided(Trainee):
    """A dense MDETR that is also asked, at every image place, for the box: it learns ten times
    faster so. The extra head is thrown away; nothing that is compared is trained with it."""

    def __init__(self, model: Any, places: int) -> None:
        super().__init__(model)
        self.places = places
        self.head = nn.Linear(model.config.d_model, 5)
        model.fusion_encoder.register_forward_hook(self._note)
        self.memory: Tensor | None = None

    def _note(self, _module: Any, _args: Any, output: Any) -> None:
        self.memory = output.last_hidden_state

    def forward(self, *args: Any, **batch: Any) -> Any:
        loss = self.model(**batch).loss
        assert self.memory is not None
        said = self.head(self.memory[:, : self.places**2])
        line = (torch.arange(self.places, device=said.device) + 0.5) / self.places
        y, x = (axis.reshape(-1) for axis in torch.meshgrid(line, line, indexing="ij"))
        box = torch.stack([target["boxes"][0] for target in batch["labels"]])
        inside = ((x - box[:, :1]).abs() < box[:, 2:3] / 2) & (
            (y - box[:, 1:2]).abs() < box[:, 3:4] / 2
        )
        score = focal_loss(said[..., 0], inside.float()).sum() / inside.sum().clamp(min=1)
        found = torch.stack(
            [x + 0.3 * said[..., 1], y + 0.3 * said[..., 2], *said[..., 3:].sigmoid().unbind(-1)],
            -1,
        )[inside]
        wanted = box[:, None].expand(-1, len(x), 4)[inside]
        apart = (found - wanted).abs().sum(1).mean()
        shape = (1 - paired_giou(found, wanted)).mean()
        return {"loss": loss + 20 * score + 20 * apart + 8 * shape}


@dataclass(frozen=True)
class Lab:
    """Where everything is kept, and where it runs."""

    out: Path
    device: torch.device

    def now(self) -> float:
        """Seconds of this process on the CPU; of the clock, all work done, on a GPU."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> float:
        """The most memory held so far, in GB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def task_of(name: str, lab: Lab) -> Any:
    """The experiment's task, on scenes kept beside the results."""
    what = EXPERIMENTS[name]
    scenes = lab.out / f"scenes-{what.test}"
    data = DataSpec(train_items=4000, test_items=what.test, folder=str(scenes))
    return TASKS[what.task](what.model, data, lab.out, what.options)


def dense_model(name: str, task: Any, lab: Lab, seed: int) -> Any:
    """The trained dense model of a seed, from OUT where it is there already."""
    what, folder = EXPERIMENTS[name], lab.out / f"dense-{name}-{seed}"
    if (folder / "config.json").exists():
        return place(task.load(folder), lab.device)
    prepare(seed, torch.get_num_threads())
    model = place(task.new_model(), lab.device)
    if what.start:
        known = dense_model(what.start, task_of(what.start, lab), lab, seed).state_dict()
        own = model.state_dict()
        same = {n: t for n, t in known.items() if n in own and own[n].shape == t.shape}
        model.load_state_dict(same, strict=False)
    train_dense(model, what, task, what.dense, seed)
    vlprune.save(model, folder, processor=task.processor)
    return model


def train_dense(model: Any, what: Experiment, task: Any, steps: int, seed: int) -> None:
    """Train a model from random weights, or from those of another task."""
    plan = Training(
        steps=steps, batch_size=what.batch, learning_rate=what.rate, warmup=0.05, save_steps=0
    )
    if what.task == "grounding":
        places = what.model.image_size // what.model.patch_size
        most = replace(plan, steps=steps * 2 // 3, decay="constant")
        fit(Guided(model, places), task.train, task.collate, most, seed=seed)
        model.fusion_encoder._forward_hooks.clear()
        plan = replace(plan, steps=steps - most.steps)
    fit(model, task.train, task.collate, plan, seed=seed + 1)


def whole_layers(model: Any, description: Any, share: float) -> Plan:
    """The plan that shares whole layers, top ones first, until ``share`` of the params is left."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    towers: dict[tuple[str, str], list[Any]] = {}
    for structure in description:
        towers.setdefault((structure.tower, structure.kind), []).append(structure)
    pairs = []
    found: dict[str, Any] = {}
    for kind in ("attention", "ffn"):
        text, vision = towers[("text", kind)], towers.get(("vision", kind), [])
        pairs += [(n / len(text), s, text[0]) for n, s in enumerate(text) if n % 4]
        pairs += [
            (n / len(vision), s, text[min(len(text) - 1, n * len(text) // len(vision))])
            for n, s in enumerate(vision)
        ]
    total = cost.params(model, description.structures)
    for _, target, source in sorted(pairs, key=lambda one: -one[0]):
        plan = Plan(share=found, attention=description.attention)
        if cost.params(model, description.structures, plan) <= share * total:
            break
        if not shareable(target, source, shapes):
            found[target.name] = (source.name, range(min(target.size, source.size)))
    return Plan(share=found, attention=description.attention)


def one_run(name: str, method: str, share: float, seed: int, lab: Lab) -> dict[str, Any]:
    """Compress the dense model to ``share`` of its parameters by ``method``, and retrain it."""
    what, task = EXPERIMENTS[name], task_of(name, lab)
    model = dense_model(name, task, lab, seed)
    prepare(seed, torch.get_num_threads())
    before = sum(p.numel() for p in model.parameters())
    whole = Training(
        steps=what.search + what.retrain,
        batch_size=what.batch,
        learning_rate=what.after,
        save_steps=0,
    )
    quiet = lambda done: None  # noqa: E731
    row: dict[str, Any] = {}
    began = lab.now()
    if method in SEARCHES:
        order = list(range(len(task.train)))
        random.Random(seed).shuffle(order)
        aside, rest = order[: len(order) // 20], sorted(order[len(order) // 20 :])
        look = min(what.batch, max(16, what.batch // 4))  # as in a recipe
        held_out = [
            task.collate([task.train[i] for i in aside[start : start + look]])
            for start in range(0, len(aside), look)
        ]
        search = JSP(families=SEARCHES[method], mismatch=what.mismatch, seed=seed)
        compressor = Compressor(model, search, {"params": share}, held_out=held_out)
        spec = replace(whole, steps=what.search, decay="constant")
        watch = [compressor.callback()]
        items = [task.train[i] for i in rest]
        fit(model, items, task.collate, spec, seed=seed, callbacks=watch)
        small = compressor.finish()
        row["facts"] = compressor.search.facts()
        whole = replace(whole, steps=what.retrain)
    elif method == "magnitude":
        small = Compressor(model, Magnitude(), {"params": share}).finish()
    elif method == "whole-layer":
        description = discover(model)
        small = rewrite(model, description, whole_layers(model, description, share))
    elif method == "scratch":
        sizes = vlprune.Random(scope="uniform", seed=seed)
        random_one = place(task.new_model(), lab.device)
        small = Compressor(random_one, sizes, {"params": share}).finish()
        first = EXPERIMENTS[what.start].dense if what.start else 0
        train_dense(small, what, task, first + what.dense, seed)
    else:
        small = model
    row["cut"] = task.evaluate(small, quiet)
    fit(small, task.train, task.collate, whole, seed=seed + 100)
    row["end"] = task.evaluate(small, quiet)
    row["params"] = sum(p.numel() for p in small.parameters())
    row["reached"] = row["params"] / before
    row["seconds"] = round(lab.now() - began)
    if seed == 0:
        vlprune.save(
            small, lab.out / "small" / f"{name}-{method}-{share}", processor=task.processor
        )
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, a line for each method."""
    lines = []
    for name in dict.fromkeys(row["experiment"] for row in rows):
        metric = TASKS[EXPERIMENTS[name].task].metric
        mine = [row for row in rows if row["experiment"] == name]
        lines += [
            f"\n{name} ({metric})\n",
            "| asked | method | reached | right after the cut | retrained | seeds |",
            "|---|---|---|---|---|---|",
        ]
        for share in sorted({row["share"] for row in mine}, reverse=True):
            for method in METHODS:
                found = [r for r in mine if (r["method"], r["share"]) == (method, share)]
                if found:
                    reached = statistics.mean(r["reached"] for r in found)
                    cut, end = ([r[key][metric] for r in found] for key in ("cut", "end"))
                    lines.append(
                        f"| {share:.2f} | {method} | {reached:.3f} | {_spread(cut)} | "
                        f"{_spread(end)} | {len(found)} |"
                    )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def costs(name: str, share: float, lab: Lab) -> str:
    """Disk, memory, MACs and latency of dense and small models, tied and materialised."""
    task = task_of(name, lab)
    models = {"dense": dense_model(name, task, lab, seed=0)}
    for method in ("jsp", "prune-only", "magnitude", "whole-layer"):
        folder = lab.out / "small" / f"{name}-{method}-{share}"
        if folder.exists():
            models[method] = place(vlprune.load(folder), lab.device)
            if vlprune.cutting.sharing.ties.is_shared(models[method]):
                models[f"{method}, materialised"] = materialize(copy.deepcopy(models[method]))
    example = {k: v for k, v in task.example_inputs().items() if k not in ("labels", "answers")}
    seconds = latencies(
        models,
        lambda size: {
            k: v for k, v in task.example_inputs(size).items() if k not in ("labels", "answers")
        },
    )
    lines = [
        f"\n{name}, {share:.0%} of the parameters asked for\n",
        "| model | params | disk | memory | MACs | batch 1 | batch 16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, model in models.items():
        with tempfile.TemporaryDirectory() as scratch:
            vlprune.save(model, Path(scratch) / "m")
            disk = (Path(scratch) / "m" / "model.safetensors").stat().st_size
        held = [*model.parameters(), *model.buffers()]
        memory = sum(t.numel() * t.element_size() for t in held)
        params = sum(p.numel() for p in model.parameters())
        macs = cost.measure_macs(model, (), example).total
        times = " | ".join(f"{1000 * value:.1f} ms" for value in seconds[label].values())
        lines.append(
            f"| {label} | {params / 1e6:.2f} M | {disk / 1e6:.2f} MB | {memory / 1e6:.2f} MB | "
            f"{macs / 1e6:.1f} M | {times} |"
        )
    return "\n".join([*lines, "", step_cost(EXPERIMENTS[name], task, models["dense"], lab)])


def step_cost(
    what: Experiment, task: Any, model: Any, lab: Lab, every: int = 40, windows: int = 10
) -> str:
    """Seconds of a training step with the search, relative to plain training.

    Looks at ``windows`` pieces of a search of 6,000 steps, evenly spread, plain and searched steps
    in turn. The first step of a piece is not counted: what a search does after a leap is no cost.
    """
    batch = moved_to(model, task.collate(list(task.train[: what.batch])))
    search = JSP(every=every, mismatch=what.mismatch)
    compressor = Compressor(copy.deepcopy(model), search, {"params": 0.6}, held_out=[batch])
    twins = {"plain": copy.deepcopy(model), "searched": compressor.model}
    steppers = {label: torch.optim.AdamW(t.parameters(), lr=1e-5) for label, t in twins.items()}
    ratios, seconds = [], []
    for window in range(windows):
        start, spent = (window + 0.5) / windows, dict.fromkeys(twins, 0.0)
        for number in range(2 * every + 1):
            for label, twin in twins.items():
                began = lab.now()
                steppers[label].zero_grad()
                twin(**batch).loss.backward()
                if label == "searched":
                    compressor.step(start + number / 6000)
                steppers[label].step()
                if number:
                    spent[label] += lab.now() - began
        seconds.append(spent["plain"] / (2 * every))
        ratios.append(spent["searched"] / spent["plain"])
        print(f"progress {start:.2f}: x {ratios[-1]:.3f}", flush=True)
    return (
        f"A step of {what.task}: {statistics.mean(seconds):.3f} s plain, "
        f"x {statistics.mean(ratios):.3f} searched on average over a search of 6,000 steps "
        f"(x {min(ratios):.3f} to {max(ratios):.3f}), a turn every {every} while it learns."
    )


def larger(lab: Lab, batch: int) -> str:
    """Size, seconds a step, peak memory and the outcome of a few turns for the larger pair."""
    data = DataSpec(train_items=2 * batch, test_items=8, folder=str(lab.out / "scenes-larger"))
    task = TASKS[LARGER.task](LARGER.model, data, lab.out, LARGER.options)
    prepare(0, torch.get_num_threads())
    model = place(task.new_model(), lab.device)
    size = sum(p.numel() for p in model.parameters())
    said = step_cost(replace(LARGER, batch=batch), task, model, lab, windows=4)
    peak = lab.peak()
    batches = [moved_to(model, task.collate(list(task.train[i : i + batch]))) for i in (0, batch)]
    small, seconds = searched(model, batches, lab, turns=8)
    return (
        f"{size / 1e6:.1f} M parameters. {said} Peak memory {peak:.2f} GB.\n"
        f"Eight turns and as many steps: {seconds:.0f} s; the plan keeps "
        f"{small / size:.1%} of the parameters (asked for 60 %)."
    )


def searched(model: Any, batches: Sequence[Any], lab: Lab, turns: int) -> tuple[int, float]:
    """The parameters that a short search leaves, and its seconds."""
    twin = copy.deepcopy(model)
    search = JSP(turns=turns, every=1)
    compressor = Compressor(twin, search, {"params": 0.6}, held_out=list(batches))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-5)
    began = lab.now()
    for number in range(turns):
        optimizer.zero_grad()
        twin(**batches[number % len(batches)]).loss.backward()
        compressor.step(0.1 + 0.4 * number / turns)
        optimizer.step()
    small = compressor.finish()
    return sum(p.numel() for p in small.parameters()), lab.now() - began


def main() -> None:
    """Run what is asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", default=[], metavar="|".join(EXPERIMENTS))
    parser.add_argument("-o", "--out", type=Path, default=Path("jsp-runs"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.65])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--larger", action="store_true")
    parser.add_argument("--batch", type=int, default=LARGER.batch, help="with --larger")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    lab = Lab(options.out, choose(options.device))
    if options.larger:
        print(larger(lab, options.batch))
    log = options.out / "results.jsonl"
    for name in options.experiments:
        if options.costs:
            print(costs(name, options.shares[0], lab))
            continue
        if options.steps:
            task = task_of(name, lab)
            model = dense_model(name, task, lab, seed=0)
            print(step_cost(EXPERIMENTS[name], task, model, lab))
            continue
        for share in options.shares:
            for seed in options.seeds:
                for method in options.methods:
                    at = 1.0 if method == "dense" else share
                    key = {"experiment": name, "method": method, "share": at, "seed": seed}
                    done = [json.loads(line) for line in log.open()] if log.exists() else []
                    if any(key.items() <= row.items() for row in done):
                        continue
                    try:
                        row = one_run(name, method, at, seed, lab)
                    except vlprune.errors.BudgetError as error:  # sharing alone may not suffice
                        print(name, method, at, seed, error, flush=True)
                        continue
                    with log.open("a") as file:
                        file.write(json.dumps({**key, **row}) + "\n")
                    print(name, method, at, seed, row["cut"], row["end"], flush=True)
    if log.exists() and not (options.costs or options.steps or options.larger):
        print(table([json.loads(line) for line in log.open()]))


if __name__ == "__main__":
    main()
