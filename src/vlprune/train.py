"""Training is the Trainer's: this only fills in its arguments."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from .errors import VlpruneError
from .recipe import Training

__all__ = ["fit", "prepare"]


class _Items(Dataset[Any]):
    """A sequence as a torch data set."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class _Watch(TrainerCallback):
    """Reports every step, and ends training with a sentence when the loss is not a number."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.advance(1)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        self.advance(0, note=f"loss {float(loss):.3f}")
        if not math.isfinite(float(loss)):
            raise VlpruneError(
                f"the loss became {float(loss)} at step {state.global_step}: lower the learning "
                "rate, or train in float32"
            )


def prepare(seed: int, threads: int = 0) -> None:
    """Settings of the whole process: seeds, CPU threads, no denormal numbers."""
    set_seed(seed)
    torch.set_flush_denormal(True)  # a BLIP step is ten times slower with them
    if threads:
        torch.set_num_threads(threads)


def fit(
    model: Any,
    items: Sequence[Any],
    collate: Any,
    spec: Training,
    *,
    seed: int,
    report_to: str = "none",
    callbacks: Sequence[TrainerCallback] = (),
    advance: Callable[..., None] = lambda done, note="": None,
    checkpoints: Path | None = None,
) -> list[dict[str, float]]:
    """Train the model in place for ``spec.steps``; returns the Trainer's log.

    ``advance(steps done, note=...)`` is called as it goes. With ``checkpoints`` and
    ``spec.save_steps`` the Trainer's checkpoints go there, and training goes on from the last
    one; the folder is removed at the end.
    """
    if spec.steps == 0:
        return []
    with tempfile.TemporaryDirectory(prefix="vlprune-") as scratch:
        saving = checkpoints is not None and spec.save_steps > 0
        folder = str(checkpoints) if saving else scratch
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=spec.steps,
            per_device_train_batch_size=spec.batch_size,
            learning_rate=spec.learning_rate,
            weight_decay=spec.weight_decay,
            warmup_steps=round(spec.warmup * spec.steps),
            lr_scheduler_type="cosine",
            max_grad_norm=1.0,
            bf16=spec.bf16,
            seed=seed,
            data_seed=seed,
            logging_steps=max(1, spec.steps // 20),
            save_strategy="steps" if saving else "no",
            save_steps=spec.save_steps or spec.steps,
            save_total_limit=1,
            logging_nan_inf_filter=False,  # it would log a NaN as a good loss
            report_to=report_to,
            remove_unused_columns=False,
            dataloader_drop_last=len(items) >= spec.batch_size,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=_Items(items),
            data_collator=collate,
            callbacks=[_Watch(advance), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout, where results go
        if last:
            advance(int(Path(last).name.rpartition("-")[2]))
        trainer.train(resume_from_checkpoint=last)
        if saving:
            shutil.rmtree(folder, ignore_errors=True)
        return list(trainer.state.log_history)
