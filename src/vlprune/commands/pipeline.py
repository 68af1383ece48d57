"""A recipe from data to folder: train, search, cut, retrain, evaluate, save."""

from __future__ import annotations

import copy
import inspect
import json
import math
import platform
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from torch import nn

from .. import __version__
from ..architectures import discover
from ..cutting.gates import evaluating
from ..cutting.sharing.materialize import materialize
from ..cutting.sharing.ties import is_shared
from ..device import choose, device_name, place
from ..errors import CheckpointError, RecipeError, UnsupportedError, VlpruneError
from ..files import is_full, plain, reason, write_text
from ..folders.exported.model import Exported, is_export
from ..folders.exported.write import check_export_place, export
from ..folders.notes import NO_NOTE, hashed, note_text
from ..folders.opening import guarded, open_model
from ..folders.ordinary import ordinary
from ..folders.place import check_file
from ..folders.save import (
    PLAN_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    check_result,
    save,
)
from ..folders.weights import check_weights
from ..measuring.bench import latencies
from ..measuring.inputs import made_up_inputs
from ..measuring.sensitivity import SHARES, scan
from ..methods import METHODS, Alternating, Method
from ..prices import cost
from ..prices.prices import least
from ..prices.round_to import best_round_to
from ..recipe.machine import need_logger
from ..recipe.spec import Recipe, Training
from ..reports.card import model_card
from ..status import Progress
from ..structures.plan import Plan
from ..tasks import TASKS, Task
from ..training.compressor import Compressor
from ..training.fit import fit, prepare
from ..training.ranks import agreed
from ..training.teacher import Taught
from .earlier import (
    CUT_NOTE,
    DENSE_NOTE,
    Basis,
    basis_of,
    deciding,
    known,
    known_dense,
    refuse_overwriting,
    remember,
    search_key,
)
from .workplace import WORK, claimed, cleared

__all__ = ["compress", "evaluate_folder", "export_folder", "make_task", "scan_folder"]


def make_task(recipe: Recipe, folder: Path) -> Task:
    """The task of a recipe, with its data loaded.

    Raises what its readers raise, and UnsupportedError if the processor of ``model.path`` makes
    no batch of it.
    """
    task = TASKS[recipe.task](recipe.model, recipe.data, folder, recipe.options)
    if recipe.model.path:
        with guarded(recipe.model.path, f"make batches for {recipe.task} with", UnsupportedError):
            task.example_inputs(1)
    return task


def make_method(options: Mapping[str, Any]) -> Method:
    """The method of a recipe, which has checked its name and options."""
    chosen = {**options}
    cls: Any = METHODS[chosen.pop("name")]
    return cls(**chosen)


