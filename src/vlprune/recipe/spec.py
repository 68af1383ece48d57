"""Recipes: YAML files as frozen dataclasses, checked before anything heavy is imported.

Creating an instance raises one RecipeError for all mistakes, from Python as from a file
(:mod:`vlprune.recipe.checks`). The values that a leaf takes stand beside it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ValidationError, ValidationInfo, field_validator

from ..errors import BudgetError
from ..files import plain, shown
from ..prices.budget import parse_budget
from .checks import (
    BUDGET,
    KEY,
    SEEDS,
    Checked,
    Flag,
    Mistake,
    Number,
    OneOf,
    Text,
    Texts,
    Whole,
    checked,
    mistakes_of,
    refusal,
    refuse,
)
from .data import AugmentSpec, DataSpec, data_mistakes
from .machine import THREADS, Device, Logger
from .options import (
    JSP_FAMILIES,
    METHOD_OPTIONS,
    TASK_OPTIONS,
    check_method,
    check_options,
    check_teacher,
)
from .reading import override, read

__all__ = [
    "AugmentSpec",
    "CalibrationSpec",
    "DataSpec",
    "LoraSpec",
    "ModelSpec",
    "Recipe",
    "Training",
    "load_recipe",
]

MANY = 10**9
PATCHES = 2**14
"""The most patches per image of a new model: 128 by 128, as for 2,048 pixels in patches of 16."""
PARAMETERS = 10**9
"""The most parameters of a new model."""


@checked
class ModelSpec(Checked):
    """Which model: ``path`` (a folder or a hub name), or a small new one of these sizes."""

    path: Annotated[str, Text()] = ""
    width: Annotated[int, Whole(8, 8192)] = 96
    heads: Annotated[int, Whole(1, 1024)] = 4
    vision_layers: Annotated[int, Whole(1, 1000)] = 3
    text_layers: Annotated[int, Whole(1, 1000)] = 2
    image_size: Annotated[int, Whole(8, 8192)] = 64
    patch_size: Annotated[int, Whole(1, 8192)] = 16

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """Sizes must divide evenly, and make a model that fits in memory."""
        if self.width % self.heads:
            yield ("heads",), f"{KEY} must divide the width {self.width}, not {self.heads}"
        if self.image_size % self.patch_size:
            text = f"must divide the image_size {self.image_size}, not {self.patch_size}"
            yield ("patch_size",), f"{KEY} {text}"
        elif (self.image_size // self.patch_size) ** 2 > PATCHES:
            text = f"{self.patch_size} makes more than {PATCHES:,} patches of {self.image_size} px"
            yield ("patch_size",), f"{KEY} {text}: make it larger, or image_size smaller"
        if 12 * self.width**2 * (self.vision_layers + self.text_layers) > PARAMETERS:
            text = f"{self.width} and so many layers make more than {PARAMETERS:,} parameters"
            yield ("width",), f"{KEY} {text}: make them smaller, or give model.path"


@checked
class CalibrationSpec(Checked):
    """How many training items the cut is calibrated on, without their labels; 0: it is not.

    The items are drawn at random by the recipe's seed and go through the model in batches of
    ``batch_size``; every eighth batch is held out. A method such as ``obs`` learns from them, and
    the plan of any other method is folded into the weights that stay.
    """

    items: Annotated[int, Whole(0, 10**6)] = 0
    batch_size: Annotated[int, Whole(1, 4096)] = 8


@checked
class LoraSpec(Checked):
    """Low-rank adapters to train in place of the weights (Hu et al., ICLR 2022), by peft.

    Linear layers whose names match one of ``targets`` (none given: all but the output head) get
    adapters of ``rank`` (0: no adapters), scaled by ``alpha / rank``, with ``dropout`` before them.
    With ``merge`` they end as part of the weights; else they are saved beside the model, in the
    folder ``adapter``.
    """

    rank: Annotated[int, Whole(0, 8192)] = 0
    alpha: Annotated[float, Number(0, 10**6, above=True)] = 16.0
    dropout: Annotated[float, Number(0, 1, below=True)] = 0.0
    targets: Annotated[Sequence[str], Texts()] = ()
    merge: Annotated[bool, Flag()] = True


DECAYS = ("cosine", "constant")
OPTIMIZERS = ("adamw", "sgd")
DECAYED = ("weights", "all")


@checked
class Training(Checked):
    """One phase of training by the Trainer: warm-up, then ``cosine`` or ``constant`` decay.

    It takes ``steps`` optimizer steps, or ``epochs`` passes over the data where ``steps`` is 0.
    ``warmup`` is a fraction of them; ``batch_size`` is per process, and ``accumulate`` batches
    make one step. The Trainer saves a checkpoint every ``save_steps`` (0: never) and at the
    end of a phase, and the same command goes on from the last one, ending with the very weights
    of a run that was never stopped. ``rates`` multiplies the learning rate of the weights whose
    names match a pattern, as in ``{"vision_model.*": 0.1}``; gradients are clipped to a norm of
    ``clip`` (0: not at all). ``optimizer`` is ``adamw``, or ``sgd`` with Nesterov's momentum of
    0.9. ``weight_decay_on`` is what decays: ``weights``, all but biases and norms, or ``all``. With
    ``ema`` the phase ends with an exponential moving average of its weights, which after
    every step is ``ema`` of itself and the rest of the weights (0: with the last weights).

    ``drop_path`` and ``dropout`` are rates by patterns of module names, as in
    ``{"vision_model.*": 0.1}``, for this training alone (:mod:`vlprune.training.regularise`).
    """

    steps: Annotated[int, Whole(0, MANY)] = 0
    epochs: Annotated[float, Number(0, 10**6)] = 0.0
    batch_size: Annotated[int, Whole(1, 10**6)] = 64
    accumulate: Annotated[int, Whole(1, 10**6)] = 1
    optimizer: Annotated[str, OneOf(*OPTIMIZERS)] = "adamw"
    learning_rate: Annotated[float, Number(0, 1000)] = 1e-3
    weight_decay: Annotated[float, Number(0, 1000)] = 0.05
    weight_decay_on: Annotated[str, OneOf(*DECAYED)] = "weights"
    rates: Mapping[Annotated[str, Text(1)], Annotated[float, Number(0, 1000)]] = field(
        default_factory=dict
    )
    clip: Annotated[float, Number(0, 10**6)] = 1.0
    ema: Annotated[float, Number(0, 1, below=True)] = 0.0
    drop_path: Mapping[Annotated[str, Text(1)], Annotated[float, Number(0, 1, below=True)]] = field(
        default_factory=dict
    )
    dropout: Mapping[Annotated[str, Text(1)], Annotated[float, Number(0, 1, below=True)]] = field(
        default_factory=dict
    )
    warmup: Annotated[float, Number(0, 1)] = 0.1
    decay: Annotated[str, OneOf(*DECAYS)] = "cosine"
    bf16: Annotated[bool, Flag()] = False
    fp16: Annotated[bool, Flag()] = False
    gradient_checkpointing: Annotated[bool, Flag()] = False
    compile: Annotated[bool, Flag()] = False
    lora: LoraSpec = field(default_factory=LoraSpec)
    save_steps: Annotated[int, Whole(0, MANY)] = 500
    workers: Annotated[int, Whole(0, 64)] = 0

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """The Trainer takes only one precision; adapters are no weights to average."""
        if self.bf16 and self.fp16:
            yield ("fp16",), f"{KEY} and bf16 must not both be true: leave one of them out"
        if self.ema and self.lora.rank:
            yield ("ema",), f"{KEY} must be 0 with lora, which leaves the weights as they are"
        if self.drop_path and self.lora.rank:
            yield ("drop_path",), f"{KEY} must be empty with lora, which wraps the projections"

    @property
    def on(self) -> bool:
        """Whether there is anything to train."""
        return self.steps > 0 or self.epochs > 0

    def count(self, items: int, processes: int = 1) -> int:
        """The number of optimizer steps for ``items`` training items on ``processes`` processes."""
        if self.steps:
            return self.steps
        return max(1, math.ceil(self.epochs * self.epoch(items, processes)))

    def epoch(self, items: int, processes: int = 1) -> int:
        """The number of optimizer steps in one pass; a stream (0 items) is passed through once."""
        if not items:
            return self.steps
        batches = items // (self.batch_size * processes)  # the last, smaller one is dropped
        return max(1, batches // self.accumulate)


ATTENTION = ("head_dim", "qk_vo", "head", "query_head")
EXPERTS = ("neuron", "expert")


@checked
class Recipe(Checked):
    """One compression from data to folder.

    ``method`` is ``{"name": ..., option: value}``. ``train`` makes the dense model (no steps:
    take it as it is), ``search`` is the training a method with gates watches, ``retrain``
    follows the cut. ``teacher`` weighs what the model must imitate of the dense one in
    ``search`` and ``retrain``, as in ``{"logits": 1, "features": 1, "similarities": 1}``; empty
    means no teacher. ``calibration`` compresses without training, or repairs the cut of another
    method. ``options`` are the task's own. ``skip`` are patterns of structures that
    stay dense. ``uniform`` gives all layers of a tower one width and saves an ordinary model where
    its config can say that. ``threads`` 0 leaves the number of CPU threads alone. ``device`` is
    where all of it runs: ``auto`` (a CUDA GPU where there is one, else the CPU), ``cpu``, ``cuda``,
    ``cuda:1``. A budget in latency is measured on batches of ``latency_batch_size``.
    """

    task: Annotated[str, OneOf(*TASK_OPTIONS)]
    budget: Mapping[str, float]
    method: Mapping[Annotated[str, Text(1)], Any] = field(
        default_factory=lambda: {"name": "magnitude"}
    )
    attention: Annotated[str, OneOf(*ATTENTION)] = "head_dim"
    experts: Annotated[str, OneOf(*EXPERTS)] = "neuron"
    skip: Annotated[Sequence[str], Texts()] = ()
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    options: Mapping[Annotated[str, Text(1)], Any] = field(default_factory=dict)
    train: Training = field(default_factory=Training)
    search: Training = field(default_factory=Training)
    retrain: Training = field(default_factory=Training)
    teacher: Mapping[Annotated[str, Text(1)], Any] = field(default_factory=dict)
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)
    seed: Annotated[int, Whole(0, SEEDS)] = 0
    threads: Annotated[int, Whole(0, THREADS)] = 0
    device: Annotated[str, Device()] = "auto"
    report_to: Annotated[str, Logger()] = "none"
    latency_batch_size: Annotated[int, Whole(1, 4096)] = 1
    uniform: Annotated[bool, Flag()] = False

    @field_validator("budget", mode="plain")
    @classmethod
    def _a_budget(cls, budget: Any) -> Any:
        if isinstance(budget, Mapping):
            budget = {what: _as_number(fraction) for what, fraction in budget.items()}
        try:
            parse_budget(budget)
        except BudgetError as error:
            raise refuse(((), str(error)), kind=BUDGET) from None
        return budget

    @field_validator("method")
    @classmethod
    def _a_method(cls, method: Mapping[str, Any]) -> Mapping[str, Any]:
        check_method(method)
        return method

    @field_validator("teacher")
    @classmethod
    def _a_teacher(cls, teacher: Mapping[str, Any]) -> Mapping[str, Any]:
        check_teacher(teacher)
        return {term: float(weight) for term, weight in teacher.items()}

    @field_validator("options")
    @classmethod
    def _its_options(cls, options: Mapping[str, Any], seen: ValidationInfo) -> Mapping[str, Any]:
        if "task" in seen.data:
            model = seen.data.get("model")
            new = model if model is not None and not model.path else None
            check_options(seen.data["task"], options, new)
        return options

    @field_validator("data")
    @classmethod
    def _its_data(cls, data: DataSpec, seen: ValidationInfo) -> DataSpec:
        if "task" in seen.data:
            wrong = [*data_mistakes(seen.data["task"], data)]
            if wrong:
                raise refuse(*wrong)
        return data

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """Averages and adapters are for retraining; calibration suits some methods only."""
        if self.search.ema:
            text = (
                "must be 0: units fade during the search, and an average would bring back what "
                "went. Give retrain.ema"
            )
            yield ("search", "ema"), f"{KEY} {text}"
        for phase in ("train", "search"):
            if getattr(self, phase).lora.rank:
                text = "must be 0: only the small model is trained by adapters. Give retrain.lora"
                yield (phase, "lora", "rank"), f"{KEY} {text}"
        name, items = self.method["name"], self.calibration.items
        if getattr(METHOD_OPTIONS[name], "uses_calibration", False) and not items:
            text = f"must be at least 1 for the method {name}, which learns from these items"
            yield ("calibration", "items"), f"{KEY} {text}, as in 256"
        shares = {"cross", "block"} & {*self.method.get("families", JSP_FAMILIES)}
        if name == "jsp" and shares and items:
            text = (
                "must be 0 for a method that shares weights, since a repair would pull them apart"
            )
            yield ("calibration", "items"), f"{KEY} {text}; or give method.families=[prune]"
        if self.data.streaming:
            yield from self._streaming_conflicts()

    def _streaming_conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """A stream has no length, no second look, and nothing to set aside."""
        takes = TASK_OPTIONS[self.task]
        for name in ("train", "search", "retrain"):
            phase = getattr(self, name)
            if phase.on and not phase.steps:
                text = "must be 0 with data.streaming, since a stream has no length"
                yield (name, "epochs"), f"{KEY} {text}: give {name}.steps"
        if takes.counts_words and not self.model.path:
            text = "must be given with data.streaming: a new model needs the words of all texts"
            yield ("model", "path"), f"{KEY} {text}"
        for name in takes.stream_needs:
            if not self.options.get(name):
                text = "must be given with data.streaming, since a stream is not searched for them"
                yield ("options", name), f"{KEY} {text}"
        for name in takes.not_streamed:
            if self.options.get(name):
                text = "must be false with data.streaming, since a stream has no epochs"
                yield ("options", name), f"{KEY} {text}"
        if self.method["name"] == "jsp":
            text = "must not be jsp with data.streaming: it sets some of the training items aside"
            yield ("method", "name"), f"{KEY} {text}"

    def to_yaml(self) -> str:
        """The recipe with every default spelled out, ready to be run again."""
        return yaml.safe_dump(_as_written(dataclasses.asdict(self)), sort_keys=False)

    def toy(self) -> Recipe:
        """The same procedure in minutes: a small new model, generated data in the same format,
        and a few steps of each phase."""
        form = self.data.format

        def short(phase: Training, on: bool) -> Training:
            return dataclasses.replace(
                phase,
                steps=TOY_STEPS if on else 0,
                epochs=0.0,
                batch_size=16,
                accumulate=1,
                learning_rate=1e-3,
                rates={},
                clip=1.0,
                ema=min(phase.ema, TOY_EMA),
                lora=dataclasses.replace(phase.lora, targets=()),
                bf16=False,
                fp16=False,
                compile=False,
                gradient_checkpointing=False,
                workers=0,
            )

        method, budget = dict(self.method), dict(self.budget)
        if "interval" in method:
            method["interval"] = "auto"
        if method.get("name") == "jsp":  # few steps, and towers that are a small part of the model
            method |= {"every": 1, "learning_rate": 0.05, "mismatch": "skip"}
            budget = {what: max(0.9, fraction) for what, fraction in budget.items()}
        return dataclasses.replace(
            self,
            method=method,
            budget=budget,
            options={
                k: TOY_OPTIONS.get(k, v)
                for k, v in self.options.items()
                if k not in TOY_IGNORES["options"]
            },
            model=dataclasses.replace(self.model, path="", **TOY_SIZES),
            data=DataSpec(
                format="shapes",
                like=self.data.like if form == "shapes" else form,
                train_items=96,
                test_items=32,
                augment=self.data.augment,
            ),
            train=short(self.train, True),
            calibration=CalibrationSpec(
                min(self.calibration.items, TOY_ITEMS), min(self.calibration.batch_size, 4)
            ),
            search=short(self.search, self.search.on),
            retrain=short(self.retrain, self.retrain.on),
        )


TOY_IGNORES = {
    "model": ("path",),
    "data": ("folder", "train", "test", "columns", "streaming"),
    "options": ("answers", "names"),
}
"""What a toy does not use, so that it need not exist."""
TOY_STEPS = 12
TOY_EMA = 0.5
"""A longer average would hold little but the weights before the first step."""
TOY_ITEMS = 32
TOY_OPTIONS: Mapping[str, Any] = {"queue": 64, "fusion_width": 0, "queries": 16}
TOY_SIZES: Mapping[str, Any] = {
    "width": 48,
    "heads": 4,
    "vision_layers": 2,
    "text_layers": 2,
    "image_size": 32,
    "patch_size": 16,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), toy: bool = False) -> Recipe:
    """The recipe in a YAML file, with ``key.key=value`` overrides applied.

    ``toy`` applies :meth:`Recipe.toy` first; variables that the environment lacks do not matter
    then.

    Raises RecipeError for a file that cannot be read, and for all mistakes in the file and in the
    overrides at once; BudgetError where a wrong budget is the only mistake.
    """
    body, wrong = read(path)
    where = plain(path)
    if toy:
        for section, ignored in TOY_IGNORES.items():
            given = body.get(section)
            if isinstance(given, dict):
                body[section] = {k: v for k, v in given.items() if k not in ignored}
        if isinstance(body.get("data"), dict):
            body["data"]["folder"] = "generated"  # stands for the files of its format
        body = yaml.safe_load(_made(body, wrong, where, ()).toy().to_yaml())
    given = []
    for text in overrides:
        key, refused = override(body, text)
        given.append(key)
        wrong += refused
    return _made(body, wrong, where, given)


def _made(body: dict[str, Any], wrong: list[Mistake], where: str, given: Sequence[str]) -> Recipe:
    """The recipe of these values. Raises for the mistakes in ``wrong`` and in the values.

    ``given`` are the keys of the command line: mistakes there are not mistakes in the file.
    """
    wrong = [*wrong]
    body = {name: _expanded(value, name, wrong) for name, value in body.items()}
    try:
        recipe: Recipe = Recipe.__pydantic_validator__.validate_python(body)  # type: ignore[attr-defined]
    except ValidationError as error:
        wrong += mistakes_of(error)
    if not wrong:
        return recipe
    own = [any(_is_below(one.key, key) for key in given) for one in wrong]
    places = [*([] if all(own) else [where]), *(["the command line"] if any(own) else [])]
    raise refusal(wrong, " and ".join(places) if len(wrong) > 1 or not any(own) else "")


def _is_below(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


# -- values in YAML ----------------------------------------------------------------------


def _as_number(value: Any) -> Any:
    """A number also where it is text: YAML reads 5e-1 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _as_written(value: Any) -> Any:
    """Plain values for YAML, from which :func:`load_recipe` makes the same recipe again."""
    if isinstance(value, Mapping):
        return {name: _as_written(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(entry) for entry in value]
    return value.replace("$", "$$") if isinstance(value, str) else value


def _expanded(value: Any, key: str, wrong: list[Mistake]) -> Any:
    """The value with ``$NAME`` and a leading ``~`` expanded in all its texts.

    Mistakes are added to ``wrong``.
    """
    if isinstance(value, dict):
        return {name: _expanded(entry, f"{key}.{name}", wrong) for name, entry in value.items()}
    if isinstance(value, list):
        return [_expanded(entry, key, wrong) for entry in value]
    if not isinstance(value, str):
        return value
    try:
        return os.path.expanduser(string.Template(value).substitute(os.environ))
    except KeyError as error:
        text = f"uses ${plain(error.args[0])}, which is not set in the environment"
    except ValueError:
        text = f"{shown(value)} holds a $ that begins no name: write $$ for the sign itself"
    wrong.append(Mistake(plain(key), f"{plain(key)} {text}"))
    return value
