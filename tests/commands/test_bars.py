"""Progress where stderr is no terminal, a log file say."""

from __future__ import annotations

from typing import Any

import pytest

from vlprune.commands import bars


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A list whose only item is the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    return now


def lines(clock: Any, capsys: Any, total: int, seconds: float) -> list[str]:
    """What is said of ``total`` steps that take so long each."""
    with bars.Bars().count("training", total) as advance:
        for step in range(1, total + 1):
            clock[0] += seconds
            advance(1, f"loss {step}")
    said: list[str] = capsys.readouterr().err.splitlines()
    return said


def test_fast_work_says_a_line_a_quarter(clock: Any, capsys: Any) -> None:
    said = lines(clock, capsys, 100, 0.1)
    assert said == [f"  training {n}/100 loss {n}" for n in (25, 50, 75, 100)]


def test_slow_work_is_never_silent_for_more_than_a_minute(clock: Any, capsys: Any) -> None:
    """The steps say how long they will take still."""
    said = lines(clock, capsys, 1000, 31.0)
    assert len(said) >= 500
    assert said[0] == "  training 2/1000 loss 2 about 9 h left"
    assert said[-20].endswith("about 20 min left")
    assert said[-1] == "  training 1000/1000 loss 1000"
