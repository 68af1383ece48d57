"""What a model's output heads compute, also where its output does not name it.

A BLIP that answers questions returns the picture's hidden states and a loss, but not the logits of its
answers: without labels, nothing of its output depends on its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["head_outputs", "output_heads"]


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that make token logits; composite models have them in their parts."""
    heads: dict[int, nn.Module] = {}
    for part in model.modules():
        try:
            head = part.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(head, nn.Module):
            heads[id(head)] = head
    return [*heads.values()]


@contextmanager
def head_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of all heads in the forward passes inside, in order."""
    seen: list[Tensor] = []

    def note(seen: list[Tensor], _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(output)

    handles = [head.register_forward_hook(partial(note, seen)) for head in output_heads(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
