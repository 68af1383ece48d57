"""The proof of a cut: the masked and the cut model give the same outputs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..device import device_of, same_random_numbers
from ..errors import IncomparableError, VerificationError, first_line
from ..structures.shards import is_dtensor, shape_of
from ..structures.units import plain_name
from .apply import slices_of
from .difference import Difference, difference, tensors_of
from .heads import head_outputs
from .first_batch import run_inputs
from .fsdp import by_fsdp, computing_in, recover
from .gates import gated
from .layerwise import Pieces, Weights, held_weights, layerwise
from .settle import Cut
from .sharing.ties import Tie, WholeWeights, remember_ties, ties_of, untie
from .zero import is_split

__all__ = [
    "MaskedWeights",
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
    attention kernel that ran, "" for the model's own.
    """

    difference: float
    scale: float
    dtype: str
    compared: float = 1.0
    kernel: str = ""


@dataclass(frozen=True)
class Setting:
    """How a pass of the proof runs.

    On which inputs and in which dtype, with which attention kernel ("" for the model's own), and
    what of the model holds its weights at a time.
    """

    inputs: Mapping[str, Any]
    dtype: torch.dtype
    kernel: str
    pieces: Pieces


def verification(found: Difference, setting: Setting) -> Verification:
    """The result of a proof."""
    name = str(setting.dtype).removeprefix("torch.")
    return Verification(found.largest, found.scale, name, found.compared, setting.kernel)


def run_masked(
    model: nn.Module,
    cut: Cut,
    inputs: Mapping[str, Any],
    stored: Weights | None = None,
    part: str = "",
) -> tuple[list[Tensor], Setting]:
    """The masked model's outputs, and the setting in which they were computed.

    The first attempt uses the wide dtype and the model's own kernels. If it fails, the proof is
    tried without labels (a loss may hold numbers of another dtype), then with other kernels that
    may support the wide dtype (flash attention does not), then in float32, and last in the model's
    own dtype.
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
        for pieces in _pieces(model):
            setting = replace(one, pieces=pieces)
            try:
                with _untied(model), gated(model, cut.description.structures, cut.plan):
                    outputs = _pass(model, setting, part, weights)
                if pieces != "model" and any(output.isnan().any() for output in outputs):
                    raise IncomparableError("the outputs are no numbers")
                difference(outputs, outputs)
            except Exception as error:
                name = str(setting.dtype).removeprefix("torch.")
                problems.append(f"{name}: {first_line(error)}")
                recover(model)
                continue
            return outputs, setting
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


class MaskedWeights:
    """The weights of the masked model: those that the plan shares taken from their sources.

    Query weights that a softmax temperature will be folded into are rounded as the cut will round
    their product, so that the rest of the proof can be exact. ``stored`` gives the weights of the
    model as they are.
    """

    # not closures that call themselves: they would hold the old weights until Python looks for
    # circles, while the cut makes the new ones

    def __init__(self, model: nn.Module, cut: Cut, stored: Weights) -> None:
        with _untied(model):
            every = model.named_parameters(remove_duplicate=False)
            shapes = {name: shape_of(parameter) for name, parameter in every}
        self._scale = slices_of(cut.structures, cut.plan, shapes).scale
        self._ties: dict[str, list[Tie]] = defaultdict(list)
        for tie in ties_of(cut.structures, cut.plan, shapes):
            self._ties[tie.target].append(tie)
        self._whole = WholeWeights(model, _Rounded(stored, self._scale))

    def __call__(self, name: str) -> Tensor:
        weight = self._whole(name)
        for tie in self._ties.get(name, ()):
            source = self(tie.source)
            wide = torch.promote_types(weight.dtype, source.dtype)
            taken = source.to(wide).index_select(tie.axis, _on(source, tie.out_of))
            weight = weight.to(wide).index_copy(tie.axis, _on(weight, tie.into), taken)
        return weight


def _on(weight: Tensor, positions: Sequence[int]) -> Tensor:
    return torch.tensor(positions, device=weight.device)


@dataclass(frozen=True)
class _Rounded:
    """Stored weights, rounded where the cut multiplies them by a factor."""

    stored: Weights
    scale: Mapping[str, float]

    def __call__(self, name: str) -> Tensor:
        weight, factor = self.stored(name), self.scale.get(plain_name(name), 1.0)
        return weight if factor == 1.0 else (weight * factor).double() / factor


def compare(
    model: nn.Module,
    masked: Sequence[Tensor],
    setting: Setting,
    stored: Weights | None = None,
    part: str = "",
    advice: str = ADVICE,
) -> Difference:
    """How far the outputs of the cut model are from those of the masked one.

    ``setting`` is what :func:`run_masked` returned with ``masked``. Raises VerificationError, which
    ends with ``advice``, if the cut model does not run or the difference is more than rounding.
    """
    weights = WholeWeights(model, stored or held_weights(model))
    try:
        with _untied(model):
            found = _pass(model, setting, part, weights)
    except Exception as error:
        recover(model)
        raise VerificationError(
            f"the cut model does not run ({first_line(error)}); {advice}"
        ) from error
    try:
        apart = difference(masked, found)
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
        return _run(model.get_submodule(part), setting.inputs, setting.dtype)


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
def _untied(model: nn.Module) -> Iterator[None]:
    """The model with whole weights in place of shared ones while the block runs."""
    tie_again = remember_ties(model)
    try:
        untie(model)
        yield
    finally:
        tie_again()


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
def _run(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Every floating tensor of one forward pass, and the logits that its output leaves out."""
    with same_random_numbers(model), head_outputs(model) as logits:
        torch.manual_seed(0)
        found = tensors_of(model(**run_inputs(model, inputs, device_of(model), dtype)))
    named = {tensor.shape for tensor in found}
    return [*found, *(tensor for tensor in logits if tensor.shape not in named)]
