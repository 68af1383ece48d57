"""Weights at another place in memory, as a file that is mapped into it may put them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers


def move(model: Any) -> Any:
    """Every parameter and buffer one element past where torch would put it; the same values."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            place = room[1:].view(tensor.shape)
            place.copy_(tensor)
            tensor.data = place
    return model


def loads_move(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """From now on every loaded model lies elsewhere; the classes that were loaded."""
    real, loaded = transformers.PreTrainedModel.from_pretrained.__func__, []

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        answer = real(cls, *args, **kwargs)
        model = answer[0] if isinstance(answer, tuple) else answer
        move(model)
        loaded.append(type(model))
        return answer

    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained)
    )
    return loaded
