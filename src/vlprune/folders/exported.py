"""From a folder to what a runtime takes: ONNX, torch.export, OpenVINO, int8; checked on the way.

The exporters and runners are transformers' own, the quantizers those of ONNX Runtime and NNCF.
They work on the model object, so uneven layers, padded projections and shared weights are just
modules to them. Ours is the check: what was written is read again and must answer as the model.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cutting.difference import difference, tensors_of
from ..cutting.gates import evaluating
from ..device import device_of, moved_to, placed
from ..errors import CheckpointError, IncomparableError, UnsupportedError, VerificationError
from ..facts import ExportManifest, check_facts
from ..files import plain, read_json, reason, write_text
from .checkpoint import EXPORT_FILE, MANIFEST, files_of_export
from .opening import guarded, read_config
from .place import MARK, check_place, is_being_saved, staging, swap

__all__ = [
    "FORMATS",
    "Exported",
    "check_export_place",
    "export",
    "export_folders",
    "is_export",
]

FORMATS = ("onnx", "torch-export", "openvino")
"""What ``--to`` may say."""

_EXPORTERS = {
    "onnx": ("OnnxExporter", "OnnxConfig", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": ("DynamoExporter", "DynamoConfig", ()),
    "openvino": ("OpenVINOExporter", "OpenVINOConfig", ("openvino",)),
}
_QUANTIZERS = {
    "onnx": ("OnnxRuntimeQuantizer", ("onnxruntime",)),
    "openvino": ("NNCFOpenVINOQuantizer", ("nncf",)),
}
TOLERANCE = 1e-3
"""The largest difference to PyTorch that is no error, relative to an output's largest value."""
FLOOR = 1e-3
"""An output is judged at its own scale: logits of a new head and entries of a normalised embedding
lie far below 1, where a floor of 1 would let an error of some per cent pass. Below this floor
TOLERANCE would ask for less than 1e-6, which is what float32 rounds values of order 1 to."""


class Exported:
    """An exported model, read from its folder, called like the model it came from.

    Its runtime gets ``threads`` (default: torch's number of them), and computes in float32.
    torch.export writes pickles, which run code when they are read: such a folder is only opened
    with ``trust_remote_code``. Raises CheckpointError, UnsupportedError.
    """

    def __init__(
        self, folder: str | Path, threads: int | None = None, trust_remote_code: bool = False
    ) -> None:
        folder = Path(folder)
        if not is_export(folder):
            raise CheckpointError(f"{plain(folder)} is no export: it holds no {MANIFEST}")
        manifest = _manifest(folder)
        exporters = _transformers_exporters()
        threads = threads or torch.get_num_threads()
        self.format = manifest["export_format"]
        options: dict[str, Any] = {}
        if self.format not in ("onnx", "openvino") and not trust_remote_code:
            raise UnsupportedError(
                f"{plain(folder)} is a torch.export, which runs code when it is read: if you "
                "trust who made it, add --trust-remote-code (trust_remote_code=True)"
            )
        if self.format == "onnx":
            runtime = _needs("onnxruntime")
            options["session_options"] = runtime.SessionOptions()
            options["session_options"].intra_op_num_threads = threads
            # else its own log prints names of the file as they are; the error is raised as well
            options["session_options"].log_severity_level = 4
            # else its threads wait in a busy loop, and slow down what is timed in turns with it
            options["session_options"].add_session_config_entry(
                "session.intra_op.allow_spinning", "0"
            )
        elif self.format == "openvino":
            _needs("openvino")
            options["config"] = {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
            }
        with guarded(folder, "open the export"), _silence(), _denormals():
            self.model = exporters.base.ExportedModel.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **options
            )
        self.config, self.device = self.model.config, torch.device("cpu")

    def eval(self) -> Exported:
        """Itself: it never trains."""
        return self

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """What the model's forward returns."""
        with _denormals():
            return self.model(**inputs)

    @property
    def stages(self) -> dict[str, Any]:
        """{stage: what runs it}, for an export of what ``generate`` needs."""
        return dict(self.model.runners)


def _manifest(folder: Path) -> dict[str, Any]:
    """``export.json``, whose files are in the folder. Raises CheckpointError."""
    body: dict[str, Any] = read_json(folder / MANIFEST)
    check_facts(ExportManifest, body, folder / MANIFEST, advice="export the model again")
    for component in body["components"].values():
        path = folder / component["file"]
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise CheckpointError(
                f"{plain(folder)} lacks {plain(component['file'])}: export the model again"
            )
    if (folder / "config.json").exists():
        read_config(folder)
    return body


