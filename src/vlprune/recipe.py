"""Recipes: YAML files as frozen typed dataclasses. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .budget import parse_budget
from .errors import RecipeError, did_you_mean

__all__ = ["DataSpec", "ModelSpec", "Recipe", "Training", "load_recipe"]


@dataclass(frozen=True)
class ModelSpec:
    """Which model: ``path`` (a folder or a hub name), or a small new one of these sizes."""

    path: str = ""
    width: int = 96
    heads: int = 4
    vision_layers: int = 3
    text_layers: int = 2
    image_size: int = 64
    patch_size: int = 16


@dataclass(frozen=True)
class DataSpec:
    """Which data.

    ``format`` is one that the task reads (docs/recipes.md lists them), with ``train`` and
    ``test`` naming the files of each split, or ``folder`` where all lies in one place. The
    format ``shapes`` generates ``train_items`` and ``test_items`` scenes into ``folder`` and
    reads them as the format ``like`` (default: the task's first). 0 items means all.
    ``$NAME`` is replaced from the environment.
    """

    format: str = "shapes"
    like: str = ""
    folder: str = ""
    train: Mapping[str, str] = field(default_factory=dict)
    test: Mapping[str, str] = field(default_factory=dict)
    train_items: int = 0
    test_items: int = 0


DECAYS = ("cosine", "constant")


@dataclass(frozen=True)
class Training:
    """One phase of training by the Trainer: AdamW, warm-up, ``cosine`` or ``constant`` decay.

    It takes ``steps`` optimizer steps, or ``epochs`` passes over the data where ``steps`` is 0.
    ``warmup`` is a fraction of them; ``batch_size`` is per process, and ``accumulate`` batches
    make one step. The Trainer saves a checkpoint every ``save_steps`` (0: never) and at the
    end of a phase, and the same command goes on from the last one, ending with the very weights
    of a run that was never stopped. ``rates`` multiplies the learning rate of the weights whose
    names match a pattern, as in ``{"vision_model.*": 0.1}``; gradients are clipped to a norm of
    ``clip`` (0: not at all).
    """

    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    rates: Mapping[str, float] = field(default_factory=dict)
    clip: float = 1.0
    warmup: float = 0.1
    decay: str = "cosine"
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    save_steps: int = 500

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise RecipeError(
                f"decay must be one of {', '.join(DECAYS)}, not {self.decay!r}."
                f"{did_you_mean(self.decay, DECAYS)}"
            )

    @property
    def on(self) -> bool:
        """Whether there is anything to train."""
        return self.steps > 0 or self.epochs > 0

    def count(self, items: int, processes: int = 1) -> int:
        """Optimizer steps on so many training items."""
        if self.steps:
            return self.steps
        batch = self.batch_size * processes
        batches = max(1, items // batch)  # the last, smaller one is dropped
        return max(1, math.ceil(self.epochs * max(1, batches // self.accumulate)))


@dataclass(frozen=True)
class Recipe:
    """One compression from data to folder.

    ``method`` is ``{"name": ..., option: value}``. ``train`` makes the dense model (no steps:
    take it as it is), ``search`` is the training a method with gates watches, ``retrain``
    follows the cut. ``teacher`` weighs what the model must imitate of the dense one in
    ``search`` and ``retrain``, as in ``{"logits": 1, "features": 1, "similarities": 1}``; empty
    means no teacher. ``options`` are the task's own. ``skip`` are patterns of structures that
    stay dense. ``uniform`` gives all layers of a tower one width and saves an ordinary model where
    its config can say that. ``threads`` 0 leaves the number of CPU threads alone. ``device`` is
    where all of it runs: ``auto`` (a CUDA GPU where there is one, else the CPU), ``cpu``, ``cuda``,
    ``cuda:1``. A budget in latency is measured on batches of ``latency_batch_size``.
    """

    task: str
    budget: Mapping[str, float]
    method: Mapping[str, Any] = field(default_factory=lambda: {"name": "magnitude"})
    attention: str = "head_dim"
    skip: Sequence[str] = ()
    model: ModelSpec = field(default_factory=ModelSpec)
    data: DataSpec = field(default_factory=DataSpec)
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Training = field(default_factory=Training)
    search: Training = field(default_factory=Training)
    retrain: Training = field(default_factory=Training)
    teacher: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    threads: int = 0
    device: str = "auto"
    report_to: str = "none"
    latency_batch_size: int = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        parse_budget(self.budget)

    def to_yaml(self) -> str:
        """The recipe with every default spelled out, ready to be run again."""
        body = dataclasses.asdict(self)
        return yaml.safe_dump({**body, "skip": list(self.skip)}, sort_keys=False)

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
                bf16=False,
                fp16=False,
                compile=False,
                gradient_checkpointing=False,
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
            options={**self.options, **({"queue": 64} if "queue" in self.options else {})},
            model=dataclasses.replace(self.model, path="", **TOY_SIZES),
            data=DataSpec(
                format="shapes",
                like=self.data.like if form == "shapes" else form,
                train_items=96,
                test_items=32,
            ),
            train=short(self.train, True),
            search=short(self.search, self.search.on),
            retrain=short(self.retrain, self.retrain.on),
        )


TOY_IGNORES = ("path", "folder", "train", "test")
TOY_STEPS = 12
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

    ``toy`` makes it :meth:`Recipe.toy` first; names that the environment lacks do not matter then.

    Raises RecipeError for a file that cannot be read, an unknown key (with the closest known
    one) or a value of the wrong type; BudgetError for a budget that is none.
    """
    try:
        body = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict):
        raise RecipeError(f"{path} must be a mapping of keys to values")
    if toy:
        for section in ("model", "data"):  # nothing of it is used, so it need not be there
            given = body.get(section)
            if isinstance(given, dict):
                body[section] = {k: v for k, v in given.items() if k not in TOY_IGNORES}
        small = typing.cast(Recipe, _build(Recipe, body, "")).toy()
        body = yaml.safe_load(small.to_yaml())
    for override in overrides:
        _override(body, override)
    return typing.cast(Recipe, _build(Recipe, body, ""))


