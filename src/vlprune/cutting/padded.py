"""The one layer that a cut may add: a projection that keeps its old width on the outside."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .wrappers import stock_class

__all__ = [
    "PaddedLinear",
    "check_indices",
    "expect_index",
    "is_linear",
    "linear_axes",
    "stock_name",
]


def stock_name(module: nn.Module) -> str:
    """The name of the stock class, even where a cut or sharing has put a subclass in its place."""
    return stock_class(module).__name__


def is_linear(module: nn.Module) -> bool:
    """Whether the module is ``y = x W + b`` with a plain dense weight."""
    return isinstance(module, nn.Linear | PaddedLinear) or stock_name(module) == "Conv1D"


def linear_axes(module: nn.Module) -> tuple[int, int]:
    """``(output axis, input axis)`` of the module's weight; Conv1D stores it transposed."""
    return (1, 0) if stock_name(module) == "Conv1D" else (0, 1)


def expect_index(module: nn.Module, name: str, values: Tensor) -> None:
    """Note the ``values`` that an index buffer of an empty model must hold after loading.

    Raises ValueError if ``values`` are on the meta device.
    """
    if values.is_meta:
        raise ValueError("the positions themselves are needed, not a tensor without numbers")
    module.__dict__.setdefault("expected_indices", {})[name] = values


def check_indices(model: nn.Module) -> None:
    """Compare the loaded index buffers with the noted positions, then drop the notes.

    A wrong buffer would read or write other positions, or memory outside a weight. Raises
    CheckpointError if a buffer differs.
    """
    for path, module in model.named_modules():
        for name, wanted in module.__dict__.pop("expected_indices", {}).items():
            found = getattr(module, name)
            if not found.is_meta and not torch.equal(found.cpu().to(wanted.dtype), wanted):
                raise CheckpointError(
                    f"the positions in {path}.{name} are not those of the plan: the weights are "
                    "damaged, or of another model; copy the folder again"
                )


class PaddedLinear(nn.Module):
    """A small projection with the full width outside.

    ``rows`` are the output positions that exist: the small result is scattered into zeros
    of ``full_out``. ``columns`` are the input positions that are read. The surrounding
    forward sees the same shapes as before the cut, so rotary embeddings, q/k norms and
    hard-coded reshapes stay exact. Parameters and projection MACs fall; those of the attention
    core do not. Both index buffers are saved with the weights.

    The class is not an ``nn.Linear``, because its weight is smaller than ``in_features`` and
    ``out_features`` say. Code that replaces or wraps every ``nn.Linear`` by these numbers
    (adapters, quantizers) would compute something else, so it must skip this layer, or refuse.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rows: Tensor | None,
        columns: Tensor | None,
        full_out: int,
        full_in: int,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = full_in, full_out
        self.transposed = transposed  # stored (in, out), as Conv1D does
        self.weight = weight
        self.register_parameter("bias", bias)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        """(..., full_in) -> (..., full_out)."""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        weight = self.weight.T if self.transposed else self.weight
        small = nn.functional.linear(x, weight, self.bias)
        if self.rows is None:
            return small
        full = small.new_zeros(*small.shape[:-1], self.out_features)
        return full.index_copy(-1, self.rows, small)

    def extra_repr(self) -> str:
        """The text inside the parentheses when the model is printed."""
        inside = tuple(self.weight.shape)
        return (
            f"in={self.in_features}, out={self.out_features}, stored={inside}, "
            "padded by vlprune: not an nn.Linear, so adapters and quantizers leave it out"
        )
