"""Types for the files that are read back from a folder: reports, timings, exports, sections.

Only the keys in use are listed; a file may have others. Reading is strict, because these files may
be damaged or untrusted: text in place of a number raises an error that names the key.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import CheckpointError, VlpruneError
from .files import plain

__all__ = ["Bench", "Export", "ExportManifest", "Report", "Section", "check_facts"]


def check_facts(
    kind: Any,
    value: object,
    where: object,
    error: type[VlpruneError] = CheckpointError,
    advice: str = "copy the file again",
) -> None:
    """Raise ``error`` unless ``value`` has the type ``kind``, a class of this module.

    The message names the file ``where`` and up to three keys with their problems, and ends with
    ``advice``.
    """
    try:
        _adapter(kind).validate_python(value)
    except (ValidationError, RecursionError) as found:
        raise error(f"{plain(where)} is damaged: {_problems(found)}; {advice}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _problems(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    every = error.errors(include_url=False, include_input=False)
    told = []
    for one in every[:3]:
        key = ".".join(str(part) for part in one["loc"]) or "the whole"
        words = one["msg"].removeprefix("Value error, ")
        told.append(f"{key}: {words[:1].lower()}{words[1:]}")
    more = f", and {len(every) - 3} more" if len(every) > 3 else ""
    return plain("; ".join(told)[:600]) + more


class _Facts(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, le=2**53)]
Number = Annotated[float, Field(ge=-1e300, le=1e300)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Some = Annotated[float, Field(gt=0, le=1e300)]
Batches = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Seconds]


class _Change(_Facts):
    before: Some
    after: Annotated[float, Field(ge=0, le=1e300)]


class _Macs(_Change):
    not_counted: list[str] = []


class _Group(_Facts):
    tower: str
    kind: str
    structures: Count
    units: Annotated[int, Field(ge=1, le=2**53)]
    kept: Count
    shared: Count = 0
    padded: Count = 0
    params: dict[Literal["before", "after"], Count] | None = None

    def model_post_init(self, _context: Any) -> None:
        """No more units can be kept or shared than there were."""
        if self.kept > self.units or self.shared > self.units:
            raise ValueError(f"{max(self.kept, self.shared)} of {self.units} units")
        if self.params is not None and len(self.params) < 2:
            raise ValueError("params needs before and after")


class _Layer(_Facts):
    name: str
    tower: str
    kind: str
    units: Annotated[int, Field(ge=1, le=2**53)]
    kept: Count
    shared: Count = 0
    source: str | None = None

    def model_post_init(self, _context: Any) -> None:
        """No more units can be kept than there were, or shared than are kept."""
        if self.kept > self.units or self.shared > self.kept:
            raise ValueError(f"{self.kept} kept and {self.shared} shared of {self.units} units")


class _Timed(_Facts):
    device: str = "cpu"
    threads: Count = 0
    dense: Seconds = 0.0
    small: Seconds = 0.0
    shapes: dict[str, Annotated[list[Count], Field(min_length=1)]] = {}

    def model_post_init(self, _context: Any) -> None:
        """A time of the small model needs that of the dense one, the threads and the shapes."""
        there = self.model_fields_set
        if "small" in there and not ({"dense", "threads"} <= there and self.shapes):
            raise ValueError("it has small, and not dense, threads and shapes")


class _Prunable(_Facts):
    p: Number
    removed: Number
    params_left: Number


class _Budget(_Facts):
    what: str
    asked: Number
    reached: Number
    prunable_cost: _Prunable | None = None
    seconds: _Timed | None = None


class _Proof(_Facts):
    difference: Number
    scale: Number
    dtype: str
    kernel: str = ""
    compared: Number = 1.0
    unseen: list[str] = []


def _alike(latencies: Any) -> Any:
    if latencies and ({"dense", "small"} - latencies.keys() or not latencies["dense"]):
        raise ValueError("Input should have times of dense and small")
    if len({tuple(times) for times in latencies.values()}) > 1:
        raise ValueError("Input should have the same batch sizes for every model")
    return latencies


def _stages(metrics: Any) -> Any:
    if metrics and "dense" not in metrics:
        raise ValueError("Input should have a stage dense")
    if metrics and len({tuple(row) for row in metrics.values()}) > 1:
        raise ValueError("Input should have the same metrics for every stage")
    return metrics


class _Error(_Facts):
    before: Number
    after: Number


class _Outputs(_Facts):
    before: dict[str, Number]
    after: dict[str, Number]
    kept: bool = True

    def model_post_init(self, _context: Any) -> None:
        """Every output has an error before and after the repair."""
        if self.before.keys() != self.after.keys():
            raise ValueError("before and after name different outputs")


class _Calibration(_Facts):
    batches: Count
    items: Count | None = None
    rotated: bool = False
    not_rotated: dict[str, str] = {}
    outputs: _Outputs | None = None
    towers: dict[str, _Error] = {}


class _Row(_Facts):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=True)


class _Step(_Row):
    loss: float = 0.0
    step: float = 0.0

    def model_post_init(self, _context: Any) -> None:
        """A loss needs the step that it belongs to."""
        if "loss" in self.model_fields_set and "step" not in self.model_fields_set:
            raise ValueError("it has a loss and no step")


class _Watched(_Row):
    progress: float
    remains: float = 0.0
    gate_of_fading_units: float = 0.0
    masked_loss: float = 0.0
    full_loss: float = 0.0
    gap: float = 0.0


def _same_columns(rows: Any) -> Any:
    if rows and any(row.model_fields_set != rows[0].model_fields_set for row in rows):
        raise ValueError("Input should have the same keys in every row")
    return rows


class Report(_Facts):
    """``report.json``, as far as texts and figures use it."""

    budget: _Budget
    method: str
    attention: str = ""
    experts: str = "neuron"
    options: dict[str, Any] = {}
    params: _Change
    macs: _Macs | None = None
    groups: list[_Group]
    layers: list[_Layer] = []
    verified: _Proof | None = None
    notes: list[str] = []
    search_history: Annotated[list[_Watched], AfterValidator(_same_columns)] | None = None
    metric: str | None = None
    metrics: Annotated[dict[str, dict[str, Number]], AfterValidator(_stages)] | None = None
    latency_seconds: Annotated[dict[str, Batches], AfterValidator(_alike)] = {}
    weight_bytes: dict[str, Count] | None = None
    ordinary: str | None = None
    history: dict[str, list[_Step]] = {}
    calibration: _Calibration | None = None
    peak_bytes: Count | None = None
    device: str = "cpu"
    threads: Count = 0

    def model_post_init(self, _context: Any) -> None:
        """Keys that are reported together must be present together."""
        if self.metrics:
            if self.metric is None or any(self.metric not in m for m in self.metrics.values()):
                raise ValueError(f"metrics has no {self.metric!r}, which metric names")
            if not self.latency_seconds or self.macs is None:
                raise ValueError("metrics are there, macs or latency_seconds are not")
        sizes = self.weight_bytes
        missing = {"dense", "small", "materialised"} - (sizes or {}).keys()
        if sizes and missing and any(group.shared for group in self.groups):
            raise ValueError(f"weight_bytes has no {min(missing)}")


class _Conditions(_Facts):
    device: str = "cpu"
    threads: Count
    dtype: str = ""
    torch: str = ""


class _Run(_Facts):
    engine: str
    batch: Count
    model: str = ""
    median: Seconds = 0.0
    items_per_second: Number = 0.0
    failed: str = ""

    def model_post_init(self, _context: Any) -> None:
        """A run has times, or says why it has none."""
        there = self.model_fields_set
        if "failed" not in there and not {"model", "median", "items_per_second"} <= there:
            raise ValueError("it has neither model, median and items_per_second nor failed")


class _Faster(_Facts):
    engine: str
    batch: Count
    times: Number
    of_ideal: Number = 0.0


class Bench(_Facts):
    """``bench.json``, as far as a report uses it."""

    conditions: _Conditions
    runs: list[_Run]
    faster: list[_Faster]


class _Checked(_Facts):
    difference: Number
    compared: Number = 1.0


class Export(_Facts):
    """``vlprune-export.json``."""

    format: str
    int8: bool
    files: dict[str, Count]
    checked: Annotated[list[_Checked], Field(min_length=1)]


class _Component(_Facts):
    file: Annotated[str, Field(pattern=r"^[^/\\\x00]+$", max_length=255)]
    metadata: dict[str, Any]


class ExportManifest(_Facts):
    """``export.json``, as transformers writes it."""

    schema_version: Count = 1
    export_format: Literal["onnx", "openvino", "torch-export", "dynamo", "executorch"]
    components: Annotated[dict[str, _Component], Field(min_length=1)]


class _Kept(_Facts):
    kept: Annotated[int, Field(ge=1, le=2**31)]
    of: Annotated[int, Field(ge=1, le=2**31)]
    mask: str
    layout: Literal["native", "padded"]


class _Shared(_Facts):
    source: Annotated[str, Field(alias="from")]
    mask: str
    units: list[Count] | None = None


class Section(_Facts):
    """The vlprune section in the ``config.json`` of a cut model."""

    version: int
    attention: Literal["head_dim", "qk_vo", "head", "query_head"]
    fingerprint: str
    experts: Literal["neuron", "expert"] = "neuron"
    keep: dict[str, _Kept]
    share: dict[str, _Shared] = {}
    weights: str | None = None
