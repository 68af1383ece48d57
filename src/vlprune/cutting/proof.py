"""The proof of a cut: the masked and the cut model give the same outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..device import device_of, same_random_numbers
from ..errors import IncomparableError, VerificationError, first_line
from ..structures.shards import is_dtensor, shape_of
from ..structures.units import plain_name
from .difference import Difference, difference, tensors_of
from .first_batch import run_inputs
from .fsdp import by_fsdp, computing_in, recover
from .gates import gated
from .heads import head_outputs
from .layerwise import Pieces, Weights, held_weights, layerwise
from .masked import MaskedWeights, untied, used_in
from .memories import forgetful, memories
from .settle import Cut
from .sharing.ties import WholeWeights
from .widened import widened
from .zero import is_split

__all__ = [
    "Masked",
    "Setting",
    "Verification",
    "compare",
    "in_dtype",
    "run_masked",
    "verification",
]


SMALL_ENOUGH_FOR_FLOAT64 = 100_000_000

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative difference between masked and cut model that counts as rounding."""

HALF_TOLERANCE = 5e-2
"""The same for any other dtype, where a kernel supports only half precision."""

ADVICE = (
    "the model was put back as it was: report this architecture, or, if you know better, "
    "cut without proof by finish(verify=False)"
)


@dataclass(frozen=True)
class Verification:
    """How the cut was proved.

    ``difference`` is the largest absolute difference between masked and cut model, ``scale`` the
    largest absolute output value, ``dtype`` the dtype of both passes, ``compared`` the fraction of
    all values that was compared (the others are infinite or NaN on both sides), and ``kernel`` the
    attention kernel that ran, "" for the model's own. ``unseen`` are structures that were cut and
    that the pass does not use, so that it shows nothing about them.
    """

    difference: float
    scale: float
    dtype: str
    compared: float = 1.0
    kernel: str = ""
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """How a pass of the proof runs.

    On which inputs and in which dtype, with which attention kernel ("" for the model's own), what
    of the model holds its weights at a time, whether it ``forgets`` earlier passes first, and
    whether what the forward computes in float32 by itself is ``wide``, too.
    """

    inputs: Mapping[str, Any]
    dtype: torch.dtype
    kernel: str
    pieces: Pieces
    forgets: bool = True
    wide: bool = False


@dataclass(frozen=True)
class Masked:
    """The masked model's outputs, the setting of the pass, and the structures that it used."""

    outputs: Sequence[Tensor]
    setting: Setting
    used: frozenset[str]


def verification(found: Difference, masked: Masked, cut: Cut) -> Verification:
    """The result of a proof."""
    setting = masked.setting
    name = str(setting.dtype).removeprefix("torch.")
    unseen = tuple(
        structure.name
        for structure in cut.description.structures
        if structure.name not in masked.used and len(cut.plan.kept(structure)) < structure.size
    )
    return Verification(found.largest, found.scale, name, found.compared, setting.kernel, unseen)


def run_masked(
    model: nn.Module,
    cut: Cut,
    inputs: Mapping[str, Any],
    stored: Weights | None = None,
    part: str = "",
) -> Masked:
    """The masked model's outputs, and how they were computed.

    The first attempt uses the wide dtype, for all that the forward computes, and the model's own
    kernels. If it fails, the proof is tried with a forward that rounds where it asks for float32,
    without labels (a loss may hold numbers of another dtype), with other kernels that may support
    the wide dtype (flash attention does not), in float32, and last in the model's own dtype.
    ``stored`` gives the weights of a model that has none in memory; ``part`` is the path of a
    sub-model that runs alone.

    Raises IncomparableError if every attempt fails.
    """
    problems: list[str] = []
    weights = MaskedWeights(model, cut, stored or held_weights(model))
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    (first, *others) = [(inputs, *setting) for setting in _settings(model)]
    labelled = [(unlabelled, *first[1:])] if "labels" in inputs else []
    for one in (Setting(*values) for values in (first, *labelled, *others)):
        for wide, pieces, forgets in product((True, False), _pieces(model), (True, False)):
            if not (forgets or memories(model)):  # the same again
                continue
            if wide and (one.dtype != torch.float64 or by_fsdp(model)):
                continue
            setting = replace(one, pieces=pieces, forgets=forgets, wide=wide)
            try:
                structures = cut.description.structures
                with (
                    untied(model),
                    gated(model, structures, cut.plan),
                    used_in(model, structures) as used,
                ):
                    outputs = _pass(model, setting, part, weights)
                if pieces != "model" and any(output.isnan().any() for output in outputs):
                    raise IncomparableError("the outputs are no numbers")
                difference(outputs, outputs)
            except Exception as error:
                name = str(setting.dtype).removeprefix("torch.")
                problems.append(f"{name}: {first_line(error)}")
                recover(model)
                continue
            return Masked(outputs, setting, used())
    raise IncomparableError(
        f"the masked model could not be run for the proof ({'; '.join(dict.fromkeys(problems))}), "
        "so nothing was cut: give other example_inputs, or cut without proof by "
        "finish(verify=False)"
    )


PIECES: tuple[Pieces, ...] = ("layers", "modules", "model")


def _pieces(model: nn.Module) -> tuple[Pieces, ...]:
    """What of the model to give its weights at a time, best first."""
    if by_fsdp(model):  # which gathers by its own units
        return PIECES[-1:]
    # never all of a large split model in every process
    return PIECES[:-1] if is_split(model) and not _is_small(model) else PIECES


def _is_small(model: nn.Module) -> bool:
    return sum(math.prod(shape_of(p)) for p in model.parameters()) <= SMALL_ENOUGH_FOR_FLOAT64


