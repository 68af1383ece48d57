"""The moving average of the weights: its numbers, what counts in it, and what is saved of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

import vlprune
from small_models import small
from small_runs import DEMO, TINY
from vlprune.commands.pipeline.compress import compress
from vlprune.cutting.padded import PaddedLinear
from vlprune.cutting.sharing.ties import is_shared
from vlprune.errors import RecipeError, UnsupportedError
from vlprune.recipe.spec import Training, load_recipe
from vlprune.testing import build
from vlprune.training.average import AVERAGE_FILE, Average
from vlprune.training.fit import fit
from vlprune.training.objective import Trainee

SLOPE = Training(
    steps=3, batch_size=1, optimizer="sgd", learning_rate=0.1, weight_decay=0, warmup=0, clip=0,
    decay="constant", ema=0.5, save_steps=1,
)  # fmt: skip


class Slope(nn.Module):
    """A weight whose gradient is always 1, and buffers of three kinds that move with it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Any:
        for name in ("mean", "passing", "count"):
            getattr(self, name).add_(1)
        return {"loss": (self.weight * x).sum()}


def train(model: nn.Module, spec: Training = SLOPE, **more: Any) -> Any:
    return fit(model, [1.0, 1.0], lambda _rows, _: {"x": torch.ones(1)}, spec, seed=0, **more)


def test_an_average_by_hand() -> None:
    """Nesterov's steps of 1.9, 2.71 and 3.439 times 0.1: 0.81, 0.539, 0.1951 after 1."""
    model = Slope()
    train(model)
    # (1 + .81) / 2 = .905, (.905 + .539) / 2 = .722, (.722 + .1951) / 2 = .45855
    assert float(model.weight) == pytest.approx(0.45855)
    assert float(model.get_buffer("mean")) == pytest.approx(2.125)  # of 0, 1, 2, 3
    assert (float(model.get_buffer("passing")), int(model.get_buffer("count"))) == (3, 3)
    last = Slope()
    train(last, Training(**{**vars(SLOPE), "ema": 0.0}))
    assert float(last.weight) == pytest.approx(0.1951)


def test_few_bits_do_not_stop_the_average() -> None:
    """40 steps towards 2 at a decay of .9998 come to 1.00797, which is no 1 in bfloat16 either."""
    model = Slope(torch.bfloat16)
    average = Average(model, 0.9998)
    state: Any = type("State", (), {"global_step": 0})()
    average.on_train_begin(None, state, None)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(40):
        average.on_step_end(None, state, None)
    average.on_train_end(None, state, None)
    assert model.weight.dtype == torch.bfloat16
    assert float(model.weight) == 1.0078125


class Weights(TrainerCallback):
    """The weights before training and after every step, of the modules that read them."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, [read(model)]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(read(self.model))


def read(model: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{leaf}": getattr(module, leaf).detach().clone()
        for name, module in model.named_modules()
        for leaf in ("weight", "bias")
        if isinstance(getattr(module, leaf, None), Tensor)
    }


def shared_clip() -> Any:
    """A CLIP one of whose layers stores half of its FFN with another layer."""
    model: Any = build("clip").model
    description = vlprune.discover(model)
    source, target = [s for s in description if s.kind == "ffn" and s.tower == "vision"][:2]
    vlprune.rewrite(model, description, vlprune.Plan(share={target.name: (source.name, (0, 2))}))
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "dense": lambda: build("clip").model,
    "padded": lambda: small("clip", attention="qk_vo"),
    "shared": shared_clip,
}


def test_which_models_these_are() -> None:
    assert any(isinstance(module, PaddedLinear) for module in MODELS["padded"]().modules())
    assert is_shared(MODELS["shared"]())


@pytest.mark.parametrize("kind", [*MODELS, "tied"])
def test_the_weights_that_modules_read_are_averaged(kind: str) -> None:
    sample = build("clip" if kind in MODELS else "blip_captioning")
    batch = {**sample.inputs, "return_loss": True}
    if kind in MODELS:
        model = MODELS[kind]()
    else:
        model, batch = sample.model, {**sample.inputs, "labels": sample.inputs["input_ids"]}
    weights = Weights(model)
    spec = Training(steps=4, batch_size=2, learning_rate=0.01, ema=0.7)
    fit(model, [0, 1], lambda _rows, _: batch, spec, seed=0, callbacks=[weights])
    expected = weights.seen[0]
    for step in weights.seen[1:]:
        expected = {name: 0.7 * old + 0.3 * step[name] for name, old in expected.items()}
    found = read(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert any(not found[name].equal(weights.seen[-1][name]) for name in found)


def test_only_the_model_of_a_trainee_is_averaged(tmp_path: Path) -> None:
    class Queued(Trainee):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.extra = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Any:
            return {"loss": self.model(x)["loss"] + self.extra.sum()}

    trainee = Queued(Slope())
    train(trainee, checkpoints=tmp_path)
    assert float(trainee.model.weight) == pytest.approx(0.45855)
    assert float(trainee.extra) == pytest.approx(-0.8049)
    assert load_file(tmp_path / "checkpoint-3" / AVERAGE_FILE).keys() == {"weight", "mean"}


class Stop(Exception):
    """A training ends here."""


def test_a_training_that_was_stopped_ends_with_the_same_average(tmp_path: Path) -> None:
    def advance(steps: int, note: str = "") -> None:
        done.append(steps)
        if sum(done) == 2:
            raise Stop

    def anew() -> Slope:
        model = Slope()
        torch.nn.init.constant_(model.weight, 7.0)  # the checkpoint's weights count
        return model

    whole, done = Slope(), list[int]()
    train(whole)
    with pytest.raises(Stop):  # in step 2
        train(Slope(), checkpoints=tmp_path, advance=advance)
    for _ in ("after step 1", "after the last step"):
        model = anew()
        train(model, checkpoints=tmp_path)
        assert model.weight.equal(whole.weight)
        assert model.get_buffer("mean").equal(whole.get_buffer("mean"))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_what_is_evaluated_and_saved_is_the_average(tmp_path: Path) -> None:
    """An average that hardly moves: retraining ends where it began."""
    recipe = load_recipe(DEMO, [*TINY, "retrain.ema=0.99999999", "retrain.save_steps=0"])
    report = compress(recipe, tmp_path / "slow")
    metrics = report["metrics"]
    assert metrics["retrained"] == metrics["cut"]
    at_once = load_recipe(DEMO, [*TINY, "retrain.steps=0"])
    compress(at_once, tmp_path / "cut")
    saved, cut = (load_file(tmp_path / n / "model.safetensors") for n in ("slow", "cut"))
    assert saved.keys() == cut.keys()
    for name, tensor in cut.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "slow" / "report.json").read_text())["metrics"] == metrics


def test_a_search_takes_no_average() -> None:
    with pytest.raises(RecipeError, match=r"^search.ema must be 0: units fade .*retrain.ema$"):
        load_recipe(DEMO, ["search.ema=0.5"])
    assert load_recipe(DEMO, ["retrain.ema=0.9998", "train.ema=0.2"]).toy().retrain.ema == 0.5
    assert load_recipe(DEMO, ["train.ema=0.2"]).toy().train.ema == 0.2


@pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_weights_are_refused_before_the_first_step(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlprune.training import fit as training

    real = training._Trainer.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        setattr(self, kind, True)

    monkeypatch.setattr(training._Trainer, "__init__", sharded)
    model = Slope()
    with pytest.raises(UnsupportedError, match="ema keeps the average of whole weights"):
        train(model)
    assert float(model.weight) == 1
