"""A given plan carried out on a folder, whatever its size: ``vlprune cut``."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from ...errors import CheckpointError
from ...files import plain
from ...folders.save import SHARD, check_result
from ...measuring.memory import peak_memory
from ...status import Progress
from ...streaming.cut import Streamed, stream_cut
from ...structures.plan import Plan
from .fingerprint import of_model
from .untrained import refuse_overwriting
from .workplace import claimed, cleared, disk_errors_told

__all__ = ["cut_folder", "proof_of"]


def cut_folder(
    folder: Path,
    plan_file: Path,
    out: Path,
    *,
    max_shard_size: int | str = SHARD,
    verify: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Cut the model in ``folder`` by a plan; returns figures of the cut and of its proof.

    One weight file is in memory at a time. A run that was stopped goes on after its last finished
    file, and ends with the same bytes. Raises the errors of
    :func:`vlprune.streaming.cut.stream_cut`.
    """
    progress, started = progress or Progress(), time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    refuse_overwriting(str(folder), out)
    check_result(out)
    if not folder.is_dir():
        raise CheckpointError(
            f"there is no folder {plain(folder)}: a model on the hub is downloaded first, by "
            "`hf download NAME --local-dir FOLDER`"
        )
    plan = Plan.load(plan_file)
    with (
        disk_errors_told(out, "the last finished weight file"),
        claimed(out, progress.note) as work,
    ):
        done = stream_cut(
            folder,
            plan,
            out,
            work,
            key=of_model(str(folder)),
            verify=verify,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        cleared(work)
    return {
        "model": str(folder),
        "out": str(out),
        "structures": len(done.cut.structures),
        "weight_bytes": dict(done.bytes),
        "proof": proof_of(done),
        "peak_bytes": peak_memory(torch.device("cpu")),
        "seconds": round(time.monotonic() - started, 1),
    }


def proof_of(done: Streamed) -> dict[str, Any] | None:
    """The proof as plain values; None where none was asked for."""
    if done.proof is None:
        return None
    passes = {part: dataclasses.asdict(found) for part, found in done.proof.passes.items()}
    return {
        "passes": passes,
        "by_passes": done.proof.by_passes,
        "by_weights": done.proof.by_weights,
    }
