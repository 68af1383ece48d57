"""Checks of a command line before anything is loaded, with all mistakes reported at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..errors import (
    BudgetError,
    CheckpointError,
    RecipeError,
    UnsupportedError,
    VlpruneError,
    did_you_mean,
)
from ..files import HUB_NAME, plain, shown
from ..folders import place
from ..structures.structure import AttentionUnit, ExpertUnit

if TYPE_CHECKING:
    from ..data.samples import Sample
    from ..recipe.spec import Recipe

__all__ = [
    "budget_of",
    "check_alone",
    "check_attention",
    "check_choice",
    "check_device",
    "check_experts",
    "check_file",
    "check_folder",
    "check_name",
    "check_output",
    "check_plan",
    "check_size",
    "check_stream",
    "check_timing",
    "check_untrained",
    "check_whole",
    "each",
    "given",
    "is_recipe",
    "numbers_of",
    "on",
    "recipe_for",
    "samples_of",
]


UNTRAINED = ("obs", "magnitude", "random")
"""Methods that need neither a training nor labels."""


WITHOUT_SAMPLES = ("magnitude", "random")
"""Methods that need no samples either."""


def each(*checks: Callable[[], Any]) -> list[Any]:
    """The results of the checks, in order.

    Raises the error of a check that fails; where several fail, one RecipeError with the problems
    of all.
    """
    results, errors = [], []
    for check in checks:
        try:
            results.append(check())
        except VlpruneError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = tuple(
            dict.fromkeys(
                line for error in errors for line in getattr(error, "problems", (str(error),))
            )
        )
        if len(problems) == 1:  # two checks came upon the same mistake
            raise errors[0]
        title = f"{len(problems)} mistakes:"
        raise RecipeError("\n".join([title, *(f"  {line}" for line in problems)]), problems)
    return results


def check_folder(folder: Path | None) -> None:
    """Raise CheckpointError if a folder is given but does not exist."""
    if folder is not None and not folder.is_dir():
        raise CheckpointError(f"there is no folder {plain(folder)}")


def check_name(name: str) -> None:
    """Raise CheckpointError for a name that is neither an existing path nor a possible hub name."""
    if not Path(name).exists() and not HUB_NAME.fullmatch(name):
        raise CheckpointError(f"there is no folder {plain(name)}")


def check_output(folder: Path) -> None:
    """Raise CheckpointError for an output that is a file."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{plain(folder)} is a file: choose a folder to save into")


def check_file(path: Path | None) -> None:
    """Raise CheckpointError if a file is asked for but cannot be written."""
    if path is not None:
        place.check_file(path)


def check_plan(path: Path) -> None:
    """Raise PlanError unless the file holds a plan."""
    from ..structures.plan import Plan

    Plan.load(path)


def check_size(size: str) -> None:
    """Raise UnsupportedError if a text is given that is no size of a weight file."""
    if size:  # accelerate, which knows the words, takes seconds to import
        from ..folders.save import check_shard_size

        check_shard_size(size)


def check_device(name: str) -> None:
    """Raise RecipeError unless this machine has the device."""
    if name not in ("", "auto", "cpu"):  # asking torch takes seconds
        from ..device import choose

        choose(name)


def check_attention(unit: str) -> None:
    """Raise UnsupportedError unless ``unit`` is an attention unit."""
    check_choice(unit, get_args(AttentionUnit), "attention must be one of {}, not {}.")


def check_experts(unit: str) -> None:
    """Raise UnsupportedError unless ``unit`` is a unit of experts."""
    check_choice(unit, get_args(ExpertUnit), "experts must be one of {}, not {}.")


def check_choice(word: str, known: Sequence[str], says: str) -> None:
    """Raise UnsupportedError unless ``word`` is known; ``says`` has places for both."""
    if word not in known:
        raise UnsupportedError(
            says.format(", ".join(known), repr(word)) + did_you_mean(word, known)
        )


def is_recipe(source: str, for_models: Sequence[str] = ()) -> bool:
    """Whether an argument names a recipe rather than a model: a folder, or a name on the hub.

    Options ``for_models`` decide where neither exists.
    """
    if source.lower().endswith((".yaml", ".yml")) or Path(source).is_file():
        return True
    if Path(source).is_dir() or for_models:
        return False
    return not HUB_NAME.fullmatch(source)


