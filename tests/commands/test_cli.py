"""The command as a person meets it: results on stdout, one sentence for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

import vlprune
from small_runs import DEMO, TINY
from vlprune.commands import main as cli
from vlprune.testing import build

COMMANDS = [c.callback.__name__ for c in cli.app.registered_commands if not c.hidden]


def test_the_whole_thing_from_recipe_to_answers(run: Any, tmp_path: Path, python: Any) -> None:
    out = tmp_path / "small"
    code, stdout, stderr = run("compress", DEMO, *TINY, "-o", str(out), "--json")
    assert code == 0
    report = json.loads(stdout)  # stdout holds the result and nothing else
    assert "retraining" in stderr
    assert report["budget"]["asked"] == 0.5
    assert report["budget"]["reached"] <= 0.5
    assert report["verified"]["difference"] < 1e-9
    assert set(report["metrics"]) == {"dense", "cut", "retrained"}
    assert set(report["latency_seconds"]["small"]) == {"1", "16"}
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "plan.json", "recipe.yaml", "report.json",
            "README.md", "dense", "processor_config.json"} <= names  # fmt: skip
    model = transformers.BlipForQuestionAnswering.from_pretrained(out)
    assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]
    assert "from_pretrained" in (out / "README.md").read_text()

    code, stdout, _ = run("evaluate", str(out), "--json")
    assert code == 0
    assert json.loads(stdout) == pytest.approx(report["metrics"]["retrained"])

    # the same answers in a new process
    question = "from vlprune.recipe.spec import load_recipe\n" + (
        f"recipe = load_recipe({str(out / 'recipe.yaml')!r})\n"
        "import vlprune, transformers\n"
        "from pathlib import Path\n"
        "from vlprune.commands.pipeline.make import make_task\n"
        f"out = Path({str(out)!r})\n"
        "task = make_task(recipe, out / 'data')\n"
        "model = transformers.BlipForQuestionAnswering.from_pretrained(out)\n"
        "print(task.predict(model, list(task.test[:8])))"
    )
    done = python.run(question)
    from vlprune.commands.pipeline.make import make_task
    from vlprune.recipe.spec import load_recipe

    task = make_task(load_recipe(out / "recipe.yaml"), out / "data")
    assert done.stdout.strip() == str(task.predict(model, list(task.test[:8]))), done.stderr

    # a second run takes the dense model from the first
    code, _, stderr = run("compress", DEMO, *TINY, "budget.params=0.6", "-o", str(out))
    assert code == 0
    assert "taken from an earlier run" in stderr


def test_the_table_fits_eighty_columns(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, _ = run("demo", *TINY, "-o", str(tmp_path / "d"))
    assert code == 0
    assert max(len(line) for line in stdout.splitlines()) <= 80
    for word in ("dense", "cut", "retrained", "Asked for 50.0 %", "batch 16", "MACs"):
        assert word in stdout


def test_retrieval_runs_from_a_recipe(run: Any, tmp_path: Path) -> None:
    code, stdout, _ = run(
        "compress", DEMO, *TINY, "task=retrieval", "method.name=magnitude",
        "budget={macs: 0.6}", "-o", str(tmp_path / "r"), "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(stdout)
    assert report["macs"]["after"] <= 0.6 * report["macs"]["before"]
    transformers.CLIPModel.from_pretrained(tmp_path / "r")


def test_a_model_of_ones_own_is_compressed(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "first"
    assert run("compress", DEMO, *TINY, "-o", str(out))[0] == 0
    code, stdout, _ = run(
        "compress", DEMO, *TINY, f"model.path={out / 'dense'}", "train.steps=0",
        "-o", str(tmp_path / "second"), "--json",
    )  # fmt: skip
    assert code == 0
    first = json.loads((out / "report.json").read_text())
    assert json.loads(stdout)["metrics"]["dense"] == pytest.approx(first["metrics"]["dense"])


def test_inspect(run: Any, tmp_path: Path) -> None:
    build("clip").model.save_pretrained(tmp_path / "m")
    code, stdout, _ = run("inspect", str(tmp_path / "m"), "--json")
    assert code == 0
    body = json.loads(stdout)
    assert body["model"] == "CLIPModel"
    assert body["params"] == sum(p.numel() for p in build("clip").model.parameters())
    assert body["macs"] > 0
    assert {g["tower"] for g in body["groups"]} == {"vision", "text"}
    code, stdout, _ = run("inspect", str(tmp_path / "m"))
    assert "normalisation" in stdout
    code, stdout, _ = run("inspect", "vit", "--config-only", "--json")
    body = json.loads(stdout)
    assert body["params"] == 86_389_248  # ViT-B/16 with a pooler
    assert body["macs"] == pytest.approx(17.58e9, rel=0.01)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run: Any, command: str) -> None:
    code, stdout, _ = run(command, "--help")
    assert code == 0
    assert "Example: vlprune " + command in " ".join(stdout.replace("│", " ").split())


def test_mistakes_get_one_sentence_and_code_two(run: Any, tmp_path: Path) -> None:
    def refused(says: str, *args: str) -> None:
        code, stdout, stderr = run(*args)
        assert code == 2, stderr
        assert stdout == ""
        line = stderr.strip().splitlines()[-1]
        assert line.startswith("vlprune: ")
        assert says in line, line
        assert "Traceback" not in stderr

    out = str(tmp_path / "o")
    refused("Did you mean 'budget'", "compress", DEMO, "budgt.params=0.5", "-o", out)
    for budget in ("0", "1.5", "half"):
        refused("fraction that stays", "compress", DEMO, f"budget.params={budget}", "-o", out)
    refused("ask for at least", "compress", DEMO, *TINY, "budget.params=0.02", "-o", out)
    assert not (tmp_path / "o" / "dense").exists()  # said before training, not after
    refused("Did you mean 'taylor'", "compress", DEMO, "method.name=tailor", "-o", out)
    refused("Did you mean 'interval'", "compress", DEMO, "method.intervall=5", "-o", out)
    refused("Did you mean 'logits'", "compress", DEMO, *TINY, "teacher.logit=1", "-o", out)
    refused("unknown key 'options.queue'", "compress", DEMO, "options.queue=5", "-o", out)
    refused("fp16 needs a GPU", "compress", DEMO, *TINY, "search.fp16=true", "-o", out)
    refused("give search.steps", "compress", DEMO, *TINY, "search.steps=0", "-o", out)
    refused("must be a list", "compress", DEMO, "skip=text", "-o", out)
    refused("look like", "compress", DEMO, *TINY, "skip=[nothing.*]", "-o", out)
    refused("task must be one of", "compress", DEMO, "task=painting", "-o", out)
    refused("there is no recipe", "compress", str(tmp_path / "none.yaml"))
    refused("there is no folder", "inspect", str(tmp_path / "none") + "/")
    refused("attention must be one of", "inspect", "vit", "--config-only", "--attention", "heads")
    refused("there is no recipe", "evaluate", str(tmp_path))
    (tmp_path / "file").write_text("precious")
    refused("is a file", "compress", DEMO, *TINY, "-o", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    refused("cannot load", "compress", DEMO, *TINY, f"model.path={tmp_path}", "-o", out)
    # a model of the user's, where the result or the dense model would be put
    own = tmp_path / "own" / "dense"
    build("clip").model.save_pretrained(own)
    for place in (own, own.parent):
        refused("would overwrite", "compress", DEMO, *TINY, f"model.path={own}", "-o", str(place))
    refused("vlprune did not write", "compress", DEMO, *TINY, "-o", str(own.parent))
    assert {path.name for path in own.iterdir()} == {"config.json", "model.safetensors"}


def test_all_mistakes_of_a_command_line_are_told_at_once(
    run: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    """A missing folder, a bad value, a file that cannot be written: one answer for all."""
    none, here = str(tmp_path / "none"), str(tiny_folder)
    (tmp_path / "file").write_text("precious")
    missing = f"there is no folder {none}"

    def told(*args: str) -> list[str]:
        code, stdout, stderr = run(*args, "--json")
        assert (code, "Traceback" in stderr) == (2, False), stderr
        body = json.loads(stdout)
        assert body["error"] == "RecipeError"
        assert all(line in stderr for line in body["problems"])
        assert f"vlprune: {len(body['problems'])} mistakes:" in stderr
        return [line.split(" must")[0].split(",")[0] for line in body["problems"]]

    assert told("inspect", f"{none}/x/y", "--attention", "heads") == [
        f"{missing}/x/y", "attention",
    ]  # fmt: skip
    assert told("compress", f"{none}.yaml", "--device", "gpu", "-o", str(tmp_path / "file")) == [
        f"there is no recipe {none}.yaml", "device", f"{tmp_path / 'file'} is a file: choose a "
        "folder to save into",
    ]  # fmt: skip
    assert told("evaluate", none, "--device", "gpu", "--results", f"{none}/r.json") == [
        missing, "device", f"cannot write {none}/r.json: there is no folder {none}",
    ]  # fmt: skip
    assert told("sensitivity", none, "--device", "gpu") == [missing, "device"]
    assert told("sensitivity", here, "budgt.params=1", "--device", "gpu")[1:] == ["device"]
    assert told(
        "bench", none, "--against", none + "2", "--batch-sizes", "0", "--threads", "-1",
        "--seconds", "nan", "--device", "gpu",
    ) == [
        "batch sizes are numbers of at least 1", "threads", "seconds", missing,
        f"{missing}2", "device",
    ]  # fmt: skip
    assert told("export", f"{none}/x/y", "--to", "onyx", "--recipe", f"{none}.yaml") == [
        f"there is no recipe {none}.yaml", f"{missing}/x/y", "a model is exported to onnx",
    ]  # fmt: skip
    code, stdout, stderr = run(
        "report", none, here, none + "2", "--format", "htlm", "-o", none + "/r"
    )
    assert (code, stdout) == (2, "")
    assert [line.strip().split(",")[0] for line in stderr.strip().splitlines()] == [
        "vlprune: 4 mistakes:", "a report is written as text",
        f"cannot write {none}/r: there is no folder {none}", missing, f"{missing}2",
    ]  # fmt: skip
    assert (tmp_path / "file").read_text() == "precious"


def test_a_corrupt_image_stops_before_training_is_lost(run: Any, tmp_path: Path) -> None:
    from vlprune.data.shapes.write import write_shapes

    root = write_shapes(tmp_path / "s", train=12, test=6)
    notes = root / "annotations"
    victim = sorted((root / "images" / "val2014").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:100])
    parts = []
    for split, sub in (("train", "train2014"), ("test", "val2014")):
        parts += [
            f"data.{split}.questions={notes / f'questions_{sub}.json'}",
            f"data.{split}.annotations={notes / f'answers_{sub}.json'}",
            f"data.{split}.images={root / 'images'}",
        ]
    tiny = [o for o in TINY if "_items" not in o]
    code, _, stderr = run(
        "compress", DEMO, *tiny, "data.format=vqav2", "data.train_items=0", "data.test_items=0",
        *parts, "-o", str(tmp_path / "o"),
    )  # fmt: skip
    assert code == 2
    assert victim.name in stderr.replace("\n", "")
    assert not (tmp_path / "o" / "config.json").exists()


def test_a_loss_that_is_no_number_ends_the_run(run: Any, tmp_path: Path) -> None:
    code, _, stderr = run(
        "compress", DEMO, *TINY, "train.steps=40", "train.learning_rate=1000", "train.warmup=0",
        "-o", str(tmp_path / "o"),
    )  # fmt: skip
    assert code == 2
    assert "the loss stopped being a finite number" in stderr


@pytest.mark.slow
def test_two_processes_make_one_folder_and_one_plan(tmp_path: Path) -> None:
    out = tmp_path / "o"
    steps = ["train.steps=3", "search.steps=3", "retrain.steps=2"]
    code = f"""
