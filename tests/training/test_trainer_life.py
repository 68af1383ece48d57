"""The Trainer as people use it: more than one train() from beginning to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.errors import UnsupportedError, VlpruneError
from vlprune.testing import build
from vlprune.training.compressor import CompressorCallback
from vlprune.training.objective import Trainee

STEPS = 6


def make(
    folder: Path, method: Any = None, callbacks: Any = (), with_callback: bool = True, **more: Any
) -> tuple[Any, Any]:
    """A Trainer of a tiny ViT with a search in it, and the Compressor."""
    transformers.set_seed(0)
    model = build("vit").model
    held_out = [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.arange(2)}]
    compressor = vlprune.Compressor(
        model, method or vlprune.UPop(interval=1), {"params": 0.7}, held_out=held_out
    )
    mine = [compressor.callback()] if with_callback else []
    return trainer_of(model, folder, [*mine, *callbacks], **more), compressor


def trainer_of(model: Any, folder: Path, callbacks: Any = (), **more: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    items = [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 2}
        for i in range(8)
    ]
    optimizers = more.pop("optimizers", lambda _: (None, None))(model)
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "learning_rate": 1e-3, **more,
    }  # fmt: skip
    return transformers.Trainer(
        model=model, args=transformers.TrainingArguments(**arguments), train_dataset=items,
        eval_dataset=items[:4], callbacks=list(callbacks), optimizers=optimizers,
    )  # fmt: skip


def untrained(trainer: Any, model: Any) -> list[str]:
    """The weights that another train() leaves as they are, though they get a gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    # softmax takes no notice of a bias of the keys, whose gradient is rounding alone
    return [
        name
        for name, p in model.named_parameters()
        if p.equal(before[name]) and not name.endswith("k_proj.bias")
    ]


