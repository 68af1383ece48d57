"""Measured seconds beside MACs: models timed in turns in one process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ..architectures import discover
from ..device import choose, device_of, moved_to, place
from ..errors import CheckpointError, UnsupportedError, VlpruneError
from ..files import plain
from ..folders.exported.model import Exported, export_folders, is_export
from ..folders.opening import open_model, open_processor
from ..folders.weights import check_weights
from ..prices import cost
from ..prices.clock import conditions, seconds_of, take_turns
from ..recipe.machine import Timing
from ..status import Progress
from .inputs import TEXT_TOKENS, made_up_inputs

__all__ = ["bench", "latencies", "seconds_exported"]

NOISE = 0.2
"""The largest spread (interquartile range over median) at which timings count as steady."""
LEAST_ROUNDS, MOST_ROUNDS = 7, 60


def latencies(
    models: Mapping[str, Any],
    inputs: Callable[[int], Mapping[str, Any]],
    batch_sizes: tuple[int, ...] = (1, 16),
    rounds: int = 7,
) -> dict[str, dict[int, float]]:
    """Median seconds of one forward pass: {model: {batch size: seconds}}; the models take turns.

    Raises VlpruneError if the models do not all lie on one device.
    """
    places = {name: device_of(model) for name, model in models.items()}
    if len(set(places.values())) > 1:
        told = ", ".join(f"{name} on {device}" for name, device in places.items())
        raise VlpruneError(f"only models on one device can be compared in time, not {told}")
    seconds: dict[str, dict[int, float]] = {name: {} for name in models}
    for batch_size in batch_sizes:
        batch = inputs(batch_size)
        for model in models.values():
            model.eval()
        runs = {
            name: partial(seconds_of, model, moved_to(model, batch))
            for name, model in models.items()
        }
        for name, values in take_turns(runs, rounds).items():
            seconds[name][batch_size] = statistics.median(values)
    return seconds


def bench(
    folder: Path,
    against: Path | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    compiled: bool = False,
    device: str = "auto",
    threads: int = 0,
    seconds: float = 10.0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the model in ``folder``, and compare it with the model in ``against`` if given.

    Both run in this process, on one ``device`` (:func:`vlprune.device.choose`), in turns, for about
    ``seconds`` per batch size and engine: eager, with ``compiled`` torch.compile, and the exports
    inside the folders, whose runtimes use the CPU. Inputs are made up. Memory and loading time are
    measured in a separate process per model.

    Returns plain values: ``conditions``; ``models`` {name: params, macs (batch 1), disk_bytes,
    load_seconds, peak_bytes}; ``runs``, a list of engine, batch, model, median, low and high
    (quartiles, seconds), items_per_second; ``faster``, a list of engine, batch, times (median of
    dense over small, round by round), low, high, ideal (MACs of dense over small), of_ideal.

    Raises VlpruneError if the machine is too busy to tell, RecipeError if the machine has no such
    device, UnsupportedError if ``folder`` is an export or no inputs can be made up for its model.
    """
    progress = progress or Progress()
    Timing(threads, seconds, tuple(batch_sizes))
    if threads:
        torch.set_num_threads(threads)
    chosen = choose(device)
    folders = {"small": folder, **({"dense": against} if against else {})}
    progress.phase("loading")
    models = {name: place(_opened(path), chosen).eval() for name, path in folders.items()}
    example = inputs_of(models, folders)
    engines = _engines(models, folders, compiled, trust_remote_code)  # refuses before it measures
    largest = max(batch_sizes)
    facts = {}
    for name, path in folders.items():
        progress.phase(f"memory and loading time of {path}")
        facts[name] = alone(path, largest, chosen)
        facts[name] |= _size(models[name], example(1))
    runs: list[dict[str, Any]] = []
    faster: list[dict[str, Any]] = []
    for engine, callables in engines.items():
        for batch_size in batch_sizes:
            progress.phase(f"timing {engine}, batch {batch_size}")
            batch, where = example(batch_size), {"engine": engine, "batch": batch_size}
            try:
                timers = {n: _timer(run, models[n], batch) for n, run in callables.items()}
                timed = steady(timers, seconds, f"{engine}, batch {batch_size}")
            except VlpruneError:
                raise
            except Exception as error:
                runs.append(where | {"failed": " ".join(str(error).split())[:200]})
                continue
            for name, values in sorted(timed.items()):  # dense, small
                runs.append(_summary(engine, batch_size, name, values))
            if len(timed) == 2:
                faster.append(where | _times_as_fast(timed, facts))
    told = conditions(models["small"], example(largest))
    return {
        "folders": {name: str(path) for name, path in folders.items()},
        "conditions": told | {"torch": torch.__version__},
        "models": facts,
        "runs": runs,
        "faster": faster,
    }


