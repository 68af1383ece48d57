"""Low-rank adapters on the linear layers of a model (Hu et al., ICLR 2022), by peft."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import set_seed

from ..cutting.sharing.ties import is_shared
from ..errors import RecipeError, UnsupportedError
from ..recipe.spec import LoraSpec

__all__ = ["Adapters", "need_peft"]


def need_peft() -> None:
    """Raise RecipeError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise RecipeError("retrain.lora needs peft: pip install 'vlprune[lora]'")


class Adapters:
    """Adapters on ``model``, which from now on trains nothing else.

    The model keeps its class, and its own linear layers are called as before, inside those of the
    adapters. :meth:`merge` or :meth:`remove` puts them back. Raises RecipeError for a pattern of
    ``spec.targets`` that matches no linear layer, UnsupportedError for a model whose layers share
    weights, which a merge would pull apart.
    """

    def __init__(self, model: Any, spec: LoraSpec, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        if is_shared(model):
            raise UnsupportedError(
                "retrain.lora: layers of this model share weights, which adapters would pull "
                "apart: leave lora out, or give method.families=[prune]"
            )
        self.model, self.places = model, targets_of(model, spec.targets)
        self.trained = {name: p.requires_grad for name, p in model.named_parameters()}
        set_seed(seed)  # one factor of each adapter is drawn at random
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]
            lora_dropout=spec.dropout,
            target_modules=self.places,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on tied embeddings, which have no adapters
            self.wrapped: Any = get_peft_model(model, config)

    def merge(self) -> None:
        """Add what the adapters have learnt to the weights, and take them off."""
        self.wrapped.merge_and_unload()
        self._restore()

    def save(self, folder: str) -> None:
        """Write the adapters into a folder that ``PeftModel.from_pretrained(model, folder)`` reads.

        That model is the one without adapters.
        """
        self.wrapped.save_pretrained(folder, save_embedding_layers=False)

    def remove(self) -> None:
        """Take the adapters off; the weights are as they were."""
        self.wrapped.unload()
        self._restore()

    def _restore(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trained[name])
        self.model.__dict__.pop("peft_config", None)
        self.model.__dict__.pop("_hf_peft_config_loaded", None)


def targets_of(model: Any, patterns: Sequence[str]) -> list[str]:
    """The names of the linear layers that get adapters; a pattern may match at any depth."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owned = {
        id(part.out_proj) for part in model.modules() if isinstance(part, nn.MultiheadAttention)
    }
    layers: Mapping[str, nn.Module] = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and part is not head and id(part) not in owned
    }
    if not patterns:
        return [*layers]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        own = [n for n in layers if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")]
        if not own:
            raise RecipeError(f"retrain.lora.targets: no linear layer's name matches {pattern!r}")
        chosen |= dict.fromkeys(own)
    return [*chosen]
