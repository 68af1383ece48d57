"""What a search shows while it runs: the Trainer's loggers, the history, the progress line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vlprune
from small_runs import DEMO, TINY
from vlprune.testing import build


def trainer_for(folder: Path, sample: Any, callbacks: Any = None, **more: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=4, logging_steps=1, use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False, per_device_train_batch_size=2, **more,
    )  # fmt: skip
    return transformers.Trainer(
        sample.model,
        arguments,
        lambda items: {**sample.inputs, "return_loss": True},
        [0] * 8,
        callbacks=callbacks,
    )


def test_tensorboard_gets_the_searchs_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    sample = build("clip")
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.8})
    trainer = trainer_for(tmp_path, sample, report_to="tensorboard")
    compressor.watch(trainer)
    trainer.train()
    (file,) = (tmp_path / "logs").glob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    remains = [event.value for event in events.Scalars("train/search/remains")]
    assert len(remains) == 4
    assert remains == sorted(remains, reverse=True)
    assert remains[-1] + 0.02 >= 0.8
    assert {"train/search/fading_units", "train/search/gate_of_fading_units"} <= set(
        events.Tags()["scalars"]
    )
    assert [row["search/remains"] for row in trainer.state.log_history if "loss" in row] == (
        pytest.approx(remains)
    )


def test_what_remains_is_what_the_plan_costs_at_the_end(tmp_path: Path) -> None:
    sample = build("clip")
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.8})
    assert compressor.figures()["remains"] == 1
    trainer_for(tmp_path, sample, [compressor.callback()], report_to="none").train()
    remains = compressor.figures()["remains"]
    compressor.finish()
    assert remains == pytest.approx(compressor.report()["budget"]["reached"], abs=1e-6)


def test_the_history_of_a_search_survives_a_checkpoint() -> None:
    sample = build("clip")
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(interval=1), {"params": 0.8})
    compressor.attach()
    for step in range(3):
        sample.model(**sample.inputs, return_loss=True).loss.backward()
        compressor.step((step + 1) / 5)
    history = compressor.search.history()
    assert [row["progress"] for row in history] == [0.2, 0.4, 0.6]
    assert all(row["gate_of_fading_units"] <= 1 for row in history)
    again = vlprune.Compressor(build("clip").model, vlprune.UPop(interval=1), {"params": 0.8})
    again.restore({name: tensor.clone() for name, tensor in compressor.state().items()})
    assert again.search.history() == history
    fresh = vlprune.Compressor(build("clip").model, vlprune.UPop(), {"params": 0.8})
    fresh.restore(fresh.state())
    assert fresh.search.history() == []


def test_a_recipe_logs_every_phase_and_shows_what_is_kept(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, _, stderr = run("compress", DEMO, *TINY, "report_to=tensorboard", "-o", str(out))
    assert code == 0, stderr
    assert {path.name for path in (out / "logs").iterdir()} == {"train", "search", "retrain"}
    assert "searching 2/2 loss" in stderr
    assert ", keeps " in stderr
    (file,) = (out / "logs" / "search").glob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert "train/search/remains" in events.Tags()["scalars"]
    report = json.loads((out / "report.json").read_text())
    assert report["search_history"]
    logged = [row for row in report["history"]["search"] if "search/remains" in row]
    assert logged


def test_timings_and_exports_of_another_model_do_not_survive_a_save(tmp_path: Path) -> None:
    model = build("deit").model
    folder = tmp_path / "m"
    vlprune.save(model, folder)
    (folder / "bench.json").write_text('{"runs": [], "faster": []}')
    (folder / "onnx").mkdir()
    (folder / "onnx" / "vlprune-export.json").write_text('{"files": {"model.onnx": 1}}')
    (folder / "onnx" / "model.onnx").write_text("x")
    (folder / "own").mkdir()
    (folder / "own" / "model.onnx").write_text("somebody's")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("kept")
    vlprune.save(model, folder)
    assert not (folder / "bench.json").exists()
    assert not (folder / "onnx" / "model.onnx").exists()
    assert (folder / "own" / "model.onnx").exists()
    assert (folder / "mine" / "notes.txt").read_text() == "kept"


def test_a_recipe_with_a_budget_in_latency(
    run: Any, tmp_path: Path, worked: dict[str, float]
) -> None:
    """On the counting clock, where time is work: asked is reached."""
    out = tmp_path / "small"
    args = [a for a in TINY if not a.startswith("budget")]
    code, stdout, stderr = run(
        "compress", DEMO, *args, "budget={latency: 0.7}", "latency_batch_size=4",
        "method.round_to=auto", "-o", str(out), "--json",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads(stdout)
    seconds = report["budget"]["seconds"]
    assert 0.6 < report["budget"]["reached"] < 0.72
    assert report["budget"]["reached"] == pytest.approx(seconds["small"] / seconds["dense"])
    assert seconds["shapes"]["pixel_values"][0] == 4
    assert "4" in report["latency_seconds"]["small"]
    assert report["options"]["round_to"] == 1  # on this clock no width is dearer than its size
    assert stderr.count("measuring which widths this device likes") == 1
    assert stderr.count("measuring the time of every width, batch 4") == 1
    assert "On 1 CPU thread, batch 4" in (out / "README.md").read_text()
