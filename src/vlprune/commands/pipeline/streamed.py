"""A model cut by its weights alone, without samples and without holding it in memory."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from ...device import device_name
from ...errors import BudgetError, UnsupportedError
from ...folders.notes import hashed
from ...folders.opening import guarded, open_processor
from ...folders.save import REPORT_FILE, SHARD, check_result
from ...measuring.inputs import made_up_inputs
from ...measuring.memory import peak_memory
from ...reports.card import model_card
from ...status import Progress
from ...streaming.cut import Streamed, stream_cut
from ...streaming.source import Source, folder_of, open_source
from ...structures.units import unit_squares
from ...training.compressor import Compressor
from .cut import proof_of
from .fingerprint import of_model
from .make import make_method
from .result import versions
from .untrained import Asked, refuse_overwriting
from .workplace import claimed, cleared, disk_errors_told

__all__ = ["compress_streaming", "finished"]


def compress_streaming(
    asked: Asked,
    out: Path,
    progress: Progress | None = None,
    max_shard_size: int | str = SHARD,
) -> dict[str, Any]:
    """Score the units of a model, cut it and fill ``out``; returns the report that is saved there.

    Weights are read one at a time, and one weight file is in memory. A run that was stopped goes on
    after its last finished file, and ends with the same bytes. Raises BudgetError for a budget that
    cannot be reached or priced, and the errors of :func:`vlprune.streaming.cut.stream_cut`.
    """
    progress, started = progress or Progress(), time.monotonic()
    transformers.utils.logging.disable_progress_bar()
    refuse_overwriting(asked.model, out)
    check_result(out)
    progress.phase("scoring units, one weight at a time")
    source = open_source(asked.model)
    if not Path(asked.model).is_dir():
        open_processor(asked.model)  # so that its files are in the cache, too
    with guarded(asked.model, "compress", UnsupportedError):
        compressor = _compressor(asked, source)
        plan, report = compressor.plan(), compressor.report()

    def extras(done: Streamed) -> Mapping[str, str]:
        nonlocal report
        report["command"] = asked.command()
        report, texts = finished(report, done, torch.device("cpu"), started)
        return texts

    with (
        disk_errors_told(out, "the last finished weight file"),
        claimed(out, progress.note) as work,
    ):
        stream_cut(
            folder_of(asked.model),
            plan,
            out,
            work,
            key=hashed([of_model(asked.model)]),
            max_shard_size=max_shard_size,
            extras=extras,
            progress=progress,
        )
        cleared(work)
    return report


def _compressor(asked: Asked, source: Source) -> Compressor:
    """A Compressor of the empty model whose search reads weights from the files."""
    ((what, _),) = asked.budget.items()
    inputs = None
    if what == "latency":
        raise BudgetError(
            "a budget in latency needs the model in memory: give --calibration and --no-stream"
        )
    if what == "macs":
        try:
            inputs = made_up_inputs(source.model)
        except UnsupportedError as error:
            raise BudgetError(
                f"a budget in macs needs inputs, and none can be made up: {error}; give "
                "--calibration, or a budget in params"
            ) from None
    method = make_method(asked.method)
    compressor = Compressor(
        source.model,
        method,
        dict(asked.budget),
        attention=asked.attention,  # type: ignore[arg-type]
        experts=asked.experts,  # type: ignore[arg-type]
        example_inputs=inputs,
    )
    problem = dataclasses.replace(
        compressor.search.problem,
        squares=lambda: unit_squares(source.weight, compressor.structures),
    )
    compressor.search = method.start(problem)
    return compressor


def finished(
    report: Mapping[str, Any], done: Streamed, device: torch.device, started: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """The report with the figures of a run that streamed, and the text files {name: text} of it.

    ``started`` is when the run began, by :func:`time.monotonic`.
    """
    proof = proof_of(done)
    passes = proof["passes"].values() if proof else ()
    body = {
        **report,
        "streamed": proof,
        "verified": max(passes, key=lambda found: found["difference"], default=None),
        "weight_bytes": dict(done.bytes),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "peak_bytes": peak_memory(device),
        "seconds": round(time.monotonic() - started, 1),
        "versions": versions(),
    }
    card = model_card(body, type(done.model).__name__)
    return body, {REPORT_FILE: json.dumps(body, indent=1) + "\n", "README.md": card}
