"""Structures that no gradient reaches: they stay dense, and everybody is told so once."""

from __future__ import annotations

import json
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

import vlprune
from vlprune.errors import VlpruneError
from vlprune.testing import build

LAST = "model.vision_tower.encoder.layers.1."
METHODS = [vlprune.UPop(), vlprune.Taylor()]


def llava() -> tuple[Any, dict[str, Any]]:
    """A LLaVA that reads the last but one layer of its vision tower, as the published ones do."""
    sample = build("llava")
    model: Any = sample.model
    model.config.vision_feature_layer = -2
    return model, {**sample.inputs, "labels": sample.inputs["input_ids"]}


def search(
    model: Any, batches: list[Any], method: Any, fraction: float = 0.75, **more: Any
) -> tuple[vlprune.Compressor, list[str]]:
    """A finished compression, and what it warned of."""
    compressor = vlprune.Compressor(model, method, {"params": fraction}, attention="head", **more)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught, compressor:
        warnings.simplefilter("always")
        for number, batch in enumerate(batches):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            compressor.step((number + 1) / len(batches))
            optimizer.step()
        compressor.finish()
    return compressor, [str(w.message) for w in caught if "reaches no gate" in str(w.message)]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_they_stay_dense_with_a_note_and_one_warning(method: Any, uniform: bool) -> None:
    model, batch = llava()
    compressor, told = search(model, [batch] * 20, method, uniform=uniform)
    names = [s.name for s in compressor.structures]
    unreached = [name for name in names if name.startswith(LAST)]
    plan = compressor.plan()
    assert len(unreached) == 2
    assert all(len(plan.kept(s)) == s.size for s in compressor.structures if s.name in unreached)
    assert len(told) == 1
    pattern = told[0].partition('skip=("')[2].partition('"')[0]
    assert [name for name in names if fnmatchcase(name, pattern)] == unreached
    assert "1 more structure:" in told[0]
    (note,) = compressor.report()["notes"]
    assert all(name in note for name in unreached)
    assert "2 of 8 structures" in note
    assert compressor.report()["budget"]["reached"] <= 0.75
    # the advice is good: nothing is warned of, and the same is left dense
    again, told = search(llava()[0], [batch] * 20, method, uniform=uniform, skip=(pattern,))
    assert not told
    assert again.report()["notes"] == []


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_budget_out_of_reach_without_them_ends_the_search_by_half(
    method: Any, uniform: bool
) -> None:
    model, batch = llava()
    done = []

    def batches() -> Any:
        for number in range(20):
            done.append(number)
            yield batch

    class Counted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return batches()

    with pytest.raises(VlpruneError, match="budget cannot be reached"):
        search(model, Counted([batch] * 20), method, 0.45, uniform=uniform)
    assert len(done) <= 10
    assert not vlprune.cutting.gates.has_gates(model)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_first_batches_without_a_picture_are_waited_out(method: Any) -> None:
    sample = build("llava")
    full = {**sample.inputs, "labels": sample.inputs["input_ids"]}
    ids = torch.randint(6, 50, (2, 6))
    text = {"input_ids": ids, "labels": ids}
    compressor, told = search(sample.model, [text] * 6 + [full] * 24, method)
    assert len(told) == 1
    assert "unless a later batch reaches them" in told[0]
    assert compressor.report()["notes"] == []
    kept = [g["kept"] < g["units"] for g in compressor.report()["groups"] if g["tower"] == "vision"]
    assert any(kept)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_zero_gradients_everywhere_make_no_plan(method: Any) -> None:
    sample = build("vit")
    compressor = vlprune.Compressor(sample.model, method, {"params": 0.75})
    with compressor:
        loss = sample.model(**sample.inputs).logits.sum() * 0
        loss.backward()
        with pytest.raises(VlpruneError, match="reaches no gate"):
            compressor.step(0.1 if isinstance(method, vlprune.Taylor) else 1.0)
    compressor.progress = 0.05
    with pytest.raises(VlpruneError, match="zero, so it knows nothing"):
        compressor.finish()


def test_jsp_leaves_what_no_look_reaches_dense() -> None:
    model, batch = llava()
    method = vlprune.JSP(base="text", other="vision", mismatch="skip")
    compressor, _ = search(model, [batch] * 60, method, 0.85, held_out=[batch])
    plan = compressor.plan()
    assert all(
        len(plan.kept(s)) == s.size for s in compressor.structures if s.name.startswith(LAST)
    )
    (note,) = compressor.report()["notes"]
    assert LAST in note


def test_every_view_of_a_report_shows_the_notes(run: Any, tmp_path: Path) -> None:
    sample = build("vit")
    compressor = vlprune.Compressor(sample.model, vlprune.Magnitude(), {"params": 0.7})
    small = compressor.finish()
    folder, report = tmp_path / "small", compressor.report()
    note = "no gradient of the loss reached 1 of 8 structures, which stay dense: a.<layer>.b"
    told = json.dumps({**report, "notes": [note]})
    vlprune.save(small, folder, extras={"report.json": told})
    code, text, _ = run("report", str(folder))
    assert code == 0
    assert note in " ".join(text.split())
    assert "Note: no gradient" in text
    _, text, _ = run("report", str(folder), "--format", "markdown")
    assert note.replace("<", r"\<") in text  # as text, not as HTML
    pytest.importorskip("plotly")
    page = tmp_path / "page.html"
    run("report", str(folder), "-o", str(page))
    assert note.replace("<layer>", "&lt;layer&gt;") in page.read_text()
