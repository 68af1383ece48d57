"""What a Trainer trains when it is more than the model: a module around it that owns the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Trainee"]


class Trainee(nn.Module):
    """A module around ``model`` whose forward returns ``{"loss": ...}`` for a batch.

    Buffers of a subclass (queues, averages) are saved in the Trainer's checkpoints with the
    weights, and kept equal by DistributedDataParallel.
    """

    accepts_loss_kwargs = False  # the Trainer then divides the loss when it accumulates

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_state_dict_post_hook(_without_ties)

    @property
    def device(self) -> Any:
        """Where the weights are."""
        return next(self.model.parameters()).device


def _without_ties(_module: nn.Module, state: dict[str, Tensor], _prefix: str, _local: Any) -> None:
    """Drop the second name of every tied weight: safetensors refuses to write both."""
    seen: set[tuple[int, Any, Any]] = set()
    for name in list(state):
        tensor = state[name]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            del state[name]
        seen.add(key)
