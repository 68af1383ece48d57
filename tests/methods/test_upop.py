"""UPop: its pure parts by hand and against a slow reference; its decisions under any training."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import vlprune
from vlprune.errors import BudgetError, RecipeError, VlpruneError
from vlprune.methods import Problem
from vlprune.methods.base import standardised
from vlprune.methods.schedule import removed_share
from vlprune.methods.walk import walk
from vlprune.prices.prices import Floor, Prices, least
from vlprune.prices.select import select
from vlprune.structures.structure import Structure
from vlprune.testing import build


def structure(name: str, kind: str, size: int, tower: str = "vision") -> Structure:
    return Structure(name, kind, size, tower, (), ())


# Two attention structures of 3 units at 4, two FFN structures of 4 units at 1; nothing fixed.
STRUCTURES = (
    structure("v.attn", "attention", 3), structure("v.ffn", "ffn", 4),
    structure("t.attn", "attention", 3, "text"), structure("t.ffn", "ffn", 4, "text"),
)  # fmt: skip
UNIT = {"v.attn": 4.0, "v.ffn": 1.0, "t.attn": 4.0, "t.ffn": 1.0}
PRICES = Prices("params", UNIT, {s.name: s.size for s in STRUCTURES}, 0.0)


def problem(budget: float) -> Problem:
    return Problem(STRUCTURES, PRICES, budget, dict)


def search_with(total: dict[str, list[float]], budget: float = 0.5, **options: Any) -> Any:
    """A search that has seen one gradient."""
    search: Any = vlprune.UPop(**options).start(problem(budget))
    search.after_backward(1e-6, {name: torch.tensor(v) for name, v in total.items()})
    return search


GRADIENTS = {
    "v.attn": [3.0, -1.0, 0.5],
    "v.ffn": [0.1, 0.2, -0.3, 0.0],
    "t.attn": [1.0, -2.0, -1.5],
    "t.ffn": [-0.1, 0.4, 0.3, -0.6],
}


# -- the pure parts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "share"), [(0, 0), (1, 1), (0.5, math.sqrt(0.5)), (1 / 3, 0.5), (2 / 3, 0.75**0.5)]
)
def test_the_schedule_by_hand(progress: float, share: float) -> None:
    assert removed_share(progress) == pytest.approx(share, abs=1e-12)


def test_the_schedule_only_grows_and_stays_in_its_range() -> None:
    values = [removed_share(i / 1000) for i in range(1001)]
    assert values == sorted(values)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="0 to 1"):
            removed_share(wrong)


def test_one_decision_by_hand() -> None:
    # attention: mean 0, so the largest gradients are v0 (3), t0 (1), v2 (.5); sd = sqrt(17.5/6)
    # FFN: mean 0, sd = sqrt(.76/8); t1 .4, t2 .3, v1 .2, v0 .1 ...
    # standardised: v0 1.757 > t1 1.298 > t2 .973 > v1 .649 > t0 .586 > ...
    search = search_with(GRADIENTS, budget=0.5, interval=1)
    search._decide(1 / 3)  # half of what is to go: a quarter of 32, so 8 = v0 (4) t1 t2 v1 t0 (4)
    gates = {name: values.tolist() for name, values in search.gates(1 / 3).items()}
    assert gates == {
        "v.attn": [0.5, 1, 1], "v.ffn": [1, 0.5, 1, 1],
        "t.attn": [0.5, 1, 1], "t.ffn": [1, 0.5, 0.5, 1],
    }  # fmt: skip


def test_at_the_end_what_fades_is_exactly_zero_and_is_what_is_cut() -> None:
    search = search_with(GRADIENTS, budget=0.6)
    search.after_backward(1.0, {n: torch.zeros(len(v)) for n, v in GRADIENTS.items()})
    kept = search.keep()
    for name, gate in search.gates(1.0).items():
        assert set(gate.tolist()) <= {0.0, 1.0}
        assert tuple(gate.nonzero()[:, 0].tolist()) == kept[name]
    assert PRICES.cost({n: len(u) for n, u in kept.items()}) <= 0.6 * PRICES.total


def reference(
    total: dict[str, list[float]], budget: float, progress: float
) -> dict[str, list[float]]:
    """The same decision, slowly and independently: plain Python, as the paper words it."""
    kinds = {"attn": [n for n in total if "attn" in n], "ffn": [n for n in total if "ffn" in n]}
    standard = {}
    for names in kinds.values():
        values = [v for n in names for v in total[n]]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        for n in names:
            standard[n] = [(v - mean) / deviation for v in total[n]]
    order = sorted(
        ((-standard[n][u], i, u, n) for i, n in enumerate(total) for u in range(len(total[n]))),
    )
    whole = sum(UNIT[n] * len(total[n]) for n in total)
    goal = (1 - budget) * math.sin(math.pi * progress / 2) * whole
    gates = {n: [1.0] * len(total[n]) for n in total}
    removed = 0.0
    for _, _, unit, name in order:
        if removed >= goal - 1e-9:
            break
        if sum(g == 1.0 for g in gates[name]) == 1:
            continue
        gates[name][unit] = 1 - math.sin(math.pi * progress / 2) if progress < 1 else 0.0
        removed += UNIT[name]
    return gates


def test_decisions_agree_with_a_slow_reference() -> None:
    rng = random.Random(0)
    for _ in range(60):
        total = {s.name: [rng.gauss(0, 1) for _ in range(s.size)] for s in STRUCTURES}
        budget, progress = rng.uniform(0.35, 0.95), rng.choice([0.1, 0.4, 0.77, 1.0])
        search = search_with(total, budget, interval=10**6)
        search._decide(progress)
        got = {n: v.tolist() for n, v in search.gates(progress).items()}
        want = reference(total, budget, progress)
        assert {n: pytest.approx(v, abs=1e-6) for n, v in want.items()} == got


def test_gradients_add_up_over_all_steps_and_bad_ones_are_counted() -> None:
    search: Any = vlprune.UPop(interval=10**6).start(problem(0.5))
    for factor in (1.0, 2.0, float("nan"), float("inf"), -0.5):
        step = {n: factor * torch.tensor(v) for n, v in GRADIENTS.items()}
        search.after_backward(0.001, step)
    assert (search.steps, search.skipped) == (3, 2)
    assert search.total[:3].tolist() == pytest.approx([2.5 * g for g in GRADIENTS["v.attn"]])
    assert search.total.dtype == torch.float32
    assert search.facts()["skipped_steps"] == 2


def test_a_unit_may_come_back() -> None:
    search = search_with(GRADIENTS, 0.6, interval=1)
    search.after_backward(0.9, {n: torch.tensor(v) for n, v in GRADIENTS.items()})
    gone = search.gates(0.9)["v.attn"][0]
    assert gone < 1
    flipped = {n: -3 * torch.tensor(v) for n, v in GRADIENTS.items()}
    search.after_backward(0.95, flipped)
    assert search.gates(0.95)["v.attn"][0] == 1


def test_the_l1_term_cancels_while_no_gate_is_zero() -> None:
    """Its gradient is one constant a kind, and a constant goes with the mean."""
    plain = search_with(GRADIENTS, 0.5)
    with_l1 = search_with(GRADIENTS, 0.5, l1={"attention": 1.44e-2, "ffn": 5e-4})
    assert not plain.total.equal(with_l1.total)  # it did act on the gradient
    for name in GRADIENTS:
        assert plain.scores()[name] == pytest.approx(with_l1.scores()[name], abs=1e-6)
    assert plain.keep() == with_l1.keep()
    # and on gates that are 0 it does not act: there the constant is missing
    plain.values[0] = with_l1.values[0] = 0
    again = {n: torch.tensor(v) for n, v in GRADIENTS.items()}
    before = with_l1.scores()["v.attn"][0] - plain.scores()["v.attn"][0]
    for search in (plain, with_l1):
        search.after_backward(2e-6, again)
    assert abs(with_l1.scores()["v.attn"][0] - plain.scores()["v.attn"][0] - before) > 1e-4


def test_the_interval_counts_steps_and_auto_counts_hundredths() -> None:
    def decisions(interval: Any, steps: int, **how: Any) -> list[int]:
        search: Any = vlprune.UPop(interval=interval, **how).start(problem(0.5))
        made = []
        search._decide = lambda progress: made.append(round(progress * steps))
        for step in range(1, steps + 1):
            values = {n: torch.tensor(v) for n, v in GRADIENTS.items()}
            search.after_backward(step / steps, values)
        return made

    assert decisions(3, 10) == [3, 6, 9, 10]
    assert decisions("auto", 10) == list(range(1, 11))
    assert decisions("auto", 1000) == list(range(10, 1001, 10))
    # the authors decide after the first step, or after the first interval and a step
    assert decisions(50, 160, cost="paper") == [1, 51, 101, 151, 160]
    assert decisions(50, 151, cost="paper", first_step=False) == [51, 101, 151]


def test_floors_hold_at_the_last_decision() -> None:
    gradients = {**GRADIENTS, "v.attn": [9.0, 9.0, 9.0], "v.ffn": [9.0, 9.0, 9.0, 9.0]}
    free = search_with(gradients, 0.5).keep()
    held = search_with(gradients, 0.6, floors={"vision": 0.75}).keep()

    def cost(kept: Any, tower: str) -> float:
        return sum(UNIT[n] * len(u) for n, u in kept.items() if n[0] == tower)

    assert cost(free, "v") == 5  # one unit each
    assert cost(held, "v") >= 0.75 * 16
    assert cost(held, "v") + cost(held, "t") <= 0.6 * 32
    with pytest.raises(RecipeError, match="Did you mean 'vision'"):
        search_with(GRADIENTS, floors={"vison": 0.3})
    with pytest.raises(BudgetError, match=r"1 of vision.*remains"):
        search_with(GRADIENTS, 0.5, floors={"vision": 1.0, "text": 0.5})


def test_a_floor_that_whole_units_cannot_meet_is_said() -> None:
    floors = (Floor("all", tuple(UNIT), 0.5),)
    assert least(PRICES, floors=floors) == 0.5
    scores = {n: [0.0] * s for n, s in PRICES.sizes.items()}
    kept = select(scores, PRICES, 0.5, floors=floors)
    assert PRICES.cost({n: len(u) for n, u in kept.items()}) == 16


def test_round_to_holds_at_the_last_decision() -> None:
    search = search_with(GRADIENTS, 0.8, round_to=2, interval=1)
    search._decide(0.5)  # in between single units fade
    assert all(
        len(u) % 2 == PRICES.sizes[n] % 2 or len(u) % 2 == 0 for n, u in search.keep().items()
    )
    assert all(len(search.keep()[n]) % 2 == 0 for n in ("v.ffn", "t.ffn"))


def authors(
    total: dict[str, list[float]], p: float, progress: float, ratio: int, bill_last: bool
) -> dict[str, tuple[int, ...]]:
    """The units that stay by the authors' rule, slowly: one list, loops, whole numbers as costs."""
    rows: list[tuple[float, int, str]] = []
    for kind, cost in (("attn", ratio), ("ffn", 1)):
        values = [v for name in total if kind in name for v in total[name]]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        for name in total:
            if kind in name:
                rows += [((v - mean) / spread, cost, name) for v in total[name]]
    goal = p * math.sin(math.pi * progress / 2) * sum(cost for _, cost, _ in rows)
    smallest = {name: min(row[0] for row in rows if row[2] == name) for name in total}
    running, bound, nearest = 0, math.nan, math.inf
    for value, cost, name in sorted(rows, reverse=True):
        if not bill_last and value == smallest[name]:
            continue
        running += cost
        if abs(running - goal) < nearest:
            nearest, bound = abs(running - goal), value
    kept = {}
    for name in total:
        own = [row[0] for row in rows if row[2] == name]
        kept[name] = tuple(u for u, v in enumerate(own) if v <= bound or v == smallest[name])
    return kept


