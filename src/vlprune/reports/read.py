"""Opening what a run left in a folder: its report and the files beside it, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..facts import Bench, Export, Report, check_facts
from ..files import plain, read_json
from ..structures.plan import Plan

__all__ = ["read_report"]


def read_report(folder: Path) -> dict[str, Any]:
    """The report in a folder, with ``folder``, and ``keep``, ``exports``, ``bench`` where there.

    Raises CheckpointError for a folder without one.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {plain(folder)}")
    report = _facts(folder / "report.json", Report)
    if report is None:
        raise CheckpointError(
            f"{plain(folder)} holds no report.json: `vlprune compress` writes one; after a loop of "
            'your own, vlprune.save(model, folder, extras={"report.json": '
            "json.dumps(compressor.report())})"
        )
    report["folder"] = plain(folder)
    plan = Plan.load(folder / "plan.json") if (folder / "plan.json").exists() else Plan()
    report["keep"] = {plain(name): units for name, units in plan.keep.items()}
    report["fingerprint"] = plan.fingerprint
    found = [_facts(path, Export) for path in sorted(folder.glob("*/vlprune-export.json"))]
    report["exports"] = [one for one in found if one is not None]
    report["bench"] = _facts(folder / "bench.json", Bench)
    return report


def _facts(path: Path, kind: Any) -> dict[str, Any] | None:
    """What a JSON file holds, checked, its texts without control characters; None without one.

    Raises CheckpointError that names file and key.
    """
    if not path.exists():
        return None
    facts = read_json(path)
    check_facts(kind, facts, path, advice="copy it again from where it was made")
    cleaned: dict[str, Any] = _cleaned(facts)
    return cleaned


def _cleaned(value: Any) -> Any:
    """The same JSON value, its texts without control characters."""
    if isinstance(value, dict):
        return {plain(key): _cleaned(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_cleaned(one) for one in value]
    return plain(value) if isinstance(value, str) else value
