"""The whole thing on a GPU: every command that runs a model, in processes that see the GPUs.

The other tests compute on the CPU wherever they run (tests/conftest.py says why). These are
skipped where torch sees no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ranks import meeting
from small_runs import DEMO, TINY
from unlabelled import captioned, captioner, classifier, dual_encoder, pictures

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
STEPS = ["train.steps=20", "search.steps=10", "retrain.steps=5"]


def environment() -> dict[str, str]:
    """The environment as it was before tests/conftest.py hid the GPUs."""
    names = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    visible = os.environ.get("VLPRUNE_TEST_GPUS", "all")
    return names if visible == "all" else {**names, "CUDA_VISIBLE_DEVICES": visible}


def python(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A Python process that sees the GPUs, with ``more`` in its environment."""
    env = environment() | {name: str(value) for name, value in more.items()}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=env, check=False
    )


def vlprune(*args: str, **more: Any) -> dict[str, Any]:
    """The JSON that a command prints."""
    done = python("-m", "vlprune.commands.main", *args, "--json", **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def gpu() -> str:
    """The name of the first GPU; the test is skipped where there is none."""
    if torch.version.cuda is None and torch.version.hip is None:
        pytest.skip("this torch is built for the CPU alone, so torch.cuda is not available")
    asked = python("-c", "import torch; print(torch.cuda.get_device_name(0))")
    if asked.returncode:
        pytest.skip("torch.cuda is not available: torch sees no GPU here")
    return asked.stdout.strip()


@pytest.fixture(scope="module")
def small(gpu: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `vlprune demo` makes on the GPU, in a size for tests, with its dense model inside."""
    out = tmp_path_factory.mktemp("gpu") / "small"
    report = vlprune("demo", "-o", str(out), *TINY, *STEPS, "--device", "cuda")
    assert report["device"] == gpu
    assert report["verified"]["difference"] < 1e-9
    assert report["budget"]["reached"] <= 0.5
    assert set(report["latency_seconds"]) == {"dense", "small"}
    return out


def test_the_demo_runs_there_by_itself(gpu: str, tmp_path: Path) -> None:
    report = vlprune("demo", "-o", str(tmp_path / "out"), *TINY)
    assert report["device"] == gpu


def test_the_cpu_can_be_asked_for(gpu: str, tmp_path: Path) -> None:
    report = vlprune("demo", "-o", str(tmp_path / "out"), *TINY, "device=cpu")
    assert report["device"] == "cpu"


@pytest.mark.parametrize(
    "more",
    [
        ["method={name: upop}", "budget={macs: 0.6}", "teacher={logits: 1, features: 1}"],
        ["method={name: magnitude, round_to: auto}", "budget={latency: 0.9}"],
        ["method={name: jsp, every: 1, learning_rate: 0.05, mismatch: skip}",
         "budget={params: 0.9}"],
        ["method={name: taylor}", "search.bf16=true", "train.bf16=true"],
        ["method={name: upop}", "train.fp16=true", "search.fp16=true", "retrain.fp16=true"],
        ["uniform=true", "method={name: magnitude}"],
    ],
    ids=["macs and teacher", "latency", "jsp", "bf16", "fp16", "uniform"],
)  # fmt: skip
def test_recipes(more: list[str], gpu: str, tmp_path: Path) -> None:
    """A latency budget of so small a model is a matter of launches: reaching it is no promise."""
    report = vlprune("compress", DEMO, "-o", str(tmp_path / "out"), *TINY, *STEPS, *more)
    assert report["device"] == gpu
    if report["budget"]["what"] == "latency":
        assert report["budget"]["seconds"]["device"] == gpu


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_task(recipe: Path, gpu: str, tmp_path: Path) -> None:
    """Training, evaluation and timing of every task's model, by the recipes' toys."""
    report = vlprune("compress", str(recipe), "--toy", "-o", str(tmp_path / "out"))
    assert report["device"] == gpu


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2},
    "fsdp, offloaded": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": 2, "FSDP_OFFLOAD_PARAMS": "true",
    },
    **{
        f"zero {stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage,
        }
        for stage in (1, 2, 3)
    },
}  # fmt: skip
"""What ``accelerate launch`` puts into the environment for each engine."""


@pytest.mark.parametrize("half", ["", "bf16", "fp16"], ids=lambda name: name or "float32")
@pytest.mark.parametrize("engine", ENGINES)
def test_engines(engine: str, half: str, gpu: str, tmp_path: Path) -> None:
    """A recipe in one process of NCCL, whose engine wraps, casts, gathers and is taken back."""
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    out, more = tmp_path / "out", [f"{phase}.{half}=true" for phase in ("search", "retrain")]
    args = ["compress", DEMO, "-o", str(out), *TINY, *STEPS, *(more if half else [])]
    (rank,) = meeting(1, **ENGINES[engine])
    if "offloaded" in engine:
        done = python("-m", "vlprune.commands.main", *args, **rank)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return
    report = vlprune(*args, **rank)
    assert report["device"] == gpu
    assert report["verified"]["difference"] < 1e-9
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())


MODELS = {"clip": dual_encoder, "blip": captioner, "vit": classifier}


@pytest.mark.parametrize("more", [[], ["--rotate"]], ids=["obs", "rotated"])
@pytest.mark.parametrize("kind", MODELS)
def test_on_samples(kind: str, more: list[str], gpu: str, tmp_path: Path) -> None:
    """Cut without training, in the GPU's memory and streamed to it: one plan, the same weights."""
    MODELS[kind](tmp_path / "model")
    captioned(tmp_path / "samples")
    samples = tmp_path / "samples" / "captions.jsonl"
    if kind == "vit":
        samples = pictures(tmp_path / "pictures")
    reports = {}
    for way in ("--no-stream", "--stream"):
        args = ["compress", str(tmp_path / "model"), "--calibration", str(samples), *more]
        args += ["--budget", "params=0.7", "--items", "16", way, "-o", str(tmp_path / way)]
        reports[way] = vlprune(*args)
        outputs = reports[way]["calibration"]["outputs"]
        assert all(outputs["after"][name] < error for name, error in outputs["before"].items())
    one, other = (tmp_path / way / "plan.json" for way in reports)
    assert one.read_text() == other.read_text()
    one, other = (load_file(tmp_path / way / "model.safetensors") for way in reports)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6)


def test_evaluate_and_scan(small: Path) -> None:
    report = json.loads((small / "report.json").read_text())
    there = vlprune("evaluate", str(small))
    assert there == pytest.approx(report["metrics"]["retrained"], abs=0.2)  # of six items
    here = vlprune("sensitivity", str(small / "dense"), "--device", "cpu")
    there = vlprune("sensitivity", str(small / "dense"), "--device", "cuda")
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-2)