@pytest.mark.parametrize("bill_last", [False, True])
def test_the_authors_sets_agree_with_a_slow_restatement(bill_last: bool) -> None:
    rng, differ = random.Random(1), 0
    for _ in range(150):
        sizes = {f"{t}.{i}.{k}": rng.randint(2, 12) for t in "vt" for i in range(2)
                 for k in ("attn", "ffn")}  # fmt: skip
        parts = tuple(structure(n, "ffn" if "ffn" in n else "attention", k, n[0])
                      for n, k in sizes.items())  # fmt: skip
        prices = Prices("params", dict.fromkeys(sizes, 1.0), sizes, 50.0)  # not what counts here
        total = {name: [rng.gauss(0, 1) for _ in range(k)] for name, k in sizes.items()}
        gradients = {n: torch.tensor(v) for n, v in total.items()}
        total = {n: v.tolist() for n, v in gradients.items()}  # as float32 holds them
        p, ratio = rng.uniform(0.05, 0.45), rng.choice([12, 36])
        method = vlprune.UPop(
            cost="paper", paper_ratio=ratio, bill_last=bill_last, interval=10**6, first_step=False
        )
        search: Any = method.start(Problem(parts, prices, 1 - p, dict))
        search.after_backward(1e-6, gradients)
        for progress in (0.02, 0.3, 0.77, 1.0):
            search._decide(progress)
            want = authors(total, p, progress, ratio, bill_last)
            fading = 1 - math.sin(math.pi * progress / 2) if progress < 1 else 0.0
            for name, values in search.gates(progress).items():
                gates = [1.0 if u in want[name] else fading for u in range(sizes[name])]
                assert values.tolist() == pytest.approx(gates, abs=1e-6)
        assert search.keep() == want
        plain = {n: -torch.tensor(v) for n, v in total.items()}
        scores = {n: v.tolist() for n, v in standardised(parts, plain).items()}
        differ += select(scores, search.prices, 1 - p) != want
    assert differ > 100  # the rule of exact costs is another


