"""Calibration batches: what a user hands over, as a list of keyword arguments of one forward pass.

Also the weight of each token in the statistics. Padding counts nothing. In the language part of a
model that reads image tokens, the image tokens together count no more than the words, because
there are many more of them and they would decide alone (not from a paper).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.first_batch import run_inputs
from ..device import device_of
from ..errors import DataError, VlpruneError

__all__ = ["HELD_OUT", "Batches", "batches_of", "processed"]

HELD_OUT = 8
"""Every eighth batch is held out: damping is chosen, and every repair is checked, on these."""

TokenWeight = Callable[[str, Mapping[str, Any]], Tensor | None]
"""From a tower and a batch to one weight per token, (items, tokens), or None for equal weights."""


@dataclass(frozen=True)
class Batches:
    """Batches ready to run on a model. ``given`` are keywords of one forward pass each."""

    given: Sequence[Mapping[str, Any]]
    weigh: TokenWeight

    def __len__(self) -> int:
        return len(self.given)

    def inputs(self, model: nn.Module, number: int) -> dict[str, Any]:
        """Batch ``number`` on the model's device and in its dtype."""
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return run_inputs(model, self.given[number], device_of(model), dtype)

    def split(self, most: int) -> Batches:
        """The same items in batches of at most ``most``.

        Batches whose values are not all tensors with one row per item stay whole.
        """
        parts: list[Mapping[str, Any]] = []
        for batch in self.given:
            tensors = [value for value in batch.values() if isinstance(value, Tensor)]
            counts = {t.shape[0] if t.dim() else 0 for t in tensors}
            if len(counts) != 1 or len(tensors) < len(batch) or max(counts) <= most:
                parts.append(batch)
                continue
            (count,) = counts
            starts = range(0, count, most)
            parts += [{n: t[start : start + most] for n, t in batch.items()} for start in starts]
        return Batches(parts, self.weigh)

    def run(self, model: nn.Module, number: int) -> Any:
        """What the model returns for batch ``number``. Raises DataError if it cannot run on it."""
        try:
            return model(**self.inputs(model, number))
        except VlpruneError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{type(model).__name__} does not run on calibration batch {number} (it has "
                f"{', '.join(self.given[number])}): {type(error).__name__}: {reason}"
            ) from error

    def held_out(self, number: int) -> bool:
        """Whether the batch is held out: every eighth, and at least the last of several."""
        if len(self) < HELD_OUT:
            return len(self) > 1 and number == len(self) - 1
        return number % HELD_OUT == HELD_OUT - 1

    def weights(self, tower: str, number: int, activation: Tensor) -> Tensor | None:
        """One weight per token of an activation (..., width), flat; None where all count 1."""
        weights = self.weigh(tower, self.given[number])
        tokens = activation.shape[:-1]
        if weights is None or weights.numel() != tokens.numel():
            return None
        if len(tokens) == weights.dim() and tokens != weights.shape:
            return None
        return weights.to(activation.device, torch.float32).reshape(-1)


def batches_of(
    model: nn.Module,
    given: Iterable[Mapping[str, Any]] | Batches,
    weigh: TokenWeight | None = None,
) -> Batches:
    """The batches of a list, a DataLoader or any other iterable of keyword mappings.

    Labels and whatever else the model's forward does not take are left out; a single batch of
    several items is split in two, so that a part can be held out. Raises DataError if there is no
    batch, or a batch is no mapping or holds nothing that the model takes.
    """
    if isinstance(given, Batches):
        return given
    takes = inspect.signature(model.forward).parameters
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    found: list[Mapping[str, Any]] = []
    for number, batch in enumerate(_each(given)):
        if not isinstance(batch, Mapping):
            raise DataError(
                f"calibration batch {number} is a {type(batch).__name__}: give mappings of the "
                "keywords of one forward pass, as a processor returns them"
            )
        # some models derive what the decoder reads from the labels
        decoded = "decoder_input_ids" in takes and "decoder_input_ids" not in batch
        useless = ("return_loss",) if decoded else ("labels", "return_loss")
        kept = {
            name: value
            for name, value in batch.items()
            if (name in takes or everything) and name not in useless
        }
        meant = kept.keys() & takes.keys() or (() if len(takes) > 1 else kept)
        if not any(isinstance(kept[name], Tensor) for name in meant):
            raise DataError(
                f"calibration batch {number} has nothing that {type(model).__name__} takes: it has "
                f"{', '.join(map(str, batch)) or 'no keys'}"
            )
        found.append(kept)
    if not found:
        raise DataError("there are no calibration batches: give at least one")
    if len(found) == 1:
        found = _halves(found[0])
    return Batches(found, weigh or _counts_of(model))


def processed(
    rows: Iterable[Mapping[str, Any]],
    processor: Callable[..., Mapping[str, Any]],
    items: int,
    batch_size: int,
    columns: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Batches of the first ``items`` rows, as a processor, tokenizer or image processor makes them.

    ``columns`` says which column goes to which keyword of the processor. Raises DataError if there
    are no rows or a row lacks a column.
    """
    chosen = list(islice(rows, items))
    if not chosen:
        raise DataError("there are no rows to calibrate on: give at least one")
    for number, row in enumerate(chosen):
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise DataError(
                f"row {number} has no column {missing[0]!r}, only {', '.join(map(str, row))}: say "
                "which columns to read, as in columns={'images': 'picture'}"
            )
    padding = {"padding": True} if "text" in columns else {}
    parts = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    return [
        dict(
            processor(
                **{keyword: [row[column] for row in part] for keyword, column in columns.items()},
                **padding,
                return_tensors="pt",
            )
        )
        for part in parts
    ]


def _each(given: Any) -> Iterable[Any]:
    if isinstance(given, Mapping) or hasattr(given, "keys"):
        return [dict(given)]
    try:
        return iter(given)
    except TypeError:
        raise DataError(
            f"calibration must be batches, as in [{{'pixel_values': ...}}], not a "
            f"{type(given).__name__}"
        ) from None


def _halves(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The batch in two parts, where all of its tensors have the same number of items."""
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    items = {t.shape[0] if t.dim() else 0 for t in tensors}
    if len(items) != 1 or min(items) < 2 or len(tensors) < len(batch):
        return [batch]
    (count,) = items
    cut = max(1, count - max(1, count // HELD_OUT))
    return [{n: v[:cut] for n, v in batch.items()}, {n: v[cut:] for n, v in batch.items()}]


def _counts_of(model: nn.Module) -> TokenWeight:
    config: Any = getattr(model, "config", None)
    image = getattr(config, "image_token_id", None)
    image = getattr(config, "image_token_index", None) if image is None else image

    def weigh(tower: str, batch: Mapping[str, Any]) -> Tensor | None:
        usual = "pixel_attention_mask" if tower == "vision" else "attention_mask"
        mask = next((batch[n] for n in (f"{tower}_attention_mask", usual) if n in batch), None)
        weights = mask.float() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        ids = batch.get("input_ids")
        if isinstance(image, int) and isinstance(ids, Tensor) and tower != "vision":
            weights = torch.ones(ids.shape) if weights is None else weights
            if weights.shape != ids.shape:
                return weights
            pictures = (ids == image).to(weights.device) & (weights > 0)
            words = float(weights[~pictures].sum())
            if pictures.any() and words:
                weights = weights.clone()
                weights[pictures] *= min(1.0, words / float(pictures.sum()))
        return weights

    return weigh
