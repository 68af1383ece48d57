"""Neither a search's step nor a loss may keep a GPU waiting: how often the host reads a tensor.

On a GPU every such read waits for all work that has been given to it. It can be counted on a CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import vlprune
from vlprune.recipe.spec import DataSpec, ModelSpec
from vlprune.tasks import GroundingTask
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


@pytest.mark.parametrize("model", ["mdetr", "grounding-dino", "glip"])
def test_a_set_loss_waits_as_often_for_six_images_as_for_two(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its costs go to the CPU at once; GLIP's assignment goes on there, image by image."""
    sizes = ModelSpec(
        width=32, heads=4, vision_layers=2, text_layers=1, image_size=32, patch_size=16
    )
    data = DataSpec(train_items=8, test_items=2, folder=str(tmp_path / "scenes"))
    task = GroundingTask(
        sizes, data, tmp_path, {"model": model, "fusion_layers": 1, "decoder_layers": 2}
    )
    grounder, fetched = task.new_model(), []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: fetched.append(self.shape) or cpu(self))
    counts = []
    for size in (2, 6):
        batch = task.collate(list(task.train[:size]))
        fetched.clear()
        with Reads() as reads:
            loss = grounder(**batch).loss
        assert loss.isfinite()
        counts.append((len(fetched), 0 if model == "glip" else reads.count))
    assert counts[0][0] > 0
    assert counts[0] == counts[1]