def test_the_authors_walk_by_hand() -> None:
    # a0 b0 a1 | b1 a2 go in this order at 4, 1, 4; b1 and a2 are the last of theirs
    prices = Prices("", {"a": 4.0, "b": 1.0}, {"a": 3, "b": 2}, 0.0)
    scores = {"a": [0.0, 2.0, 5.0], "b": [1.0, 3.0]}
    # sums 4, 5, 9: of a goal of 14 / 2 = 7 both 5 and 9 are two away; the first counts and stays
    assert walk(scores, prices, 0.5) == {"a": (1, 2), "b": (0, 1)}
    assert walk(scores, prices, 8 / 14) == {"a": (1, 2), "b": (1,)}
    assert walk(scores, prices, 0.0) == {"a": (0, 1, 2), "b": (0, 1)}
    assert walk(scores, prices, 1.0) == {"a": (1, 2), "b": (1,)}
    # billed: sums 4, 5, 9, 10, 14, and what stays anyhow is the last of each
    assert walk(scores, prices, 1.0, bill_last=True) == {"a": (2,), "b": (1,)}
    # units that score the same as the one that stays, stay
    tied = {"a": [0.0, 0.0, 5.0], "b": [1.0, 3.0]}  # sums 4, 8, 9
    assert walk(tied, prices, 8 / 14) == {"a": (0, 1, 2), "b": (0, 1)}
    one = Prices("", {"a": 4.0}, {"a": 1}, 0.0)
    assert walk({"a": [0.0]}, one, 0.5) == {"a": (0,)}


