"""The options of methods and tasks that a recipe may set, each with its range and its default.

They are kept apart from the methods and tasks themselves, which import torch, so that a recipe is
checked at once. The code that uses an option explains its meaning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar

from ..files import shown
from .checks import KEY, SEEDS, Checked, Flag, Number, OneOf, Text, Texts, Whole, checked, refuse
from .columns import (
    CAPTIONED,
    CHATS,
    GROUNDED,
    LABELLED,
    MASKED,
    OBJECTS,
    QUESTIONS,
    STATEMENTS,
    TYPED_QUESTIONS,
    Columns,
)

__all__ = [
    "DETECTORS",
    "JSP_FAMILIES",
    "METHOD_OPTIONS",
    "TASK_OPTIONS",
    "JspOptions",
    "ObsOptions",
    "OneShotOptions",
    "RandomOptions",
    "TaskOptions",
    "TeacherOptions",
    "UPopOptions",
    "check_method",
    "check_options",
    "check_teacher",
    "fusion_width",
]

BLOCKS = Whole(1, 65536)
MANY = 10**6

# -- methods ---------------------------------------------------------------------------


@checked
class OneShotOptions(Checked):
    """Of every method that scores each unit once."""

    scope: Annotated[str, OneOf("global", "uniform")] = "global"
    round_to: Annotated[int, BLOCKS] = 1


@checked
class RandomOptions(OneShotOptions):
    """Of ``random``."""

    seed: Annotated[int, Whole(0, SEEDS)] = 0


@checked
class ObsOptions(Checked):
    """Of ``obs``."""

    uses_calibration: ClassVar[bool] = True

    across: Annotated[str, OneOf("outputs", "layers", "uniform")] = "outputs"
    rotate: Annotated[bool, Flag()] = False
    fold: Annotated[bool, Flag()] = True
    round_to: Annotated[int, BLOCKS] = 1


@checked
class UPopOptions(Checked):
    """Of ``upop``."""

    interval: Annotated[int | str, Whole(1, 10**9, "auto")] = "auto"
    cost: Annotated[str, OneOf("exact", "paper")] = "exact"
    paper_ratio: Annotated[float, Number(0, MANY, above=True)] = 36.0
    bill_last: Annotated[bool, Flag()] = False
    first_step: Annotated[bool, Flag()] = True
    importance: Annotated[str, OneOf("signed", "squared", "gradient_x_gate")] = "signed"
    l1: Mapping[Annotated[str, OneOf("attention", "ffn")], Annotated[float, Number(0, MANY)]] = (
        field(default_factory=dict)
    )
    round_to: Annotated[int, BLOCKS] = 1
    floors: Mapping[Annotated[str, Text(1)], Annotated[float, Number(0, 1)]] = field(
        default_factory=dict
    )

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """Exact costs have no use for what only the authors' rule knows."""
        if self.cost == "exact":
            for name, default in (("bill_last", False), ("first_step", True)):
                if getattr(self, name) != default:
                    yield (name,), f"{KEY} is only for cost: paper; leave it out for cost: exact"


JSP_FAMILIES = ("prune", "cross", "block")


@checked
class JspOptions(Checked):
    """Of ``jsp``."""

    families: Annotated[Sequence[str], Texts(*JSP_FAMILIES)] = JSP_FAMILIES
    base: Annotated[str, Text(1)] = "text"
    other: Annotated[str, Text(1)] = "vision"
    block: Annotated[int, Whole(1, 10**4)] = 4
    group_size: Annotated[int, BLOCKS] = 1
    match: Annotated[bool, Flag()] = False
    mismatch: Annotated[str, OneOf("error", "skip")] = "error"
    turns: Annotated[int, Whole(1, 10**9)] = 60
    every: Annotated[int, Whole(1, 10**9)] = 40
    learning_rate: Annotated[float, Number(0, 1000, above=True)] = 3e-3
    weight_decay: Annotated[float, Number(0, 1000)] = 1e-2
    budget_weight: Annotated[float, Number(0, MANY)] = 12.0
    alignment: Annotated[float, Number(0, MANY)] = 5e-4
    temperature: Annotated[float, Number(0.001, 1000)] = 0.4
    offset: Annotated[float, Number(-100, 100)] = 3.0
    warmup: Annotated[float, Number(0, 1)] = 0.1
    align: Annotated[float, Number(0, 1)] = 0.2
    freeze: Annotated[float, Number(0, 1)] = 0.5
    seed: Annotated[int, Whole(0, SEEDS)] = 0

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """The search needs time to learn in, between warm-up and freeze."""
        if self.warmup >= self.freeze:
            yield ("warmup",), f"{KEY} {self.warmup} must come before freeze {self.freeze}"