def _times_as_fast(
    timed: Mapping[str, Sequence[float]], facts: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """The ratio of dense to small times, round by round, also relative to the ratio of MACs."""
    ratios = np.asarray(timed["dense"]) / np.asarray(timed["small"])
    low, times, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    row = {"times": times, "low": low, "high": high}
    if facts["dense"]["macs"] and facts["small"]["macs"]:
        row["ideal"] = facts["dense"]["macs"] / facts["small"]["macs"]
        row["of_ideal"] = times / row["ideal"]
    return row


def _opened(folder: Path) -> Any:
    if is_export(folder):
        raise UnsupportedError(
            f"{folder} is an export: name the model's folder, its exports are timed along with it"
        )
    return open_model(str(folder))


def inputs_of(models: Mapping[str, Any], folders: Mapping[str, Path]) -> Any:
    """A function from batch size to inputs of one forward pass."""
    model = models["small"]
    try:
        made_up_inputs(model)
    except UnsupportedError as error:
        prompt = _prompt(model, folders["small"])
        if prompt is None:
            raise UnsupportedError(
                f"no inputs can be made up for {plain(folders['small'])}: {error}"
            ) from None
        return lambda size: {
            name: value.repeat(size, *[1] * (value.dim() - 1)) for name, value in prompt.items()
        }
    return lambda size: made_up_inputs(model, size, TEXT_TOKENS)


def _prompt(model: Any, folder: Path) -> dict[str, torch.Tensor] | None:
    """One image and a few words as the folder's processor makes them; None if it cannot."""
    from PIL import Image

    try:
        processor = open_processor(folder)
        token = getattr(processor, "image_token", "<image>")
        made = processor(
            images=[Image.new("RGB", (224, 224))], text=[f"{token} a picture"], return_tensors="pt"
        )
    except Exception:
        return None
    return moved_to(model, dict(made))


def _size(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as stored, MACs at batch 1 (None where they cannot be counted)."""
    structures = discover(model).structures
    facts: dict[str, Any] = {"params": int(cost.params(model, structures)), "macs": None}
    try:
        facts["macs"] = cost.measure_macs(model, structures, inputs).total
    except Exception as error:
        facts["macs_problem"] = " ".join(str(error).split())[:200]
    return facts


def _engines(
    models: Mapping[str, Any], folders: Mapping[str, Path], compiled: bool, trust: bool
) -> dict[str, dict[str, Any]]:
    """The callables to time, {engine: {model: callable}}."""
    engines: dict[str, dict[str, Any]] = {"eager": dict(models)}
    if compiled:
        engines["compiled"] = {name: torch.compile(model) for name, model in models.items()}
    exports = {name: export_folders(path) for name, path in folders.items()}
    for export in sorted({one for found in exports.values() for one in found}):
        engines[export] = {
            name: Exported(found[export], trust_remote_code=trust)
            for name, found in exports.items()
            if export in found
        }
    return engines


def _timer(run: Any, model: Any, batch: Mapping[str, Any]) -> Callable[[], float]:
    if isinstance(run, Exported):
        return partial(seconds_exported, run, {n: v.cpu() for n, v in batch.items()})
    return partial(seconds_of, run, moved_to(model, batch))


def seconds_exported(run: Exported, batch: Mapping[str, Any]) -> float:
    """Seconds of one call of an exported model."""
    start = time.perf_counter()
    run(**batch)
    return time.perf_counter() - start


def steady(
    timers: Mapping[str, Callable[[], float]], seconds: float, what: str
) -> dict[str, list[float]]:
    """The seconds of all timers, taken in turns, in twice the rounds if the first ones spread.

    Raises VlpruneError if the second ones spread by more than :data:`NOISE`, too.
    """
    first = take_turns(timers, 1, warm_up=2)
    once = sum(values[0] for values in first.values())
    rounds = int(min(MOST_ROUNDS, max(LEAST_ROUNDS, seconds / max(once, 1e-6))))
    timed = take_turns(timers, rounds, warm_up=0)
    if _spread(timed) > NOISE:
        timed = take_turns(timers, 2 * rounds, warm_up=1)
    spread = _spread(timed)
    if spread > NOISE:
        raise VlpruneError(
            f"the machine is too busy to tell: {what} spreads by {spread:.0%} between quartiles; "
            "stop what else is running, or measure longer with --seconds"
        )
    return timed


def _spread(timed: Mapping[str, list[float]]) -> float:
    """The interquartile range over the median, of the ratio where two are compared."""
    values = [np.asarray(one) for one in timed.values()]
    value = values[0] / values[1] if len(values) == 2 else values[0]
    low, middle, high = np.quantile(value, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def _summary(engine: str, batch_size: int, name: str, values: list[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {
        "engine": engine,
        "batch": batch_size,
        "model": name,
        "median": median,
        "low": low,
        "high": high,
        "rounds": len(values),
        "items_per_second": batch_size / median,
    }


# -- in a process of its own ---------------------------------------------------------------


def alone(folder: Path, batch_size: int, device: torch.device) -> dict[str, Any]:
    """Loading time, peak memory and bytes on disk of the model in ``folder``.

    Time and memory are measured in a separate process. Raises CheckpointError if that fails.
    """
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    facts: dict[str, Any] = {"disk_bytes": sum(path.stat().st_size for path in weights)}
    # -P: without it Python would import a torch.py from the working folder
    command = [sys.executable, "-P", "-m", "vlprune.measuring.bench"]
    command += [str(folder.absolute()), str(batch_size), str(device)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(_import_places()),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        return facts | json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise CheckpointError(
            f"cannot load {folder} in a process of its own: "
            f"{(done.stderr.strip().splitlines() or ['it was killed'])[-1]}"
        ) from None


def _import_places() -> list[str]:
    """PYTHONPATH without empty entries, which mean the working folder."""
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [os.path.abspath(place) for place in places if place]


def _report_alone(folder: Path, batch_size: int, device: torch.device) -> None:
    """Print the seconds and the bytes that loading and one forward pass add to a bare process."""
    check_weights(folder)
    before, peak = _resident(), _Peak()
    start = time.perf_counter()
    model = place(open_model(str(folder)), device).eval()
    took = time.perf_counter() - start
    example = inputs_of({"small": model}, {"small": folder})
    with torch.no_grad():
        model(**moved_to(model, example(batch_size)))
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
    else:
        most = peak.stop() - before
    print(json.dumps({"load_seconds": took, "peak_bytes": most, "peak_batch": batch_size}))


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(psutil.Process().memory_info().rss)


class _Peak:
    """Watches the memory of this process from a thread."""

    def __init__(self) -> None:
        self.most, self.over = _resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, _resident())

    def stop(self) -> int:
        """The most bytes seen."""
        self.over.set()
        self.thread.join()
        return max(self.most, _resident())


if __name__ == "__main__":
    import vlprune  # noqa: F401  # installs the loading hook

    _report_alone(Path(sys.argv[1]), int(sys.argv[2]), choose(sys.argv[3]))
