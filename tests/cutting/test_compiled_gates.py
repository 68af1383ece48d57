"""A gated model under torch.compile: one graph, as before, and the same figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlprune
from vlprune.cutting.difference import tensors_of
from vlprune.cutting.gates import gated, ones
from vlprune.testing import build

WHOLE = ("siglip", "gpt2", "bert", "llava")
"""Gates on linear layers, Conv1D and grouped keys, and on weights that a forward reads itself."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow) if f in ("siglip", "gpt2") else f for f in WHOLE],
)
def test_gates_break_no_graph_and_follow_their_values(family: str) -> None:
    sample = build(family)
    model, structures = sample.model, vlprune.discover(sample.model).structures
    gates = ones(structures, requires_grad=True)
    graphs = 0

    def count(graph: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def figures(run: Any) -> list[torch.Tensor]:
        for gate in gates.values():
            gate.grad = None
        out = tensors_of(run(**sample.inputs))[0]
        out.float().square().mean().backward()
        return [out.detach(), *(g.grad for g in gates.values() if g.grad is not None)]

    torch._dynamo.reset()
    fast: Any = torch.compile(model, backend=count, fullgraph=True)
    with gated(model, structures, gates):
        for value in (1.0, 0.5):
            with torch.no_grad():
                for gate in gates.values():
                    gate.fill_(value)
            eager, compiled = figures(model), figures(fast)
            assert len(eager) == len(compiled) > 1
            for one, other in zip(eager, compiled, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert graphs == 1
    torch._dynamo.reset()
