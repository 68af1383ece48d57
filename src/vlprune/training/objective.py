"""The module that the Trainer trains: a wrapper around the model that computes the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..device import device_of
from ..structures.shards import is_dtensor

__all__ = ["Trainee", "innermost", "layers"]


class Trainee(nn.Module):
    """A module around ``model`` whose forward returns the loss of a batch: here the model's own.

    Buffers of a subclass (queues, averages) are saved in the Trainer's checkpoints with the
    weights. The checkpoints hold the weights under the names they have in memory. Those of a bare
    PreTrainedModel may not: transformers 5.23 saves a ViT under the names of transformers 4, and a
    Trainer that resumes then silently leaves its weights as they are.
    """

    reads_weights = False
    """Whether the forward reads the model's weights itself, which must then be whole."""
    accepts_loss_kwargs = False  # the Trainer then divides the loss when it accumulates
    _keys_to_ignore_on_save = None  # the Trainer reads this when it loads a checkpoint

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_state_dict_post_hook(_without_ties)

    def forward(self, *args: Any, **batch: Any) -> Any:
        """The model's own output."""
        return self.model(*args, **batch)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the output of :meth:`state_dict`, which lacks the second names of tied weights.

        Raises RuntimeError if ``strict`` and any other name is missing or unexpected.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        wanted = self.state_dict().keys()
        missing = [name for name in result.missing_keys if name in wanted]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing {missing}, unexpected {result.unexpected_keys}")
        return type(result)(missing, result.unexpected_keys)

    def begin(self, epoch: int) -> None:
        """Called before a training, with the number of optimizer steps in its first epoch."""

    def stepped(self) -> None:
        """Called after every optimizer step, whose batches have all been seen by then."""

    @property
    def device(self) -> Any:
        """The device of the weights."""
        return device_of(self.model)


def layers(trainee: nn.Module) -> Iterator[Trainee]:
    """All objectives around a model, from the outermost on."""
    while isinstance(trainee, Trainee):
        yield trainee
        trainee = trainee.model


def innermost(trainee: nn.Module) -> nn.Module:
    """The model itself, inside its objective and its teacher's."""
    while isinstance(trainee, Trainee):
        trainee = trainee.model
    return trainee


def _without_ties(_module: nn.Module, state: dict[str, Tensor], _prefix: str, _local: Any) -> None:
    """Drop the second name of every tied weight: safetensors refuses to write both.

    Not where FSDP2 has weights in parts: these are told apart by no address, and written otherwise.
    """
    seen: set[tuple[int, Any, Any]] = set()
    for name in list(state):
        tensor = state[name]
        if is_dtensor(tensor):
            continue
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            del state[name]
        seen.add(key)
