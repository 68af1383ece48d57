"""One model twice: after a folder, in another class, copied.

Its weights are the same bits. Its outputs need not be: kernels sum in another order where the
weights lie at another place in memory (tests/training/test_moved.py), so they are compared nearly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprune.cutting.difference import difference, tensors_of
from vlprune.testing.conformance import NEARLY


def same_weights(one: Any, other: Any) -> None:
    """The same names and, bit by bit, the same tensors."""
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def nearly(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Equal but for what float32 rounds away, relative to outputs of order 1."""
    apart = difference(expected, found).relative
    assert apart <= NEARLY, f"{apart:.1e} apart"


def same_model(one: Any, other: Any, inputs: Mapping[str, Any]) -> None:
    """The same weights, and nearly the same answers."""
    same_weights(one, other)
    outputs = []
    for model in (one, other):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(tensors_of(model(**inputs)))
    nearly(*outputs)


def close(expected: Any, found: Any) -> None:
    """Two JSON values whose floating numbers agree to six digits, and all else exactly."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            close(value, found[name])
    elif isinstance(expected, list):
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    else:
        assert found == expected


TIMES = {"seconds", "latency_seconds", "peak_bytes"}


def same_results(once: Path, again: Path) -> None:
    """Two folders of ``compress`` with the same files, bit by bit.

    Except the logs and the card, and times and memory in the report; its other numbers agree to six
    digits, because what a model answers may differ in the last bits where its weights were loaded.
    """

    def files(folder: Path) -> set[str]:
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        return {name for name in names if not name.startswith("logs/")}

    assert files(once) == files(again)
    for name in sorted(files(once) - {"README.md"}):
        if name in ("report.json", "dense/vlprune-dense.json"):
            one, other = (json.loads((folder / name).read_text()) for folder in (once, again))
            for body in (one, other):
                for key in (*TIMES, "digest"):
                    body.pop(key, None)
            close(one, other)
        else:
            assert (once / name).read_bytes() == (again / name).read_bytes(), name