def _override(body: dict[str, Any], text: str) -> None:
    """Set ``a.b=value`` in a nested mapping; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"{text!r} is not of the form key=value, as in budget.params=0.3")
    *parents, leaf = key.split(".")
    for name in parents:
        body = body.setdefault(name, {})
        if not isinstance(body, dict):
            raise RecipeError(f"{key}: {name} has a value and no keys below it")
    try:
        body[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r}: the value is not valid YAML") from None


def _build(cls: type[Any], body: Any, where: str) -> Any:
    """A dataclass from a mapping, strictly."""
    if not isinstance(body, Mapping):
        raise RecipeError(f"{where or 'the recipe'} must hold keys, not {body!r}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in body.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise RecipeError(
                f"unknown key {place!r} in the recipe.{did_you_mean(str(key), hints)}"
            )
        values[key] = _value(hints[key], value, place)
    for spec in dataclasses.fields(cls):
        needed = spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
        if needed and spec.name not in values:
            raise RecipeError(f"the recipe needs {spec.name!r}")
    return cls(**values)


_MAPPINGS = (Mapping, types.MappingProxyType)
_LISTS = (Sequence,)


def _value(hint: Any, value: Any, place: str) -> Any:
    """``value`` as the type that a field asks for."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, place)
    origin = typing.get_origin(hint)
    if origin in _MAPPINGS:
        if not isinstance(value, Mapping):
            raise RecipeError(f"{place} must hold keys, as in {place}.name=value, not {value!r}")
        return {
            str(k): _expand(v, f"{place}.{k}") if isinstance(v, str) else v
            for k, v in value.items()
        }
    if origin in _LISTS:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise RecipeError(f"{place} must be a list, as in [a, b], not {value!r}")
        return tuple(str(entry) for entry in value)
    if hint is str and isinstance(value, str):
        return _expand(value, place)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            raise RecipeError(f"{place} must be a number, not {value!r}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
        kind = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint]
        raise RecipeError(f"{place} must be {kind}, not {value!r}")
    if hint in (int, float) and value < 0:
        raise RecipeError(f"{place} must not be negative, not {value!r}")
    return value


def _expand(text: str, place: str) -> str:
    """``$NAME`` replaced from the environment. Raises RecipeError if a name is not set."""
    expanded = os.path.expanduser(os.path.expandvars(text))
    if "$" in expanded:
        name = expanded[expanded.index("$") :].split("/")[0]
        raise RecipeError(f"{place} uses {name}, which is not set in the environment")
    return expanded
