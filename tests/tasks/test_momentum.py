"""Contrast with a momentum encoder: its average, its queue, its soft targets, hard negatives."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlprune
from ranks import HEAD, launch
from vlprune.commands.pipeline.make import split
from vlprune.cutting.gates import gated, has_gates
from vlprune.cutting.ungated import ungated
from vlprune.data.captions import CaptionedImage, EachCaption
from vlprune.data.datasets.rows import Part
from vlprune.errors import RecipeError
from vlprune.recipe.spec import DataSpec, ModelSpec, Recipe, Training
from vlprune.tasks import BlipRetrievalTask, CaptioningTask, RetrievalTask
from vlprune.training.fit import fit
from vlprune.training.objective import Trainee

SMALL = ModelSpec(width=16, heads=2, vision_layers=1, text_layers=1, image_size=32, patch_size=16)
FEW = DataSpec(format="shapes", train_items=6, test_items=4)
BOTH = pytest.mark.parametrize("cls", [RetrievalTask, BlipRetrievalTask])
INPUTS = ("pixel_values", "input_ids", "attention_mask")


def contrast(folder: Path, cls: Any, **options: Any) -> tuple[Any, Any]:
    task = cls(SMALL, FEW, folder, {"queue": 8, **options})
    torch.manual_seed(0)
    return task, task.objective(task.new_model()).train()


def batch_of(task: Any, start: int = 0, count: int = 3) -> dict[str, Tensor]:
    found: dict[str, Tensor] = task.collate(
        list(task.train[start : start + count]), random.Random(start)
    )
    return found


def shift(objective: Any) -> None:
    """Other weights, as after an optimizer step."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# -- the average ---------------------------------------------------------------------------


@BOTH
def test_the_averaged_pass_has_no_gates(cls: Any, tmp_path: Path) -> None:
    """It is that of a twin without a search, also after a pass of the gated model."""
    task, objective = contrast(tmp_path, cls)
    twin, inputs = copy.deepcopy(objective), [batch_of(task)[name] for name in INPUTS]
    compressor = vlprune.Compressor(objective.model, vlprune.UPop(), {"params": 0.8})
    with compressor:
        with torch.no_grad():
            for gate in compressor.gates.values():
                gate.fill_(0.5)
        now = objective.features(*inputs)[:2]
        slow, want = objective._averaged(*inputs), twin._averaged(*inputs)
        assert has_gates(objective.model)
        assert all(map(torch.equal, slow, want))
        assert not any(map(torch.equal, slow, now))
    assert not has_gates(objective.model)


def test_gates_learn_from_the_current_features_as_ever(tmp_path: Path) -> None:
    """The loss and its gradients, made by hand from a twin's averaged features."""
    task, objective = contrast(tmp_path, RetrievalTask)
    batch = batch_of(task)
    slow = copy.deepcopy(objective)._averaged(*(batch[name] for name in INPUTS))
    compressor = vlprune.Compressor(objective.model, vlprune.UPop(), {"params": 0.8})
    losses, gradients = [], []
    with compressor:
        with torch.no_grad():
            for gate in compressor.gates.values():
                gate.fill_(0.5)
        losses.append(objective(**batch)["loss"])
        losses[0].backward()
        gradients.append(compressor._gating.take_gradients())
        now = objective.features(*(batch[name] for name in INPUTS))
        loss, queues = 0.0, (objective.text_queue, objective.image_queue)
        for own, mine, others, queue in zip(now, slow, slow[::-1], queues, strict=False):
            candidates = objective.features.scale() * torch.cat([others, queue]).T
            soft = (mine @ candidates).softmax(1).detach()
            target = 0.4 * soft + 0.6 * torch.eye(*soft.shape)
            loss = loss + F.cross_entropy(own @ candidates, target) / 2
        losses.append(loss)
        losses[1].backward()
        gradients.append(compressor._gating.take_gradients())
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert any(gradient.any() for gradient in gradients[0].values())


def test_without_gates_nothing_of_a_search_is_left() -> None:
    """Neither a mixture, nor gates around a forward of the instance, and all of it comes back."""
    layer = nn.Sequential(nn.Linear(4, 4))
    structure = vlprune.Structure(
        name="a",
        tower="vision",
        kind="ffn",
        size=4,
        gates=(vlprune.structures.structure.Gate("0", "output"),),
        slots=(),
    )
    x, want = torch.ones(1, 4), layer(torch.ones(1, 4))
    layer[0].forward = lambda *args: nn.Linear.forward(layer[0], *args)
    with gated(layer, [structure], {"a": torch.full((4,), 0.5)}):
        layer[0].__dict__["bias"] = torch.full((4,), 7.0)
        before = layer(x)
        with ungated(layer):
            assert torch.equal(layer(x), want)
        with pytest.raises(RuntimeError, match="shapes"), ungated(layer):
            layer(torch.ones(1, 5))
        assert torch.equal(layer(x), before)
        assert not torch.equal(before, want)
        del layer[0].__dict__["bias"]
    assert torch.equal(layer(x), want)