def budget_of(text: str) -> dict[str, float]:
    """The budget in text such as ``params=0.5``. Raises BudgetError for any other text."""
    from ..prices.budget import parse_budget

    if not text:
        raise BudgetError("a model without a recipe needs --budget, as in --budget params=0.5")
    what, sign, fraction = text.partition("=")
    try:
        budget = {what.strip(): float(fraction)}
    except ValueError:
        budget = {}
    if not sign or not budget:
        raise BudgetError(
            f"--budget is what stays of the model, as in params=0.5 or macs=0.5, not {shown(text)}"
        )
    parse_budget(budget)
    return budget


def samples_of(place: Path | None, left: Counter[str], method: str = "obs") -> list[Sample]:
    """The samples in ``place``; ``left`` counts rows left out. Raises DataError, RecipeError.

    A method that needs none gets none if no place is given.
    """
    from ..data.samples import read_samples

    if place is None and method in WITHOUT_SAMPLES:
        return []
    if place is None:
        raise RecipeError(
            "a model without a recipe needs --calibration: a folder of images like those that it "
            "is used with, or a .jsonl file of images and texts; or --method magnitude, which "
            "looks at the weights only"
        )
    return read_samples(place, left)


def check_untrained(method: str, rotate: bool) -> None:
    """Raise UnsupportedError unless the method needs no training, RecipeError for its options."""
    check_choice(method, UNTRAINED, "without a recipe the method must be one of {}, not {}.")
    if rotate and method != "obs":
        raise RecipeError(f"--rotate is an option of obs, not of {method}: leave it out")


def given(**values: Any) -> list[str]:
    """The options of a command line that have a value, as they are written there."""
    return [f"--{name.replace('_', '-')}" for name, value in values.items() if value]


def check_alone(options: Sequence[str], says: str) -> None:
    """Raise RecipeError if there are options that do not go with the rest; ``says`` why."""
    if options:
        raise RecipeError(f"{' and '.join(options)} {says}")


def check_whole(number: int, name: str, most: int) -> None:
    """Raise RecipeError unless ``number`` is from 1 to ``most``."""
    if not 1 <= number <= most:
        raise RecipeError(f"{name} must be a whole number from 1 to {most:,}, not {number}")


def numbers_of(text: str) -> tuple[int, ...]:
    """The batch sizes in text such as ``1,8,32``. Raises RecipeError for any other text."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise RecipeError(f"batch sizes are numbers of at least 1, as in 1,8,32, not {text!r}")
    return sizes


def check_timing(threads: int, seconds: float, batch_sizes: str) -> None:
    """Raise RecipeError for numbers that no measurement takes; :func:`numbers_of` reads them."""
    from ..recipe.machine import Timing

    try:
        sizes = numbers_of(batch_sizes)
    except RecipeError:  # reported by numbers_of itself
        sizes = (1,)
    Timing(threads, seconds, sizes)


def recipe_for(folder: Path, given: Path | None, overrides: Sequence[str] | None) -> Recipe | None:
    """The given recipe, or that of ``folder``: a model's, or an export's inside a model's.

    None where the folder is missing: the folder is the mistake then, not the recipe. Raises the
    errors of :func:`vlprune.recipe.spec.load_recipe`.
    """
    if given is None and not folder.is_dir():
        return None
    from ..recipe.spec import load_recipe

    places = [folder / "recipe.yaml", folder.parent / "recipe.yaml"]  # the latter for an export
    found = given or next((path for path in places if path.exists()), places[0])
    return load_recipe(found, overrides or [])


def on(device: str, recipe: Recipe) -> Recipe:
    """The recipe, to be run on ``device`` unless that is empty."""
    return replace(recipe, device=device) if device else recipe


def check_stream(stream: bool | None, calibration: Path | None) -> None:
    """Raise RecipeError for a wish that a model without samples be in memory, where it never is."""
    if stream is False and calibration is None:
        raise RecipeError("--no-stream needs --calibration: without samples the model is streamed")
