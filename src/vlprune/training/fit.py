"""Training by the Hugging Face Trainer: its arguments, and a guard on its checkpoints."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from ..device import device_of
from ..errors import CheckpointError, RecipeError, UnsupportedError, VlpruneError
from ..files import is_full, plain, reason
from ..recipe.spec import Training
from .arguments import arguments_of
from .average import Average
from .checkpoints import newest, seal, step_of
from .engines import engine_for, load_checkpoint, refuse_other_engine
from .engines.fsdp import settle
from .loading import Collate, Endless, Items, Numbered, Seeded, as_it_was, length
from .objective import Trainee, innermost, layers
from .ranks import agreed

__all__ = ["fit", "prepare"]


class _Trainer(Trainer):
    """The Trainer, noting how many losses in a row were not finite.

    Its loader draws from a generator of its own: left to itself, a loader draws one number from
    the global one whenever it starts workers or begins an epoch without them, and what is dropped
    out would then depend on ``workers``.
    """

    loader: Any = None
    not_finite: Tensor | None = None
    most_not_finite: Tensor | None = None
    rates: Mapping[str, float] = MappingProxyType({})
    average: Average | None = None
    decays_all = False

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, and seal it when every process has written its part.

        Raises CheckpointError if it cannot be written; earlier ones stay.
        """
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        state = PartialState()
        try:
            super()._save_checkpoint(*args, **kwargs)
            state.wait_for_everyone()
            if state.is_main_process:
                if self.average is not None:
                    self.average.save(folder)
                seal(folder)
        except (OSError, RuntimeError, SafetensorError, CheckpointError) as error:
            full = is_full(error, folder.parent)
            shutil.rmtree(folder, ignore_errors=True)  # the folder may have filled the disk
            why = os.strerror(errno.ENOSPC) if full else reason(error)
            raise CheckpointError(f"cannot write the checkpoint {plain(folder)}: {why}") from (
                OSError(errno.ENOSPC, why) if full else error
            )

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the weights, which an engine has in what it writes by itself."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super().save_model(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        prepared = super().get_train_dataloader()
        self.loader = getattr(prepared, "base_dataloader", prepared)
        self.loader.generator = torch.Generator().manual_seed(self.args.seed)
        return prepared

    def end_workers(self) -> None:
        """End the workers now: an error's traceback would keep them for as long as it lives."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            self.loader._iterator = None

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The names of what decays: all, or as the Trainer does all but biases and norms."""
        if self.decays_all:
            return [name for name, _ in model.named_parameters()]
        names: list[str] = super().get_decay_parameter_names(model)
        return names

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, its groups split where some weights learn more slowly."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.rates:
            assert self.model is not None
            names = {id(p): name for name, p in self.model.named_parameters()}
            optimizer.param_groups[:] = _split_groups(optimizer.param_groups, names, self.rates)
        return optimizer

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        loss = (result[0] if isinstance(result, tuple) else result).detach()
        if self.not_finite is None or self.most_not_finite is None:
            self.not_finite = self.most_not_finite = torch.zeros_like(loss, dtype=torch.long)
        self.not_finite = torch.where(loss.isfinite(), 0, self.not_finite + 1)
        self.most_not_finite = torch.maximum(self.most_not_finite, self.not_finite)
        return result


