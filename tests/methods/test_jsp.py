"""JSP: its vectors by hand, its invariants, and a whole run."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vlprune
from alike import close
from small_models import clip, inputs
from vlprune import cost
from vlprune.cutting.gates import gated
from vlprune.cutting.sharing.mixed import mixed
from vlprune.cutting.sharing.rules import shareable
from vlprune.errors import BudgetError, RecipeError, UnsupportedError, VlpruneError
from vlprune.methods import Alignment, Look, Problem
from vlprune.methods.schedule import removed_share
from vlprune.methods.vectors import Vectors, alignment, draw_near, moves_to
from vlprune.prices.prices import Prices
from vlprune.structures.structure import Structure
from vlprune.testing import build
from vlprune.training.turns import Turns


def structure(name: str, tower: str, size: int = 4, kind: str = "ffn") -> Structure:
    return Structure(name, kind, size, tower, (), ())


TEXT = [structure(f"t{i}", "text") for i in range(6)]
VISION = [structure(f"v{i}", "vision") for i in range(3)]
ALL = (*VISION, *TEXT)
PRICES = Prices(
    "params",
    {s.name: 10.0 for s in ALL},
    {s.name: 4 for s in ALL},
    fixed=40.0,
    borrowed={s.name: 1.0 for s in ALL},
)


def search(budget: float = 0.5, prices: Prices = PRICES, **options: Any) -> Any:
    return vlprune.JSP(**options).start(Problem(ALL, prices, budget, dict))


# -- vectors -------------------------------------------------------------------------------


def test_which_layer_shares_with_which() -> None:
    """Vision with the text layer of equal depth, text with the first of its block of four."""
    found = {v.structure.name: v.source for v in search().vectors if v.source}
    assert found == {
        "v0": "t1", "v1": "t3", "v2": "t5",  # ceil(l * 6 / 3)
        "t1": "t0", "t2": "t0", "t3": "t0", "t5": "t4",
    }  # fmt: skip
    assert [v.name for v in search(families=("prune",)).vectors] == [
        "t0", "t1", "v0", "t2", "t3", "v1", "t4", "t5", "v2"
    ]  # by depth, the towers taking turns  # fmt: skip
    only_block = search(families=("block",), block=2, budget=0.8).vectors
    assert {v.name for v in only_block} == {"t1<t0", "t3<t2", "t5<t4"}


def test_alive_own_and_cost_by_hand() -> None:
    units = torch.arange(4)
    vectors = Vectors(
        {"t0": torch.tensor([1.0, 1, 0, 0]), "t1": torch.tensor([1.0, 0, 1, 0])},
        {"t1": ("t0", torch.tensor([0.0, 1, 0, 1]), units)},
    )
    # t1: 0 is its own, 1 is shared from a living unit, 2 its own, 3 shared from one that goes
    assert vectors.alive()["t1"].tolist() == [1, 1, 1, 0]
    assert vectors.own()["t1"].tolist() == [1, 0, 1, 0]
    other = 7 * 40.0  # seven structures that stay whole
    assert float(vectors.cost(PRICES)) == 40 + other + (2 * 10) + (2 * 10 + 1)
    plan = vectors.plan(ALL, "head_dim", "")
    assert plan.keep == {"t0": (0, 1), "t1": (0, 1, 2)}
    assert plan.share == {"t1": ("t0", (1,), (1,))}
    again = Vectors.of_plan(TEXT[:2], plan)
    assert float(again.cost(PRICES)) == float(vectors.cost(PRICES))


def test_the_price_of_vectors_is_differentiable() -> None:
    m = torch.tensor([1.0, 1, 0, 0], requires_grad=True)
    s = torch.tensor([0.0, 1, 0, 1], requires_grad=True)
    vectors = Vectors({"t0": m}, {"t1": ("t0", s, torch.arange(4))})
    vectors.cost(PRICES).backward()
    # a unit of t0 costs 10, and 1 more for the bias of each unit that shares it
    assert m.grad.tolist() == [10, 11, 10, 11]
    # sharing saves 9 of its own weights, and the bias as well where the source goes
    assert s.grad.tolist() == [-9, -9, -10, -10]


# -- invariants ----------------------------------------------------------------------------


def test_nothing_changes_at_the_start() -> None:
    found = search()
    assert float(found.now.cost(PRICES)) == PRICES.total
    drawn = [found.draw(0.2) for _ in range(20)]  # with noise
    assert all(float(v.cost(PRICES).detach()) == PRICES.total for v in drawn)


def test_the_gradient_reaches_every_head() -> None:
    found = search()
    found.offset = 0.0
    before = [head.weight.detach().clone() for head in found.network.heads]
    drawn = found.draw(0.2)
    ones = lambda values: {n: torch.ones(len(v)) for n, v in values.items()}  # noqa: E731
    found.learn(drawn, ones(drawn.keep), {n: torch.ones(4) for n in drawn.share})
    for vector, old, head in zip(found.vectors, before, found.network.heads, strict=True):
        grad = head.weight.grad
        assert grad is not None, vector.name
        assert bool((grad != 0).any()), vector.name
        assert not torch.equal(old, head.weight), vector.name


def test_the_budget_pulls_only_above_the_target() -> None:
    for budget, pulls in ((1.0, False), (0.6, True)):
        found = search(budget)
        drawn = found.draw(0.2)
        zero = {n: torch.zeros(4) for n in drawn.keep}
        found.learn(drawn, zero, {n: torch.zeros(4) for n in drawn.share})
        moved = any(bool((h.weight.grad != 0).any()) for h in found.network.heads)
        assert moved is pulls


def test_as_many_turns_in_a_short_search_as_in_a_long_one() -> None:
    class Still:
        looks: list[tuple[bool, bool]]

        def align(self, wanted: Any) -> None:
            return

        def look(self, vectors: Any, learns: bool, compares: bool) -> Any:
            self.looks.append((learns, compares))
            keep = {n: torch.ones(4) for n in vectors.keep if learns}
            share = {n: torch.ones(4) for n in vectors.share if learns}
            return Look(1.0, 1.0 if compares else None, keep, share)

    for steps, turns, watches in ((50, 20, 15), (300, 60, 18), (2000, 60, 18)):
        found, still = search(), Still()
        still.looks = []
        for step in range(steps):
            found.turn((step + 1) / steps, still)
        assert found.structure_steps == pytest.approx(turns, abs=2), steps
        learning = [compares for learns, compares in still.looks if learns]
        assert sum(learning) == pytest.approx(len(learning) / 5, abs=1)
        assert all(compares for learns, compares in still.looks if not learns)
        # outside it looks a fifth as often
        assert len(still.looks) - len(learning) == pytest.approx(watches, abs=2)
        assert len(found.watched) == sum(compares for _, compares in still.looks)


def test_no_structure_is_ever_empty() -> None:
    found = search(0.4)
    with torch.no_grad():
        for head in found.network.heads:
            head.weight.mul_(200)
    for threshold in (-1e9, -5.0, 0.0, 5.0, math.inf):
        vectors = found.vectors_at(threshold)
        for name, alive in vectors.alive().items():
            assert float(alive.sum()) >= 1, (threshold, name)
    for _ in range(30):
        for name, alive in found.draw(0.2).alive().items():
            assert float(alive.sum()) >= 1, name


def test_the_exported_plan_meets_the_budget_and_is_the_closest() -> None:
    found = search(0.5)
    with torch.no_grad():
        for head in found.network.heads:
            head.weight.mul_(10)
    chosen = found.fitted()
    assert float(chosen.cost(PRICES)) <= 0.5 * PRICES.total
    levels = torch.cat(found._logits()).add(-math.log(math.log(2))).sort().values.tolist()
    lower = max((x for x in levels if x < found.threshold), default=None)
    if lower is not None:
        assert float(found.vectors_at(lower).cost(PRICES)) > 0.5 * PRICES.total
    assert found.fitted().plan(ALL, "", "") == chosen.plan(ALL, "", "")


def test_a_unit_is_exported_if_most_draws_keep_it() -> None:
    """The median of Gumbel(0, 1) is 0.3665, so the bar for o + b lies at its negative."""
    found = search(families=("prune",))
    found._logits = lambda: [torch.tensor([-0.36, -0.37, 5.0, -5.0])] * len(found.vectors)
    assert found.vectors_at(0.0).keep["t0"].tolist() == [1, 0, 1, 0]
    draws = torch.stack([found.draw(0.2).keep["t0"] for _ in range(2000)]).mean(0)
    assert draws[:2].tolist() == pytest.approx([0.5, 0.5], abs=0.04)
    assert draws[2:].tolist() == pytest.approx([1, 0], abs=0.01)


def test_what_cannot_be_reached_is_said_at_once() -> None:
    with pytest.raises(BudgetError, match=r"by block in the towers text and vision: 0.64"):
        search(0.3, families=("block",))
    with pytest.raises(UnsupportedError, match="towers are text, vision"):
        search(base="words")
    for options, says in (
        ({"families": ("prone",)}, "Did you mean 'prune'"),
        ({"families": ()}, "at least one"),
        ({"every": 0}, "every must be a whole number from 1 to"),
        ({"warmup": 0.6}, "must come before freeze"),
        ({"mismatch": "ignore"}, "one of error, skip"),
    ):
        with pytest.raises(RecipeError, match=says):
            vlprune.JSP(**options)
    with pytest.raises(VlpruneError, match="not made a structure step"):
        search().keep()


def test_unlike_layers_stop_it_or_are_left_alone() -> None:
    problem = Problem(
        ALL, PRICES, 0.5, dict, shareable=lambda t, s: "too wide" if t.name == "v1" else ""
    )
    with pytest.raises(UnsupportedError, match="v1 with t3: too wide; give mismatch='skip'"):
        vlprune.JSP().start(problem)
    found: Any = vlprune.JSP(mismatch="skip").start(problem)
    assert {v.structure.name for v in found.vectors if v.source and v.source != "t0"} == {
        "v0", "v2", "t5"
    }  # fmt: skip


# -- on a model ----------------------------------------------------------------------------


def batch(seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (8, 6), generator=g)
    pixels = torch.randn(8, 3, 16, 16, generator=g)
    return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}


HELD_OUT = [batch(100 + i) for i in range(3)]
STEPS = 60
FAST = {"every": 2, "learning_rate": 2e-2, "alignment": 1e-3, "budget_weight": 12.0}


def run(
    steps: range = range(STEPS),
    state: Any = None,
    model: Any = None,
    look: Any = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """A search of the model from ``state``; its compressor, model and optimizer.

    ``look`` is called before every step with the number of the step and these three.
    """
    torch.manual_seed(1)
    model = model or clip((4, 4))
    compressor = vlprune.Compressor(
        model.train(), vlprune.JSP(**{**FAST, **options}), {"params": 0.6}, held_out=HELD_OUT
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if state:
        compressor.restore(dict(reversed(state[0].items())))  # a file gives any order
        optimizer.load_state_dict(state[1])
    for step in steps:
        if look:
            look(step, compressor, model, optimizer)
        optimizer.zero_grad()
        model(**batch(step % 8)).loss.backward()
        compressor.step((step + 1) / STEPS)
        optimizer.step()
    return compressor, model, optimizer


STOPS = (17, 41)  # while it learns, and after the freeze


@dataclass
class Whole:
    """A run from beginning to end, and what it was at some steps. One test may finish it."""

    compressor: Any
    model: Any
    plan: Any
    watched: Any
    weights: dict[str, torch.Tensor]
    stops: dict[int, Any]


@pytest.fixture(scope="module")
def whole() -> Whole:
    stops = {}

    def look(step: int, compressor: Any, model: Any, optimizer: Any) -> None:
        if step in STOPS:
            state = compressor.state(), optimizer.state_dict(), model.state_dict()
            stops[step] = (compressor.plan(), copy.deepcopy(state))

    compressor, model, _ = run(look=look)
    watched, weights = copy.deepcopy((compressor.search.watched, model.state_dict()))
    return Whole(compressor, model, compressor.plan(), watched, weights, stops)


@pytest.mark.whole
def test_a_whole_run(whole: Whole) -> None:
    compressor, model = whole.compressor, whole.model
    structures, vectors = compressor.structures, compressor.search.chosen()
    facts = compressor.search.facts()
    assert facts["structure_steps"] > 5
    # P from the vectors is the real number of parameters, before and after the cut
    plan = compressor.plan()
    wanted = float(vectors.cost(compressor.prices))
    assert wanted == cost.params(model, structures, plan)
    assert plan.share, "nothing is shared"
    assert any(len(units) < 20 for name, units in plan.keep.items() if "mlp" in name)
    # the weights have come to the structure, so masked and whole model nearly agree
    started = clip((4, 4))
    far, near = (float(alignment(m, structures, vectors)) for m in (started, model))
    assert near < 0.02 * far
    assert abs(facts["gap"]) < 0.05
    model.eval()
    with mixed(model, structures, plan), gated(model, structures, plan), torch.no_grad():
        masked = model(**inputs()).logits_per_image
    small = compressor.finish()
    report = compressor.report()
    whole = vlprune.materialize(copy.deepcopy(small))
    assert sum(p.numel() for p in whole.parameters()) == report["params"]["materialised"]
    assert sum(p.numel() for p in small.parameters()) == wanted == report["params"]["after"]
    assert report["budget"]["reached"] <= 0.6
    assert report["verified"]["difference"] < 1e-10
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs()).logits_per_image, masked, atol=1e-4, rtol=1e-4)
    towers = {row["tower"]: row["shared"] for row in report["groups"] if row["kind"] == "ffn"}
    assert sum(towers.values()) > 0
    assert {"masked_loss", "full_loss", "gap", "remains"} <= report["search_history"][-1].keys()


@pytest.mark.whole
def test_same_seed_same_plan_and_a_stopped_run_is_the_run_it_continues(whole: Whole) -> None:
    """Bit by bit: all of it lies where torch puts new tensors."""
    other, _, _ = run(range(STOPS[-1]), seed=5)
    assert whole.stops[STOPS[-1]][0] != other.plan()
    for stop in STOPS:
        *state, weights = whole.stops[stop][1]
        model = clip((4, 4))
        model.load_state_dict(weights)
        resumed, model, _ = run(range(stop, STEPS), state, model)
        assert resumed.plan() == whole.plan
        close(whole.watched, resumed.search.watched)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, whole.weights[name]), name


def test_training_without_structure_steps_is_plain_training() -> None:
    """Held-out batches touch neither weights nor random numbers nor the mode."""
    _, searched, _ = run(range(20), warmup=0.9, freeze=1.0, align=1.0)
    torch.manual_seed(1)
    plain = clip((4, 4)).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for step in range(20):
        optimizer.zero_grad()
        plain(**batch(step % 8)).loss.backward()
        optimizer.step()
    assert searched.training
    for a, b in zip(searched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_model_answers_held_out_batches_in_eval_mode() -> None:
    model = clip((4, 4)).train()
    modes, seen = [], []

    def loss(given: Any) -> torch.Tensor:
        modes.append(model.training)
        seen.append(int(given["input_ids"][0, 0]))
        return model(**given).loss

    compressor = vlprune.Compressor(
        model, vlprune.JSP(every=1), {"params": 0.6}, held_out=HELD_OUT, loss=loss
    )
    for _ in range(4):
        model(**batch(0)).loss.backward()
        compressor.step(0.2)
    assert modes == [False] * 5  # at first also without the vectors
    firsts = [int(one["input_ids"][0, 0]) for one in HELD_OUT]
    assert seen[1:] == [*firsts, firsts[0]]  # in turn
    assert model.training


@pytest.mark.parametrize(("steps", "most"), [(100, 50), (4000, 201)])
def test_a_long_search_moves_its_weights_some_hundred_times(steps: int, most: int) -> None:
    """... from their whole distance to exactly none, each move by what the schedule has lost."""
    found = search()
    factors: list[tuple[float, float]] = []

    class Stub:
        def align(self, wanted: Any) -> None:
            factors.append((progress, wanted.factor))

        def look(self, vectors: Any, learns: bool, compares: bool) -> Look:
            keep = {n: 0.1 * torch.randn_like(v) for n, v in vectors.keep.items()}
            share = {n: 0.1 * torch.randn_like(v) for n, (_, v, _) in vectors.share.items()}
            return Look(1.0, 1.0, keep, share)

    for step in range(1, steps + 1):
        progress = step / steps
        found.turn(progress, Stub())
    moves = [one for one in factors if one[1] < 1]
    assert min(steps / 4, 100) < len(moves) <= most
    assert moves[-1] == (1.0, 0.0)
    left = 1.0
    for at, factor in moves[:-1]:
        left *= factor
        assert left == pytest.approx(1 - removed_share((at - 0.5) / 0.5), abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "swin", "mixtral", "gpt2"])
def test_gradients_of_the_distance_are_those_of_autograd(name: str) -> None:
    """Of weights that go, and of both sides where one takes another's; frozen ones get none."""
    model = build(name).model.double()
    structures = vlprune.discover(model).structures
    keep = {s.name: (torch.arange(s.size) % 3 > 0).float() for s in structures}
    share = {}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for target, source in itertools.pairwise(structures):
        if target.kind == source.kind and not shareable(target, source, shapes):
            taken = (torch.arange(target.size) % 2).float()
            share[target.name] = (source.name, taken, torch.arange(target.size))
    wanted = Vectors(keep, share)
    frozen = next(p for n, p in model.named_parameters() if n == structures[0].slots[0].param)
    frozen.requires_grad_(False)
    (0.25 * alignment(model, structures, wanted)).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert expected
    model.zero_grad()
    weight = next(p for n, p in model.named_parameters() if n in expected)
    weight.grad = torch.ones_like(weight)  # of the loss
    turns = Turns(model, structures, None, (), None)
    turns.align(Alignment(wanted, 0.25))
    weight.grad -= 1
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for n, gradient in expected.items():
        torch.testing.assert_close(found[n], gradient, rtol=1e-9, atol=1e-12)