def compare(
    model: nn.Module,
    masked: Masked,
    stored: Weights | None = None,
    part: str = "",
    advice: str = ADVICE,
) -> Difference:
    """How far the outputs of the cut model are from those of the masked one.

    ``masked`` is what :func:`run_masked` returned. Raises VerificationError, which ends with
    ``advice``, if the cut model does not run or the difference is more than rounding.
    """
    setting = masked.setting
    weights = WholeWeights(model, stored or held_weights(model))
    try:
        with untied(model):
            found = _pass(model, setting, part, weights)
    except Exception as error:
        recover(model)
        raise VerificationError(
            f"the cut model does not run ({first_line(error)}); {advice}"
        ) from error
    try:
        apart = difference(masked.outputs, found)
    except VerificationError as error:
        raise VerificationError(f"masked and cut model differ: {error}; {advice}") from None
    rounding = max(TOLERANCE.get(setting.dtype, HALF_TOLERANCE), _rounding(model))
    if not apart.relative <= rounding:
        raise VerificationError(
            f"masked and cut model differ by {apart.largest:.2g} on outputs up to "
            f"{apart.scale:.2g}; {advice}"
        )
    return apart


def _rounding(model: nn.Module) -> float:
    """The relative difference that a cut of a sharded model may make by rounding; else 0.

    FSDP2's weights keep their dtype during the proof. A softmax temperature that is folded into
    them is rounded to it, and so are activations that a forward casts to the dtype of a weight.
    """
    dtypes = {p.dtype for p in model.parameters() if is_dtensor(p) and p.is_floating_point()}
    return max((min(HALF_TOLERANCE, 16 * torch.finfo(d).eps) for d in dtypes), default=0.0)


def _pass(model: nn.Module, setting: Setting, part: str, weights: Weights) -> list[Tensor]:
    """The outputs of one pass in the setting, with these weights.

    FSDP2 gathers the weights of a sharded model by itself, layer by layer.
    """
    with ExitStack() as entered:
        if setting.kernel:
            entered.enter_context(_kernels(model, setting.kernel))
        if by_fsdp(model):
            entered.enter_context(in_dtype(model, setting.dtype))
        else:
            entered.enter_context(layerwise(model, setting.dtype, weights, setting.pieces))
        return _run(
            model.get_submodule(part), setting.inputs, setting.dtype, setting.forgets, setting.wide
        )


def _settings(model: Any) -> Iterator[tuple[torch.dtype, str, Pieces]]:
    """The dtypes and kernels to try the proof with, best first."""
    wide = torch.float64 if _is_small(model) else torch.float32
    yield wide, "", "layers"
    if hasattr(model, "set_attn_implementation"):
        yield wide, "sdpa", "layers"
        yield wide, "eager", "layers"
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), wide)
    for dtype in dict.fromkeys((torch.float32, own)):  # some forwards make float32 tensors
        if dtype != wide:
            yield dtype, "", "layers"


@contextmanager
def _kernels(model: Any, name: str) -> Iterator[None]:
    """The model with attention kernel ``name``, and eager experts, while the block runs."""
    fields = ("_attn_implementation_internal", "_experts_implementation_internal")
    before = {
        place: (config, {f: config.__dict__[f] for f in fields if f in config.__dict__})
        for place, config in _configs(model).items()
    }
    try:
        model.set_attn_implementation(name)
        with suppress(Exception):  # only models with experts have the setting
            model.set_experts_implementation("eager")
        yield
    finally:
        now = _configs(model)  # a cut model has new config objects
        for place, (config, values) in before.items():
            config.__dict__.update(values)
            now.get(place, config).__dict__.update(values)


def _configs(model: nn.Module) -> dict[tuple[str, str], Any]:
    """{(module path, sub-config name): config} of all configs that the model refers to."""
    found = {}
    for path, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            found[path, ""] = config
            parts = {name: getattr(config, name, None) for name in config.sub_configs}
            found |= {(path, n): part for n, part in parts.items() if hasattr(part, "model_type")}
    return found


@contextmanager
def in_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The model in another dtype while the block runs; widening and back is lossless.

    Parameters cut inside the block come back in the dtype they had. Those that lie in parts keep
    theirs, and are gathered in the other.
    """
    sharded = by_fsdp(model)
    with computing_in(model, dtype) if sharded else nullcontext():
        before = {plain_name(name): t.dtype for name, t in _floating(model) if t.dtype != dtype}
        try:
            if sharded:  # FSDP2 widens its own as it gathers them
                for _, tensor in _floating(model):
                    tensor.data = tensor.data.to(dtype)
            elif before:
                model.to(dtype)
            yield
        finally:
            for name, tensor in _floating(model):
                if plain_name(name) in before:
                    tensor.data = tensor.data.to(before[plain_name(name)])


def _floating(model: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, t) for name, t in named if t.is_floating_point() and not is_dtensor(t)]


@torch.no_grad()
def _run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    dtype: torch.dtype,
    forgets: bool = True,
    wide: bool = False,
) -> list[Tensor]:
    """Every floating tensor of one forward pass, and the logits that its output leaves out."""
    given = run_inputs(model, inputs, device_of(model), dtype)
    with same_random_numbers(model), head_outputs(model) as logits:
        torch.manual_seed(0)
        with (
            forgetful(model) if forgets else nullcontext(),
            widened() if wide else nullcontext(),
        ):
            found = tensors_of(model(**given))
    named = {tensor.shape for tensor in found}
    return [*found, *(tensor for tensor in logits if tensor.shape not in named)]