def _split_groups(
    groups: Sequence[dict[str, Any]], names: Mapping[int, str], rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Each group split by rate; a pattern may match at any depth of a name.

    Raises RecipeError for a pattern that matches no name.
    """
    split: list[dict[str, Any]] = []
    used: set[str] = set()
    for group in groups:
        by_rate: dict[float, list[Any]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            matching = [p for p in rates if fnmatchcase(name, p) or fnmatchcase(name, f"*.{p}")]
            used.update(matching)
            by_rate.setdefault(rates[matching[-1]] if matching else 1.0, []).append(parameter)
        for rate, parameters in by_rate.items():
            split.append({**group, "params": parameters, "lr": group["lr"] * rate})
    for pattern in rates:
        if pattern not in used:
            raise RecipeError(f"rates: no weight's name matches {pattern!r}")
    return split


class _Steps(TrainerCallback):
    """Tells the objectives of the optimizer's steps, before anything else hears of them."""

    def __init__(self, trainee: Trainee) -> None:
        self.trainee = trainee

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for objective in layers(self.trainee):
            objective.stepped()


class _Watch(TrainerCallback):
    """Reports every step, and ends training when the loss is no longer a finite number.

    Raises VlpruneError once more than ``patience`` losses in a row were not finite.
    """

    def __init__(self, advance: Callable[..., None], patience: int) -> None:
        self.advance, self.patience = advance, patience
        self.trainer: _Trainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)
        if control.should_save:  # a logged loss is the mean since the last log or resume
            control.should_log = True
        if control.should_log:  # before a bad state is saved
            self._check(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        notes = [f"loss {float(logs['loss']):.3f}"] if "loss" in logs else []
        if "search/remains" in logs:
            notes.append(f"keeps {logs['search/remains']:.0%}")
        if notes:
            self.advance(0, note=", ".join(notes))

    def _check(self, step: int) -> None:
        assert self.trainer is not None
        worst = self.trainer.most_not_finite
        if worst is not None and int(worst) > self.patience:
            raise VlpruneError(
                f"the loss stopped being a finite number before step {step}: lower the learning "
                "rate, or train in float32 (bf16: false, fp16: false)"
            )


def prepare(seed: int, threads: int = 0) -> None:
    """Set seeds and CPU threads (0: as they are) for the process; flush denormals to zero."""
    set_seed(seed)
    torch.set_flush_denormal(True)  # a BLIP step is ten times slower with them
    if threads:
        torch.set_num_threads(threads)


def fit(
    model: Any,
    items: Sequence[Any] | Endless,
    collate: Collate,
    spec: Training,
    *,
    seed: int,
    report_to: str = "none",
    callbacks: Sequence[TrainerCallback] = (),
    advance: Callable[..., None] = lambda done, note="": None,
    say: Callable[[str], None] = lambda text: None,
    checkpoints: Path | None = None,
    logs: Path | None = None,
) -> list[dict[str, float]]:
    """Train the model in place and where it lies, as ``spec`` says; returns the Trainer's log.

    ``model`` is anything whose forward returns a loss for ``collate(items, rng)``; ``rng`` depends
    on nothing but the seed and the batch. ``items`` may be a stream, which is then trained on by
    ``spec.steps``. ``spec.workers`` processes make the batches. ``advance(steps done, note=...)``
    is called during training. With ``checkpoints`` and ``spec.save_steps`` the Trainer's
    checkpoints go there, and training goes on from the last one that is whole; ``say`` gets a line
    for every other. Raises
    CheckpointError where a checkpoint cannot be written, VlpruneError where the loss is no longer
    finite, UnsupportedError where weights to average are sharded.
    TensorBoard's files, where ``report_to`` asks for them, go to ``logs``.
    """
    if not spec.on:
        return []
    set_seed(seed)  # a phase must not depend on whether the phase before was run or resumed
    processes = PartialState().num_processes
    steps = spec.count(length(items), processes)
    if spec.workers:  # else a tokenizer that was used before warns in every worker
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    trainee = model if isinstance(model, Trainee) else Trainee(model)
    for objective in layers(trainee):
        objective.begin(spec.epoch(length(items), processes))
    with tempfile.TemporaryDirectory(prefix="vlprune-") as scratch, engine_for(trainee):
        saving = checkpoints is not None and spec.save_steps > 0
        folder = checkpoints if checkpoints is not None and saving else Path(scratch)
        last = agreed(lambda: newest(folder, say))
        if last:
            refuse_other_engine(last)
        arguments = arguments_of(
            spec, folder, saving, items, steps, seed, report_to, device_of(model)
        )
        if logs is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(logs)
        watch = _Watch(advance, patience=10 if spec.fp16 else 0)
        average = Average(innermost(trainee), spec.ema, last) if spec.ema else None
        own = [average] if average is not None else []
        callbacks = [_Steps(trainee), *callbacks, *own]
        trainer = _Trainer(
            model=trainee,
            args=arguments,
            train_dataset=(
                Numbered(items, seed, spec, processes, step_of(last) if last else 0)
                if isinstance(items, Endless)
                else Items(items)
            ),
            data_collator=Seeded(collate, seed),
            callbacks=[*callbacks, watch],
        )
        first(trainer, callbacks)
        watch.trainer, trainer.rates, trainer.average = trainer, spec.rates, average
        trainer.decays_all = spec.weight_decay_on == "all"
        if spec.ema and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise UnsupportedError(
                "ema keeps the average of whole weights, and FSDP and DeepSpeed divide them among "
                "the processes: leave ema out, or train with torchrun alone"
            )
        settle(trainer)
        trainer.model_accepts_loss_kwargs = False  # divide the loss when accumulating
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, where results go
        if last:
            advance(step_of(last))
        if last and step_of(last) >= steps:  # the Trainer would take one more step
            state = _as_it_ended(trainer, last, callbacks)
        else:
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except VlpruneError as error:
                raise as_it_was(error) from None
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"the checkpoint {plain(last or folder)} holds more than tensors and is not "
                    f"read ({reason(error)[:100]}): remove it, and the same command goes on"
                ) from error
            finally:
                trainer.end_workers()
            state = trainer.state
        # the last row describes this process only: its run time, and its loss since it resumed
        return [row for row in state.log_history if "train_runtime" not in row]


def first(trainer: Trainer, callbacks: Sequence[TrainerCallback]) -> None:
    """Put these callbacks before the loggers, so that their additions to a log are logged."""
    others = [one for one in trainer.callback_handler.callbacks if one not in callbacks]
    trainer.callback_handler.callbacks = [*callbacks, *others]


def _as_it_ended(
    trainer: Trainer, checkpoint: Path, callbacks: Sequence[TrainerCallback]
) -> TrainerState:
    """Bring model and callbacks to the end of a training, from its last checkpoint."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if not load_checkpoint(trainer.model, checkpoint):
        trainer._load_from_checkpoint(str(checkpoint))
    for callback in callbacks:
        callback.on_train_begin(trainer.args, state, trainer.control)
        callback.on_train_end(trainer.args, state, trainer.control)
    return state