def check_export_place(out: str | Path, need: int = 0) -> None:
    """Raise CheckpointError unless an export can be written to ``out``: a new or an empty folder.

    Or one with an export, which is replaced, or with one that was stopped while it was written.
    """
    out = Path(out)
    check_place(out, need)
    ours = is_export(out) or files_of_export(out) or is_being_saved(out) is False
    if out.is_dir() and any(out.iterdir()) and not ours:
        raise CheckpointError(
            f"{plain(out)} exists and is no export: choose another folder with -o"
        )


def is_export(folder: Path) -> bool:
    """Whether the folder holds an exported model."""
    return (folder / MANIFEST).is_file()


def export_folders(folder: Path) -> dict[str, Path]:
    """The exports inside a model's folder, by name."""
    return {path.name: path for path in sorted(folder.glob("*")) if is_export(path)}


def export(
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    to: str,
    out: str | Path,
    *,
    int8: bool = False,
    generation: bool = False,
    calibration: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write ``model`` to the folder ``out`` in the format ``to``; returns what was checked.

    The first of ``inputs`` (keywords of one forward pass; of ``generate`` with ``generation``) is
    traced with all its dimensions dynamic; on every one of them what was written, read again,
    must answer as the model does. They should differ in batch size and length. A model on a GPU
    is traced and checked on the CPU, where the runtimes compute, and put back afterwards. With
    ``generation`` the stages are exported that ``generate`` needs (encoders, prefill, decode),
    each checked on what ``generate`` hands it; the loop around them is the runtime's. With
    ``int8`` the quantizer is calibrated on ``calibration`` (more such inputs; default: the same
    ones), and the difference is reported rather than judged.

    The result has ``format``, ``files`` {name: bytes}, ``seconds``, ``int8`` and ``checked``: per
    input its shapes, the largest difference relative to the largest value of that output, and the
    fraction of all values that was compared (both sides finite).

    Raises UnsupportedError for an unknown format, a package that is missing, a model that the
    exporter cannot trace; VerificationError if the export answers otherwise than the model, or if
    there is nothing finite to compare.
    """
    exporters = _transformers_exporters()
    if to not in _EXPORTERS:
        raise UnsupportedError(f"a model is exported to {', '.join(FORMATS)}, not to {to!r}")
    exporter_name, config_name, packages = _EXPORTERS[to]
    for package in packages:
        _needs(package)
    started = time.monotonic()
    if device_of(model).type == "meta":
        raise UnsupportedError("a model is exported with its weights, and this one has none")
    options: dict[str, Any] = {"dynamic": True}
    out = Path(out)
    check_export_place(out)
    with staging(out) as staged:
        with placed(model, torch.device("cpu")), evaluating(model), torch.no_grad():
            samples = [
                moved_to(model, {n: v for n, v in one.items() if n != "labels"}) for one in inputs
            ]
            if int8:
                more = [moved_to(model, one) for one in calibration]
                options["quantizer"] = _quantizer(exporters, to, more or samples)
            exporter = getattr(exporters, exporter_name)()
            config = getattr(exporters, config_name)(**options)
            run = exporter.export_for_generation if generation else exporter.export
            try:
                with _silence(), _own_forwards(model):
                    exported = run(model, dict(samples[0]), config)
                    exported.save_pretrained(staged)
                _forget_code(staged / "config.json")
            except Exception as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise CheckpointError(f"cannot write {plain(out)}: {reason(error)}") from error
                raise UnsupportedError(
                    f"{type(model).__name__} cannot be exported to {to}: {_sentence(error)}"
                ) from error
            written = Exported(staged, trust_remote_code=True)  # written a moment ago
            check = _checked_stages if generation else _checked
            try:
                checked = check(model, written, samples)
                worst = max(row["difference"] for row in checked)
                if not int8 and not worst <= TOLERANCE:
                    raise VerificationError(f"they are {worst:.2g} apart, relative to the largest")
            except IncomparableError as error:
                raise IncomparableError(
                    f"the {to} export cannot be checked ({error}), so nothing was written: "
                    "give inputs that the model answers with finite numbers"
                ) from error
            except VerificationError as error:
                raise VerificationError(
                    f"the {to} export answers otherwise than the model ({error}), so nothing was "
                    "written: report this architecture"
                ) from error
        found = sorted(path for path in staged.iterdir() if path.name != MARK)
        files = {path.name: path.stat().st_size for path in found}
        facts: dict[str, Any] = {
            "format": to,
            "int8": int8,
            "model": type(model).__name__,
            "files": files,
            "checked": checked,
            "seconds": round(time.monotonic() - started, 1),
            "versions": {p: version(p) for p in ("torch", "transformers", *packages)},
        }
        write_text(staged / EXPORT_FILE, json.dumps(facts, indent=1) + "\n")
        stale = [path for path in files_of_export(out) if path.name not in (*files, EXPORT_FILE)]
        swap(staged, last=MANIFEST, stale=stale)
    return facts


def _forget_code(path: Path) -> None:
    """Take ``auto_map`` out of the config of an export: it would be followed when that is read."""
    if path.exists():
        write_text(path, json.dumps(_without(read_json(path), "auto_map"), indent=2) + "\n")


def _without(value: Any, name: str) -> Any:
    """The same JSON value without a key, at any depth."""
    if isinstance(value, dict):
        return {key: _without(one, name) for key, one in value.items() if key != name}
    return [_without(one, name) for one in value] if isinstance(value, list) else value


def _checked(
    model: Any, written: Exported, samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """How far model and export lie apart on every sample."""
    rows = []
    for sample in samples:
        torch.manual_seed(0)  # ViLT draws patches
        shapes = _shapes(sample)
        try:
            ours, theirs = model(**sample), written(**sample)
        except Exception as error:
            raise UnsupportedError(
                f"the export cannot take inputs of other sizes, {shapes}: {_sentence(error)}"
            ) from error
        rows.append({"shapes": shapes, **_row(ours, theirs)})
    return rows


def _checked_stages(
    model: Any, written: Exported, samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """How far model and export lie apart in every stage, on what ``generate`` hands it."""
    apart = import_module("transformers.exporters.utils").decompose_for_generation
    rows = []
    with _own_forwards(model):
        parts = apart(model, dict(samples[0]))
    for name, (part, inputs) in parts.items():
        ours = part(**copy.deepcopy(inputs))  # a cache among them is written to
        runner = written.stages[name]
        taken = {n: v for n, v in inputs.items() if n in runner.metadata.kwargs}
        with _denormals():
            theirs = runner(**copy.deepcopy(taken))
        rows.append({"stage": name, "shapes": _shapes(inputs), **_row(ours, theirs)})
    return rows


def _shapes(inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(v.shape) for name, v in inputs.items() if isinstance(v, Tensor)}


def _row(ours: Any, theirs: Any) -> dict[str, float]:
    """What is kept of a comparison. Raises VerificationError where the outputs are not alike."""
    apart = difference(tensors_of(ours), tensors_of(theirs), floor=FLOOR)
    return {"difference": apart.relative, "compared": apart.compared}


def _quantizer(exporters: Any, to: str, samples: Sequence[Mapping[str, Any]]) -> Any:
    """The runtime's own quantizer, for int8 weights and activations."""
    if to not in _QUANTIZERS:
        raise UnsupportedError(
            "int8 is made by the runtime's quantizer: choose --to onnx or --to openvino"
        )
    name, packages = _QUANTIZERS[to]
    for package in packages:
        _needs(package)
    if to == "onnx":
        config = exporters.OnnxRuntimeDynamicConfig(per_channel=True)
        return getattr(exporters, name)(config)
    return getattr(exporters, name)(calibration_dataset=[dict(sample) for sample in samples])


def _transformers_exporters() -> Any:
    """The package, with its modules loaded. Raises UnsupportedError where it is too old."""
    try:
        package = import_module("transformers.exporters")
        import_module("transformers.exporters.base").ExportedModel  # noqa: B018
    except (ImportError, AttributeError):
        raise UnsupportedError(
            f"exporting needs transformers 5.23 or newer, this is {version('transformers')}"
        ) from None
    return package


def _needs(package: str) -> Any:
    try:
        version(package)
        return import_module(package)
    except (PackageNotFoundError, ImportError):
        raise UnsupportedError(f"this needs {package}: pip install 'vlprune[export]'") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporters' progress, warnings and graphs are about their insides."""
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
def _denormals() -> Iterator[None]:
    """Denormal numbers are kept inside, though training flushes them (``train.prepare``).

    OpenVINO moves small integers, such as sizes, as if they were floats: flushed, they are 0.
    """
    flushed = not torch.full((), 1e-40).mul(1.0).item()
    torch.set_flush_denormal(False)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


@contextlib.contextmanager
def _own_forwards(model: Any) -> Iterator[None]:
    """Takes back the ``forward`` that exporters leave on a module, where it would hide its class's.

    A later cut may give the module another class.
    """
    before = {id(module) for module in model.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module in model.modules():
            if id(module) not in before:
                vars(module).pop("forward", None)


def _sentence(error: BaseException) -> str:
    """The first line of what went wrong inside, at its root."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."