@BOTH
def test_accumulated_batches_are_one_step(cls: Any, tmp_path: Path) -> None:
    """The average moves once, and they see the queue as it was before the step."""
    task, objective = contrast(tmp_path, cls, momentum=0.5)
    start = {name: b.clone() for name, b in objective.named_buffers() if "average" not in name}
    before = objective.get_buffer("average_3").clone()
    with torch.no_grad():
        list(objective.features.parameters())[3].add_(1.0)
    for first in (0, 3, 0):
        objective(**batch_of(task, first))
        assert torch.allclose(objective.get_buffer("average_3"), before + 0.5, atol=1e-6)
        for name, buffer in start.items():
            assert torch.equal(objective.get_buffer(name), buffer)
    objective.stepped()
    assert int(objective.steps) == 1
    keys = [key for first in (0, 3, 0) for key in batch_of(task, first)["keys"].tolist()]
    assert objective.keys.tolist() == [keys[8], *keys[1:8]]  # nine into eight places
    assert int(objective.place) == 1
    objective(**batch_of(task))
    assert torch.allclose(objective.get_buffer("average_3"), before + 0.75, atol=1e-6)


def test_looks_at_held_out_batches_leave_no_trace(tmp_path: Path) -> None:
    """A search puts the model into eval mode for them; an evaluation all of it."""
    task, objective = contrast(tmp_path, RetrievalTask, momentum=0.5)
    shift(objective)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    for module in (objective.model, objective):
        objective.train()
        module.eval()
        objective(**batch_of(task))
        assert not objective._waiting
        for name, buffer in before.items():
            assert torch.equal(objective.get_buffer(name), buffer)


@pytest.mark.parametrize("value", [9.0, -9.0])
def test_a_temperature_beyond_its_bounds_comes_back(value: float, tmp_path: Path) -> None:
    """Where it learns, as the authors hold it; it would get no gradient out there."""
    for cls, bounds in ((RetrievalTask, (0.0, 4.6052)), (BlipRetrievalTask, (0.001, 0.5))):
        task, objective = contrast(tmp_path, cls)
        model = objective.model
        temperature = getattr(model, "logit_scale", getattr(objective.features, "temperature", 0))
        temperature.data.fill_(value)
        objective(**batch_of(task))["loss"].backward()
        assert float(temperature) == pytest.approx(bounds[value > 0], abs=1e-4)
        assert temperature.grad.abs() > 0


# -- the queue -----------------------------------------------------------------------------


@BOTH
def test_clip_queues_current_features_and_blip_averaged_ones(cls: Any, tmp_path: Path) -> None:
    task, objective = contrast(tmp_path, cls)
    shift(objective)
    batch = batch_of(task)
    inputs = [batch[name] for name in INPUTS]
    objective(**batch)
    objective.stepped()
    now, slow = objective.features(*inputs)[:2], objective._averaged(*inputs)
    held = objective.image_queue[:3], objective.text_queue[:3]
    torch.testing.assert_close(held, slow if cls is BlipRetrievalTask else now)
    assert not torch.allclose(now[0], slow[0], atol=1e-2)
    assert not objective.image_queue.requires_grad


def test_the_contrastive_loss_by_hand(tmp_path: Path) -> None:
    task, objective = contrast(tmp_path, RetrievalTask, alpha=0.0)
    batch = batch_of(task)
    objective.eval()
    loss = objective(**batch)["loss"]
    image, text, _ = objective.features(*(batch[name] for name in INPUTS))
    scale = objective.model.logit_scale.exp()
    want = 0.0
    for own, others, queue in (
        (image, text, objective.text_queue),
        (text, image, objective.image_queue),
    ):
        logits = scale * own @ torch.cat([others, queue]).T
        want += float(F.cross_entropy(logits, torch.arange(3))) / 2
    assert float(loss) == pytest.approx(want, rel=1e-5)


# -- soft targets --------------------------------------------------------------------------


