"""A search's step must not keep a GPU waiting: how often the host reads a number from a tensor.

On a GPU every such read waits for all work that has been given to it. It can be counted on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import vlprune
from vlprune.testing import build

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")


class Reads(TorchDispatchMode):
    """Counts the operations that hand numbers to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += operation.__name__.partition(".")[0] in READS
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "method", [vlprune.UPop(interval=50), vlprune.Taylor()], ids=["upop", "taylor"]
)
def test_a_step_between_decisions_reads_one_number(method: Any) -> None:
    """Whether the gradients are finite, however many structures there are."""
    sample = build("clip")
    compressor = vlprune.Compressor(sample.model.train(), method, {"params": 0.6})
    counts = []
    with compressor:
        for step in range(1, 6):
            sample.model(**sample.inputs, return_loss=True).loss.backward()
            with Reads() as reads:
                compressor.step(step / 100)
            counts.append(reads.count)
    structures = len(compressor.structures)
    assert counts[0] <= structures + 1  # which of them the loss reaches
    assert counts[1:] == [1] * 4