def test_bench(small: Path, gpu: str) -> None:
    """A GPU's times may spread; then the command says so in one sentence."""
    done = python(
        "-m",
        "vlprune.commands.main",
        "bench",
        str(small),
        "--batch-sizes",
        "1,8",
        "--seconds",
        "2",
        "--json",
    )
    if done.returncode == 2:
        assert "the machine is too busy to tell" in done.stderr
        pytest.skip("the machine is too busy to tell")
    assert done.returncode == 0, done.stderr[-3000:]
    body = json.loads(done.stdout)
    assert body["conditions"]["device"] == gpu
    for facts in body["models"].values():
        assert facts["macs"]
        assert facts["peak_bytes"] > 0


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_export(to: str, small: Path) -> None:
    facts = vlprune("export", str(small), "--to", to)
    assert max(row["difference"] for row in facts["checked"]) < 1e-3


PLACES = """
import json, torch, vlprune
from vlprune.prices import round_to
from vlprune.folders.exported.write import export
from vlprune.measuring.inputs import made_up_inputs
from vlprune.testing import build

sample = build("clip")
structures = vlprune.discover(sample.model).structures
here = vlprune.cost.measure_macs(sample.model, structures, sample.inputs)
model = sample.model.to("cuda").eval()
assert vlprune.cost.measure_macs(model, structures, sample.inputs) == here
prices = vlprune.latency_prices(model, structures, sample.inputs)
assert prices.total > 0
assert vlprune.best_round_to(model, structures, sample.inputs) in round_to.MULTIPLES
plan = vlprune.Plan(keep={s.name: range(max(1, s.size // 2)) for s in structures})
small = vlprune.rewrite(model, vlprune.discover(model), plan, verify=sample.inputs)
export(small, [made_up_inputs(small, size) for size in (2, 3)], "torch-export", "exported")
assert {p.device.type for p in small.parameters()} == {"cuda"}
print(json.dumps(True))
"""


def test_a_model_that_its_owner_has_put_there(gpu: str, tmp_path: Path) -> None:
    """Counted, timed, cut, proved and exported with inputs on the CPU; it stays on the GPU."""
    script = tmp_path / "places.py"
    script.write_text(PLACES)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment(),
        cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