@pytest.mark.parametrize("importance", ["signed", "squared", "gradient_x_gate"])
def test_importance_by_hand(importance: str) -> None:
    search = search_with(GRADIENTS, importance=importance)
    attention = search.scores()["v.attn"] + search.scores()["t.attn"]
    worst = min(range(6), key=attention.__getitem__)
    flat = GRADIENTS["v.attn"] + GRADIENTS["t.attn"]
    if importance == "signed":
        assert flat[worst] == max(flat)  # whose increase raises the loss most
    else:
        assert abs(flat[worst]) == min(map(abs, flat))  # whose removal changes it least


@pytest.mark.parametrize(
    "wrong",
    [{"interval": 0}, {"interval": "often"}, {"cost": "exakt"}, {"importance": "sign"},
     {"floors": {"vision": 2}}, {"l1": {"atention": 1.0}}, {"interval": True},
     {"bill_last": True}, {"first_step": False}],
)  # fmt: skip
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        vlprune.UPop(**wrong)


def test_a_budget_that_cannot_be_reached_is_refused_before_training() -> None:
    with pytest.raises(BudgetError, match="ask for at least"):
        vlprune.UPop().start(problem(0.1))


def test_standardisation_is_over_all_towers_of_a_kind() -> None:
    values = {n: torch.tensor(v) for n, v in GRADIENTS.items()}
    result = standardised(STRUCTURES, values)
    for kind in ("attn", "ffn"):
        together = torch.cat([result[n] for n in result if kind in n])
        assert together.mean() == pytest.approx(0, abs=1e-9)
        assert together.std(correction=0) == pytest.approx(1, abs=1e-9)
    assert result["v.attn"].mean() != pytest.approx(0, abs=1e-3)  # not tower by tower


