"""The values that recipes and methods accept, and one error that names every wrong value.

pydantic checks; this module says in plain words what is allowed. A leaf is annotated with the
values it takes, as in ``Annotated[int, Whole(1, 64)]``; a class decorated with :func:`checked` is a
frozen dataclass that raises RecipeError with one line per mistake. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from ..errors import BudgetError, RecipeError, VlpruneError, did_you_mean
from ..files import plain, shown

__all__ = [
    "Checked",
    "Flag",
    "Mistake",
    "Number",
    "OneOf",
    "Text",
    "Texts",
    "Whole",
    "checked",
    "mistakes_of",
    "refusal",
    "refuse",
]

KEY = "\0"
"""Stands in a mistake's text for the dotted key, which only the outermost class knows."""
BUDGET = "budget"
LONGEST = 4096
SEEDS = 2**32 - 1
"""The largest seed that numpy takes."""


@dataclass(frozen=True)
class Mistake:
    """One mistake: its dotted key, and the line that describes it."""

    key: str
    line: str
    kind: str = ""


def refuse(*wrong: tuple[tuple[str, ...], str], kind: str = "") -> ValidationError:
    """pydantic's error for (place, text) pairs; ``KEY`` in a text stands for the dotted key."""
    details = [_detail(place, text, kind) for place, text in wrong]
    return ValidationError.from_exception_data("checks", details)


def _detail(place: Sequence[str | int], text: str, kind: str) -> InitErrorDetails:
    told = PydanticCustomError("mistake", "{text}", {"text": text, "kind": kind})
    return InitErrorDetails(type=told, loc=tuple(place), input=None)


def mistakes_of(error: ValidationError) -> list[Mistake]:
    """The mistakes for which a class made by :func:`checked` raised ``error``, in field order."""
    found = []
    for one in error.errors(include_url=False, include_input=False):
        place, context = one["loc"], one.get("ctx", {})
        if place[-1:] == ("[key]",):
            place = place[:-1]
            name = f"the key {'.'.join(map(str, place))}"
        else:
            name = ".".join(map(str, place))
        text = context.get("text", f"{KEY}: {one['msg']}")
        line = text.replace(KEY, plain(name if len(name) <= 80 else f"{name[:77]}..."))
        found.append(Mistake(".".join(map(str, place)), line, context.get("kind", "")))
    return found


def refusal(found: Iterable[Mistake], where: str = "") -> VlpruneError:
    """The error for some mistakes, at most one per key; ``where`` is the file they are in."""
    first = {one.key: one for one in reversed([*found])}
    rest = [*reversed(first.values())]
    lines = tuple(one.line for one in rest)
    if len(rest) == 1:
        kind = BudgetError if rest[0].kind == BUDGET else RecipeError
        return kind(f"{where}: {lines[0]}" if where else lines[0])
    title = f"{len(rest)} mistakes" + (f" in {where}" if where else "")
    return RecipeError("\n".join([f"{title}:", *(f"  {line}" for line in lines)]), lines)


# -- leaves ----------------------------------------------------------------------------


