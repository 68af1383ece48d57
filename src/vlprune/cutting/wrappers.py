"""Wrappers around a model: looked through where that is exact, refused where it is not."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UnsupportedError

__all__ = ["stock_class", "uncompiled", "unwrapped"]

_REFUSED = {
    "DistributedDataParallel": "its buckets hold the old weights after a cut",
    "DataParallel": "it copies the model at every step",
    "FullyShardedDataParallel": "it has flattened the weights",
    "DeepSpeedEngine": "it has taken the weights over",
}


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without those that FSDP2, parametrizations and a cut derive from it."""
    return next(c for c in type(module).__mro__ if not _is_derived(c))


def _is_derived(cls: type) -> bool:
    own = cls.__name__.startswith("Cut") and cls.__module__.startswith("vlprune.")
    mixin = not issubclass(cls, nn.Module)
    return own or mixin or cls.__name__.startswith(("FSDP", "Parametrized"))


def uncompiled(model: Any) -> Any:
    """The module inside ``torch.compile``; any other model unchanged."""
    while type(model).__name__ == "OptimizedModule" and hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def unwrapped(model: Any) -> Any:
    """The model itself, without ``torch.compile`` around it.

    Raises UnsupportedError for other wrappers, and for a model with adapters: they all refer to
    weights that a cut replaces.
    """
    model = uncompiled(model)
    name = type(model).__name__
    if name in _REFUSED:
        inside = "model.module" if hasattr(model, "module") else "the model inside"
        raise UnsupportedError(
            f"this is a {name}, and {_REFUSED[name]}: give {inside}, and wrap the small model anew "
            "after finish()"
        )
    if _has_adapters(model):
        raise UnsupportedError(
            "this model carries PEFT adapters, whose part of the output no gate reaches: compress "
            "the base model first and put adapters on the small one, or call "
            "model.merge_and_unload() and compress what it returns"
        )
    return model


def _has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put its layers into the model, or itself around it (prompt tuning)."""
    if any(cls.__name__ == "PeftModel" for cls in type(model).__mro__):
        return True
    return any(hasattr(module, "base_layer") for module in model.modules())
