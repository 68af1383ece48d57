"""Processors of models that also take videos, where torchvision, which those need, is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file, is_torchvision_available

from ..errors import UnsupportedError
from ..files import read_json

__all__ = ["pictures_only"]

VIDEO = "video_processor"
VIDEO_FILE = "video_preprocessor_config.json"
NESTED_FILE = "processor_config.json"


def pictures_only(name: str | Path) -> Any:
    """The processor in ``name`` without its part for videos; None where all of it can be loaded.

    It takes texts and pictures as before, and saving it also writes what the source says of
    videos, so that the folder is whole where torchvision is installed.
    """
    if is_torchvision_available():
        return None
    config, _ = transformers.PreTrainedConfig.get_config_dict(name, trust_remote_code=False)
    known = PROCESSOR_MAPPING_NAMES.get(config.get("model_type", ""))
    cls: Any = getattr(transformers, known or "", None)
    if cls is None or VIDEO not in cls.get_attributes():
        return None
    parts = [part for part in cls.get_attributes() if part != VIDEO]

    class _Pictures(cls):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return parts

        def save_pretrained(self, save_directory: str | Path, **options: Any) -> Any:
            written = super().save_pretrained(save_directory, **options)
            _add_video(name, Path(save_directory))
            return written

    _Pictures.__name__ = _Pictures.__qualname__ = cls.__name__  # a folder is told this name
    return _Pictures.from_pretrained(name, trust_remote_code=False)


def _add_video(source: str | Path, folder: Path) -> None:
    """Write into ``folder`` what the source's files say of videos."""
    for file in (VIDEO_FILE, NESTED_FILE):
        found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        body = read_json(found, UnsupportedError)
        if file == VIDEO_FILE:
            (folder / file).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        elif VIDEO in body:
            own = read_json(folder / file, UnsupportedError) if (folder / file).exists() else {}
            own[VIDEO] = body[VIDEO]
            (folder / file).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
