"""A model cut without a recipe and without training: samples in, a smaller folder out."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ...architectures import discover
from ...calibration.session import Calibration
from ...data.samples import Sample, check_pictures
from ...device import choose, device_name, place
from ...errors import BudgetError, RecipeError, UnsupportedError
from ...files import plain
from ...folders.notes import hashed
from ...folders.opening import guarded, open_model, open_processor
from ...folders.save import REPORT_FILE, SHARD, check_result, save
from ...measuring.memory import peak_memory
from ...reports.card import model_card
from ...status import Progress
from ...training.compressor import Compressor
from ...training.fit import prepare
from ..arguments import each
from .fingerprint import of_data, of_model
from .make import in_fresh_memory, make_method
from .result import bytes_of, versions
from .samples import NEUTRAL, Feed, feed_of
from .workplace import claimed, cleared, disk_errors_told

__all__ = ["Asked", "Job", "compress_model", "job_of", "refuse_overwriting"]

BATCH = 8


@dataclass(frozen=True)
class Asked:
    """What a command asks for: a model, a budget, samples to learn from, and how.

    ``items`` of the ``samples`` are drawn at random, always the same ones; ``source`` is where they
    come from, and ``left_out`` says what of it is not used.
    """

    model: str
    budget: Mapping[str, float]
    samples: Sequence[Sample]
    source: Path | None = None
    items: int = 256
    method: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "obs"})
    attention: str = "head_dim"
    experts: str = "neuron"
    device: str = "auto"
    left_out: str = ""

    @property
    def units(self) -> tuple[str, str]:
        """The units of attention and of experts."""
        return self.attention, self.experts

    def chosen(self) -> list[Sample]:
        """The samples that are used, in a random order that never changes."""
        order = list(range(len(self.samples)))
        random.Random("calibration").shuffle(order)
        return [self.samples[i] for i in order[: self.items]]

    def command(self) -> str:
        """The command for a reader of the report, without names of folders."""
        ((what, fraction),) = self.budget.items()
        model = "MODEL" if Path(self.model).exists() else self.model
        words = ["vlprune", "compress", model, "--budget", f"{what}={fraction:g}"]
        words += ["--calibration", "SAMPLES", "--items", str(self.items)] if self.samples else []
        words += ["--method", self.method["name"]] if self.method["name"] != "obs" else []
        words += ["--rotate"] if self.method.get("rotate") else []
        words += ["--attention", self.attention] if self.attention != "head_dim" else []
        words += ["--experts", self.experts] if self.experts != "neuron" else []
        return shlex.join(words)


def compress_model(
    asked: Asked,
    out: Path,
    progress: Progress | None = None,
    max_shard_size: int | str = SHARD,
) -> dict[str, Any]:
    """Cut the model and fill ``out``; returns the report that is saved there.

    A run that was stopped goes on from its last finished step, and ends with the same weights.

    Raises the errors of a model, a processor or samples that cannot be used, together where there
    are several and before anything is written; CheckpointError if ``out`` cannot be written.
    """
    progress = progress or Progress()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    refuse_overwriting(asked.model, out)
    check_result(out)
    prepare(0, 0)
    device = choose(asked.device)
    chosen = asked.chosen()
    progress.phase("reading the model and the samples")
    model, processor, _ = each(
        lambda: open_model(asked.model),
        lambda: open_processor(asked.model),
        lambda: check_pictures(chosen),
    )
    feed = feed_of(asked.model, model, processor, chosen, asked.source or Path())
    place(in_fresh_memory(model), device)
    with (
        disk_errors_told(out, "the last finished step"),
        claimed(out, progress.note) as work,
    ):
        report = _cut(asked, feed, chosen, out, work, progress)
        report |= {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "peak_bytes": peak_memory(device),
            "seconds": round(time.monotonic() - started, 1),
            "versions": versions(),
        }
        progress.phase("saving")
        extras = {
            REPORT_FILE: json.dumps(report, indent=1) + "\n",
            "README.md": model_card(report, type(model).__name__),
        }
        save(model, out, extras=extras, processor=processor, max_shard_size=max_shard_size)
        cleared(work)
    return report


def refuse_overwriting(model: str, out: Path) -> None:
    """Raise RecipeError if the result would replace the model that is cut."""
    if Path(model).exists() and Path(model).resolve() == out.resolve():
        raise RecipeError(
            f"the model is in {plain(out)}, where the result would replace it: choose another "
            "folder for the result with -o"
        )


def _cut(
    asked: Asked, feed: Feed, chosen: Sequence[Sample], out: Path, work: Path, progress: Progress
) -> dict[str, Any]:
    """Cut the model of ``feed`` in place; returns the report so far."""
    model, size = feed.model, bytes_of(feed.model)
    job = job_of(asked, feed, chosen, work, progress)
    progress.phase("calibrating")
    job.compressor.finish()
    return job.report({"dense": size, "small": bytes_of(model)})


@dataclass(frozen=True)
class Job:
    """A compression on samples, ready to run.

    ``example`` are the keywords of a forward pass on one sample, ``folder`` is for finished steps,
    which count for the same ``key`` only. ``skip`` are structures that stay dense.
    """

    asked: Asked
    compressor: Compressor
    example: Mapping[str, Any]
    key: str
    folder: Path
    chosen: Sequence[Sample]
    skip: Sequence[str]

    def report(self, weight_bytes: Mapping[str, int]) -> dict[str, Any]:
        """The report of the compression, without figures of the run."""
        report = self.compressor.report()
        report["calibration"]["items"] = len(self.chosen)
        report["weight_bytes"] = dict(weight_bytes)
        report["command"] = self.asked.command()
        if self.skip:
            text = f'no sample has a text, so every image was paired with "{NEUTRAL}"'
            report["notes"].append(f"{text}, and the text tower stays dense")
        if self.asked.left_out:
            report["notes"].append(self.asked.left_out)
        return report


def job_of(
    asked: Asked, feed: Feed, chosen: Sequence[Sample], work: Path, progress: Progress
) -> Job:
    """The compression of the model of ``feed``, which may have its weights in files.

    Raises UnsupportedError for a model or a processor that cannot be used, BudgetError for a budget
    that cannot be reached.
    """
    key = _key(asked, chosen, feed.text)
    folder = work / f"calibration-{key}"
    with guarded(asked.model, "make batches of the samples for", UnsupportedError):
        batches = [feed.batch(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]
        example = feed.batch(chosen[:1])
    skip = _unread(feed.model, asked) if feed.text else ()
    calibration = Calibration(batches, work=folder, key=key, progress=progress)
    try:
        with guarded(asked.model, "compress", UnsupportedError):
            compressor = Compressor(
                feed.model,
                make_method(asked.method),
                dict(asked.budget),
                attention=asked.attention,  # type: ignore[arg-type]
                experts=asked.experts,  # type: ignore[arg-type]
                example_inputs=example,
                skip=skip,
                calibration=calibration,
            )
    except BudgetError as error:
        if not skip:
            raise
        raise BudgetError(f"{error}; the text tower stays dense, as no sample has a text") from None
    return Job(asked, compressor, example, key, folder, chosen, skip)


def _unread(model: Any, asked: Asked) -> tuple[str, ...]:
    """Structures of the text tower, which would learn from one text alone."""
    found = discover(model, *asked.units)  # type: ignore[arg-type]
    return tuple(s.name for s in found.structures if s.tower == "text")


def _key(asked: Asked, chosen: Sequence[Sample], text: str) -> str:
    """The same for two runs only if they make the same cut."""
    return hashed(
        [
            of_model(asked.model),
            of_data(chosen),
            dict(asked.budget),
            dict(asked.method),
            asked.units,
            text,
            BATCH,
        ]
    )