# -- with a model --------------------------------------------------------------------------


def searched(
    family: str = "clip",
    steps: int = 6,
    budget: float = 0.7,
    wrap: Any = None,
    rate: float = 1e-3,
    **how: Any,
) -> tuple[Any, Any]:
    """A compressor after a search of so many steps, and its loss function's model."""
    sample = build(family.removesuffix("_labelled"))
    sample.model.train()
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(**how), {"params": budget})
    run = wrap(sample.model) if wrap else sample.model
    optimizer = torch.optim.SGD(sample.model.parameters(), lr=rate)
    extra: dict[str, Any] = {"return_loss": True} if family == "clip" else {}
    if family == "vit_labelled":
        extra["labels"] = torch.tensor([0, 1])
    compressor.attach()
    for step in range(steps):
        run(**sample.inputs, **extra).loss.backward()
        compressor.step((step + 1) / steps)
        optimizer.step()
        optimizer.zero_grad()
    return compressor, sample


def test_search_cut_and_proof() -> None:
    compressor, _ = searched()
    small = compressor.finish()
    report = compressor.report()
    assert report["budget"]["reached"] <= 0.7
    assert report["verified"]["difference"] < 1e-9
    assert report["search"]["gate_of_fading_units"] == 0
    assert report["params"]["after"] == sum(p.numel() for p in small.parameters())


def test_the_masked_model_at_the_end_is_the_small_model() -> None:
    """At progress 1 the gates are the plan, so the cut changes nothing."""
    compressor, sample = searched()
    sample.model.eval()
    with torch.no_grad():
        before = sample.model(**sample.inputs).logits_per_image
        small = compressor.finish(verify=False)
        assert torch.allclose(small(**sample.inputs).logits_per_image, before, atol=1e-5)


def relative(a: Any, b: Any) -> float:
    difference = (a.search.total - b.search.total).norm() / b.search.total.norm()
    return float(difference)


def test_gradient_accumulation_makes_the_same_decisions() -> None:
    def run(parts: int) -> Any:
        sample = build("vit")
        compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.7})
        optimizer = torch.optim.SGD(sample.model.parameters(), lr=1e-2)
        pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        labels = torch.arange(8) % 2
        for step in range(5):
            for x, y in zip(pixels.chunk(parts), labels.chunk(parts), strict=True):
                (sample.model(pixel_values=x, labels=y).loss / parts).backward()
            compressor.step((step + 1) / 5)
            optimizer.step()
            optimizer.zero_grad()
        return compressor

    whole, parts = run(1), run(4)
    assert relative(parts, whole) < 1e-4
    assert parts.plan() == whole.plan()