METHOD_OPTIONS: dict[str, type[Any]] = {
    "jsp": JspOptions,
    "magnitude": OneShotOptions,
    "obs": ObsOptions,
    "random": RandomOptions,
    "taylor": OneShotOptions,
    "upop": UPopOptions,
}
"""The names that a recipe may write under ``method: name:``, and the options of each method."""


def check_method(method: Mapping[str, Any]) -> None:
    """Raise pydantic's ValidationError for an unknown method, or for its wrong options."""
    options = {**method}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in METHOD_OPTIONS:
        raise refuse((("name",), OneOf(*METHOD_OPTIONS).refuses(name)))
    if options.get("round_to") == "auto":  # a number replaces auto once it is measured
        options["round_to"] = 1
    METHOD_OPTIONS[name].__pydantic_validator__.validate_python(options)


@checked
class TeacherOptions(Checked):
    """Of ``teacher``: how much of each thing to imitate (see :mod:`vlprune.training.teacher`)."""

    logits: Annotated[float, Number(0, MANY)] = 0.0
    features: Annotated[float, Number(0, MANY)] = 0.0
    similarities: Annotated[float, Number(0, MANY)] = 0.0


def check_teacher(weights: Mapping[str, Any]) -> None:
    """Raise pydantic's ValidationError for an unknown term, or for a wrong weight."""
    teacher: Any = TeacherOptions
    teacher.__pydantic_validator__.validate_python({**weights})


# -- tasks -----------------------------------------------------------------------------

Formats = Mapping[str, tuple[str, ...]]
DATASET: Formats = {"dataset": ("path",)}


@checked
class TaskOptions(Checked):
    """Of a task without options; base of the others.

    ``formats`` maps each format of data to what a split must name, ``also`` are keys that a
    split may name in addition, all or none of them, and ``optional`` are keys that it may name one
    by one. ``columns`` are the names by which the task reads the rows of a dataset
    (:mod:`vlprune.recipe.columns`). A new model of a task that ``counts_words`` takes its
    vocabulary from the training texts; ``stream_needs`` are options that replace a look at all
    training items, and ``not_streamed`` those that need such a look. A task that ``augments`` may
    train on pictures changed by ``data.augment``.
    """

    formats: ClassVar[Formats] = {}
    also: ClassVar[Formats] = {}
    optional: ClassVar[Formats] = {"dataset": ("name", "split")}
    columns: ClassVar[Columns] = {}
    counts_words: ClassVar[bool] = True
    stream_needs: ClassVar[tuple[str, ...]] = ()
    not_streamed: ClassVar[tuple[str, ...]] = ()
    augments: ClassVar[bool] = False


CAPTIONS: Formats = {
    "karpathy": ("split_file", "images", "split"),
    "coco-captions": ("captions", "images"),
    **DATASET,
}


@checked
class ReasoningOptions(TaskOptions):
    """Of ``reasoning``."""

    formats: ClassVar[Formats] = {
        "nlvr2": ("statements", "images"),
        "nlvr1": ("folder", "split"),
        **DATASET,
    }
    columns: ClassVar[Columns] = STATEMENTS
    augments: ClassVar[bool] = True
    swap: Annotated[bool, Flag()] = False


@checked
class CaptionedOptions(TaskOptions):
    """Of tasks whose images have several captions.

    With ``every_caption`` a training item is one caption with its image, and an epoch passes over
    all of them; else it is an image, of whose captions one is drawn each time.
    """

    formats: ClassVar[Formats] = CAPTIONS
    columns: ClassVar[Columns] = CAPTIONED
    augments: ClassVar[bool] = True
    not_streamed: ClassVar[tuple[str, ...]] = ("every_caption",)
    every_caption: Annotated[bool, Flag()] = False


@checked
class CaptioningOptions(CaptionedOptions):
    """Of ``captioning``. A longer prompt would leave no room for a caption of 20 tokens."""

    prompt: Annotated[str, Text(0, 60)] = "a picture of"
    beams: Annotated[int, Whole(1, 64)] = 3
    smoothing: Annotated[float, Number(0, 1, below=True)] = 0.0


@checked
class VqaOptions(TaskOptions):
    """Of ``vqa``."""

    formats: ClassVar[Formats] = {
        "vqav2": ("questions", "annotations", "images"),
        "visual-genome": ("questions", "image_data", "images"),
        "easy-vqa": ("folder", "split"),
        **DATASET,
    }
    also: ClassVar[Formats] = {
        "vqav2": ("visual_genome", "visual_genome_data", "visual_genome_images")
    }
    columns: ClassVar[Columns] = QUESTIONS
    stream_needs: ClassVar[tuple[str, ...]] = ("answers",)
    augments: ClassVar[bool] = True
    answers: Annotated[str, Text()] = ""
    targets: Annotated[str, OneOf("frequent", "all")] = "frequent"
    smoothing: Annotated[float, Number(0, 1, below=True)] = 0.0


