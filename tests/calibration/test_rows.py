"""Calibration on the rows of a dataset, as a processor turns them into batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlprune
from small_models import clip
from vlprune.errors import DataError


class Processor:
    """Takes what the processors of transformers take, and returns random numbers."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **given: Any) -> dict[str, Any]:
        self.calls.append(given)
        count = len(given["images"])
        return {
            "pixel_values": torch.randn(count, 3, 16, 16),
            "input_ids": torch.randint(2, 60, (count, 6)),
        }


def rows() -> Iterator[dict[str, Any]]:
    number = 0
    while True:  # as a streamed dataset, it may never end
        yield {"image": f"picture {number}", "caption": f"text {number}", "label": 0}
        number += 1


def test_columns_go_to_the_processor_and_a_model_is_cut() -> None:
    processor = Processor()
    columns = {"images": "image", "text": "caption"}
    calibration = vlprune.Calibration.of(rows(), processor, columns, items=20, batch_size=8)
    assert [len(call["images"]) for call in processor.calls] == [8, 8, 4]
    assert processor.calls[2]["text"][-1] == "text 19"
    assert all(call["padding"] and call["return_tensors"] == "pt" for call in processor.calls)
    model = clip()
    compressor = vlprune.Compressor(model, vlprune.OBS(), {"params": 0.8}, calibration=calibration)
    compressor.finish()
    assert compressor.report()["calibration"]["batches"] == 3


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="row 0 has no column 'picture', only image, caption"):
        vlprune.Calibration.of(rows(), Processor(), {"images": "picture"})
    with pytest.raises(DataError, match="no rows"):
        vlprune.Calibration.of([], Processor())
