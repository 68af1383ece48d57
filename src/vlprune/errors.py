"""Every error vlprune raises on purpose.

    VlpruneError            one clear sentence that says what to do
    ├── PlanError           a plan that does not fit the model, or is malformed
    ├── BudgetError         a budget that is invalid, or cannot be reached
    ├── UnsupportedError    a model or a request that vlprune cannot handle exactly
    ├── VerificationError   the cut model does not answer like the masked one
    │   └── IncomparableError   the two models could not be compared at all
    ├── CheckpointError     a folder that is incomplete, damaged or cannot be written
    ├── DataError           a data file that is missing, malformed or empty
    └── RecipeError         a recipe with an unknown key or an impossible value

The command line prints the sentence and exits with code 2; a library caller catches
``VlpruneError`` or the subclass that matters to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DataError",
    "IncomparableError",
    "PlanError",
    "RecipeError",
    "UnsupportedError",
    "VerificationError",
    "VlpruneError",
    "did_you_mean",
    "first_line",
]


class VlpruneError(ValueError):
    """Base of all errors that vlprune raises on purpose."""


class PlanError(VlpruneError):
    """A plan that does not fit the model, or is malformed."""


class BudgetError(VlpruneError):
    """A budget that is invalid, or cannot be reached."""


class UnsupportedError(VlpruneError):
    """A model or a request that vlprune cannot handle exactly."""


class VerificationError(VlpruneError):
    """The cut model does not answer like the masked one; the model was put back."""


class IncomparableError(VerificationError):
    """The masked and the cut model could not be compared; the model was put back."""


class CheckpointError(VlpruneError):
    """A folder that is incomplete, damaged or cannot be written."""


class DataError(VlpruneError):
    """A data file that is missing, malformed or empty."""


class RecipeError(VlpruneError):
    """A recipe or an option with an unknown key or an impossible value.

    ``problems`` has one line per mistake.
    """

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest known word, or an empty string."""
    close = get_close_matches(word[:200], list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The kind of an error of another library, and the first line of what it says."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0] if said else ''}"