def compress(recipe: Recipe, out: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Run the recipe and fill ``out``; returns the report that is saved there.

    ``out`` ends as a folder that plain ``from_pretrained`` loads, with the dense model in
    ``out/dense``. If a run of the same recipe was stopped, it goes on from the last finished
    phase or checkpoint, and ends as if it had never been stopped.

    Raises CheckpointError if ``out`` cannot be written, or if another run is working in it.
    """
    progress = progress or Progress()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    check_result(out)
    try:
        return _compress(recipe, out, progress, started)
    except (OSError, VlpruneError) as error:
        if is_full(error):
            raise CheckpointError(
                f"the disk of {plain(out)} is full: free some space and run the same command "
                "again, it goes on from the last complete checkpoint"
            ) from None
        if isinstance(error, VlpruneError) or error.filename is None:
            raise
        raise CheckpointError(
            f"cannot read or write {plain(error.filename)}: {reason(error)}"
        ) from None


def _compress(recipe: Recipe, out: Path, progress: Progress, started: float) -> dict[str, Any]:
    prepare(recipe.seed, recipe.threads)
    device = choose(recipe.device)
    need_logger(recipe.report_to)
    measures = recipe.method.get("round_to") == "auto"
    method = make_method({**recipe.method, "round_to": 1} if measures else recipe.method)
    for spec in (recipe.train, recipe.search, recipe.retrain):
        if spec.fp16 and device.type == "cpu":
            raise RecipeError("fp16 needs a GPU: leave it out, or use bf16")
    alone = PartialState().is_main_process  # the others work for it, in the same folder
    with claimed(out, progress.note) if alone else nullcontext(out / WORK) as work:
        refuse_overwriting(recipe, out)
        return _work_through(recipe, method, measures, out, work, device, progress, started)


def _work_through(
    recipe: Recipe,
    method: Method,
    measures: bool,
    out: Path,
    work: Path,
    device: torch.device,
    progress: Progress,
    started: float,
) -> dict[str, Any]:
    processes = PartialState()
    progress.phase("reading data")
    with processes.main_process_first():
        task = make_task(recipe, out / "data")
    if task.left_out:
        progress.phase(task.left_out)
    basis = basis_of(recipe, task)
    if measures:
        progress.phase("measuring which widths this device likes")
        width = _round_to(recipe, task, work, device, basis, progress)
        method = make_method({**recipe.method, "round_to": width})
    timed = "latency" in recipe.budget
    batch_size = recipe.latency_batch_size if timed else 1
    example = task.example_inputs(batch_size)
    searched: Sequence[Any] = task.train
    held_out: Sequence[Any] = ()
    if method.needs_held_out:
        searched, held_out = _split(task, recipe)

    model, dense_known = _open_dense(task, out, device, basis, progress)
    key = search_key(recipe, basis, getattr(method, "round_to", 1))
    done = work / f"cut-{key}"
    cut_known = known(done / CUT_NOTE, key, progress, f"the cut model in {plain(done)}")
    own_loss, compressor = _OwnLoss(), None
    if not cut_known:
        if timed:
            progress.phase(f"measuring the time of every width, batch {batch_size}")
        with guarded(recipe.model.path or "the model", "compress", UnsupportedError):
            compressor = Compressor(
                model,
                method,
                recipe.budget,
                attention=recipe.attention,  # type: ignore[arg-type]
                example_inputs=example,
                skip=recipe.skip,
                uniform=recipe.uniform,
                held_out=held_out,
                loss=own_loss,
            )
        _refuse_early(recipe, compressor, len(searched))
    if not dense_known:
        dense_known = _train_dense(recipe, task, out, work, model, basis, progress)
    dense_metrics, dense_history = dense_known["metrics"], dense_known["history"]
    history: dict[str, Any] = {"train": dense_history}
    dense = copy.deepcopy(model)
    phase = _Phases(recipe, task, progress, work, out / "logs", dense)

    if compressor is None:
        progress.phase("cut model: taken from an earlier run of this recipe")
        small = place(in_fresh_memory(task.load(done)), device)
        plan = Plan.load(done / PLAN_FILE)
        report, cut_metrics = cut_known["report"], cut_known["metrics"]
        history["search"] = cut_known["history"]
    else:
        progress.phase("searching" if recipe.search.on else "planning")
        compressor.restart()  # with the trained weights, where it looks at weights at all
        own_loss.trainee = trainee = phase.trainee(model)
        watcher = [compressor.callback()]
        history["search"] = phase.fit(
            f"search-{key}", recipe.search, model, watcher, searched, trainee
        )
        small = compressor.finish()
        plan, report = compressor.plan(), compressor.report()
        cut_metrics = _evaluate(task, small, "evaluating cut", progress)
        note = {"report": report, "metrics": cut_metrics, "history": history["search"]}
        if processes.is_main_process and recipe.search.on and recipe.retrain.on:
            save(small, done)
            remember(done / CUT_NOTE, key, note)
        processes.wait_for_everyone()
    metrics = {"dense": dense_metrics, "cut": cut_metrics}

    if recipe.retrain.on:
        progress.phase("retraining")
        # Checkpoints of a retraining fit only the plan it started from.
        key = hashed([key, deciding(recipe.retrain), plan.to_json()])
        history["retrain"] = phase.fit(f"retrain-{key}", recipe.retrain, small)
        metrics["retrained"] = _evaluate(task, small, "evaluating retrained", progress)

    progress.phase("measuring speed")
    models = {"dense": dense, "small": small}
    if is_shared(small):
        models["materialised"] = materialize(copy.deepcopy(small))
    sizes = tuple(sorted({1, 16, batch_size}))
    seconds = latencies(models, task.example_inputs, sizes)
    if timed:  # side by side, where the compressor's own figures lie a training apart
        beside = {name: by_batch[batch_size] for name, by_batch in seconds.items()}
        report["budget"]["reached"] = beside["small"] / beside["dense"]
        report["budget"]["seconds"] |= beside
        for when in ("before", "after"):
            report["macs"][when] //= batch_size
    report |= {
        "weight_bytes": {name: _bytes(model) for name, model in models.items()},
        "task": recipe.task,
        "metric": task.metric,
        "metrics": metrics,
        "latency_seconds": seconds,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "history": history,
        "data": task.facts(),
        "notes": [*report["notes"], *filter(None, [task.left_out])],
        "seconds": round(time.monotonic() - started, 1),
        "versions": _versions(),
    }
    progress.phase("saving")
    if recipe.uniform:
        report["ordinary"], small = _ordinary(small)
    extras = {
        REPORT_FILE: json.dumps(report, indent=1) + "\n",
        RECIPE_FILE: recipe.to_yaml(),
        "README.md": model_card(report, type(small).__name__),
    }
    if report.get("ordinary") == "":  # its config holds no plan any more
        extras[PLAN_FILE] = plan.to_json() + "\n"
    if processes.is_main_process:
        save(small, out, extras=extras, processor=task.processor)
        cleared(work)
    processes.wait_for_everyone()
    return report


def _round_to(
    recipe: Recipe, task: Task, work: Path, device: torch.device, basis: Basis, progress: Progress
) -> int:
    """The multiple of units that is fast here; measured once a run, by the first process."""
    size = recipe.latency_batch_size if "latency" in recipe.budget else 8
    key = hashed([basis.model, recipe.attention, size, device_name(device)])
    path = work / "round-to.json"
    noted = known(path, key, progress, f"the width in {plain(path)}")
    if noted is not None:
        return int(noted)

    def measured() -> int:
        model = place(task.dense_model(), device)
        structures = discover(model, recipe.attention).structures  # type: ignore[arg-type]
        found = best_round_to(model, structures, task.example_inputs(size), recipe.attention)
        remember(path, key, found)
        return found

    return agreed(measured)


def _ordinary(small: Any) -> tuple[str, Any]:
    """Why the model has no ordinary form ("" if it has), and the model to save."""
    try:
        return "", ordinary(small)
    except UnsupportedError as error:
        return str(error), small


@dataclass
class _Phases:
    """What all phases of a run share."""

    recipe: Recipe
    task: Task
    progress: Progress
    work: Path
    logs: Path
    teacher: Any = None

    def trainee(self, model: Any) -> nn.Module:
        """What is trained for ``model``: its task's objective, with a teacher if there is one."""
        recipe, trainee = self.recipe, self.task.objective(model)
        if self.teacher is not None and recipe.teacher:
            structures = discover(self.teacher, recipe.attention).structures  # type: ignore[arg-type]
            return Taught(trainee, model, self.teacher, recipe.teacher, structures)
        return trainee

    def fit(
        self,
        name: str,
        spec: Training,
        model: Any,
        callbacks: Sequence[Any] = (),
        items: Sequence[Any] | None = None,
        trainee: nn.Module | None = None,
    ) -> list[dict[str, float]]:
        """Train ``model`` in place, on all training items or on ``items``."""
        if not spec.on:
            return []
        recipe, task = self.recipe, self.task
        trainee = trainee if trainee is not None else self.trainee(model)
        items = task.train if items is None else items
        if spec.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        steps = spec.count(len(items), PartialState().num_processes)
        phase = {"train": "training", "search": "searching", "retrain": "retraining"}
        title = phase[name.partition("-")[0]]
        with self.progress.count(title, steps) as advance:
            history = fit(
                trainee,
                items,
                task.collate,
                spec,
                seed=recipe.seed,
                report_to=recipe.report_to,
                callbacks=callbacks,
                advance=advance,
                say=self.progress.note,
                checkpoints=self.work / name,
                logs=self.logs / name.partition("-")[0],
            )
        if spec.gradient_checkpointing:
            model.gradient_checkpointing_disable()
        return history


class _HeldOut(Sequence[Any]):
    """Batches of items that the search does not train on, collated when they are asked for."""

    def __init__(self, task: Task, items: Sequence[Any], batch_size: int) -> None:
        self.task, self.items, self.batch_size = task, items, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.items) / self.batch_size)

    def __getitem__(self, number: Any) -> Any:
        start = number * self.batch_size
        batch = list(self.items[start : start + self.batch_size])
        return self.task.collate(batch, random.Random(f"held out/{number}"))