def test_where_the_weights_go_is_worked_out_once_for_each_structure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not at every step: between turns the same units of the same weights are on their way."""
    worked_out = []
    monkeypatch.setattr(
        "vlprune.training.turns.moves_to", lambda *given: worked_out.append(1) or moves_to(*given)
    )
    compressor, _, _ = run(every=10, turns=1)
    facts = compressor.search.facts()
    assert 0 < len(worked_out) <= facts["structure_steps"] + 1 < facts["steps"] / 8


def test_families_alone() -> None:
    prune, _, _ = run(families=("prune",))
    assert not prune.plan().share
    torch.manual_seed(0)
    cross = vlprune.Compressor(
        clip((4, 4)), vlprune.JSP(families=("cross",)), {"params": 0.9}, held_out=HELD_OUT
    )
    assert all(v.source.startswith("text_model") for v in cross.search.vectors)


def test_matched_units_share_with_their_likeness() -> None:
    model = clip((4, 4))
    texts = [m.mlp for m in model.text_model.encoder.layers]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the vision layer holds the text layer's neurons in another order
        for number, layer in enumerate(model.vision_model.encoder.layers):
            layer.mlp.fc1.weight[:20] = texts[number].fc1.weight[order]
            layer.mlp.fc2.weight[:, :20] = texts[number].fc2.weight[:, order]
    compressor = vlprune.Compressor(
        model, vlprune.JSP(match=True), {"params": 0.6}, held_out=HELD_OUT
    )
    found = next(
        v
        for v in compressor.search.vectors
        if v.source and v.name.startswith("vision") and "mlp" in v.name
    )
    assert found.units[:20].tolist() == order.tolist()
    assert found.units[20:].tolist() == [-1] * 12


def test_held_out_batches_are_asked_for() -> None:
    compressor = vlprune.Compressor(clip((4, 4)), vlprune.JSP(every=1), {"params": 0.6})
    model = compressor.model
    model(**batch(0)).loss.backward()
    with pytest.raises(VlpruneError, match="held_out="):
        compressor.step(0.2)


def test_weights_at_distance_zero_are_the_structure() -> None:
    model = clip((4, 4)).double().eval()
    compressor, _, _ = run(range(40), model=clip((4, 4)))
    vectors, structures = compressor.search.chosen(), compressor.structures
    far = float(alignment(model, structures, vectors))
    draw_near(model, structures, vectors, 0.5)
    assert float(alignment(model, structures, vectors)) == pytest.approx(far / 2, rel=0.2)
    # a unit that shares follows its source, whichever of the two is named first
    late = Vectors(dict(reversed(vectors.keep.items())), dict(reversed(vectors.share.items())))
    draw_near(model, structures, late, 0.0)
    assert float(alignment(model, structures, vectors, epsilon=0.0)) == 0
    plan = vectors.plan(structures, "head_dim", "")
    probe = inputs(torch.float64)
    with torch.no_grad():
        whole = model(**probe).logits_per_image
        with mixed(model, structures, plan), gated(model, structures, plan):
            masked = model(**probe).logits_per_image
    assert float((whole - masked).abs().max()) < 1e-12


def test_a_search_too_short_to_learn_in_is_refused_as_it_begins() -> None:
    compressor = vlprune.Compressor(clip((4, 4)), vlprune.JSP(), {"params": 0.6}, held_out=HELD_OUT)

    class Args:
        bf16 = fp16 = load_best_model_at_end = False

    class State:
        global_step, max_steps = 0, 2

    with pytest.raises(RecipeError, match="of 2 steps leaves JSP no step to learn in, between"):
        compressor.callback().on_train_begin(Args, State, None)
    State.max_steps = 4
    compressor.callback().on_train_begin(Args, State, None)


def test_a_budget_in_macs_is_met_by_pruning() -> None:
    """Sharing saves no MACs, so a budget in MACs is met by what goes."""
    model = clip((4, 4)).train()
    compressor = vlprune.Compressor(
        model, vlprune.JSP(**FAST), {"macs": 0.7}, held_out=HELD_OUT, example_inputs=batch(0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(30):
        optimizer.zero_grad()
        model(**batch(step % 8)).loss.backward()
        compressor.step((step + 1) / 30)
        optimizer.step()
    small = compressor.finish()
    found = cost.measure_macs(small, (), batch(0)).total
    report = compressor.report()
    assert report["macs"]["after"] == found
    assert found <= 0.7 * report["macs"]["before"]