def test_gradient_checkpointing_makes_the_same_decisions() -> None:
    def checkpointing(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    plain, _ = searched("clip")
    thrifty, _ = searched("clip", wrap=checkpointing)
    assert relative(thrifty, plain) < 1e-5
    assert thrifty.plan() == plain.plan()


@pytest.mark.slow
def test_torch_compile_makes_the_same_decisions() -> None:
    plain, _ = searched("vit_labelled")
    compiled, _ = searched("vit_labelled", wrap=lambda m: torch.compile(m, backend="aot_eager"))
    assert relative(compiled, plain) < 1e-5
    assert compiled.plan() == plain.plan()


def test_bf16_autocast_makes_nearly_the_same_decisions() -> None:
    def cast(model: Any) -> Any:
        def run(**inputs: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**inputs)

        return run

    plain, _ = searched("clip", rate=1e-5)  # at a higher one small differences grow
    mixed, _ = searched("clip", rate=1e-5, wrap=cast)
    assert relative(mixed, plain) < 0.1
    assert mixed.search.total.dtype == torch.float32
    same = total = 0
    for name, units in plain.plan().keep.items():
        same += len(set(units) & set(mixed.plan().keep[name]))
        total += len(units)
    assert same / total > 0.9


def test_a_gradient_scaler_changes_nothing_and_its_overflows_are_left_out() -> None:
    plain, _ = searched("clip", steps=4)
    sample = build("clip")
    sample.model.train()
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.7})
    compressor.attach()
    optimizer = torch.optim.SGD(sample.model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
    for step in range(4):
        scaler.scale(sample.model(**sample.inputs, return_loss=True).loss).backward()
        compressor.step((step + 1) / 4, scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() != 2.0**20  # it moved on the way
    assert relative(compressor, plain) < 1e-4
    assert compressor.plan() == plain.plan()


def test_a_trainer_in_fp16_passes_the_scale_on() -> None:
    compressor, _ = searched("clip", steps=2)
    seen = []
    compressor.step = lambda progress, scale=1.0, weight_scale=1.0: seen.append(
        (scale, weight_scale)
    )

    class Optimizer:
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    class State:
        global_step, max_steps = 0, 4

    class Args:
        max_grad_norm = 1.0

    compressor.callback().on_pre_optimizer_step(Args, State, None, optimizer=Optimizer)
    Args.max_grad_norm = 0.0  # without clipping nothing has unscaled the weights' gradients
    compressor.callback().on_pre_optimizer_step(Args, State, None, optimizer=Optimizer)
    assert seen == [(64.0, 1.0), (64.0, 64.0)]


def test_gates_follow_the_model_to_another_device() -> None:
    sample = build("vit")
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.7})
    compressor.attach()
    sample.model.to("meta")  # as a Trainer moves it to a GPU, after the compressor was made
    sample.model(pixel_values=sample.inputs["pixel_values"].to("meta"))
    assert {gate.device.type for gate in compressor.gates.values()} == {"meta"}
    assert all(gate.is_leaf and gate.requires_grad for gate in compressor.gates.values())


def test_a_structure_without_gradient_is_named() -> None:
    sample = build("clip")
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.7})

    def train_images_only() -> None:
        for step in range(20):
            features = sample.model.get_image_features(pixel_values=sample.inputs["pixel_values"])
            features.pooler_output.sum().backward()
            compressor.step((step + 1) / 20)

    with pytest.warns(UserWarning, match=r"reaches no gate of text_model.*skip=\(\"text_model"):
        train_images_only()
    compressor.finish()
    rows = compressor.report()["layers"]
    assert all(row["kept"] == row["units"] for row in rows if row["tower"] == "text")
    assert any(row["kept"] < row["units"] for row in rows if row["tower"] == "vision")
    (note,) = compressor.report()["notes"]
    assert "which stay dense: text_model" in note
    again = vlprune.Compressor(
        build("clip").model, vlprune.UPop(), {"params": 0.9}, skip=("text_model.*",)
    )
    assert all(s.name.startswith("vision_model") for s in again.structures)


def test_skip_says_when_it_matches_nothing() -> None:
    with pytest.raises(vlprune.errors.UnsupportedError, match="look like"):
        vlprune.Compressor(build("clip").model, vlprune.UPop(), {"params": 0.9}, skip=("txt.*",))
    with pytest.raises(vlprune.errors.UnsupportedError, match="nothing to prune"):
        vlprune.Compressor(build("clip").model, vlprune.UPop(), {"params": 0.9}, skip=("*",))


def test_without_a_finite_gradient_there_is_no_plan() -> None:
    sample = build("clip")
    compressor = vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.7})
    with pytest.raises(VlpruneError, match="no finite gradient"):
        compressor.plan()


def test_a_state_goes_on_exactly() -> None:
    def steps(compressor: Any, sample: Any, first: int, last: int) -> None:
        for step in range(first, last):
            sample.model.zero_grad()
            sample.model(**sample.inputs, return_loss=True).loss.backward()
            compressor.step((step + 1) / 10)

    def fresh() -> Any:
        sample = build("clip")
        return vlprune.Compressor(sample.model, vlprune.UPop(), {"params": 0.7}), sample

    whole, sample = fresh()
    steps(whole, sample, 0, 10)
    first, sample = fresh()
    steps(first, sample, 0, 4)
    second, sample = fresh()
    second.restore(first.state())
    steps(second, sample, 4, 10)
    assert second.search.total.equal(whole.search.total)
    assert second.plan() == whole.plan()
    other = vlprune.Compressor(build("vit").model, vlprune.UPop(), {"params": 0.9})
    with pytest.raises(VlpruneError, match="another model"):
        other.restore(first.state())


