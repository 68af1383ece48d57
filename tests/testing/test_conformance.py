"""The shipped conformance suite over every family and every attention unit."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch

from vlprune.architectures import discover
from vlprune.architectures.layouts import NATIVE
from vlprune.cutting.padded import stock_name
from vlprune.structures.structure import AttentionUnit
from vlprune.testing import CHECKS, FAMILIES, VARIANTS, build
from vlprune.testing.families import Sample

UNITS = ("head_dim", "qk_vo", "head")
QUICK = {
    "clip": "two towers, native heads, the fused kernel",
    "blip_captioning": "fused query-key-value, cross-attention, a folded temperature, generation",
    "gpt2": "transposed weights (Conv1D)",
    "llava": "rotary positions, gated FFN, grouped key-value heads",
    "bridgetower": "nn.MultiheadAttention, which never calls its projections",
    "swin": "windows with position biases per head: padded",
}
"""One family per way in which a block is described and cut; all the others are variations."""


EVERYWHERE = "masked_equals_cut"
"""What every family runs under every unit. Eight ninths of the other checks wait for `make slow`:
each family beyond QUICK runs every third one under one unit, and each check meets a third of the
families.
"""
SELDOM = (
    "sharing_is_exact",
    "every_structure_alone_equals_its_mask",
    "calibration_is_exact",
    "a_second_cut_composes",
)
"""The dearest checks: under one unit in QUICK families and in half of the others."""


GROUPED = (
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "paligemma",
    "gemma3",
    "smolvlm",
    "idefics3",
    "idefics2",
    "instructblip",
    "internvl",
    "internvl_qk_norm",
)
"""Families in which query heads share keys; in all others `query_head` means `head`."""


def grouped_cases() -> Iterator[Any]:
    """(family, check) under `query_head`, with the lanes they run in."""
    for family, check in product(GROUPED, CHECKS):
        quick = family == "llava"
        lane = pytest.mark.whole if check == "masked_equals_cut" else pytest.mark.slow
        yield pytest.param(family, check, marks=[] if quick else [lane], id=f"{family}-{check}")


@pytest.mark.parametrize(("family", "check"), grouped_cases())
def test_family_by_query_heads(family: str, check: str) -> None:
    CHECKS[check](partial(copied, family), "query_head")


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_query_heads_are_heads_where_keys_are_not_shared(family: str) -> None:
    heads, queries = (discover(sample(family).model, unit) for unit in ("head", "query_head"))
    assert (heads.structures != queries.structures) == (family in GROUPED)


def cases() -> Iterator[Any]:
    """(family, unit, check) for all of them, with the lanes they run in."""
    for number, family in enumerate(FAMILIES):
        for unit, check in product(UNITS, CHECKS):
            marks = [] if family in QUICK else [pytest.mark.whole]
            second = unit != UNITS[number % len(UNITS)]
            other = (number // len(UNITS) + [*CHECKS].index(check)) % 3 > 0
            if marks and check != EVERYWHERE and (second or other):
                marks = [pytest.mark.slow]
            if check in SELDOM and (second or (marks and number // len(UNITS) % 2)):
                marks = [pytest.mark.slow]
            yield pytest.param(family, unit, check, marks=marks, id=f"{family}-{unit}-{check}")


sample = cache(build)


def copied(name: str) -> Sample:
    """A sample of its own: to copy one takes a third of the time of building it."""
    torch.manual_seed(0)
    return copy.deepcopy(sample(name))


@pytest.mark.parametrize(("family", "unit", "check"), cases())
def test_family(family: str, unit: str, check: str) -> None:
    CHECKS[check](partial(copied, family), unit)


LIKE_ANOTHER = (
    "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "jamba", "mistral4", "glm_moe_dsa",
    "mistral_large4", "youtu", "glmga", "cosmos3_omni", "minicpmv4_7", "minicpm_ocr",
    "mistral_large4_vl", "nemotron_h_omni", "inkling2_loop", "unlimited_ocr", "sam3_lite_text",
    "vision_encoder_decoder", "granite_docling", "apertus1p5", "inkling", "dots3_note", "hy_v4_vl",
    "glm5_next", "qwen4_exp", "muse_spark", "embedding_gemma2", "slanext", "align",
)  # fmt: skip
"""Variants with the experts and the attention of another one: in `make slow`."""

DEAR = (
    "sam3", "sam3_tracker", "sam2_video", "sam3_tracker_video", "omdet_turbo", "perceiver", "emu3",
    "pp_ocrv6_small_rec", "granite4_vision", "deepseek_ocr2", "phi4_multimodal", "inkling2",
    "pp_formulanet", "diffusion_gemma", "t5gemma2", "videoprism", "glm_image",
)  # fmt: skip
"""Variants that take seconds: in `make slow`."""


TESTING = [*dict.fromkeys(row.family for row in NATIVE.values())]
"""The families and variants that test a native class."""


def waits(variant: str) -> bool:
    """Whether all of a variant waits for `make slow`: two of three rows of the tables do."""
    row = isinstance(VARIANTS[variant], partial)
    place = TESTING.index(variant) if variant in TESTING else 1
    return variant in (*LIKE_ANOTHER, *DEAR) or (row and place % 3 > 0)


def variants() -> Iterator[Any]:
    """(variant, unit): each under one unit, under the others in `make slow`."""
    for number, variant in enumerate(VARIANTS):
        row = isinstance(VARIANTS[variant], partial)
        place = TESTING.index(variant) if variant in TESTING else 1
        own = ("head_dim", "head")[place // 3 % 2] if row else UNITS[number % len(UNITS)]
        for unit in (*UNITS, "query_head"):
            quick = unit == own and not waits(variant)
            mark = pytest.mark.whole if quick else pytest.mark.slow
            yield pytest.param(variant, unit, marks=mark, id=f"{variant}-{unit}")


@pytest.mark.parametrize(("variant", "unit"), variants())
def test_variant(variant: str, unit: AttentionUnit) -> None:
    if unit == "query_head":
        heads, queries = (discover(sample(variant).model, u) for u in ("head", "query_head"))
        if heads.structures == queries.structures:
            pytest.skip("no query heads share keys: the same as whole heads")
    for check in ("order_is_execution_order", "masked_equals_cut", "generation_agrees"):
        CHECKS[check](partial(copied, variant), unit)


@pytest.mark.parametrize(
    ("variant", "check"),
    [
        pytest.param("unlimited_ocr", "calibration_is_exact", marks=pytest.mark.slow),
        ("phi4_multimodal", "calibration_is_exact"),  # a mask of floating-point numbers
        ("kosmos2_5", "calibration_is_exact"),  # places among floating-point numbers
        ("pi0", "calibration_is_exact"),  # a part that reads the keys and values of another
        ("colqwen2", "folders_round_trip"),  # a config that AutoModel does not know
        ("lighton_ocr", "folders_round_trip"),  # other names of weights for AutoModel
        ("perceiver", "folders_round_trip"),  # of which AutoModel builds something else
        ("clipseg", "gradients_reach_every_gate"),  # a tower that computes without gradients
        ("diffusion_gemma", "gradients_reach_every_gate"),
    ],
)
def test_a_check_takes_whatever_a_model_is_given(variant: str, check: str) -> None:
    CHECKS[check](partial(copied, variant), "head_dim")


@cache
def cut_as(family: str) -> dict[tuple[str, str], set[str]]:
    """{(class of an attention block, unit): the layouts in which the family's blocks are cut}.

    Only of blocks that the family's inputs reach.
    """
    made, layouts = sample(family), defaultdict(set)
    model = made.model
    for unit in UNITS:
        for structure in discover(model, unit):
            reached = not (made.idle and re.search(made.idle, structure.name))
            if structure.core and reached:
                name = stock_name(model.get_submodule(structure.core))
                layouts[name, unit].add(structure.layout)
    return dict(layouts)


def native_classes() -> Iterator[Any]:
    """The names of all native classes, in the lane of the variants that test them."""
    for name, native in NATIVE.items():
        variant = native.family in VARIANTS and waits(native.family)
        yield pytest.param(name, marks=pytest.mark.slow if variant else pytest.mark.whole)


@pytest.mark.parametrize("name", native_classes())
def test_a_native_class_is_cut_natively_in_the_family_that_tests_it(name: str) -> None:
    family = NATIVE[name].family
    assert family in FAMILIES or family in VARIANTS
    for unit in UNITS:
        claimed = {"native" if getattr(NATIVE[name], unit) else "padded"}
        cut = cut_as(family).get((name, unit))
        dense = unit == "qk_vo" and cut is None  # queries and gates in one projection
        assert cut == claimed or dense, f"{name} under {unit} in {family}"