class _Leaf:
    """The values that a leaf takes; ``says`` puts them in words."""

    @property
    def says(self) -> str:
        """The allowed values, in words."""
        raise NotImplementedError

    def schema(self) -> core_schema.CoreSchema:
        """The schema of pydantic's own check."""
        raise NotImplementedError

    def read(self, value: Any) -> Any:
        """The value as pydantic should see it. May raise ValueError to refuse the value."""
        return value

    def hint(self, value: Any) -> str:
        """A sentence to add to the mistake for a refused value, or an empty string."""
        return ""

    def refuses(self, value: Any) -> str:
        """The text of the mistake for a refused ``value``."""
        return f"{KEY} must be {self.says}, not {shown(value)}{self.hint(value)}"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def check(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            try:
                return inner(self.read(value))
            except (ValueError, TypeError, OverflowError):  # ValidationError is a ValueError
                raise refuse(((), self.refuses(value))) from None

        return core_schema.no_info_wrap_validator_function(check, self.schema())


@dataclass(frozen=True)
class Whole(_Leaf):
    """A whole number in a range, or ``word`` in place of a number."""

    low: int
    high: int
    word: str = ""

    @property
    def says(self) -> str:
        """As in "a whole number from 1 to 64"."""
        return f"{self.word}{' or ' if self.word else ''}a whole number from {self.low} to " + (
            f"{self.high:,}"
        )

    def schema(self) -> core_schema.CoreSchema:
        number = core_schema.int_schema(strict=True, ge=self.low, le=self.high)
        if not self.word:
            return number
        return core_schema.union_schema([core_schema.literal_schema([self.word]), number])


@dataclass(frozen=True)
class Number(_Leaf):
    """A finite number in a range, whose ends may be excluded.

    A number may also be given as text, since YAML reads 1e-3 as text.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False

    @property
    def says(self) -> str:
        """As in "a number above 0 and at most 1"."""
        low = f"above {self.low:,}" if self.above else f"of at least {self.low:,}"
        high = f"below {self.high:,}" if self.below else f"at most {self.high:,}"
        return f"a number {low} and {high}"

    def read(self, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError
        return float(value) if isinstance(value, str | int) else value

    def schema(self) -> core_schema.CoreSchema:
        ends: dict[str, Any] = {
            "gt" if self.above else "ge": self.low,
            "lt" if self.below else "le": self.high,
        }
        return core_schema.float_schema(strict=True, allow_inf_nan=False, **ends)


@dataclass(frozen=True)
class Flag(_Leaf):
    """True or false, and no other value in place of them."""

    @property
    def says(self) -> str:
        """As in "true or false"."""
        return "true or false"

    def schema(self) -> core_schema.CoreSchema:
        return core_schema.bool_schema(strict=True)


@dataclass(frozen=True)
class Text(_Leaf):
    """Text without control characters, of a bounded length."""

    least: int = 0
    most: int = LONGEST

    @property
    def says(self) -> str:
        """As in "text of 1 to 4,096 printable characters"."""
        length = f"{self.least} to" if self.least else "at most"
        return f"text of {length} {self.most:,} printable characters"

    def read(self, value: Any) -> Any:
        if isinstance(value, str) and not value.isprintable():
            raise ValueError
        return value

    def schema(self) -> core_schema.CoreSchema:
        return core_schema.str_schema(strict=True, min_length=self.least, max_length=self.most)


class OneOf(_Leaf):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    @property
    def says(self) -> str:
        """As in "one of cosine, constant"."""
        return f"one of {', '.join(self.words)}"

    def schema(self) -> core_schema.CoreSchema:
        return core_schema.literal_schema(list(self.words))

    def hint(self, value: Any) -> str:
        close = did_you_mean(value[:LONGEST], self.words) if isinstance(value, str) else ""
        return f".{close}" if close else ""


class Texts(_Leaf):
    """A list of texts, kept as a tuple; given ``words``, at least one of them and none twice."""

    def __init__(self, *words: str) -> None:
        self.words = words

    @property
    def says(self) -> str:
        """As in "a list of texts, as in [a, b]"."""
        if not self.words:
            return "a list of at most 1,000 texts, as in [a, b]"
        return f"a list of at least one of {', '.join(self.words)}, each once"

    def read(self, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError
        if self.words and len({*value}) != len(value):
            raise ValueError
        return tuple(value)

    def schema(self) -> core_schema.CoreSchema:
        item = OneOf(*self.words).schema() if self.words else Text(1).schema()
        return core_schema.tuple_schema(
            [item],
            variadic_item_index=0,
            strict=True,
            min_length=1 if self.words else 0,
            max_length=1000,
        )

    def hint(self, value: Any) -> str:
        for word in value if isinstance(value, list | tuple) else ():
            if self.words and word not in self.words and isinstance(word, str):
                close = did_you_mean(word[:LONGEST], self.words)
                return f".{close}" if close else ""
        return ""


# -- classes ---------------------------------------------------------------------------

C = TypeVar("C", bound=type[Any])
_CONFIG = ConfigDict(extra="forbid")  # leaves are strict by themselves


@pydantic_dataclass(frozen=True, config=_CONFIG)
class Checked:
    """Base of the classes that :func:`checked` makes."""

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """(place, text) of every conflict between fields that are each valid alone."""
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, value: Any, inner: Any) -> Any:
        try:
            made = inner(value)
        except ValidationError as error:
            raise refuse_again(cls, error) from None
        wrong = [*made.conflicts()]
        if wrong:
            raise refuse(*wrong)
        return made


def refuse_again(cls: type[Any], error: ValidationError) -> ValidationError:
    """The same error, with pydantic's own lines in vlprune's words."""
    names = [one.name for one in dataclasses.fields(cls)]
    details = []
    for one in error.errors(include_url=False):
        place, context = [*one["loc"]], one.get("ctx", {})
        if place and isinstance(place[0], int) and place[0] < len(names):
            place[0] = names[place[0]]  # the field was given by position
        text = context.get("text") or _in_words(one, names)
        details.append(_detail(place, text, context.get("kind", "")))
    return ValidationError.from_exception_data(cls.__name__, details)


def _in_words(one: Any, names: Sequence[str]) -> str:
    kind, value = one["type"], one["input"]
    if kind == "unexpected_keyword_argument":
        close = did_you_mean(str(one["loc"][-1])[:LONGEST], names)
        allowed = f" Allowed: {', '.join(names)}." if names else " There are no keys here."
        return f"unknown key '{KEY}'.{close or allowed}"
    if kind == "missing":
        return f"{KEY} is missing, and has no default"
    if kind in ("dataclass_type", "mapping_type", "dict_type"):
        return f"{KEY} must hold keys, as in {{name: value}}, not {shown(value)}"
    return f"{KEY}: {one['msg'][:1].lower()}{one['msg'][1:]}, not {shown(value)}"


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(cls: C) -> C:
    """Make ``cls``, of base :class:`Checked`, a frozen dataclass that refuses wrong values.

    Creating an instance raises one RecipeError for all wrong values, from Python as from a recipe;
    BudgetError if a wrong budget is the only mistake.
    """
    made: Any = pydantic_dataclass(frozen=True, config=_CONFIG)(cls)
    make = made.__init__

    @functools.wraps(make)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except ValidationError as error:
            raise refusal(mistakes_of(error)) from None

    made.__init__ = init
    return made
