"""Detectors that number their classes (RT-DETR, D-FINE, DETR and relatives) and read no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.regions import Scenery
from ..errors import DataError, RecipeError, UnsupportedError, did_you_mean
from ..files import plain
from ..recipe.options import DETECTORS
from ..recipe.spec import ModelSpec
from .grounders import GROUNDERS
from .grounding import as_fractions

__all__ = [
    "ClassDetector",
    "detector_class",
    "detector_config",
    "detector_processor",
    "new_detector",
    "published_detector",
]

MASKED = ("conditional_detr", "deformable_detr", "detr")
"""Model types whose boxes are fractions of the picture itself, however it is padded."""
WHOLE = ("d_fine", "rt_detr", "rt_detr_v2", "yolos")
"""Model types whose boxes are fractions of the padded picture: all must have one size."""
NAMED = 5
"""Classes that an error message names."""


@dataclass(frozen=True)
class ClassDetector:
    """How a detector of ``model_type`` numbers the classes of the data: ``numbers``, by name.

    The numbers are those of its config's ``id2label``, which may have other classes besides.
    """

    model_type: str
    numbers: Mapping[str, int]

    models: ClassVar[tuple[str, ...]] = (*MASKED, *WHOLE)

    def check(self, looks: Mapping[str, Tensor]) -> None:
        """Raise DataError if the pictures of a batch are padded and the boxes would not fit."""
        if "pixel_mask" in looks and self.model_type in WHOLE:
            raise DataError(
                f"the image processor gives pictures of several sizes, and {self.model_type} reads "
                "pictures of one size: set its size to a height and a width"
            )

    def labels(self, item: Scenery) -> dict[str, Tensor]:
        """The boxes of a picture as the model's loss reads them.

        ``class_labels`` (n,), and ``boxes`` (n, 4): centre x, centre y, width and height as
        fractions of the picture.
        """
        return {
            "class_labels": torch.tensor([self.numbers[name] for name in item.labels]).long(),
            "boxes": as_fractions(item.boxes, item.size),
        }

    def read(
        self, outputs: Any, sizes: Sequence[tuple[int, int]], processor: Any
    ) -> list[list[tuple[float, str, Tensor]]]:
        """(score, class, (left, top, right, bottom) in pixels) of each picture's detections.

        ``sizes`` are the (width, height) of the pictures. ``processor`` is the image processor,
        which knows how its model scores. Classes that the data do not have are dropped.
        """
        told = SimpleNamespace(
            logits=outputs.logits.float().cpu(), pred_boxes=outputs.pred_boxes.float().cpu()
        )
        found = processor.post_process_object_detection(
            told, threshold=0.0, target_sizes=[(height, width) for width, height in sizes]
        )
        names = {number: name for name, number in self.numbers.items()}
        return [
            [
                (score, names[number], box)
                for score, number, box in zip(
                    one["scores"].tolist(), one["labels"].tolist(), one["boxes"], strict=True
                )
                if number in names
            ]
            for one in found
        ]


def new_detector(name: str, classes: Sequence[str]) -> ClassDetector | None:
    """The small new detector that ``options.model`` names; None for a model that reads prompts."""
    if name not in DETECTORS:
        return None
    _check_scipy()
    return ClassDetector(name.replace("-", "_"), {one: i for i, one in enumerate(classes)})


def published_detector(
    config: Any, classes: Sequence[str], names: Mapping[str, str], where: str
) -> ClassDetector | None:
    """The detector of a ``config`` for the classes of the data; None for one that reads prompts.

    ``names`` are the model's names of those classes that have another name in the data. Raises
    RecipeError for a name of no class of the data or for two classes of one name, and
    UnsupportedError for another type of model or if the ``id2label`` of the config lacks a class.
    """
    prompted = [kind for grounder in GROUNDERS.values() for kind in grounder.model_types]
    if config.model_type in prompted:
        return None
    if config.model_type not in ClassDetector.models:
        raise UnsupportedError(
            f"{plain(where)} is of the type {plain(config.model_type)}; detection reads "
            f"{', '.join(sorted({*prompted, *ClassDetector.models}))}"
        )
    _check_scipy()
    for name in names:
        if name not in classes:
            raise RecipeError(
                f"options.names has a name for {plain(name)}, which is no class of the data."
                f"{did_you_mean(name, classes)}"
            )
    known: dict[str, int] = {}
    for number, name in config.id2label.items():
        known.setdefault(str(name), int(number))
    own = {name: names.get(name, name) for name in classes}
    missing = [name for name in classes if own[name] not in known]
    if missing:
        named = ", ".join(plain(own[name]) for name in missing[:NAMED])
        raise UnsupportedError(
            f"{plain(where)} knows {len(known)} classes, but not {named}"
            f"{f' and {len(missing) - NAMED} more' if missing[NAMED:] else ''} of the data: give "
            f"its names in options.names, as in {{{plain(missing[0])}: name in its id2label}}."
            f"{did_you_mean(own[missing[0]], known)}"
        )
    numbers = {name: known[own[name]] for name in classes}
    if len({*numbers.values()}) < len(numbers):
        raise RecipeError("options.names gives two classes of the data the same name")
    return ClassDetector(config.model_type, numbers)


def _check_scipy() -> None:
    """Raise UnsupportedError without scipy, with which the models' loss matches boxes."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise UnsupportedError(
            "matching boxes needs scipy: pip install 'vlprune[grounding]'"
        ) from None


