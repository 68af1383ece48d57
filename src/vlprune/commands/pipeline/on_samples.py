"""A model cut on samples without holding it in memory, and the choice between this and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ...architectures import discover
from ...data.samples import check_pictures
from ...device import choose
from ...errors import BudgetError, UnsupportedError, VlpruneError
from ...folders.opening import guarded, open_model, open_processor
from ...folders.save import SHARD, check_result
from ...folders.weights import weight_files
from ...measuring.memory import free_memory
from ...status import Progress
from ...streaming.cut import Streamed, bytes_of_model, stream_cut
from ...streaming.on_pages import on_pages
from ...streaming.source import folder_of, open_source
from ...training.fit import prepare
from ..arguments import each
from .samples import feed_of
from .streamed import finished
from .untrained import Asked, compress_model, job_of, refuse_overwriting
from .workplace import claimed, cleared, disk_errors_told

__all__ = ["compress_on_samples", "streams"]

NEEDED = 2
"""A compression in memory takes about this many times the bytes of the weights."""


def compress_on_samples(
    asked: Asked,
    out: Path,
    progress: Progress | None = None,
    max_shard_size: int | str = SHARD,
    stream: bool | None = None,
) -> dict[str, Any]:
    """Cut the model on samples and fill ``out``, in memory or streamed; the same bits either way.

    ``stream`` None means to stream where the model does not fit into memory. Returns the report
    that is saved there. A run that was stopped goes on from its last finished step, whichever way
    it ran. Raises the errors of :func:`compress_model`, and BudgetError for a latency that is to be
    streamed.
    """
    progress = progress or Progress()
    if asked.budget.keys() == {"latency"}:
        if stream:
            raise BudgetError("a budget in latency needs the model in memory: leave out --stream")
        stream = False
    if streams(asked, stream, progress):
        return _streamed(asked, out, progress, max_shard_size)
    return compress_model(asked, out, progress, max_shard_size)


def streams(asked: Asked, wanted: bool | None, progress: Progress) -> bool:
    """Whether to stream: as ``wanted``, else whether twice the weights exceed the free memory.

    ``progress`` gets a line that says what was chosen and why.
    """
    if wanted is not None:
        return wanted
    needed, free = NEEDED * _bytes_of(asked.model), free_memory(choose(asked.device))
    short = needed > free
    if needed:
        progress.note(
            f"{'streaming' if short else 'in memory'}: the weights have {needed / NEEDED / 1e9:.2f}"
            f" GB, twice as much {'exceeds' if short else 'fits into'} the {free / 1e9:.2f} GB of "
            f"free memory (--stream and --no-stream choose otherwise)"
        )
    return short


def _bytes_of(model: str) -> int:
    """The bytes of a model's weights; 0 where they cannot be told, which the load will report."""
    try:
        if Path(model).is_dir():
            return sum(file.stat().st_size for file in weight_files(Path(model)))
        empty = open_model(model, config_only=True)
        dtype = getattr(empty.config, "dtype", None) or torch.float32
        return sum(p.numel() for p in empty.parameters()) * dtype.itemsize
    except (VlpruneError, OSError):
        return 0


def _streamed(
    asked: Asked, out: Path, progress: Progress, max_shard_size: int | str
) -> dict[str, Any]:
    """As :func:`compress_model`, with the weights of two blocks in memory."""
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    refuse_overwriting(asked.model, out)
    check_result(out)
    prepare(0, 0)
    device = choose(asked.device)
    chosen = asked.chosen()
    progress.phase("reading the samples; weights are read as they are used")
    source, processor, _ = each(
        lambda: open_source(asked.model),
        lambda: open_processor(asked.model),
        lambda: check_pictures(chosen),
    )
    with guarded(asked.model, "compress", UnsupportedError):
        structures = discover(source.model, *asked.units).structures  # type: ignore[arg-type]
    feed = feed_of(asked.model, source.model, processor, chosen, asked.source or Path())
    size = bytes_of_model(source.model)
    with (
        disk_errors_told(out, "the last finished step"),
        claimed(out, progress.note) as work,
        on_pages(source, structures, work / "calibration-weights", device) as pages,
    ):
        job = job_of(asked, feed, chosen, work, progress)
        progress.phase("calibrating")
        plan = job.compressor.repaired()
        report = job.report({"dense": size})
        pages.flush()

        def extras(done: Streamed) -> Mapping[str, str]:
            nonlocal report
            report, texts = finished(report, done, device, started)
            return texts

        stream_cut(
            folder_of(asked.model),
            plan,
            out,
            work,
            key=job.key,
            max_shard_size=max_shard_size,
            inputs={"": job.example},
            extras=extras,
            weights=pages.now,
            processor=processor,
            progress=progress,
        )
        cleared(work)
    return report