def test_soft_targets_gain_weight_over_the_first_epoch(tmp_path: Path) -> None:
    """alpha * min(1, step / steps of an epoch), wherever the training was stopped."""
    task, objective = contrast(tmp_path, RetrievalTask)
    assert objective._softness() == 0.4  # of an objective that is not told of epochs
    found = []
    for step in range(6):
        if step in (0, 2):  # a new process, from a checkpoint
            state = objective.state_dict()
            _, objective = contrast(tmp_path, RetrievalTask)
            objective.load_state_dict(state)
            objective.begin(4)
        found.append(float(objective._softness()))
        for _ in range(2):
            objective(**batch_of(task))
        objective.stepped()
    assert found == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_weight_of_soft_targets_is_that_of_the_loss(tmp_path: Path) -> None:
    task, objective = contrast(tmp_path, RetrievalTask, alpha=1.0)
    batch = batch_of(task)
    objective.begin(10)
    objective.eval()
    losses = []
    for step in (0, 5, 10):
        objective.steps.fill_(step)
        losses.append(float(objective(**batch)["loss"]))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


class Told(Trainee):
    """Notes what it is told while it trains."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        self.said: list[Any] = []

    def begin(self, epoch: int) -> None:
        self.said.append(epoch)

    def stepped(self) -> None:
        self.said.append("step")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.said.append("batch")
        return {"loss": self.model(x).square().mean()}


def test_a_training_tells_of_its_steps_and_epochs() -> None:
    """The objective inside another, too."""
    inner = Told()
    spec = Training(epochs=1.5, batch_size=2, accumulate=2, save_steps=0)
    collate = lambda items, rng: {"x": torch.tensor(items, dtype=torch.float)[:, None]}  # noqa: E731
    fit(Trainee(inner), list(range(9)), collate, spec, seed=0)
    assert inner.said == [2, *["batch", "batch", "step"] * 3]


def test_a_training_that_is_stopped_goes_on_exactly(tmp_path: Path) -> None:
    """With accumulated batches: average, queue and soft targets are part of the checkpoint."""

    def trained(**more: Any) -> dict[str, Tensor]:
        task, objective = contrast(tmp_path, RetrievalTask, momentum=0.5)
        spec = Training(steps=4, batch_size=2, accumulate=2, save_steps=2)
        fit(objective, task.train, task.collate, spec, seed=0, **more)
        return objective.state_dict()

    whole = trained()
    stopped = trained(callbacks=[Stop()], checkpoints=tmp_path / "phase")
    assert int(stopped["steps"]) == 2
    again = trained(checkpoints=tmp_path / "phase")
    assert int(again["steps"]) == 4
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name


class Stop(vlprune.training.fit.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


# -- hard negatives ------------------------------------------------------------------------


def test_a_batch_of_one_image_teaches_no_false_negatives(tmp_path: Path) -> None:
    task, objective = contrast(tmp_path, BlipRetrievalTask)
    asked: list[Any] = []
    match = objective.features.match
    objective.features.match = lambda *args: asked.append(args) or match(*args)
    for items, pairs in ((list(task.train[:1]) * 2, 2), (list(task.train[:2]), 6)):
        objective(**task.collate(items, random.Random(0)))["loss"].backward()
        assert len(asked.pop()[0]) == pairs  # each pair, and two negatives where there are any


TOGETHER = (
    HEAD
    + """
from vlprune.tasks.contrast import BlipFeatures
from vlprune.tasks.momentum import MomentumContrast
model = build("blip_retrieval").model
for projection in (model.vision_proj, model.text_proj):  # so that only matching trains the towers
    nn.init.zeros_(projection.weight)
    nn.init.zeros_(projection.bias)
g = torch.Generator().manual_seed(5)
size = model.config.vision_config.image_size
pixels = torch.randn(2, 3, size, size, generator=g)
texts, lengths = torch.randint(6, 50, (2, 6), generator=g), (4, 6)
own = range(2) if world == 1 else [rank]
longest = max(lengths[n] for n in own)  # the two processes pad to other lengths
mask = torch.tensor([[int(i < lengths[n]) for i in range(longest)] for n in own])
batch = {
    "pixel_values": pixels[list(own)],
    "input_ids": texts[list(own), :longest] * mask,
    "attention_mask": mask,
    "keys": torch.tensor([7, 8])[list(own)],
}
run = MomentumContrast(BlipFeatures(model), model.config.image_text_hidden_size, 4, 0.9, 0.4)
read = []
match = run.features.match
run.features.match = lambda *given: read.append(given) or match(*given)
if world > 1:
    run = torch.nn.parallel.DistributedDataParallel(run)
run(**batch)["loss"].backward()
towers = (model.vision_model, model.text_encoder, model.itm_head)
grads = [p.grad.double() for t in towers for p in t.parameters() if p.grad is not None]
result["norms"] = [float(g.norm()) for g in grads]
result["sums"] = [float(g.sum()) for g in grads]
result["pairs"] = len(read[0][0])