@checked
class ContrastOptions(CaptionedOptions):
    """Of tasks that contrast images with captions, against a queue of earlier ones."""

    queue: Annotated[int, Whole(0, MANY)] = 0
    momentum: Annotated[float, Number(0, 1)] = 0.995
    alpha: Annotated[float, Number(0, 1)] = 0.4


DUAL_ENCODERS = ("clip", "siglip")


@checked
class RetrievalOptions(ContrastOptions):
    """Of ``retrieval``; ``model`` is the kind of a small new model."""

    model: Annotated[str, OneOf(*DUAL_ENCODERS)] = "clip"

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """SigLIP's loss judges each pair by itself, so there is nothing to queue."""
        if self.model == "siglip" and self.queue:
            yield ("queue",), f"{KEY} must be 0 for siglip, whose loss has no queue"


@checked
class ZeroShotOptions(TaskOptions):
    """Of ``zero-shot``: ``names`` are the names of classes by the names of their folders."""

    formats: ClassVar[Formats] = {"image-folder": ("folder",), **DATASET}
    columns: ClassVar[Columns] = LABELLED
    augments: ClassVar[bool] = True
    model: Annotated[str, OneOf(*DUAL_ENCODERS)] = "clip"
    templates: Annotated[Sequence[str], Texts()] = ("a photo of a {}.",)
    names: Mapping[Annotated[str, Text(1)], Annotated[str, Text(1)]] = field(default_factory=dict)

    def conflicts(self) -> Iterable[tuple[tuple[str, ...], str]]:
        """A template without a place for the name says the same of every class."""
        if not self.templates:
            yield ("templates",), f"{KEY} must hold at least one template"
        for template in self.templates:
            if template.count("{}") != 1:
                text = f"must hold {{}} once in each template, for the name, not {shown(template)}"
                yield ("templates",), f"{KEY} {text}"


@checked
class BlipRetrievalOptions(ContrastOptions):
    """Of ``blip-retrieval``."""

    queue: Annotated[int, Whole(1, MANY)] = 57600
    rerank: Annotated[int, Whole(1, MANY)] = 128


@checked
class ClassificationOptions(TaskOptions):
    """Of ``classification``."""

    formats: ClassVar[Formats] = {"image-folder": ("folder",), **DATASET}
    columns: ClassVar[Columns] = LABELLED
    counts_words: ClassVar[bool] = False
    augments: ClassVar[bool] = True
    mixup: Annotated[float, Number(0, 1000)] = 0.8
    smoothing: Annotated[float, Number(0, 1, below=True)] = 0.1
    flip: Annotated[bool, Flag()] = True
    distill_from: Annotated[str, Text()] = ""


@checked
class SegmentationOptions(TaskOptions):
    """Of ``segmentation``."""

    formats: ClassVar[Formats] = {"ade20k": ("images", "masks"), **DATASET}
    columns: ClassVar[Columns] = MASKED
    counts_words: ClassVar[bool] = False
    multi_scale: Annotated[bool, Flag()] = False
    classes: Annotated[int, Whole(0, 1000)] = 0
    augment: Annotated[bool, Flag()] = True
    distort: Annotated[bool, Flag()] = False
    largest_class: Annotated[float, Number(0, 1, above=True)] = 1.0


GROUNDERS = ("mdetr", "grounding-dino", "glip")
DETECTORS = ("rt-detr", "d-fine")
"""New models that number their classes."""


@checked
class RegionOptions(TaskOptions):
    """Of tasks with boxes: sizes of a small new model."""

    model: Annotated[str, OneOf(*GROUNDERS)] = "mdetr"
    queries: Annotated[int, Whole(1, 1000)] = 16
    fusion_width: Annotated[int, Whole(0, 8192)] = 0
    fusion_layers: Annotated[int, Whole(1, 100)] = 2
    decoder_layers: Annotated[int, Whole(1, 100)] = 3


@checked
class GroundingOptions(RegionOptions):
    """Of ``grounding``."""

    formats: ClassVar[Formats] = {
        "mdetr": ("annotations", "images"),
        "mdetr-captions": ("annotations", "images"),
        "refer": ("refs", "instances", "images", "split"),
        **DATASET,
    }
    columns: ClassVar[Columns] = GROUNDED