HELD_OUT = 0.05


def _split(task: Task, recipe: Recipe) -> tuple[list[Any], _HeldOut]:
    """The training items in two: nineteen twentieths to train on, the rest to learn from."""
    order = list(range(len(task.train)))
    random.Random(f"{recipe.seed}/held out").shuffle(order)
    count = max(1, round(HELD_OUT * len(order)))
    aside = sorted(order[:count])
    rest = sorted(order[count:])
    items = [task.train[i] for i in aside]
    size = min(recipe.search.batch_size, len(items))
    return [task.train[i] for i in rest], _HeldOut(task, items, size)


def _evaluate(task: Task, model: Any, title: str, progress: Progress) -> dict[str, float]:
    with progress.count(title, len(task.test)) as advance:
        return task.evaluate(model, advance)


@dataclass
class _OwnLoss:
    """The loss of a held-out batch, by what the search trains once that is known."""

    trainee: nn.Module | None = None

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        assert self.trainee is not None
        with evaluating(self.trainee):  # queues and averages are not to move
            return self.trainee(**batch)["loss"]


def _refuse_early(recipe: Recipe, compressor: Compressor, items: int) -> None:
    """Raise now what would otherwise be raised after hours of training."""
    search = compressor.search
    if search.needs_training and not recipe.search.on:
        raise RecipeError(
            f"the method {recipe.method['name']} watches a training: give search.steps or "
            "search.epochs"
        )
    if isinstance(search, Alternating):
        search.expect(recipe.search.count(items, PartialState().num_processes))
    if recipe.teacher:
        model = compressor.model
        Taught(model, model, nn.Module(), recipe.teacher, compressor.structures)


