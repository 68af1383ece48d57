"""Weights that transformers saves under other names than the model has in memory.

``save_pretrained`` writes many architectures (ViT, DETR, LLaVA ...) under the names of earlier
versions. ``from_pretrained`` translates them back; a Trainer that goes on from a checkpoint hands
them to ``load_state_dict``, which silently ignores names that it does not know.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

__all__ = ["in_own_names"]


def in_own_names(model: Any, state: dict[str, Tensor], waiting: dict[str, Tensor]) -> None:
    """Rename the entries of ``state`` to the names that ``model`` has for them, in place.

    Nothing happens to a state that is in the model's names already. Entries that are stored in
    another form, not only under another name, are read by the model's ``from_pretrained``, all at
    once: a shard's entries wait in ``waiting`` until those of the other shards have arrived.
    """
    own = model.state_dict()
    if not hasattr(model, "save_pretrained") or state.keys() <= own.keys():
        return
    from transformers.core_model_loading import revert_weight_conversion

    known = {_identity(tensor): name for name, tensor in own.items()}
    written = revert_weight_conversion(model, dict(own))
    names = {name: known.get(_identity(tensor), "") for name, tensor in written.items()}
    if not state.keys() <= names.keys():  # of another model: its loader will report that
        return
    renamed = {names[name]: tensor for name, tensor in state.items() if names[name]}
    waiting.update({name: tensor for name, tensor in state.items() if not names[name]})
    converted = {name for name, own_name in names.items() if not own_name}
    if waiting and waiting.keys() == converted:
        loaded = _loaded(model, {**written, **waiting})
        same = {_identity(tensor) for tensor in written.values()}
        renamed |= {name: loaded[name] for name, t in own.items() if _identity(t) not in same}
        waiting.clear()
    state.clear()
    state.update(renamed)


def _loaded(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state that ``from_pretrained`` makes of one in saved form."""
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), None)
    config = copy.deepcopy(model.config)
    loaded = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, trust_remote_code=False
    )
    return dict(loaded.state_dict())


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
