"""The model card: the README.md of a saved folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import as_text, markdown
from .story import calibration, sizes, stages
from .words import summary, where

__all__ = ["model_card"]


HUB_TASKS = {
    "captioning": "image-to-text",
    "classification": "image-classification",
    "detection": "object-detection",
    "zero-shot": "zero-shot-image-classification",
    "gqa": "visual-question-answering",
    "segmentation": "image-segmentation",
    "vqa": "visual-question-answering",
}
"""Names that the Hub has for tasks; the others keep their own."""


def model_card(report: Mapping[str, Any], model_class: str) -> str:
    """The README.md of a saved folder: what it is, how it was made, figures, limits.

    Its head is metadata as the Hub reads them, with a result for every metric of the last stage.
    """
    from huggingface_hub import ModelCard

    head = _metadata(report, model_class)
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{_body(report, model_class)}"))


def _metadata(report: Mapping[str, Any], model_class: str) -> Any:
    """The ModelCardData, which write themselves as YAML: quoted where a name needs it."""
    from huggingface_hub import EvalResult, ModelCardData

    task = report.get("task", "")
    metrics = list((report.get("metrics") or {}).values())
    results = [
        EvalResult(
            task_type=HUB_TASKS.get(task, task),
            dataset_type="recipe.yaml",
            dataset_name="the test data of its recipe",
            dataset_split="test",
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=value,
        )
        for name, value in (metrics[-1] if metrics else {}).items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=HUB_TASKS.get(task),
        tags=["vlprune", "pruning"],
        model_name=f"a smaller {model_class}",
        eval_results=results or None,
    )


def _body(report: Mapping[str, Any], model_class: str) -> str:
    options = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    experts = "; whole experts" if report.get("experts") == "expert" else ""
    method = f"{report['method']} ({options}; attention unit {report['attention']}{experts})"
    versions = ", ".join(f"{name} {one}" for name, one in report.get("versions", {}).items())
    how = _how(report)
    return f"""# A smaller {as_text(model_class)}

Made by vlprune with {as_text(method)}.
{as_text(summary(report))}

```python
import vlprune  # teaches from_pretrained the smaller shapes
from transformers import {model_class}

model = {model_class}.from_pretrained("this folder")
```
{_sharing(report)}{_figures(report)}
## How it was made

{how} `plan.json` lists the units that stay, `report.json` holds
every number, and `vlprune report` draws it. Versions: {as_text(versions)}.

## Limits

{chr(10).join(f"- {as_text(limit)}" for limit in _limits(report))}
"""


def _how(report: Mapping[str, Any]) -> str:
    """The command that made the folder."""
    if report.get("task") or not report.get("command"):
        return "    vlprune compress recipe.yaml -o small\n\nwith the `recipe.yaml` of this folder;"
    samples = "with unlabelled samples, and " if report.get("calibration") else ""
    return f"    {as_text(report['command'])}\n\n{samples}without training;"


def _figures(report: Mapping[str, Any]) -> str:
    """The table of the stages, where a task has measured them, or of sizes and errors."""
    if not report.get("metrics"):
        more = calibration(report) if report.get("calibration") else []
        return f"\n{markdown([sizes(report), *more])}\n"
    return f"""
{markdown([stages(report)])}
Latency: median of one forward pass on {as_text(where(report))}.
MACs: multiply-adds of one forward pass at batch 1.
"""


def _sharing(report: Mapping[str, Any]) -> str:
    """What a card says of shared weights."""
    if not any(group.get("shared", 0) for group in report.get("groups", ())):
        return ""
    return """
Shared weights are stored once and stay tied in training. `vlprune.materialize(model)` turns them
into plain dense layers: faster, larger.
"""


def _origin(report: Mapping[str, Any]) -> list[str]:
    """Limits that come from the data it was made with."""
    limits = []
    if report.get("task"):
        limits.append(f"The figures are of one run of the task {report['task']} with one seed.")
    else:
        limits.append("What it can do was not measured: evaluate it on data of your own.")
    untested = "what was pruned may have mattered for inputs that were not tested."
    untrained = report.get("calibration") or report.get("streamed")
    if untrained and not any((report.get("history") or {}).values()):
        chosen = "on unlabelled samples" if report.get("calibration") else "by its weights alone"
        limits.append(
            f"Nothing was trained. The units to prune were chosen {chosen}; the biases "
            f"of the dense model are inherited, and {untested}"
        )
    else:
        limits.append(
            "It was trained on the data of its recipe and inherits the biases of that data and of "
            f"the dense model; {untested}"
        )
    return limits


def _limits(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures should know."""
    padded = sum(group["padded"] for group in report["groups"])
    limits = [
        "It is an ordinary model: it loads without vlprune."
        if report.get("ordinary") == ""
        else "Loading needs import vlprune in the process; exports of vlprune export do not.",
        *_origin(report),
    ]
    if padded:
        limits.append(
            f"{padded} structures were cut with padded projections: they save parameters and "
            "projection MACs, not the MACs of attention scores."
        )
    uncounted = (report.get("macs") or {}).get("not_counted")
    if uncounted:
        limits.append(f"Not counted in MACs: {', '.join(uncounted)}.")
    limits += [f"{note[:1].upper()}{note[1:]}." for note in report.get("notes", ())]
    if not report.get("verified"):
        limits.append("The cut was not compared with the masked model.")
    return limits
