"""Weight files written one after the other, each computed when its turn comes, and kept when done.

``save_pretrained`` decides which tensor goes into which file, and writes config and index. Only the
writing of a file is replaced: its tensors have no numbers yet.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import modeling_utils

from ..errors import CheckpointError
from ..files import is_full, plain, reason
from ..folders.notes import read_note, write_note
from ..folders.place import link

__all__ = ["Shards"]


@dataclass(frozen=True)
class Shards:
    """Finished weight files in ``work``, each with a note that vouches for it.

    ``key`` is the same for two runs only if they write the same bytes. ``advance(bytes)`` is called
    after each file.
    """

    work: Path
    key: str
    advance: Callable[[int], None] = lambda done: None

    @contextmanager
    def instead(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """While the block runs, ``save_pretrained`` of an empty model writes these weights."""

        def write(tensors: Mapping[str, Tensor], place: str, metadata: Any = None) -> None:
            self._write(tensors, weights, Path(place), metadata)

        ordinary = modeling_utils.safe_save_file
        modeling_utils.safe_save_file = write
        try:
            yield
        finally:
            modeling_utils.safe_save_file = ordinary

    def _write(
        self, empty: Mapping[str, Tensor], weights: Mapping[str, Tensor], place: Path, metadata: Any
    ) -> None:
        """Compute the tensors of a file, unless an earlier run has, and link it to its place.

        Raises CheckpointError if the file cannot be written.
        """
        done = self.work / place.name
        note = done.with_suffix(".json")
        try:
            if not self._is_whole(note):
                self.work.mkdir(parents=True, exist_ok=True)
                real = {name: weights[name] for name in empty}
                for name, tensor in real.items():
                    if (tensor.shape, tensor.dtype) != (empty[name].shape, empty[name].dtype):
                        raise CheckpointError(
                            f"{plain(name)} has shape {tuple(tensor.shape)}, and the model expects "
                            f"{tuple(empty[name].shape)}: the weights are of another model"
                        )
                partial = done.with_suffix(".partial")
                save_file(real, partial, metadata)
                partial.replace(done)
                write_note(note, self.key, files=[done.name])
            size = done.stat().st_size
            link(done, place)
        except (OSError, SafetensorError) as error:
            full = is_full(error, self.work)
            why = os.strerror(errno.ENOSPC) if full else reason(error)
            raise CheckpointError(f"cannot write {plain(place.name)}: {why}") from (
                OSError(errno.ENOSPC, why) if full else error
            )
        self.advance(size)

    def _is_whole(self, note: Path) -> bool:
        """Whether an earlier run finished the file that ``note`` vouches for."""
        try:
            known = read_note(note)
        except CheckpointError:
            return False
        return known is not None and known.key == self.key
