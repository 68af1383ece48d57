"""The Trainer's arguments for a phase of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..device import use
from ..recipe.spec import Training
from .engines.deepspeed import config_of
from .loading import Endless, length

__all__ = ["Arguments", "arguments_of"]


@dataclass
class Arguments(TrainingArguments):
    """The Trainer's arguments, for training on the one device ``runs_on``.

    Left to itself, the Trainer takes every GPU in sight, as one DataParallel model, or the first.
    """

    runs_on: str = "cpu"

    @cached_property
    def _setup_devices(self) -> torch.device:
        own: torch.device = super()._setup_devices  # joins the other processes, if there are any
        if PartialState().num_processes > 1:
            return own
        device = torch.device(self.runs_on)
        use(device)
        self._n_gpu = 0 if device.type == "cpu" else 1
        return device


def arguments_of(
    spec: Training,
    folder: Path,
    saving: bool,
    items: Sequence[Any] | Endless,
    steps: int,
    seed: int,
    report_to: str,
    device: torch.device,
) -> Arguments:
    """The Trainer's arguments for a training as a recipe describes it."""
    sgd = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true"}
    return Arguments(
        **(sgd if spec.optimizer == "sgd" else {}),
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulate,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        warmup_steps=round(spec.warmup * steps),
        lr_scheduler_type="cosine" if spec.decay == "cosine" else "constant_with_warmup",
        max_grad_norm=spec.clip,
        bf16=spec.bf16,
        fp16=spec.fp16,
        torch_compile=spec.compile,
        deepspeed=config_of(spec),
        seed=seed,
        data_seed=seed,
        logging_steps=min(50, max(1, steps // 20)),
        save_strategy="steps" if saving else "no",
        save_steps=spec.save_steps or steps,
        logging_nan_inf_filter=False,  # the filter would log a NaN as a good loss
        report_to=report_to,
        remove_unused_columns=False,
        ddp_broadcast_buffers=False,  # every rank computes the same buffers
        dataloader_drop_last=length(items) >= spec.batch_size,
        dataloader_num_workers=spec.workers,
        # kept over epochs, and the pictures they have decoded with them
        dataloader_persistent_workers=spec.workers > 0,
        ignore_data_skip=isinstance(items, Endless),  # it begins where it is to go on
        accelerator_config={"dispatch_batches": False},
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        runs_on=str(device),
    )
