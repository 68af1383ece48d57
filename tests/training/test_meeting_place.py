"""Numbers of several processes are added up where their backend can: NCCL has no CPU."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import vlprune
from vlprune import processes

SOURCE = Path(vlprune.__file__).parent


@pytest.mark.parametrize(
    ("backends", "lies", "meets"),
    [
        ("cuda:nccl", "cpu", "cuda"),
        ("cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:gloo", "cuda", "cuda"),
        ("xpu:xccl", "cpu", "xpu"),
    ],
)
def test_where_numbers_meet(
    backends: str, lies: str, meets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    assert processes.meeting_place(torch.device(lies)) == torch.device(meets)


def test_a_tensor_goes_there_to_be_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """``meta`` stands for a GPU; nothing comes back from it."""
    sent: list[str] = []
    monkeypatch.setattr(processes, "world", lambda: (2, 0))
    monkeypatch.setattr(dist, "get_backend_config", lambda: "meta:fake")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.device.type))
    with pytest.raises(NotImplementedError, match="meta"):
        processes.add_up(torch.ones(2))
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:fake")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))
    ones = torch.ones(2)
    assert processes.add_up(ones) is ones
    assert ones.tolist() == [3, 3]
    assert sent == ["meta"]


def test_nobody_else_adds_up() -> None:
    """But for rows of a model's outputs, which lie with the model and have gradients."""
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if _is_collective(node)
    }
    assert found == {"processes.py", "tasks/gathering.py"}


def _is_collective(node: Any) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in {
        "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter",
    } and getattr(node.value, "id", "") == "dist"  # fmt: skip
