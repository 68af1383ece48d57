"""A model cut on samples without labels: no recipe, no training."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import transformers

import vlprune
from alike import same_results
from small_runs import DEMO, TINY
from unlabelled import (
    WORDS,
    assistant,
    captioned,
    captioner,
    classifier,
    dual_encoder,
    pictures,
    reader,
    sigmoid_encoder,
)
from vlprune.commands.pipeline.samples import feed_of
from vlprune.data.samples import read_samples
from vlprune.folders.opening import open_model, open_processor

CUT = ("--budget", "params=0.7", "--items", "16")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and samples that no test changes."""
    folder = tmp_path_factory.mktemp("untrained")
    dual_encoder(folder / "clip")
    captioner(folder / "blip")
    classifier(folder / "vit")
    pictures(folder / "pictures")
    captioned(folder / "captioned")
    return folder


def test_a_dual_encoder_becomes_a_smaller_folder(run: Any, here: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    captions = here / "captioned" / "captions.jsonl"
    code, stdout, stderr = run(
        "compress", str(here / "clip"), *CUT, "--calibration", str(captions), "-o", str(out)
    )
    assert code == 0, stderr
    for words in ("Asked for 70.0 % of the params", "cut and repaired", "output image_embeds",
                  "layers of text", "of memory at most", "without labels"):  # fmt: skip
        assert words in " ".join(stdout.split())
    for step in ("derivatives", "statistics", "repairing", "saving"):
        assert step in stderr
    assert not (out / "vlprune-run").exists()
    report = json.loads((out / "report.json").read_text())
    errors = report["calibration"]["outputs"]
    assert errors["kept"]
    assert errors["before"].keys() == {"image_embeds", "text_embeds"}
    assert all(errors["after"][name] < error for name, error in errors["before"].items())
    assert report["calibration"]["items"] == 16
    assert report["peak_bytes"] > 2**20
    assert report["budget"]["reached"] <= 0.7
    assert report["notes"] == []
    model = transformers.CLIPModel.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert len(processor(text=["a red square"])["input_ids"][0]) > 2
    card = (out / "README.md").read_text()
    assert "vlprune compress MODEL --budget params=0.7 --calibration SAMPLES --items 16" in card
    assert "Nothing was trained" in card
    assert "recipe.yaml" not in card
    for form in ("text", "markdown"):
        code, stdout, _ = run("report", str(out), "--format", form)
        assert code == 0
        assert "cut and repaired" in stdout
    pytest.importorskip("plotly")
    assert run("report", str(out), "-o", str(tmp_path / "page.html"))[0] == 0
    assert "cut and repaired" in (tmp_path / "page.html").read_text()


def test_pictures_alone_leave_the_text_tower_dense(run: Any, here: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(
        "compress", str(here / "clip"), *CUT, "--calibration", str(here / "pictures"),
        "-o", str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(stdout)
    assert {layer["tower"] for layer in report["layers"]} == {"vision"}
    (note,) = report["notes"]
    assert "the text tower stays dense" in note
    assert json.loads((tmp_path / "report.json").read_text()) == report
    dense = transformers.CLIPModel.from_pretrained(here / "clip").state_dict()
    small = transformers.CLIPModel.from_pretrained(tmp_path).state_dict()
    texts = [name for name in dense if name.startswith("text_model")]
    assert texts
    assert all(small[name].equal(dense[name]) for name in texts)


@pytest.mark.parametrize("kind", ["vit", "blip"])
def test_classifiers_and_captioners(kind: str, run: Any, here: Path, tmp_path: Path) -> None:
    samples = "pictures" if kind == "vit" else "captioned/captions.jsonl"
    code, stdout, stderr = run(
        "compress", str(here / kind), *CUT, "--calibration", str(here / samples),
        "-o", str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    outputs = report["calibration"]["outputs"]
    assert outputs["after"]["logits"] < outputs["before"]["logits"]
    assert report["notes"] == []
    model = vlprune.load(tmp_path)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]


def test_texts_as_long_as_the_model_was_trained_with(run: Any, here: Path, tmp_path: Path) -> None:
    """SigLIP has no mask: it was trained on texts that are padded to their full length."""
    sigmoid_encoder(tmp_path / "m")
    model, processor = open_model(str(tmp_path / "m")), open_processor(tmp_path / "m")
    samples = read_samples(here / "captioned" / "captions.jsonl")[:3]
    batch = feed_of("m", model, processor, samples, Path("x")).batch(samples)
    assert batch["input_ids"].shape == (3, 12)
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    code, stdout, stderr = run(
        "compress", str(tmp_path / "m"), *CUT, "--calibration",
        str(here / "captioned" / "captions.jsonl"), "-o", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    assert {layer["tower"] for layer in json.loads(stdout)["layers"]} == {"vision", "text"}


def test_texts_alone(run: Any, tmp_path: Path) -> None:
    reader(tmp_path / "m")
    (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in 4 * WORDS))
    code, stdout, stderr = run(
        "compress", str(tmp_path / "m"), *CUT, "--calibration", str(tmp_path / "texts.txt"),
        "-o", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    outputs = json.loads(stdout)["calibration"]["outputs"]
    assert outputs["after"]["logits"] < outputs["before"]["logits"]


def test_a_language_model_that_reads_image_tokens(run: Any, here: Path, tmp_path: Path) -> None:
    assistant(tmp_path / "m")
    code, stdout, stderr = run(
        "compress", str(tmp_path / "m"), *CUT, "--calibration",
        str(here / "captioned" / "captions.jsonl"), "-o", str(tmp_path / "out"), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    assert {layer["tower"] for layer in json.loads(stdout)["layers"]} == {"vision", "text"}


def test_a_simpler_method_is_repaired_too(run: Any, here: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(
        "compress", str(here / "vit"), "--budget", "macs=0.6", "--method", "magnitude",
        "--calibration", str(here / "pictures"), "-o", str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(stdout)
    assert report["method"] == "Magnitude"
    assert report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    assert report["calibration"]["items"] == 20  # as many as there are
    outputs = report["calibration"]["outputs"]
    assert outputs["after"]["logits"] < outputs["before"]["logits"]


def test_a_search_that_closes_its_gates_leaves_nothing_to_repair(run: Any, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        "compress", DEMO, *TINY, "calibration.items=8", "calibration.batch_size=4",
        "-o", str(tmp_path), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    assert report["method"] == "UPop"
    assert set(report["metrics"]) == {"dense", "cut", "retrained"}
    assert max(report["calibration"]["outputs"]["before"].values()) < 1e-6
    assert report["notes"] == []


STOPPED = """
import os, torch
from vlprune.calibration.store import Steps
remembered, linear = Steps.remember, torch.nn.Linear.forward
calls = []

def remember(self, name, *rest):
    remembered(self, name, *rest)
    if name == STEP:
        calls.append(0)
        if not LATER:
            os.kill(os.getpid(), SIGNAL)

def forward(self, x):
    if calls:  # the step is done: stop in the middle of a later pass
        calls.append(1)
        if len(calls) == LATER:
            os.kill(os.getpid(), SIGNAL)
    return linear(self, x)

Steps.remember, torch.nn.Linear.forward = remember, forward
from vlprune.commands.main import main
main()
"""


@pytest.mark.parametrize(
    ("step", "later", "asked"),
    [
        ("rotated", 0, signal.SIGKILL),
        ("influence-rotated", 10, signal.SIGINT),
        ("folded-0", 20, signal.SIGINT),
    ],
)
def test_a_stopped_run_goes_on_and_ends_with_the_same_bits(
    step: str, later: int, asked: signal.Signals, run: Any, here: Path, tmp_path: Path, python: Any
) -> None:
    """Killed after a step, or by Ctrl-C in the pass after it; what is known is not done again."""
    command = (
        "compress", str(here / "clip"), *CUT, "--rotate", "--attention", "qk_vo",
        "--calibration", str(here / "captioned" / "captions.jsonl"),
    )  # fmt: skip
    out = tmp_path / "out"
    whole = here / "whole"
    if not whole.exists():
        assert run(*command, "-o", str(whole))[0] == 0
    code = f"STEP, LATER, SIGNAL = {step!r}, {later}, {int(asked)}\n{STOPPED}"
    done = python.run(code, *command, "-o", out)
    assert done.returncode == (-asked if asked == signal.SIGKILL else 128 + asked), done.stderr
    if asked == signal.SIGINT:
        assert "Traceback" not in done.stderr
        assert "the same command goes on" in done.stderr.splitlines()[-1]
    assert not (out / "config.json").exists()
    (kept,) = (out / "vlprune-run").glob("calibration-*")
    assert (kept / f"{step}.safetensors").exists()
    number, _, stderr = run(*command, "-o", str(out))
    assert number == 0, stderr
    assert "rotating" not in stderr
    assert ("derivatives" in stderr) == (step == "rotated")
    assert not (out / "vlprune-run").exists()
    for name in ("model.safetensors", "plan.json", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_mistakes_are_told_at_once_and_nothing_is_written(
    run: Any, here: Path, tmp_path: Path
) -> None:
    out, none = tmp_path / "out", tmp_path / "none"
    (tmp_path / "empty").mkdir()

    def told(*args: object) -> list[str]:
        code, stdout, stderr = run("compress", *map(str, args), "--json")
        assert (code, "Traceback" in stderr) == (2, False), stderr
        assert not out.exists()
        return list(json.loads(stdout)["problems"])

    def said(words: str, *args: object) -> None:
        (line,) = told(*args, "-o", out)
        assert words in line, line

    clip, pics = here / "clip", here / "pictures"
    ready = ("--budget", "params=0.7", "--calibration", pics)
    problems = told(
        clip, "--budget", "half", "--calibration", none, "--items", "0", "--attention", "heads",
        "--method", "upop", "--device", "gpu", "budget.params=0.5", "--toy",
    )  # fmt: skip
    assert [line.split(",")[0] for line in problems] == [
        "--budget is what stays of the model",
        f"there is no folder or file {none} to calibrate on",
        "--items must be a whole number from 1 to 1",
        "without a recipe the method must be one of obs",
        "attention must be one of head_dim",
        "budget.params=0.5 and --toy cannot be given with a model",
        "device must be auto or a device of this machine (cpu)",
    ]
    said("needs --calibration", clip, "--budget", "params=0.7")
    said("needs --budget", clip, "--calibration", pics)
    said("fraction that stays", clip, "--budget", "params=7", "--calibration", pics)
    said("Did you mean 'params'", clip, "--budget", "parms=0.7", "--calibration", pics)
    said("ask for at least", clip, "--budget", "params=0.01", "--calibration", pics)
    said("the text tower stays dense", clip, "--budget", "params=0.5", "--calibration", pics)
    said("holds no pictures", clip, *ready[:3], tmp_path / "empty")
    said("--rotate is an option of obs", clip, *ready, "--method", "random", "--rotate")
    said("there is no folder", f"{none}/", *ready)
    demo = Path(vlprune.__file__).parent / "demo.yaml"
    said("--budget and --calibration cannot be given with a recipe", demo, *ready)
    said("reads texts", here / "blip", *ready)
    (tmp_path / "texts.txt").write_text("a dog\n")
    said("reads images", clip, *ready[:3], tmp_path / "texts.txt")

    def copied(name: str, *without: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(clip, folder)
        for file in without:
            (folder / file).unlink()
        return folder

    everything = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
    said("processor", copied("bare", *everything), *ready)
    damaged = tmp_path / "damaged"
    shutil.copytree(pics, damaged)
    for victim in sorted(damaged.glob("*.png"))[:2]:
        victim.write_bytes(victim.read_bytes()[:100])
    problems = told(tmp_path / "bare", *ready[:3], damaged, "-o", out)
    assert "processor" in problems[0]
    assert problems[1].startswith("2 of 20 pictures cannot be read: ")
    # nothing of the user's is replaced
    assert "would replace it" in told(clip, *ready, "-o", clip)[0]
    mine = copied("mine")
    assert "vlprune did not write" in told(clip, *ready, "-o", mine)[0]
    assert (mine / "model.safetensors").read_bytes() == (clip / "model.safetensors").read_bytes()


def test_images_that_the_processor_refuses(run: Any, here: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(here / "vit", broken)
    path = broken / "preprocessor_config.json"
    path = path if path.exists() else broken / "processor_config.json"
    body = json.loads(path.read_text())
    part = body.get("image_processor", body)
    part["size"] = {"height": 16, "width": 48}
    path.write_text(json.dumps(body))
    code, stdout, stderr = run(
        "compress", str(broken), *CUT, "--calibration", str(here / "pictures"),
        "-o", str(tmp_path / "out"),
    )  # fmt: skip
    assert (code, stdout) == (2, "")
    assert "vlprune: cannot compress" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()


def test_the_recipe_ends_with_the_same_bits_too(
    run: Any, tmp_path: Path, python: Any, here: Path
) -> None:
    """A recipe without train, search and retrain, stopped by Ctrl-C while the cut is repaired."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
task: retrieval
budget: {{params: 0.6}}
method: {{name: obs, rotate: true}}
attention: qk_vo
calibration: {{items: 16, batch_size: 4}}
model: {{path: {here / "clip"}}}
data: {{train_items: 24, test_items: 6, folder: {tmp_path / "scenes"}}}
threads: 1
"""
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("compress", str(recipe), "-o", str(whole))[0] == 0
    code = f"STEP, LATER, SIGNAL = 'folded-1', 0, {int(signal.SIGINT)}\n{STOPPED}"
    done = python.run(code, "compress", recipe, "-o", out)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "the same command goes on" in done.stderr.splitlines()[-1]
    code, stdout, stderr = run("compress", str(recipe), "-o", str(out))
    assert code == 0, stderr
    assert "rotating" not in stderr
    assert "cut and repaired" in stdout
    same_results(whole, out)
    assert not (out / "vlprune-run").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["items"] == 16
    assert set(report["metrics"]) == {"dense", "cut"}
