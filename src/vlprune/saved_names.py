"""Weights that transformers saves under other names than the model has in memory.

``save_pretrained`` writes many architectures (ViT, DETR, LLaVA ...) under the names of earlier
versions. ``from_pretrained`` translates them back; a Trainer that goes on from a checkpoint hands
them to ``load_state_dict``, which ignores names it does not know, without a word.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

__all__ = ["in_own_names"]


def in_own_names(model: Any, state: dict[str, Tensor]) -> None:
    """Rename the entries of ``state`` to the names that ``model`` has for them, in place.

    Nothing happens to a state that is in the model's names already. Entries that are stored in
    another form, not only under another name, are read by the model's ``from_pretrained``.
    """
    own = model.state_dict()
    if not hasattr(model, "save_pretrained") or state.keys() <= own.keys():
        return
    from transformers.core_model_loading import revert_weight_conversion

    known = {_identity(tensor): name for name, tensor in own.items()}
    written = revert_weight_conversion(model, dict(own))
    names = {name: known.get(_identity(tensor), "") for name, tensor in written.items()}
    if all(names.get(name) for name in state):
        renamed = {names[name]: tensor for name, tensor in state.items()}
    elif state.keys() <= names.keys() and own.keys() - known.keys():
        loaded = type(model).from_pretrained(
            None, config=copy.deepcopy(model.config), state_dict=dict(state)
        )
        renamed = dict(loaded.state_dict())
    else:  # another model's: whoever loads it will say so
        return
    state.clear()
    state.update(renamed)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