def detector_class(config: Any) -> Any:
    """The model class with a detection head for a config."""
    from transformers import MODEL_FOR_OBJECT_DETECTION_MAPPING

    return MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)]


# -- small new models ------------------------------------------------------------------


def detector_processor(spec: ModelSpec) -> Any:
    """An image processor that resizes every image to a square of the model's size."""
    from transformers import RTDetrImageProcessor

    return RTDetrImageProcessor(size={"height": spec.image_size, "width": spec.image_size})


def detector_config(
    name: str, spec: ModelSpec, classes: Sequence[str], options: Mapping[str, Any]
) -> Any:
    """The config of a small new RT-DETR or D-FINE.

    The coarsest of its three levels has a place per 32 pixels. Its backbone has
    ``spec.vision_layers`` layers, at least one per stage; the last stage is as wide as the model.
    """
    from transformers import DFineConfig, RTDetrConfig

    width = options["fusion_width"] or spec.width
    stages = [max(4, width // 4), max(4, width // 2), width, width]
    depths = [1, 1, 1, max(1, spec.vision_layers - 3)]
    make, backbone = (
        (RTDetrConfig, _resnet(stages, depths))
        if name == "rt-detr"
        else (DFineConfig, _hgnet(stages, depths))
    )
    return make(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,
        d_model=width,
        encoder_hidden_dim=width,
        encoder_in_channels=stages[1:],
        decoder_in_channels=[width] * 3,
        encoder_layers=options["fusion_layers"],
        decoder_layers=options["decoder_layers"],
        encoder_attention_heads=spec.heads,
        decoder_attention_heads=spec.heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_queries=options["queries"],
        num_denoising=options["queries"],
        id2label=dict(enumerate(classes)),
        label2id={label: number for number, label in enumerate(classes)},
    )


def _resnet(stages: Sequence[int], depths: Sequence[int]) -> Any:
    from transformers import RTDetrResNetConfig

    return RTDetrResNetConfig(
        embedding_size=stages[0],
        hidden_sizes=[*stages],
        depths=[*depths],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def _hgnet(stages: Sequence[int], depths: Sequence[int]) -> Any:
    from transformers import HGNetV2Config

    return HGNetV2Config(
        stem_channels=[3, stages[0], stages[0]],
        embedding_size=stages[0],
        hidden_sizes=[*stages],
        depths=[*depths],
        stage_in_channels=[stages[0], *stages[:-1]],
        stage_mid_channels=[max(4, width // 2) for width in stages],
        stage_out_channels=[*stages],
        stage_num_blocks=[*depths],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
