"""A Compressor in a Hugging Face Trainer."""

from __future__ import annotations

import base64
import warnings
from math import isclose
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..cutting.fsdp import is_sharded, reshard
from ..device import device_of
from ..errors import UnsupportedError, VlpruneError
from ..processes import all_or_none, summed, world
from ..structures.shards import copies_of, is_part, local, whole

if TYPE_CHECKING:
    from .compressor import Compressor

__all__ = ["CompressorCallback", "callback_for"]


def callback_for(compressor: Compressor) -> CompressorCallback:
    """A callback of a class made for this compressor.

    The Trainer makes callbacks anew from their class alone where it restores their states
    (``restore_callback_states_from_checkpoint``), so the class must know its compressor.
    """

    def __init__(self: CompressorCallback) -> None:
        CompressorCallback.__init__(self, compressor)

    name = CompressorCallback.__name__
    made: CompressorCallback = type(name, (CompressorCallback,), {"__init__": __init__})()
    return made


LOOKED_AT = 1024
"""Numbers of a parameter that tell it from another."""


class CompressorCallback(TrainerCallback, ExportableState):
    """Feeds a Compressor from a Trainer; its state is a part of the Trainer's checkpoints."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self._last: tuple[int, int] | None = None
        self._sum: float | None = None

    def state(self) -> dict[str, Any]:
        """The entry in ``trainer_state.json``: the search's state, and a figure of the weights."""
        packed = base64.b64encode(pack(self.compressor.state())).decode()
        sharded = is_sharded(self.compressor.model)  # then one process alone cannot sum them up
        weights = self._sum if sharded else self._weights()
        found = {"search": packed, "weights": weights, "summed_up": sharded}
        return {"args": {}, "attributes": found}

    def _weights(self) -> float:
        """A figure to recognise the weights by, in the way of this model (see :meth:`_figure`)."""
        return self._figure(is_sharded(self.compressor.model))

    def _figure(self, summed_up: bool) -> float:
        """A figure to recognise the weights by.

        It is the sum of the magnitudes of about :data:`LOOKED_AT` numbers of every parameter,
        evenly spread. A Trainer loads a parameter as a whole or not at all, so more numbers would
        show no more, and a model of any size is looked at in milliseconds. ``summed_up``: of all
        numbers, to which every process of a sharded model adds its parts; all must call this.
        """
        model = self.compressor.model
        reshard(model)
        own = parts = 0.0
        for parameter in model.parameters():
            if not summed_up:
                flat = whole(parameter).detach().reshape(-1)
                own += float(flat[:: max(1, flat.numel() // LOOKED_AT)].double().abs().sum())
                continue
            size = float(torch.linalg.vector_norm(local(parameter).detach(), 1, dtype=torch.double))
            if is_part(parameter):
                parts += size / copies_of(parameter)
            else:
                own += size
        return own + (summed(parts, device_of(model)) if is_sharded(model) else 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sum up sharded weights where a checkpoint may follow, which one process writes."""
        steps, now = max(1, int(state.save_steps or 1)), state.global_step
        due = control.should_save or now % steps == 0 or now >= state.max_steps
        sharded = is_sharded(self.compressor.model)
        self._sum = self._weights() if sharded and due else None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.compressor.retrain()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        compressor = self.compressor
        self._last = None
        compressor.remember_optimizer(kwargs.get("optimizer"))
        if compressor.finished:
            if world()[0] > 1:
                raise UnsupportedError(
                    "this Trainer has wrapped the model as it was before the cut: make a new "
                    "Trainer for the small model"
                )
            if state.global_step > 0 and (saved := self._saved(state)):
                self._check_weights(state, saved)
            compressor.retrain()
            return
        if args.load_best_model_at_end:
            raise UnsupportedError(
                "load_best_model_at_end would put back the weights of an early step, when fewer "
                "units had faded, under the plan of the last step: leave it out of the search, "
                "and use it when you retrain the small model"
            )
        compressor.begin(state.max_steps)
        compressor.train_in(torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None)
        if state.global_step > 0:  # the Trainer goes on from a checkpoint
            self._resume(state)
        elif compressor.progress > 0:
            self._start_again()

    def _resume(self, state: Any) -> None:
        saved = self._saved(state)
        if saved is None:
            raise VlpruneError(
                "this checkpoint holds no search: it was saved without compressor.callback(), "
                "so start again without resume_from_checkpoint"
            )
        self._check_weights(state, saved)
        self.compressor.restore(unpack(base64.b64decode(saved["search"])))

    def _saved(self, state: Any) -> Any:
        """The attributes that :meth:`state` put into the checkpoint; None without this callback."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            return None
        return (saved[0] if isinstance(saved, list) else saved)["attributes"]

    def _check_weights(self, state: Any, saved: Any) -> None:
        """Raise VlpruneError if the Trainer has not loaded the weights of its checkpoint.

        If it has not in one process, the error is raised in all.
        """
        now, wanted = self._figure(saved["summed_up"]), saved["weights"]
        with all_or_none():
            if wanted is None or isclose(wanted, now, rel_tol=1e-9):
                return
            raise VlpruneError(
                "the weights of the checkpoint have not been loaded into the model: some are "
                "saved under names that the Trainer does not find again, so give it "
                "vlprune.training.objective.Trainee(model) in place of the model, from the start"
            )

    def _start_again(self) -> None:
        """``train()`` from step 0 is a new search: after too large a batch, or after Ctrl-C."""
        compressor = self.compressor
        if compressor.progress >= 1:
            raise VlpruneError(
                "the search has ended, and training from the start would undo it: call "
                "compressor.finish() and train the small model it returns, or make a new Compressor"
            )
        warnings.warn(
            f"train() starts a new search: what the last one had seen up to "
            f"{compressor.progress:.0%} is left out (resume_from_checkpoint=True goes on instead)",
            stacklevel=2,
        )
        compressor.restart()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = id(state), state.global_step
        if self.compressor.finished or step == self._last:  # given to the Trainer twice
            return
        if state.global_step >= state.max_steps:  # resumed at its end, a Trainer steps once more
            return
        self._last = step
        optimizer = kwargs.get("optimizer")
        self.compressor.remember_optimizer(optimizer)
        scaler = getattr(optimizer, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        self.compressor.step(
            min(1.0, (state.global_step + 1) / max(1, state.max_steps)),
            scale=scale,
            # clipping has unscaled the weights' gradients before this is called
            weight_scale=1.0 if args.max_grad_norm else scale,
        )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self.compressor.finished:
            return
        figures = {f"search/{name}": v for name, v in self.compressor.figures().items()}
        logs.update(figures)
        if state.log_history:  # a copy of these logs, made before
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.compressor.end()