class At(transformers.TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act(control)


def interrupt(_control: Any) -> None:
    raise KeyboardInterrupt


def stop(control: Any) -> None:
    control.should_training_stop = True


@pytest.mark.parametrize(
    "method", [vlprune.UPop(interval=1), vlprune.Taylor()], ids=["upop", "taylor"]
)
def test_train_evaluate_save_finish_agree(method: Any, tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path / "out", method)
    trainer.train()
    masked = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "dense"))
    dense = type(compressor.model).from_pretrained(tmp_path / "dense")
    shapes = [tuple(p.shape) for p in dense.parameters()]
    assert shapes == [tuple(p.shape) for p in compressor.model.parameters()]
    reloaded = trainer_of(dense, tmp_path / "again").evaluate()["eval_loss"]
    small = compressor.finish()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    after = trainer.evaluate()["eval_loss"]
    assert reloaded == pytest.approx(masked, abs=1e-5)
    if isinstance(method, vlprune.UPop):  # Taylor only cuts at the end
        assert after == pytest.approx(masked, abs=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        "adamw",
        pytest.param("adamw, callback removed", marks=pytest.mark.slow),
        pytest.param("sgd", marks=pytest.mark.slow),
        "optimizers= passed in",
    ],
)
def test_the_same_trainer_retrains_every_weight(how: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"optim": "sgd", "optim_args": "momentum=0.9"} if how == "sgd" else {}
    if "passed" in how:
        more["optimizers"] = lambda model: (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    trainer, compressor = make(tmp_path, **more)
    trainer.train()
    small = compressor.finish()
    if "removed" in how:
        trainer.remove_callback(CompressorCallback)
    assert untrained(trainer, small) == []


def test_jsp_retrains_too(tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path, vlprune.JSP(every=1, base="vision", other="vision"))
    trainer.train()
    small = compressor.finish()
    assert untrained(trainer, small) == []


def test_too_large_a_batch_starts_the_search_again(tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
    calls = [0]

    def full(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate")

    handle = compressor.model.register_forward_pre_hook(full)
    with pytest.warns(UserWarning, match="starts a new search"):
        trainer.train()
    handle.remove()
    assert compressor.search.steps == STEPS
    compressor.finish()


def test_ctrl_c_and_train_again(tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path, callbacks=[At(3, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert compressor.progress == 0.5
    trainer.remove_callback(At)
    opened: list[bool] = []

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            opened.append(all(bool((g == 1).all()) for g in compressor.gates.values()))

    trainer.add_callback(Look)
    with pytest.warns(UserWarning, match="starts a new search"):
        trainer.train()
    assert opened[0]
    assert not opened[-1]
    assert compressor.search.steps == STEPS
    with pytest.raises(VlpruneError, match="the search has ended"):
        trainer.train()
    compressor.finish()


def test_the_best_model_is_for_retraining_only(tmp_path: Path) -> None:
    best = {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    trainer, compressor = make(tmp_path / "search", **best)
    with pytest.raises(UnsupportedError, match="load_best_model_at_end"):
        trainer.train()
    assert trainer.state.global_step == 0
    trainer, compressor = make(tmp_path / "search")
    trainer.train()
    small = compressor.finish()

    def spoil(_control: Any) -> None:
        with torch.no_grad():
            small.classifier.weight.mul_(-100)

    callbacks = [compressor.callback(), At(5, spoil)]
    again = trainer_of(small, tmp_path / "retrain", callbacks, **best)
    again.train()
    assert again.state.best_global_step < STEPS
    assert again.evaluate()["eval_loss"] == pytest.approx(again.state.best_metric, abs=1e-6)


def test_a_search_that_is_stopped_early_says_so(tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path, callbacks=[At(2, stop)])
    trainer.train()
    with pytest.warns(UserWarning, match="ended at 33%"):
        compressor.finish()
    report = compressor.report()
    assert report["search"]["progress"] == pytest.approx(1 / 3)
    assert any("ended at 33%" in note for note in report["notes"])


def test_callback_states_restored_by_the_trainer(tmp_path: Path) -> None:
    more = {
        "save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True
    }  # fmt: skip
    whole, first = make(tmp_path, **more)
    whole.train()
    resumed, second = make(tmp_path, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.search.total.equal(first.search.total)
    assert second.plan() == first.plan()
    for a, b in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert a.equal(b)


def test_a_search_that_was_complete_is_resumed_for_the_cut(tmp_path: Path) -> None:
    """The Trainer makes one step too many, of which the search takes no notice."""
    more = {"save_strategy": "steps", "save_steps": STEPS}
    trainer, first = make(tmp_path, **more)
    trainer.train()
    trainer, second = make(tmp_path, **more)
    trainer.train(resume_from_checkpoint=True)
    assert second.search.total.equal(first.search.total)
    assert second.plan() == first.plan()
    masked = trainer.evaluate()["eval_loss"]
    second.finish()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(masked, abs=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(Trainee, id="trainee", marks=pytest.mark.slow),
        pytest.param(lambda model: model, id="callback"),
    ],
)
def test_retraining_is_resumed_with_its_weights(
    wrap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ViT is saved under other names, which only a Trainee or our callback finds again."""
    more = {"save_strategy": "steps", "save_steps": 3, "remove_unused_columns": False}
    trainer, compressor = make(tmp_path / "search")
    trainer.train()
    small = compressor.finish()

    def retrain(resume: str | None = None) -> list[torch.Tensor]:
        trainer = trainer_of(wrap(small), tmp_path, [compressor.callback()], **more)
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in small.parameters()]

    once = retrain()
    assert not small._load_state_dict_pre_hooks
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    again = retrain(str(tmp_path / "checkpoint-3"))
    assert all(a.equal(b) for a, b in zip(again, once, strict=True))
    monkeypatch.setattr(transformers.Trainer, "_load_from_checkpoint", lambda *_, **__: None)
    with pytest.raises(VlpruneError, match="have not been loaded"):
        retrain(str(tmp_path / "checkpoint-3"))


def test_a_callback_given_twice_counts_once(tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path)
    trainer.add_callback(compressor.callback())
    compressor.watch(trainer)
    trainer.train()
    assert compressor.search.steps == STEPS


@pytest.mark.parametrize(
    "more",
    [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=lambda more: next(iter(more)),
)
def test_ways_to_save_memory(more: dict[str, Any], tmp_path: Path) -> None:
    trainer, compressor = make(tmp_path, **more)
    trainer.train()
    assert compressor.search.steps == STEPS
    compressor.finish()
    assert compressor.verification is not None
