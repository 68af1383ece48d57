"""The options of a recipe that depend on the machine: threads, a device, a logger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Any

from ..errors import UnsupportedError
from .checks import Checked, Number, OneOf, Text, Whole, checked

__all__ = ["LOGGERS", "THREADS", "Device", "Logger", "Timing", "need_logger"]

LOGGERS: Mapping[str, str] = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": "kubeflow",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""The Trainer's loggers, and the package of each."""


class Logger(OneOf):
    """A logger of the Trainer; the hint lists the installed loggers."""

    def __init__(self) -> None:
        super().__init__("none", "all", *LOGGERS)

    def hint(self, value: Any) -> str:
        here = ", ".join(name for name in LOGGERS if is_installed(name)) or "none"
        return (super().hint(value) or ".") + f" Installed here: {here}."


def is_installed(logger: str) -> bool:
    """Whether the package of a logger is installed."""
    return find_spec(LOGGERS[logger]) is not None


def need_logger(logger: str) -> None:
    """Raise UnsupportedError if the package that a logger needs is not installed."""
    if logger in LOGGERS and not is_installed(logger):
        here = ", ".join(name for name in LOGGERS if is_installed(name)) or "none"
        raise UnsupportedError(
            f"report_to: {logger} needs the package {LOGGERS[logger]}, which is not installed "
            f"(installed here: {here}): install it, or give report_to: none"
        )


@dataclass(frozen=True)
class Device(Text):
    """The name of a device; whether this machine has that device is checked when it is used."""

    @property
    def says(self) -> str:
        """As in "auto, cpu, cuda or cuda:1"."""
        return "auto, cpu, cuda, a GPU as in cuda:1, or another device of torch"

    def read(self, value: Any) -> Any:
        kind, _, number = value.partition(":") if isinstance(value, str) else ("", "", "")
        if not (kind.isascii() and kind.isalpha() and len(kind) <= 20):
            raise ValueError
        if ":" in value and not (number.isascii() and number.isdigit() and len(number) <= 3):
            raise ValueError
        return value


THREADS = max(64, os.cpu_count() or 1)
"""The most threads asked of torch, which starts them all: a million would end the process."""


@checked
class Timing(Checked):
    """How ``vlprune bench`` measures."""

    threads: Annotated[int, Whole(0, THREADS)] = 0
    seconds: Annotated[float, Number(0, 86_400)] = 10.0
    batch_sizes: tuple[Annotated[int, Whole(1, 4096)], ...] = (1, 8)