# two steps of a CLIP: two processes, or one that accumulates two batches
from vlprune.tasks.contrast import ClipFeatures
model = build("clip").model
run = objective = MomentumContrast(ClipFeatures(model), model.config.projection_dim, 6, 0.5, 0.4)
if world > 1:
    run = torch.nn.parallel.DistributedDataParallel(run)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
objective.begin(4)
for step in range(2):
    pixels = torch.randn(4, 3, 16, 16, generator=g)
    ids, keys = torch.randint(6, 50, (4, 6), generator=g), torch.tensor([1, 2, 3, 1]) + step
    for part in (0, 1) if world == 1 else (rank,):
        rows = slice(2 * part, 2 * part + 2)
        loss = run(pixels[rows], ids[rows], torch.ones_like(ids[rows]), keys[rows])["loss"]
        (loss * world / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    objective.stepped()
state = objective.state_dict()
result["kept"] = {n: state[n].tolist() for n in ("keys", "place", "steps", "image_queue")}
result["sizes"] = [float(t.double().norm()) for t in state.values()]
end()
"""
)


@pytest.mark.slow
def test_two_processes_train_as_one(python: Any, tmp_path: Path) -> None:
    """Of two pairs each is the other's hard negative, and accumulated batches are as processes.

    Gradients of the image states flow to the process that made them.
    """
    (one,) = launch(python, tmp_path, TOGETHER, processes=1)
    assert one["pairs"] == 6
    for two in launch(python, tmp_path, TOGETHER, processes=2):
        assert two["pairs"] == 3
        assert two["norms"] == pytest.approx(one["norms"], rel=1e-3, abs=1e-6)
        assert two["sums"] == pytest.approx(one["sums"], rel=1e-3, abs=1e-4)
        for name in ("keys", "place", "steps"):
            assert two["kept"][name] == one["kept"][name]
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(two["sizes"], one["sizes"], **close)
        queues = (torch.tensor(found["kept"]["image_queue"]) for found in (two, one))
        torch.testing.assert_close(*queues, **close)


# -- one item per caption ------------------------------------------------------------------


def test_an_epoch_passes_over_every_caption() -> None:
    images = [CaptionedImage(Path(name), tuple(name * 2)) for name in ("ab", "c", "def")]
    each = EachCaption(images)
    flat = [(image.image, caption) for image in images for caption in image.captions]
    assert [(item.image, *item.captions) for item in each] == flat
    assert [(each[n].image, *each[n].captions) for n in range(len(each))] == flat
    assert each[-1] == CaptionedImage(Path("def"), ("f",))
    assert isinstance(each[2:5], Part)
    assert [item.captions for item in each[2:5]] == [("a",), ("b",), ("c",)]
    with pytest.raises(IndexError):
        each[len(flat)]
    assert each.groups() == [range(4), range(4, 6), range(6, 12)]


def test_an_image_is_held_out_with_all_its_captions(tmp_path: Path) -> None:
    recipe = Recipe(
        task="retrieval",
        budget={"params": 0.6},
        method={"name": "jsp"},
        options={"every_caption": True},
        search=Training(steps=4),
    )
    task = RetrievalTask(SMALL, replace(FEW, train_items=40), tmp_path, recipe.options)
    trained, held_out = split(task, recipe)
    apart = {item.image for item in held_out.items}
    assert len(apart) == 2
    assert not apart & {item.image for item in trained}
    assert len(held_out.items) + len(trained) == len(task.train)


@pytest.mark.parametrize("cls", [RetrievalTask, BlipRetrievalTask, CaptioningTask])
def test_a_task_may_train_on_every_caption(cls: Any, tmp_path: Path) -> None:
    task, every = (cls(SMALL, FEW, tmp_path, {"every_caption": wanted}) for wanted in (False, True))
    assert len(task.train) == 6
    assert len(every.train) == sum(len(item.captions) for item in task.train) > 6
    assert len(every.test) == len(task.test)
    if cls is not CaptioningTask:  # captions of one image are no negatives of each other
        both = every.collate([every.train[0], every.train[1]], random.Random(0))
        assert len(set(both["keys"].tolist())) == 1
        assert not torch.equal(*both["input_ids"])


def test_a_stream_has_no_captions_to_count() -> None:
    hub = {"path": "someone/pictures"}
    with pytest.raises(RecipeError, match=r"options.every_caption must be false with data.stream"):
        Recipe(
            task="retrieval",
            budget={"params": 0.5},
            options={"every_caption": True},
            model=ModelSpec(path="clip"),
            data=DataSpec(format="dataset", train=hub, test=hub, streaming=True, test_items=2),
        )
