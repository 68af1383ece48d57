"""Timing: what is told, in which order it is measured, and when it is not told at all."""

from __future__ import annotations

import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from vlprune.errors import UnsupportedError, VlpruneError
from vlprune.folders.exported.write import export
from vlprune.measuring import bench as benching
from vlprune.measuring.inputs import made_up_inputs
from vlprune.prices import clock
from vlprune.testing import build


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DeiT with an export, and the dense one inside its folder."""
    folder = tmp_path_factory.mktemp("pair") / "small"
    model = build("deit").model
    vlprune.save(model, folder / "dense")
    compressor = vlprune.Compressor(model, vlprune.Magnitude(), {"params": 0.6})
    small = compressor.finish()
    vlprune.save(small, folder, extras={"report.json": json.dumps(compressor.report())})
    inputs = [made_up_inputs(small.eval(), size) for size in (2, 3)]
    export(small, inputs, "torch-export", folder / "torch-export")
    return folder


@pytest.mark.slow
def test_the_command_tells_and_keeps_what_it_measured(
    run: Any, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "NOISE", 1e9)  # other tests run beside this one
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, stderr = run(
        "bench", str(pair), "--batch-sizes", "1,3", "--seconds", "0.1", "--save", "--json",
        "--trust-remote-code",
    )  # fmt: skip
    assert code == 0, stderr
    body = json.loads(stdout)
    assert json.loads((pair / "bench.json").read_text()) == body
    small, dense = body["models"]["small"], body["models"]["dense"]
    assert small["params"] < dense["params"]
    assert small["macs"] < dense["macs"]
    assert 0 < small["disk_bytes"] < dense["disk_bytes"]
    assert small["load_seconds"] > 0
    assert small["peak_bytes"] > 0
    told = {(row["engine"], row["batch"], row["model"]) for row in body["runs"]}
    both = {("eager", b, m) for b in (1, 3) for m in ("small", "dense")}
    assert told == both | {("torch-export", b, "small") for b in (1, 3)}
    for row in body["runs"]:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert row["items_per_second"] == pytest.approx(row["batch"] / row["median"])
    for row in body["faster"]:
        assert row["ideal"] == pytest.approx(dense["macs"] / small["macs"])
        assert row["of_ideal"] == pytest.approx(row["times"] / row["ideal"])
    assert body["conditions"]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(benching, "alone", lambda folder, *_: body["models"][folder.name])
    code, stdout, _ = run(
        "bench", str(pair), "--batch-sizes", "1", "--seconds", "0.1", "--trust-remote-code"
    )
    assert code == 0
    assert max(map(len, stdout.splitlines())) <= 80
    assert "times as fast" in stdout


def test_models_take_turns_and_warm_up() -> None:
    order: list[str] = []

    def timer(name: str) -> Any:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    timed = clock.take_turns({"a": timer("a"), "b": timer("b")}, rounds=2, warm_up=1)
    assert order == ["a", "b"] * 3
    assert timed == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_a_busy_machine_gets_a_sentence() -> None:
    noisy = cycle([1.0, 2.0, 3.0, 1.2, 2.6])
    with pytest.raises(VlpruneError, match="the machine is too busy to tell: eager, batch 8"):
        benching.steady({"small": lambda: next(noisy)}, 1.0, "eager, batch 8")
    together = cycle([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])  # both are slow at once: the ratio is steady
    timers = {"small": lambda: next(together), "dense": lambda: next(together)}
    assert len(benching.steady(timers, 1.0, "eager")["small"]) >= benching.LEAST_ROUNDS


def test_mistakes_get_one_sentence(run: Any, pair: Path, tmp_path: Path) -> None:
    def refused(says: str, *args: str) -> None:
        code, stdout, stderr = run("bench", *args)
        assert (code, stdout) == (2, ""), stderr
        assert says in " ".join(stderr.split())

    refused("batch sizes are numbers of at least 1", str(pair), "--batch-sizes", "1,zero")
    refused("there is no folder", str(tmp_path / "none"))
    refused("add --trust-remote-code", str(pair))
    refused("is an export: name the model's folder", str(pair / "torch-export"))


def test_inputs_come_from_the_processor_where_a_prompt_holds_images() -> None:
    model = build("llava").model
    with pytest.raises(VlpruneError, match=r"no inputs can be made up for .*: its prompt"):
        benching.inputs_of({"small": model}, {"small": Path("nowhere")})


@pytest.mark.parametrize("size", [-32, 0, [8], [8, -8]])
def test_an_image_of_no_size_is_said(size: object) -> None:
    model = build("vit").model
    model.config.image_size = size
    with pytest.raises(UnsupportedError, match="its config says that an image is"):
        made_up_inputs(model)