import os
from vlprune import Compressor
from vlprune.commands.main import main

real = Compressor.finish

def finish(self, *args):
    with open(os.path.join({str(tmp_path)!r}, "plan-" + os.environ["RANK"]), "w") as file:
        file.write(self.plan().to_json())
    return real(self, *args)

Compressor.finish = finish
main()
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script),
         "compress", DEMO, *TINY, *steps, "-o", str(out), "--json"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    json.loads(done.stdout)  # printed once
    plans = [(tmp_path / f"plan-{rank}").read_text() for rank in (0, 1)]
    assert plans[0] == plans[1]
    model = vlprune.load(out)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_versions_agree() -> None:
    from importlib.metadata import version

    assert version("vlprune") == vlprune.__version__


def test_sensitivity_shows_what_each_part_is_worth(run: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "o")
    steps = ["search.steps=0", "retrain.steps=0", "method={name: random}"]
    assert run("compress", DEMO, *TINY, *steps, "-o", out)[0] == 0
    code, stdout, _ = run("sensitivity", f"{out}/dense", "--json")
    assert code == 0
    body = json.loads(stdout)
    code, stdout, _ = run("scan", f"{out}/dense", "--json")  # its name in earlier versions
    assert (code, json.loads(stdout)) == (0, body)
    parts = {row["part"]: row["points"] for row in body["parts"]}
    assert {"vision attention", "vision ffn", "whole"} <= parts.keys()
    for points in parts.values():
        sizes = [point["params"] for point in points]
        assert sizes == sorted(sizes, reverse=True)
        assert all(size < body["params"] for size in sizes)
    smallest = {name: points[-1]["params"] for name, points in parts.items()}
    assert smallest["whole"] == min(smallest.values())
    curve = body["curve"]
    assert round(curve[0]["params"], 1) == 0.9
    assert curve[0]["masked"] < curve[-1]["masked"]  # two steps of training order little more
    assert all(point["folded"] <= point["masked"] for point in curve)
    code, stdout, _ = run("sensitivity", f"{out}/dense")
    assert code == 0
    assert max(map(len, stdout.splitlines())) <= 80
    code, _, stderr = run("sensitivity", str(tmp_path))
    assert code == 2
    assert "there is no recipe" in stderr


def test_the_earlier_name_of_sensitivity_is_not_advertised(run: Any) -> None:
    code, stdout, _ = run("--help")
    assert code == 0
    assert "sensitivity" in stdout
    assert "scan" not in stdout.split()


def test_toy_needs_nothing_of_what_a_recipe_names(run: Any, tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "upop" / "nlvr2.yaml"
    code, _, stderr = run("compress", str(recipe), "-o", str(tmp_path / "o"))
    assert code == 2
    assert "$BLIP_NLVR, which is not set" in stderr
    few = ["train.steps=2", "search.steps=2", "retrain.steps=2"]
    code, stdout, _ = run(
        "compress", str(recipe), "--toy", "--json", *few, "-o", str(tmp_path / "o")
    )
    assert code == 0
    assert json.loads(stdout)["method"] == "UPop"