def _open_dense(
    task: Task, out: Path, device: torch.device, basis: Basis, progress: Progress
) -> tuple[Any, Any]:
    """The dense model, and what is known of it where an earlier run of the recipe trained it."""
    noted = known_dense(out / "dense", basis, progress)
    if noted is None:
        return place(as_if_loaded(task.dense_model()), device), None
    progress.phase("dense model: taken from an earlier run of this recipe")
    return place(in_fresh_memory(task.load(out / "dense")), device), noted


def _train_dense(
    recipe: Recipe, task: Task, out: Path, work: Path, model: Any, basis: Basis, progress: Progress
) -> dict[str, Any]:
    """Train the dense model in place and save it; its metrics and log."""
    if recipe.train.on:
        progress.phase("training the dense model")
    phase = _Phases(recipe, task, progress, work, out / "logs")
    history = phase.fit(f"train-{basis.key}", recipe.train, model)
    metrics = _evaluate(task, model, "evaluating dense", progress)
    body = {"basis": asdict(basis), "metrics": metrics, "history": history}
    processes = PartialState()
    if processes.is_main_process:
        ours = {DENSE_NOTE: note_text(NO_NOTE)}
        save(model, out / "dense", extras=ours, processor=task.processor)
        remember(out / "dense" / DENSE_NOTE, basis.key, body)
    processes.wait_for_everyone()
    return body