# -- the cut changes nothing, whatever the options ---------------------------------------


def clip_prices() -> Prices:
    """Seconds in steps of four units, as a clock may give them."""
    structures = vlprune.discover(build("clip").model).structures
    curve = {
        s.name: tuple(
            1e-3 * sum(1.0 if i % 4 == 0 else 0.1 for i in range(n)) for n in range(s.size + 1)
        )
        for s in structures
    }
    unit = {name: values[-1] / (len(values) - 1) for name, values in curve.items()}
    return Prices("latency", unit, {s.name: s.size for s in structures}, 0.01, curve=curve)


OPTIONS: list[dict[str, Any]] = [
    {"interval": 1},
    {"interval": 4},
    {"interval": 1000, "cost": "paper", "round_to": 4},
    {"cost": "paper", "floors": {"vision": 0.7}, "uniform": True},
    {"cost": "paper", "paper_ratio": 12, "bill_last": True, "interval": 3},
    {"importance": "squared", "l1": {"ffn": 1.0}, "interval": 3},
    {"importance": "gradient_x_gate", "l1": {"attention": 1e-2, "ffn": 5e-4}},
    {"round_to": 5},
    {"round_to": 4, "floors": {"vision": 0.4, "text": 0.4}},
    {"round_to": 4, "uniform": True, "floors": {"text": 0.5}},
    {"latency": True},
    {"latency": True, "round_to": 4, "uniform": True, "floors": {"vision": 0.6}},
    {"shared": True},
    {"shared": True, "floors": {"vision": 0.6}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_cut_changes_nothing_and_every_decision_obeys(options: dict[str, Any]) -> None:
    told = dict(options)
    uniform, latency = told.pop("uniform", False), told.pop("latency", False)
    sample = build("clip")
    model: Any = sample.model
    if told.pop("shared", False):
        description = vlprune.discover(model)
        source, target = [s for s in description if s.kind == "ffn" and s.tower == "vision"][:2]
        units = tuple(range(0, source.size, 2))
        vlprune.rewrite(
            model,
            description,
            vlprune.Plan(
                keep={},
                share={target.name: (source.name, units, units)},
                attention=description.attention,
                fingerprint=description.fingerprint,
            ),
        )
    batch = {**sample.inputs, "return_loss": True}
    compressor = vlprune.Compressor(
        model, vlprune.UPop(**told), {"latency" if latency else "params": 0.6}, uniform=uniform,
        prices=clip_prices() if latency else None,
        example_inputs=sample.inputs if latency else None,
    )  # fmt: skip
    search: Any = compressor.search
    select, decisions = search._select, []

    def watched(scores: Any, progress: float) -> Any:
        decisions.append(select(scores, progress))
        return decisions[-1]

    search._select = watched
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    steps = 9
    with compressor:
        for step in range(steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            compressor.step(sum([1 / steps] * (step + 1)))  # ends a little beside 1
            optimizer.step()
        gates = {n: g.detach().clone() for n, g in compressor.gates.items()}
        with torch.no_grad():
            masked = float(model(**batch).loss)
        plan = compressor.plan()
        for s in compressor.structures:
            wanted = torch.zeros(s.size)
            wanted[list(plan.kept(s))] = 1
            assert torch.equal(gates[s.name], wanted), s.name
        compressor.finish()
    assert compressor.report()["notes"] == []
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(masked, rel=2e-5)
    assert len(decisions) >= 2
    for kept in decisions:
        obeys(kept, compressor, told, uniform)


def obeys(kept: Any, compressor: Any, told: Any, uniform: bool) -> None:
    """Whether one decision keeps to blocks, floors and groups."""
    prices, widths = compressor.search.prices, {}
    for s in compressor.structures:
        count = len(kept[s.name])
        assert count == s.size or count % told.get("round_to", 1) == 0
        widths.setdefault((s.tower, s.kind, s.size), set()).add(count)
    assert not uniform or all(len(counts) == 1 for counts in widths.values())
    for tower, share in told.get("floors", {}).items():
        members = [s.name for s in compressor.structures if s.tower == tower]
        left = sum(
            prices.curve[n][len(kept[n])]
            if n in prices.curve
            else prices.of(n)[list(kept[n])].sum()
            for n in members
        )
        assert left >= share * sum(prices.whole(n) for n in members) - 1e-9
