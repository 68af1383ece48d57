"""An exported model, opened to be timed and evaluated like the one that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, UnsupportedError
from ...facts import ExportManifest, check_facts
from ...files import plain, read_json
from ..configs import read_config
from ..opening import guarded
from ..save import MANIFEST
from .runtimes import denormals, needs, silence, transformers_exporters

__all__ = ["Exported", "export_folders", "is_export"]


class Exported:
    """An exported model, read from its folder, called like the model it came from.

    Its runtime uses ``threads`` threads (default: as many as torch) and computes in float32.
    torch.export writes pickles, which run code when they are read: such a folder is only opened
    with ``trust_remote_code``.

    Raises CheckpointError for a folder that holds no export or a damaged one, UnsupportedError for
    a torch.export that is not trusted or a package that is missing or too old.
    """

    def __init__(
        self, folder: str | Path, threads: int | None = None, trust_remote_code: bool = False
    ) -> None:
        folder = Path(folder)
        if not is_export(folder):
            raise CheckpointError(f"{plain(folder)} is no export: it holds no {MANIFEST}")
        manifest = _manifest(folder)
        exporters = transformers_exporters()
        threads = threads or torch.get_num_threads()
        self.format = manifest["export_format"]
        options: dict[str, Any] = {}
        if self.format not in ("onnx", "openvino") and not trust_remote_code:
            raise UnsupportedError(
                f"{plain(folder)} is a torch.export, which runs code when it is read: if you "
                "trust who made it, add --trust-remote-code (trust_remote_code=True)"
            )
        if self.format == "onnx":
            runtime = needs("onnxruntime")
            options["session_options"] = runtime.SessionOptions()
            options["session_options"].intra_op_num_threads = threads
            # otherwise its log prints names from the file unescaped; the error is raised as well
            options["session_options"].log_severity_level = 4
            # otherwise its threads wait in a busy loop, and slow down a model timed in turn with it
            options["session_options"].add_session_config_entry(
                "session.intra_op.allow_spinning", "0"
            )
        elif self.format == "openvino":
            needs("openvino")
            options["config"] = {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
            }
        with guarded(folder, "open the export"), silence(), denormals():
            self.model = exporters.base.ExportedModel.from_pretrained(
                folder, trust_remote_code=trust_remote_code, **options
            )
        self.config, self.device = self.model.config, torch.device("cpu")

    def eval(self) -> Exported:
        """The model itself: an export never trains."""
        return self

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> Any:
        """The outputs that the model's forward returns."""
        with denormals():
            return self.model(**inputs)

    @property
    def stages(self) -> dict[str, Any]:
        """{stage: its runner}, for an export of the stages that ``generate`` needs."""
        return dict(self.model.runners)


def _manifest(folder: Path) -> dict[str, Any]:
    """``export.json``, checked: every file it names is in the folder. Raises CheckpointError."""
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


def is_export(folder: Path) -> bool:
    """Whether the folder holds an exported model."""
    return (folder / MANIFEST).is_file()


def export_folders(folder: Path) -> dict[str, Path]:
    """The exports inside a model's folder, by name."""
    return {path.name: path for path in sorted(folder.glob("*")) if is_export(path)}
