"""The quick lane (`make check`): a test is in it by what it does.

A test that starts a process, a Trainer or an export leaves the quick lane at that point: it counts
as skipped there, and `make test` runs it. So no list says which tests are quick, and none can go
stale. A test that is slow for another reason carries the marker `whole`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transformers

from vlprune.folders.exported import write


def _leave(what: str) -> Any:
    def leave(*_args: Any, **_kwargs: Any) -> None:
        pytest.skip(f"it starts {what}: `make test` runs it")

    return leave


@contextmanager
def quick_lane() -> Iterator[None]:
    """Inside, whatever takes long by its nature skips the test that starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", _leave("a process"))
        patch.setattr(transformers.Trainer, "__init__", _leave("a Trainer"))
        patch.setattr(write, "transformers_exporters", _leave("an export"))
        yield
