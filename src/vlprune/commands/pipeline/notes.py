"""Notes on the results of earlier runs in the output folder, and whether this run may reuse them.

A result is reused if nothing that it depends on has changed: the model or the data behind a path,
or anything in the recipe that affects the weights. Where folders lie, how often the Trainer saves,
how many threads compute and where logs go affect nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, RecipeError
from ...files import plain, unfinished
from ...folders.notes import NO_NOTE, hashed, read_note, set_aside, write_note
from ...recipe.spec import Recipe, Training
from ...status import Progress
from ...tasks import Task
from ...training.ranks import agreed
from . import fingerprint

__all__ = [
    "CUT_NOTE",
    "DENSE_NOTE",
    "Basis",
    "basis_of",
    "deciding",
    "known",
    "known_dense",
    "refuse_overwriting",
    "remember",
    "search_key",
]

DENSE_NOTE, CUT_NOTE = "vlprune-dense.json", "vlprune-cut.json"


@dataclass(frozen=True)
class Basis:
    """Digests of the sources of the dense model."""

    model: str
    data: str
    training: str

    @property
    def key(self) -> str:
        """A digest, the same for two runs only if they train the same dense model."""
        return hashed(asdict(self))


def basis_of(recipe: Recipe, task: Task) -> Basis:
    """The basis of a recipe's dense model; the first process computes it for all."""
    return agreed(lambda: _basis_of(recipe, task))


def _basis_of(recipe: Recipe, task: Task) -> Basis:
    sizes = {name: value for name, value in asdict(recipe.model).items() if name != "path"}
    options = {**recipe.options, **task.contents()}
    changes = asdict(recipe.data.augment)
    return Basis(
        hashed([fingerprint.of_model(recipe.model.path), sizes]),
        hashed([fingerprint.of_data(task.train), fingerprint.of_data(task.test)]),
        hashed([recipe.task, options, changes, recipe.seed, deciding(recipe.train)]),
    )


def deciding(phase: Training) -> dict[str, Any]:
    """The settings of a phase that affect the weights at its end."""
    changes_nothing = ("save_steps", "workers")
    return {name: value for name, value in asdict(phase).items() if name not in changes_nothing}


def search_key(recipe: Recipe, basis: Basis, round_to: Any) -> str:
    """The same for two runs only if they make the same cut; ``round_to`` may have been measured."""
    return hashed(
        [
            basis.key,
            deciding(recipe.search),
            {**recipe.method, "round_to": round_to},
            dict(recipe.budget),
            recipe.attention,
            recipe.experts,
            list(recipe.skip),
            dict(recipe.teacher),
            asdict(recipe.calibration),
            recipe.uniform,
            recipe.latency_batch_size,
        ]
    )


def refuse_overwriting(recipe: Recipe, out: Path) -> None:
    """Raise RecipeError or CheckpointError if the result would replace a model of the user."""
    dense = out / "dense"
    given = Path(recipe.model.path) if recipe.model.path else None
    if given is not None and given.exists() and given.resolve() in (out.resolve(), dense.resolve()):
        raise RecipeError(
            f"model.path is {plain(given)}, which the result would replace: choose another folder "
            "for the result with -o"
        )
    if (dense / "config.json").exists() and not (dense / DENSE_NOTE).exists():
        raise CheckpointError(
            f"{plain(dense)} holds a model that no run of vlprune has put there, and would be "
            "replaced: move it, or choose another folder for the result with -o"
        )


def known(path: Path, key: str, progress: Progress, what: str) -> Any:
    """The body that :func:`remember` noted under this key, in all processes; None without one.

    If the note, or a file it vouches for, is damaged, its folder is set aside and a line says so.
    """
    note = agreed(lambda: _read(path, progress, what))
    return note.body if note is not None and note.key == key else None


def _read(path: Path, progress: Progress, what: str) -> Any:
    """The note; only the first process may call this."""
    try:
        return read_note(path)
    except CheckpointError as error:
        place = set_aside(path.parent if path.name in (DENSE_NOTE, CUT_NOTE) else path)
        progress.note(f"{what} is damaged ({error}): set aside as {plain(place)}, and made anew")
        return None


def known_dense(folder: Path, basis: Basis, progress: Progress) -> Any:
    """Metrics and log of the dense model in ``folder`` if this run would make the same model."""
    what = f"the dense model in {plain(folder)}"
    note = agreed(lambda: _read(folder / DENSE_NOTE, progress, what))
    if note is None or note.key == NO_NOTE:
        return None
    if note.key == basis.key:
        return note.body
    was, now = note.body["basis"], asdict(basis)
    other = [WORDS[name] for name in WORDS if was.get(name) != now[name]]
    progress.note(f"{what} was made from {' and '.join(other)}: it is made anew")
    return None


WORDS = {
    "model": "another model",
    "data": "other data",
    "training": "other settings of the task or its training",
}


def remember(path: Path, key: str, body: Any) -> None:
    """Note ``body``, and vouch for the model files beside the note, if there are any."""
    folder = path.parent
    models = path.name in (DENSE_NOTE, CUT_NOTE)
    folder.mkdir(parents=True, exist_ok=True)
    for left in unfinished(path):  # by a run that was killed: only this run works here now
        left.unlink(missing_ok=True)
    write_note(path, key, body, fingerprint.model_files(folder) if models else ())