def as_if_loaded(model: Any) -> Any:
    """The same model, its config saying of its parts what ``from_pretrained`` would note there.

    A resumed run loads its models, and is to save the same ``config.json``.
    """
    for name in getattr(model.config, "sub_configs", ()):
        part = getattr(model.config, name, None)
        if part is not None:
            part.dtype = model.dtype
    return model


def in_fresh_memory(model: Any) -> Any:
    """The same model, its weights where torch puts new tensors.

    A loaded file is mapped, so weights begin anywhere. Kernels then sum in another order, and a
    resumed training would differ in its last bits from the one it continues.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def _open_folder(folder: Path, recipe: Recipe, trust_remote_code: bool = False) -> tuple[Task, Any]:
    """The task of ``recipe``, and the model in ``folder`` on the recipe's device.

    An exported model stays where its runtime computes, which is the CPU.
    """
    transformers.utils.logging.disable_progress_bar()
    prepare(recipe.seed, recipe.threads)
    if is_export(folder):
        model = Exported(folder, trust_remote_code=trust_remote_code)
        return make_task(recipe, folder.parent / "data"), model
    device = choose(recipe.device)
    task = make_task(recipe, folder / "data")
    check_weights(folder)
    return task, place(task.load(folder), device)


def evaluate_folder(
    folder: Path,
    recipe: Recipe,
    progress: Progress | None = None,
    results: Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """The metrics of the model in ``folder`` on the test data of ``recipe``.

    ``results`` is a JSON file for what the model says about each item, in the format of the
    task's evaluation server where there is one.
    """
    progress = progress or Progress()
    if results is not None:
        check_file(results)
    task, model = _open_folder(folder, recipe, trust_remote_code)
    if task.left_out:
        progress.phase(task.left_out)
    with guarded(folder, f"evaluate on {recipe.task}", UnsupportedError):
        try:
            metrics = _evaluate(task, model, "evaluating", progress)
            said = None if results is None else task.results(model)
        except AttributeError as error:
            if isinstance(model, Exported) and error.obj is model:
                raise UnsupportedError(
                    f"the task {recipe.task} calls {error.name} of the model, but an export is its "
                    "forward pass alone: evaluate the model's folder"
                ) from None
            raise
    if results is not None:
        write_text(results, json.dumps(said) + "\n")
    return metrics


def scan_folder(folder: Path, recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """What each part of the model in ``folder`` is worth, on the data of ``recipe``."""
    progress = progress or Progress()
    task, model = _open_folder(folder, recipe)
    towers = {(s.tower, s.kind) for s in discover(model, recipe.attention)}  # type: ignore[arg-type]
    counted = progress.count("measuring", (len(towers) + 1) * len(SHARES))
    with guarded(folder, "scan", UnsupportedError), counted as advance:
        return scan(task, model, recipe.attention, advance=advance)


def export_folder(
    folder: Path,
    to: str,
    out: Path | None = None,
    *,
    int8: bool = False,
    generation: bool = False,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export the model in ``folder``; see :func:`vlprune.folders.exported.write.export`.

    With a ``recipe`` it is traced and checked on batches of its test data and calibrated on
    training data, else all on made-up inputs; on the CPU, whatever device the recipe names.
    """
    progress = progress or Progress()
    transformers.utils.logging.disable_progress_bar()
    out = out or folder / f"{to}{'-int8' if int8 else ''}"
    check_export_place(out)
    progress.phase("loading")
    calibration: list[dict[str, Any]] = []
    if recipe is not None:
        task, model = _open_folder(folder, replace(recipe, device="cpu"))
        with guarded(folder, "make batches for", UnsupportedError):
            samples, calibration = _export_batches(task, model, int8)
    else:
        model = open_model(str(folder))
        shapes = zip(EXPORT_SIZES, EXPORT_TOKENS, strict=True)
        samples = [made_up_inputs(model, size, tokens) for size, tokens in shapes]
    if generation:
        samples = [{n: v for n, v in one.items() if not n.startswith("dec")} for one in samples]
    progress.phase(f"exporting to {to} and checking it")
    facts = export(
        model, samples, to, out, int8=int8, generation=generation, calibration=calibration
    )
    return facts | {"out": str(out)}


