"""A cut from one folder to another, with one weight file in memory at a time."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import discover
from ..cutting.settle import Cut, settle
from ..errors import VerificationError
from ..files import MiB
from ..folders.notes import hashed
from ..folders.save import SHARD, check_shard_size, save_by
from ..measuring.inputs import made_up_parts
from ..status import Progress
from ..structures.plan import Plan
from .proof import Proof, prove
from .shards import Shards
from .small import cut_source
from .source import Source, open_source

__all__ = ["Streamed", "bytes_of_model", "stream_cut"]

BESIDE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens_map|added_tokens|chat_template|processor_config|"
    r"preprocessor_config|video_preprocessor_config|normalizer|sentencepiece|spiece|"
    r"source|target|bpe)[\w.-]*\.(json|txt|model|jinja|bpe|spm)"
)
"""Files of tokenizers and processors, by the names that transformers gives them."""


@dataclass(frozen=True)
class Streamed:
    """A cut that was made: the small model without weights, and how it was proved."""

    model: Any
    cut: Cut
    proof: Proof | None
    bytes: Mapping[str, int]


def stream_cut(
    folder: Path,
    plan: Plan,
    out: Path,
    work: Path,
    *,
    key: str = "",
    verify: bool = True,
    max_shard_size: int | str = SHARD,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    extras: Callable[[Streamed], Mapping[str, str]] | None = None,
    weights: Callable[[str], Tensor] | None = None,
    processor: Any = None,
    progress: Progress | None = None,
) -> Streamed:
    """Cut the model in ``folder`` to ``out`` without ever holding it in memory.

    The result has the bits that loading, :func:`vlprune.rewrite` and :func:`vlprune.save` give.
    Files of tokenizer and processor are copied, or ``processor`` saves them. ``weights`` gives the
    weight of a name in place of the one in ``folder``, as a repair has left it. Weight files that
    are done wait in ``work``, so that a run with the same ``key`` goes on after a kill, and
    everything moves to ``out`` at the end, proved first. ``inputs`` {path of a part of the model:
    keywords of its forward pass} are what the proof runs on, made up by default. ``extras`` gives
    further files {name: text}.

    Raises PlanError for a plan that does not fit, UnsupportedError for a model that cannot be
    streamed or cut, VerificationError if masked and cut model differ, CheckpointError if a folder
    cannot be read or written.
    """
    progress = progress or Progress()
    size = check_shard_size(max_shard_size)
    source = _opened(folder, weights)
    description = discover(source.model, plan.attention, plan.experts)  # type: ignore[arg-type]
    cut = settle(source.model, description, plan)
    before = bytes_of_model(source.model)
    small = cut_source(source, cut)
    counted = {"dense": before, "small": bytes_of_model(source.model)}
    result = Streamed(source.model, cut, None, counted)
    files = work / f"cut-{hashed([key, plan.to_json(), size])}"

    def fill(staged: Path) -> None:
        nonlocal result
        with (
            progress.count("cutting (MiB)", counted["small"] // MiB) as advance,
            Shards(files, files.name, lambda done: advance(done // MiB)).instead(small),
        ):
            source.model.save_pretrained(staged, max_shard_size=size)
        if processor is not None:
            processor.save_pretrained(staged)
        for path in sorted(folder.iterdir()) if processor is None else ():
            if BESIDE.fullmatch(path.name) and path.is_file():
                shutil.copyfile(path, staged / path.name)
        if verify:
            progress.phase("comparing the masked and the cut model, layer by layer")
            dense = _opened(folder, weights)
            passes = made_up_parts(dense.model, torch.device("cpu")) if inputs is None else inputs
            proof = prove(dense, open_source(staged), cut, passes, progress.note)
            result = Streamed(source.model, cut, proof, counted)
        for name, text in (extras(result) if extras else {}).items():
            (staged / name).write_text(text, encoding="utf-8")

    try:
        save_by(fill, source.model, out)
    except VerificationError:
        shutil.rmtree(files, ignore_errors=True)
        raise
    return result


def _opened(folder: Path, weights: Callable[[str], Tensor] | None) -> Source:
    source = open_source(folder)
    return source if weights is None else replace(source, weights=_Given(source.weights, weights))


@dataclass(frozen=True)
class _Given(Mapping[str, Tensor]):
    """Weights of the names in ``names``, each computed when it is asked for."""

    names: Mapping[str, Tensor]
    weight: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def bytes_of_model(model: Any) -> int:
    """The bytes of a model's weights and saved buffers, tied ones once."""
    return sum({id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}.values())
