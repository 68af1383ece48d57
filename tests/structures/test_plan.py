"""Plans: what they accept, what they refuse, and that JSON brings them back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlprune import Plan, discover, rewrite
from vlprune.errors import PlanError
from vlprune.testing import build


def test_json_brings_the_plan_back(tmp_path: Path) -> None:
    plan = Plan(
        keep={"x": (3, 1, 2)}, share={"y": ("x", (0, 1))}, attention="head", fingerprint="abc"
    )
    assert plan.keep["x"] == (1, 2, 3)
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ((), "keeps nothing"),
        ((1, 1), "more than once"),
        ((-1,), "count from 0"),
        ((0.5,), "integers"),
        ((True,), "integers"),
        ("12", "must list"),
        (3, "must list"),
    ],
)
def test_impossible_units_are_refused(units: object, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan(keep={"x": units})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        ('{"format": "vlprune.structures.plan", "version": 99}', "version 99"),
        ('{"format": "vlprune.structures.plan", "version": 1, "kep": {}}', "Did you mean 'keep'"),
        ('{"format": "vlprune.structures.plan", "version": 1, "keep": []}', "must be JSON objects"),
        ('{"format": "vlprune.structures.plan", "version": 1, "share": {"a": 1}}', "source, units"),
    ],
)
def test_malformed_json_is_refused(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan.from_json(text)


def test_a_missing_plan_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_must_fit_the_model() -> None:
    model = build("vit").model
    description = discover(model)
    name = description.structures[0].name
    size = description.structures[0].size
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PlanError, match="another model"):
        rewrite(model, description, Plan(keep={name: (0,)}, fingerprint="somebody else"))
    with pytest.raises(PlanError, match="does not have"):
        rewrite(model, description, Plan(keep={name + "x": (0,)}))
    with pytest.raises(PlanError, match=f"only {size} units"):
        rewrite(model, description, Plan(keep={name: (0, size)}))
    with pytest.raises(PlanError, match="does not have"):
        rewrite(model, description, Plan(share={name: ("other", (0,))}))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(before[k].equal(after[k]) for k in before)


def test_the_fingerprint_tells_models_and_units_apart() -> None:
    vit, deit = build("vit").model, build("deit").model
    assert discover(vit).fingerprint == discover(build("vit", seed=3).model).fingerprint
    assert discover(vit).fingerprint != discover(deit).fingerprint
    assert discover(vit).fingerprint != discover(vit, "head").fingerprint


def test_a_plan_is_plain_json() -> None:
    model = build("vit").model
    description = discover(model)
    plan = Plan(keep={s.name: (0, 1) for s in description}, fingerprint=description.fingerprint)
    body = json.loads(plan.to_json())
    assert body["keep"][description.structures[0].name] == [0, 1]


def test_a_plan_with_an_unknown_unit_names_its_file(tmp_path: Path) -> None:
    body = json.loads(Plan(keep={}).to_json()) | {"attention": "heads"}
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(
        PlanError, match=r"plan.json: .*one of head_dim, qk_vo, head, query_head, not 'heads'"
    ):
        Plan.load(tmp_path / "plan.json")
