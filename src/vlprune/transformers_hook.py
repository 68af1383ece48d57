"""Teaches ``from_pretrained`` to load cut models, without importing anything heavy.

transformers offers one place to rebuild a model's shapes before its weights are loaded: its
registry of quantizers. Nothing is quantized here. ``import vlprune`` calls :func:`install`,
which registers at once if transformers' quantizers are loaded, and otherwise as soon as they
are; until then neither torch nor transformers is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

__all__ = ["install"]

TRIGGER = "transformers.quantizers.auto"


def install() -> None:
    """Register now, or the moment transformers' quantizers are imported."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs :func:`_register` right after ``TRIGGER`` has been imported, then steps aside."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: Any = None) -> None:
    """Register the config and the quantizer; harmless when called again."""
    auto = auto or sys.modules[TRIGGER]
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
            """The config for a section; extra keywords are handed back when asked for."""
            config = cls(**{k: v for k, v in config_dict.items() if k != "quant_method"})
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict[str, Any]:
            """The section, as it stands in ``config.json``."""
            return dict(self.section)

    class ShapeRebuilder(HfQuantizer):
        """Cuts the freshly built, still empty model to the shapes of the saved one."""

        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
            rebuild = importlib.import_module("vlprune.checkpoint").rebuild_shapes
            return rebuild(model, self.quantization_config.to_dict())

        def _process_model_after_weight_loading(self, model: Any, **_kwargs: Any) -> Any:
            # From here on it is an ordinary model: no flag may keep Trainer, .half() or a
            # real quantizer away. The section stays in the config, so saving keeps it.
            for module in model.modules():
                if hasattr(getattr(module, "config", None), "_is_quantized"):
                    module.config._is_quantized = False
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
            """True, for the same reason."""
            return True

        @property
        def is_compileable(self) -> bool:
            """True: torch.compile sees plain layers."""
            return True

    auto.register_quantization_config(method)(VlpruneConfig)
    auto.register_quantizer(method)(ShapeRebuilder)