@checked
class DetectionOptions(RegionOptions):
    """Of ``detection``: ``names`` are a detector's own names of classes, by those in the data."""

    formats: ClassVar[Formats] = {
        "coco-instances": ("instances", "images"),
        "coco2017": ("instances", "images"),
        "nlvr1-objects": ("folder", "split"),
        **DATASET,
    }
    columns: ClassVar[Columns] = OBJECTS
    model: Annotated[str, OneOf(*GROUNDERS, *DETECTORS)] = "grounding-dino"
    names: Mapping[Annotated[str, Text(1)], Annotated[str, Text(1)]] = field(default_factory=dict)


@checked
class GqaOptions(RegionOptions):
    """Of ``gqa``. It needs answer heads, which only MDETR has."""

    formats: ClassVar[Formats] = {"gqa": ("questions", "images"), **DATASET}
    columns: ClassVar[Columns] = TYPED_QUESTIONS
    stream_needs: ClassVar[tuple[str, ...]] = ("answers",)
    model: Annotated[str, OneOf("mdetr")] = "mdetr"
    answers: Annotated[str, Text()] = ""


@checked
class ChatOptions(TaskOptions):
    """Of ``chat``."""

    formats: ClassVar[Formats] = {
        "llava": ("conversations", "images"),
        "messages": ("messages", "images"),
        "vqav2": ("questions", "annotations", "images"),
        "easy-vqa": ("folder", "split"),
        **DATASET,
    }
    columns: ClassVar[Columns] = CHATS
    template: Annotated[str, Text()] = ""
    prompt: Annotated[str, Text(0, 1000)] = ""
    longest: Annotated[int, Whole(0, 10**6)] = 0
    short: Annotated[int, Whole(0, 10**4)] = 5
    new_tokens: Annotated[int, Whole(1, 10**4)] = 32


TASK_OPTIONS: dict[str, type[TaskOptions]] = {
    "blip-retrieval": BlipRetrievalOptions,
    "captioning": CaptioningOptions,
    "chat": ChatOptions,
    "classification": ClassificationOptions,
    "detection": DetectionOptions,
    "gqa": GqaOptions,
    "grounding": GroundingOptions,
    "reasoning": ReasoningOptions,
    "retrieval": RetrievalOptions,
    "segmentation": SegmentationOptions,
    "vqa": VqaOptions,
    "zero-shot": ZeroShotOptions,
}
"""The names that a recipe may write under ``task:``, and the options of each task."""


def check_options(task: str, options: Mapping[str, Any], new_model: Any = None) -> None:
    """Raise pydantic's ValidationError for wrong options of a task.

    ``new_model`` (a :class:`vlprune.recipe.spec.ModelSpec`) has the sizes that they must fit.
    """
    takes: Any = TASK_OPTIONS[task]
    chosen = takes.__pydantic_validator__.validate_python({**options})
    if isinstance(chosen, RegionOptions) and new_model is not None:
        wrong = [*_too_much(chosen, new_model)]
        if wrong:
            raise refuse(*wrong)


def _too_much(chosen: RegionOptions, sizes: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The mistakes in options that do not fit the sizes of a small new model."""
    width = fusion_width(chosen.model, chosen.fusion_width or sizes.width)
    if width % sizes.heads or width % 4:
        text = f"must be a multiple of 4 and of the {sizes.heads} heads, not {width}"
        yield ("fusion_width",), f"{KEY} (0: model.width) {text}"
    if chosen.model in DETECTORS and sizes.image_size % 32:
        text = f"needs an image_size in multiples of 32 for {chosen.model}, not {sizes.image_size}"
        yield ("model",), f"{KEY} {text}"
    strides = {"grounding-dino": (4, 8, 16, 32)} | dict.fromkeys(DETECTORS, (8, 16, 32))
    places = sum(
        math.ceil(sizes.image_size / stride) ** 2 for stride in strides.get(chosen.model, ())
    )
    if places and chosen.queries > places:
        text = f"must be at most {places}, the places of {sizes.image_size} px, for {chosen.model}"
        yield ("queries",), f"{KEY} {text}, not {chosen.queries}"


STEPS = {"mdetr": 1, "grounding-dino": 32, "glip": 16, **dict.fromkeys(DETECTORS, 1)}
"""Widths are multiples of the norms' group count: a group needs two numbers even at one place."""


def fusion_width(model: str, wanted: int) -> int:
    """The fusion width of a small new model: ``wanted``, rounded down to a width the norms take.

    At least two steps of ``STEPS``, where a step is more than 1.
    """
    step = STEPS[model]
    return wanted if step == 1 else max(2, wanted // step) * step
