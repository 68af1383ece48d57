"""Teaches ``from_pretrained`` to load cut models, without importing anything heavy.

transformers offers one place to rebuild a model's shapes before its weights are loaded: its
registry of quantizers. Nothing is quantized here. ``import vlprune`` calls :func:`install`,
which registers at once if transformers' quantizers are loaded, and otherwise as soon as they
are; until then neither torch nor transformers is imported. In the same way AutoConfig and
AutoModel learn the models of :mod:`vlprune.models`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import wrapt

from ..models import MODEL_TYPES, PREFIX

__all__ = ["install"]


def install() -> None:
    """Register with each registry now, or as soon as the module that holds it is imported."""
    for name, register in REGISTRIES.items():
        wrapt.register_post_import_hook(register, name)


def _register_configs(auto: Any) -> None:
    """Teach AutoConfig vlprune's model types; the configs teach AutoModel when imported."""
    for model_type, name in MODEL_TYPES.items():
        auto.CONFIG_MAPPING.register(model_type, _Later(name), exist_ok=True)
        # For folders older than the prefix, unless transformers has a model of that type itself.
        former = model_type.removeprefix(PREFIX)
        if former not in auto.CONFIG_MAPPING:
            auto.CONFIG_MAPPING.register(former, _Later(name))


class _Later:
    """Stands for a config class, which cannot be imported while transformers is being imported."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def _find(self) -> Any:
        return getattr(importlib.import_module("vlprune.models.configs"), self.__name__)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._find(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._find()(*args, **kwargs)


def _register_quantizer(auto: Any) -> None:
    """Register the config and the quantizer; harmless when called again."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    method = "vlprune"
    if method in auto.AUTO_QUANTIZER_MAPPING:
        return

    class VlpruneConfig(QuantizationConfigMixin):
        """The vlprune section of a config, as transformers wants to hold it."""

        def __init__(self, **section: Any) -> None:
            self.quant_method: Any = method
            self.section = {**section, "quant_method": method}

        @classmethod
        def from_dict(
            cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
        ) -> Any:
            """The config for a section; extra keywords are returned on request."""
            config = cls(**{k: v for k, v in config_dict.items() if k != "quant_method"})
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict[str, Any]:
            """The section, as it stands in ``config.json``."""
            return dict(self.section)

    class ShapeRebuilder(HfQuantizer):
        """Cuts the freshly built, still empty model to the shapes of the saved one."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            rebuild = importlib.import_module("vlprune.folders.rebuild").rebuild_shapes
            section, files = self.quantization_config.to_dict(), kwargs.get("checkpoint_files")
            self.record = rebuild(model, section, files)
            return model

        def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
            # From here on this is an ordinary model: no flag may keep Trainer, .half() or a
            # real quantizer away. The section stays in the config, so saving keeps it.
            for module in model.modules():
                if hasattr(getattr(module, "config", None), "_is_quantized"):
                    module.config._is_quantized = False
            importlib.import_module("vlprune.cutting.padded").check_indices(model)
            importlib.import_module("vlprune.cutting.joined").save_apart(model, ExitStack())
            # The record uses this model's names, as another class may have written the folder, and
            # omits the digest of the weights, which the next training would make wrong.
            importlib.import_module("vlprune.structures.record").write_record(model, self.record)
            model.is_quantized = False
            for flag in ("hf_quantizer", "quantization_method"):
                if hasattr(model, flag):
                    delattr(model, flag)
            return model

        def is_serializable(self) -> bool:
            """True: the small model saves like any other."""
            return True

        @property
        def is_trainable(self) -> bool:
            """True: the small model trains like any other."""
            return True

        @property
        def is_qat_trainable(self) -> bool:
            """True, as for :attr:`is_trainable`."""
            return True

        @property
        def is_compileable(self) -> bool:
            """True: torch.compile sees plain layers."""
            return True

    auto.register_quantization_config(method)(VlpruneConfig)
    auto.register_quantizer(method)(ShapeRebuilder)


def _register_experts(moe: Any) -> None:
    """Let cut experts run under transformers' default implementation, whatever their width."""
    importlib.import_module("vlprune.cutting.grouped").register(moe)


REGISTRIES: dict[str, Callable[[Any], None]] = {
    "transformers.integrations.moe": _register_experts,
    "transformers.quantizers.auto": _register_quantizer,
    "transformers.models.auto.configuration_auto": _register_configs,
}
"""{module of transformers that holds a registry: the function that registers vlprune there}."""
