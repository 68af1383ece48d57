"""Exporters and quantizers of other libraries, and what they need to work quietly and exactly."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from ...errors import UnsupportedError

__all__ = [
    "EXPORTERS",
    "QUANTIZERS",
    "denormals",
    "needs",
    "own_forwards",
    "quantizer",
    "sentence",
    "silence",
    "transformers_exporters",
]


class Exporter(NamedTuple):
    """Names of an exporter of transformers and of its config, and the packages it needs."""

    exporter: str
    config: str
    packages: tuple[str, ...]


EXPORTERS = {
    "onnx": Exporter("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Exporter("DynamoExporter", "DynamoConfig", ()),
    "openvino": Exporter("OpenVINOExporter", "OpenVINOConfig", ("openvino",)),
}


QUANTIZERS = {
    "onnx": ("OnnxRuntimeQuantizer", ("onnxruntime",)),
    "openvino": ("NNCFOpenVINOQuantizer", ("nncf",)),
}


def quantizer(exporters: Any, to: str, samples: Sequence[Mapping[str, Any]]) -> Any:
    """The runtime's own quantizer, for int8 weights and activations.

    Raises UnsupportedError for a format without a quantizer, or if its package is missing.
    """
    if to not in QUANTIZERS:
        raise UnsupportedError(
            "int8 is made by the runtime's quantizer: choose --to onnx or --to openvino"
        )
    name, packages = QUANTIZERS[to]
    for package in packages:
        needs(package)
    if to == "onnx":
        config = exporters.OnnxRuntimeDynamicConfig(per_channel=True)
        return getattr(exporters, name)(config)
    return getattr(exporters, name)(calibration_dataset=[dict(sample) for sample in samples])


def transformers_exporters() -> Any:
    """``transformers.exporters``, loaded. Raises UnsupportedError if transformers is too old."""
    try:
        package = import_module("transformers.exporters")
        import_module("transformers.exporters.base").ExportedModel  # noqa: B018
    except (ImportError, AttributeError):
        raise UnsupportedError(
            f"exporting needs transformers 5.23 or newer, this is {version('transformers')}"
        ) from None
    return package


def needs(package: str) -> Any:
    """The imported package. Raises UnsupportedError, saying how to install it, if it is missing."""
    try:
        version(package)
        return import_module(package)
    except (PackageNotFoundError, ImportError):
        raise UnsupportedError(f"this needs {package}: pip install 'vlprune[export]'") from None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide the exporters' progress, warnings and graphs, which concern only their internals."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def denormals() -> Iterator[None]:
    """Keep denormal numbers inside the block, though training flushes them (``train.prepare``).

    OpenVINO moves small integers, such as sizes, as if they were floats: flushed, they become 0.
    """
    flushed = not torch.full((), 1e-40).mul(1.0).item()
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


@contextlib.contextmanager
def own_forwards(model: Any) -> Iterator[None]:
    """Remove the ``forward`` that exporters leave on a module, where it hides that of its class.

    A later cut may give the module another class.
    """
    before = {id(module) for module in model.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module in model.modules():
            if id(module) not in before:
                vars(module).pop("forward", None)


def sentence(error: BaseException) -> str:
    """The text of an error on one line of at most 300 characters; its type if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."
