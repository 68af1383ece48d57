"""Small files: bounded reading, writing all or nothing, one message for whatever is wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vlprune.errors import CheckpointError, DataError, PlanError
from vlprune.files import plain, read_json, read_text, reason, write_text


def test_what_is_no_small_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)  # a terabyte of nothing
    for name, said in [
        ("pipe", "not a regular file"),
        ("huge", "1,048,576 MiB"),
        ("none", "there is no file"),
        (".", "Is a directory"),
        ("nul\0", "cannot read"),
    ]:
        with pytest.raises(DataError, match=said):
            read_text(tmp_path / name, DataError)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_text("/dev/zero")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 1_000_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
        (b'{\n "a": }', "line 2, column 7"),
        (b"\xff", "not UTF-8"),
        (b"", "line 1, column 1"),
    ],
)
def test_damaged_json_is_one_message(body: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(body)
    with pytest.raises(PlanError, match=said) as caught:
        read_json(path, PlanError)
    assert "x.json" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_links_are_written_into_and_modes_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    write_text(real, "newer")
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "fresh", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o640
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link", "fresh"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write"):
        write_text(tmp_path / "no" / "x", "text")
    (tmp_path / "x").write_text("old")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_text(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_names_print_as_text() -> None:
    assert plain("a\x1b[31mb\r\u202ec") == "a\\x1b[31mb\\r\\u202ec"
    assert plain("naïve 猫\n") == "naïve 猫\n"


def test_a_librarys_long_error_is_shortened() -> None:
    assert reason(ValueError("short")) == "short"
    assert len(reason(ValueError("x" * 100_000))) < 300
    text = reason(ValueError("begins here " + "x" * 100_000 + " ends here"))
    assert text.startswith("begins here")
    assert text.endswith("ends here")