def _export_batches(task: Task, model: Any, int8: bool) -> tuple[list[Any], list[Any]]:
    """Inputs to trace and check an export on, and those to calibrate int8 on."""
    samples = [_forward_inputs(model, task.example_inputs(size)) for size in EXPORT_SIZES]
    items = [task.train[i] for i in range(min(CALIBRATION, len(task.train)))] if int8 else []
    batches = [task.collate(items[i : i + 8]) for i in range(0, len(items), 8)]
    return samples, [_forward_inputs(model, batch) for batch in batches]


EXPORT_SIZES, EXPORT_TOKENS = (2, 3, 1), (16, 12, 8)
CALIBRATION = 256
"""Training items that int8 is calibrated on."""


def _forward_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a training batch that a forward pass without labels takes."""
    takes = inspect.signature(model.forward).parameters
    chosen = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name in takes and name != "labels"
    }
    if "decoder_input_ids" in takes and "decoder_input_ids" not in chosen:
        size = len(next(iter(chosen.values())))
        chosen["decoder_input_ids"] = made_up_inputs(model, size, 4)["decoder_input_ids"]
    return chosen


def describe(model: Any, example_inputs: Any, attention: str) -> dict[str, Any]:
    """What ``vlprune inspect`` shows: structures, units, params and MACs by tower and kind."""
    description = discover(model, attention)  # type: ignore[arg-type]
    prices = cost.param_prices(model, description.structures)
    macs, problem = None, ""
    if example_inputs is not None:
        try:
            macs = cost.measure_macs(model, description.structures, example_inputs)
        except Exception as error:
            problem = (
                "its forward pass looks at values, so inspect it with its weights"
                if next(model.parameters()).is_meta
                else f"made-up inputs do not fit it ({str(error).splitlines()[0]})"
            )
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for structure in description:
        row = groups.setdefault(
            (structure.tower, structure.kind),
            {
                "tower": structure.tower,
                "kind": structure.kind,
                "structures": 0,
                "units": 0,
                "params": 0,
                "macs": 0 if macs else None,
                "padded": 0,
                "shared": 0,
            },
        )
        row["structures"] += 1
        row["units"] += structure.size
        row["params"] += round(prices.whole(structure.name))
        row["shared"] += len(prices.elsewhere.get(structure.name, ()))
        row["padded"] += structure.layout == "padded"
        if macs:
            row["macs"] += round(macs.unit[structure.name] * structure.size)
    return {
        "model": type(model).__name__,
        "attention": description.attention,
        "fingerprint": description.fingerprint,
        "params": round(prices.total),
        "macs": macs.total if macs else None,
        "macs_problem": problem,
        "not_counted": list(macs.not_counted) if macs else [],
        "groups": list(groups.values()),
        "least_params": least(prices),
        "dense": dict(description.dense),
    }


def _bytes(model: nn.Module) -> int:
    """Bytes of all weights and index buffers: what is held in memory, and saved."""
    tensors = model.state_dict().values()
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel()}.values())


def _versions() -> dict[str, str]:
    return {
        "vlprune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
