"""Checks that must hold for every family and every attention unit.

Each check takes a function that builds a fresh :class:`~vlprune.testing.families.Sample` and an
attention unit, and raises AssertionError if its promise is broken. Run the checks on an
architecture of your own::

    from vlprune.testing import CHECKS
    for check in CHECKS.values():
        check(make_my_sample, "head_dim")
"""

from __future__ import annotations

import copy
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from ..architectures import discover
from ..calibration.session import fold, rotate
from ..cutting.difference import difference, tensors_of
from ..cutting.gates import gated, has_gates, ones, plan_gates
from ..cutting.memories import forgetful
from ..cutting.rewrite import rewrite
from ..cutting.sharing.materialize import materialize
from ..cutting.sharing.mixed import mixed
from ..cutting.sharing.rules import shareable
from ..cutting.sharing.ties import ties_in
from ..errors import PlanError, VerificationError, VlpruneError
from ..folders.load import load
from ..folders.save import save
from ..prices import cost
from ..structures.plan import Plan
from ..structures.structure import AttentionUnit, Description, Structure
from ..structures.units import positions
from .families import Sample

__all__ = ["CHECKS"]

Make = Callable[[], Sample]
Check = Callable[[Make, AttentionUnit], None]
TOLERANCE = 1e-10
"""The largest difference of masked and cut model in float64, relative to outputs of order 1."""
NEARLY = 1e-5
"""The largest difference of a model before saving and after loading, in float32, relative to
outputs of order 1. The weights are the same bits; the outputs need not be, since kernels sum in
another order where the weights lie at another place in memory."""

CHECKS: dict[str, Check] = {}


def _check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


# -- helpers ---------------------------------------------------------------------------


def _double(sample: Sample) -> Sample:
    """The sample in float64 where it runs so, so that rounding cannot hide a mistake."""
    sample.model.to(sample.dtype).eval()

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(sample.dtype) if tensor.is_floating_point() else tensor

    sample.inputs = recursively_apply(cast, sample.inputs)
    sample.generate = recursively_apply(cast, sample.generate)
    return sample


def _mirrored(tensor: Tensor) -> Tensor:
    """A tensor's numbers with the other sign; masks and places, which are whole numbers, stay."""
    if not tensor.is_floating_point():
        return tensor
    return torch.where(tensor == tensor.round(), tensor, -tensor)


def _nearly(sample: Sample) -> float:
    """The largest difference that counts as rounding in the sample."""
    return max(TOLERANCE, sample.rounding)


def _forward(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Every floating output, with the same random numbers and no memory of earlier passes."""
    torch.manual_seed(0)
    with torch.no_grad(), forgetful(model):
        return tensors_of(model(**inputs))


def _apart(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference, relative to outputs of order 1.

    Raises AssertionError where number, shapes or finiteness differ, or nothing is finite.
    """
    try:
        return difference(expected, found).relative
    except VerificationError as error:
        raise AssertionError(str(error)) from error


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that a folder holds."""
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _assert_survived(
    loaded: nn.Module, weights: dict[str, Tensor], outputs: list[Tensor], inputs: dict[str, Any]
) -> None:
    """A loaded model has the weights that were saved, bit by bit, and nearly their outputs."""
    state = _weights(loaded)
    assert list(state) == list(weights), "loading changed the names of the weights"
    for name, tensor in weights.items():
        assert tensor.dtype == state[name].dtype, f"loading changed the dtype of {name}"
        assert torch.equal(_bits(tensor), _bits(state[name])), f"loading changed {name}"
    apart = _apart(outputs, _forward(loaded.eval(), inputs))
    assert apart <= NEARLY, f"loading moved the outputs by {apart:.1e}"


def _same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(_bits(x), _bits(y)) for x, y in zip(a, b, strict=True)
    )


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[nn.Module]:
    """The model itself, to be cut inside the block and restored afterwards.

    A copy would do as well but takes as long as three forward passes. Parameters are not copied: a
    cut replaces them, and the checks assert that the model answers as before.
    """
    configs: dict[int, Any] = {}

    def collect(config: Any) -> None:
        if isinstance(config, transformers.PretrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            for part in vars(config).values():
                collect(part)

    for module in model.modules():
        collect(module.__dict__.get("config"))
    holders = [*model.modules(), *configs.values()]
    before = [(holder, type(holder), _own_copy(vars(holder))) for holder in holders]
    try:
        yield model
    finally:
        for holder, kind, values in before:
            holder.__class__ = kind
            holder.__dict__.clear()
            holder.__dict__.update(values)


def _own_copy(values: dict[str, Any]) -> dict[str, Any]:
    """A copy that later changes do not reach; containers among the values are copied, too."""
    return {
        name: value.copy() if isinstance(value, dict | list | set) else value
        for name, value in values.items()
    }


def make_plan(description: Description, keep: Callable[[int], int], seed: int = 0) -> Plan:
    """A plan that keeps ``keep(size)`` random units of every structure, or the least it must."""
    rng = random.Random(seed)
    counts = {s: max(s.least, keep(s.size)) for s in description}
    return _plan_of(
        description,
        {s.name: tuple(sorted(rng.sample(range(s.size), n))) for s, n in counts.items()},
    )


def _plan_of(description: Description, keep: dict[str, Any], **share: Any) -> Plan:
    """A plan in the units of the description."""
    return Plan(
        keep=keep,
        attention=description.attention,
        fingerprint=description.fingerprint,
        experts=description.experts,
        **share,
    )


def _busy(sample: Sample, description: Description) -> list[Structure]:
    """The structures that the sample's inputs can reach."""
    return [s for s in description if not (sample.idle and re.search(sample.idle, s.name))]


def _half(size: int) -> int:
    return max(1, size // 2)


def _hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks)
        + len(m._forward_pre_hooks)
        + len(m._backward_hooks)
        + ("forward" in m.__dict__)
        + has_gates(m)
        for m in model.modules()
    )


def _attentions(model: Any) -> Iterator[str]:
    """The attention implementations the model can switch to."""
    for name in ("eager", "sdpa"):
        try:
            model.set_attn_implementation(name)
        except (ValueError, AttributeError, ImportError):
            continue
        yield name


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


# -- the promises ----------------------------------------------------------------------


@_check
def discovery_is_stable(make: Make, attention: AttentionUnit) -> None:
    """Discovering twice gives the same description; every weight belongs to at most one unit."""
    model = make().model
    description = discover(model, attention)
    assert description == discover(model, attention)
    assert description.structures, "nothing was recognised"
    assert len({s.name for s in description}) == len(description), "two structures share a name"
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    taken: Counter[tuple[str, int, int]] = Counter()
    for structure in description:
        for slot in structure.slots:
            at = positions(slot, structure.size, range(structure.size))
            assert int(at.max()) < shapes[slot.param][slot.axis], f"{slot} leaves its parameter"
            taken.update((slot.param, slot.axis, i) for i in at.tolist())
    assert max(taken.values()) == 1, f"{taken.most_common(1)[0]} belongs to two units"
    explained = {s.param.rpartition(".")[0] for x in description for s in x.slots}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and name not in explained:
            assert (name or "(model)") in description.dense, f"{name} is neither cut nor explained"


@_check
def order_is_execution_order(make: Make, attention: AttentionUnit) -> None:
    """Inside a tower, structures come in the order in which a forward pass reaches them."""
    sample = make()
    description = discover(sample.model, attention)
    busy = _busy(sample, description)
    reached: list[str] = []
    handles = []
    for structure in busy:
        module = sample.model.get_submodule(structure.gates[0].module)
        note = lambda _m, _a, name=structure.name: reached.append(name)  # noqa: E731
        handles.append(module.register_forward_pre_hook(note))
    _forward(sample.model, sample.inputs)
    for handle in handles:
        handle.remove()
    first = {name: i for i, name in reversed(list(enumerate(reached)))}
    never = {s.name for s in busy} - first.keys()
    assert not never, f"never reached: {sorted(never)[0]}"
    of_core = {s.core: first[s.name] for s in reversed(busy)}  # its values may come before its keys
    for tower in {s.tower for s in busy}:
        seen = [of_core[s.core] if s.core else first[s.name] for s in busy if s.tower == tower]
        assert seen == sorted(seen), f"the structures of {tower} are out of order"


@_check
def ones_change_nothing(make: Make, attention: AttentionUnit) -> None:
    """Gates of one give the untouched model, bit for bit, and no hook stays behind."""
    sample = make()
    model = sample.model
    structures = discover(model, attention).structures
    before, keys, hooks = _forward(model, sample.inputs), list(model.state_dict()), _hooks(model)
    with gated(model, structures, ones(structures, requires_grad=True)):
        assert _same_bits(before, _forward(model, sample.inputs)), "gates of one changed a bit"
    assert _hooks(model) == hooks, "a hook stayed behind"
    with suppress(ZeroDivisionError), gated(model, structures, ones(structures)):
        raise ZeroDivisionError
    assert _hooks(model) == hooks, "a hook stayed behind after an error"
    assert list(model.state_dict()) == keys
    assert _same_bits(before, _forward(model, sample.inputs)), "the model was changed"


@_check
def masked_equals_cut(make: Make, attention: AttentionUnit) -> None:
    """In float64: half of the units at random, one unit, and all; eager and SDPA."""
    sample = _double(make())
    description = discover(sample.model, attention)
    dense = _forward(sample.model, sample.inputs)
    implementations = [*_attentions(sample.model)] or [""]

    def answers(model: nn.Module) -> dict[str, list[Tensor]]:
        found = {}
        for implementation in implementations:
            if implementation:
                model.set_attn_implementation(implementation)  # type: ignore[operator]
            found[implementation] = _forward(model, sample.inputs)
        return found

    for keep in (_half, lambda size: 1, lambda size: size):
        plan = make_plan(description, keep)
        with gated(sample.model, description.structures, plan):
            masked = answers(sample.model)
        with _put_back(sample.model):
            cut = answers(rewrite(sample.model, description, plan))
        for implementation in implementations:
            apart = _apart(masked[implementation], cut[implementation])
            assert apart <= _nearly(sample), f"{apart:.1e} apart under {implementation}"
        if keep is _half:
            moved = _apart(dense, masked[implementations[-1]])
            assert moved > 1e-4, f"removing half moves the output by {moved:.1e} only"
    # all units were kept last, under the implementation that is still set; eager may know more
    # than SDPA does (Gemma 2 caps its scores), so the first answer is not comparable
    again = _forward(sample.model, sample.inputs)
    assert _apart(masked[implementations[-1]], again) <= TOLERANCE, "the model was not put back"


@_check
def every_structure_alone_equals_its_mask(make: Make, attention: AttentionUnit) -> None:
    """Cut one structure at a time; the mask of that structure alone must matter and agree."""
    sample = _double(make())
    description = discover(sample.model, attention)
    dense = _forward(sample.model, sample.inputs)
    for structure in _busy(sample, description):
        once = structure.kind == "ffn" and attention != "head_dim"
        if once or structure.size == structure.least:
            continue  # an FFN is the same under every attention unit: once is enough
        last = range(structure.size - structure.least, structure.size)
        plan = _plan_of(description, {structure.name: (*last,)})
        with gated(sample.model, description.structures, plan):
            masked = _forward(sample.model, sample.inputs)
        assert _apart(dense, masked) > 1e-12, f"{structure.name} does not matter"
        with _put_back(sample.model):
            cut = _forward(rewrite(sample.model, description, plan), sample.inputs)
        apart = _apart(masked, cut)
        assert apart <= _nearly(sample), f"{structure.name}: {apart:.1e} apart"
    assert _same_bits(dense, _forward(sample.model, sample.inputs)), "the model was not put back"


@_check
def generation_agrees(make: Make, attention: AttentionUnit) -> None:
    """Masked and cut model generate the same tokens with the same scores, with a cache."""
    sample = _double(make())
    if sample.generate is None:
        return
    description = discover(sample.model, attention)
    plan = make_plan(description, _half)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "use_cache": True,
        "num_beams": 1,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    with _quiet():
        with gated(sample.model, description.structures, plan):
            masked: Any = sample.model.generate(**sample.generate, **options)  # type: ignore[operator]
        small: Any = rewrite(sample.model, description, plan)
        cut: Any = small.generate(**sample.generate, **options)
    assert torch.equal(masked.sequences, cut.sequences), "other tokens were generated"
    assert _apart(list(masked.scores), list(cut.scores)) <= _nearly(sample)


@_check
def costs_agree(make: Make, attention: AttentionUnit) -> None:
    """Exact, differentiable and counted parameters and MACs are the same numbers."""
    sample = make()
    description = discover(sample.model, attention)
    structures, plan = description.structures, make_plan(description, _half)
    soft_gates = {n: g.double() for n, g in plan_gates(structures, plan).items()}
    exact = cost.params(sample.model, structures, plan)
    soft = cost.params(sample.model, structures, soft_gates)
    profile = cost.measure_macs(sample.model, structures, sample.inputs)
    exact_macs = cost.macs_of(profile, structures, plan)
    soft_macs = cost.macs_of(profile, structures, soft_gates)
    prices = cost.param_prices(sample.model, structures)
    small = rewrite(sample.model, description, plan)
    assert exact == sum(p.numel() for p in small.parameters())
    assert float(soft) == exact
    assert prices.cost({n: len(u) for n, u in plan.keep.items()}) == exact
    assert exact_macs == cost.measure_macs(small, (), sample.inputs).total
    assert abs(float(soft_macs) - float(exact_macs)) < 1


def share_plan(model: nn.Module, description: Description, seed: int = 0) -> Plan:
    """A plan that keeps half of every structure and shares wherever two structures are alike.

    Some units take the weights of an earlier structure, of any tower and in any pairing, so that
    chains occur.
    """
    rng, structures = random.Random(seed), list(description)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    plan, share = make_plan(description, _half, seed), {}
    for number, target in enumerate(structures):
        alike = [s for s in structures[:number] if not shareable(target, s, shapes)]
        if alike and target.size > 2:
            source = rng.choice(alike)
            units = rng.sample(range(target.size), target.size // 2)
            taken = [rng.choice(plan.keep[source.name]) for _ in units]
            if set(units) != set(plan.keep[target.name]):
                share[target.name] = (source.name, units, taken)
    return _plan_of(description, dict(plan.keep), share=share)


@_check
def sharing_is_exact(make: Make, attention: AttentionUnit) -> None:
    """Mixed and cut model agree; units are stored once, tied after loading and cut again."""
    sample = _double(make())
    description = discover(sample.model, attention)
    structures = description.structures
    plan = share_plan(sample.model, description)
    while any(not plan.kept(s) for s in structures):  # all sharing with units that go
        empty = {s.name for s in structures if not plan.kept(s)}
        share = {name: entry for name, entry in plan.share.items() if name not in empty}
        plan = _plan_of(description, dict(plan.keep), share=share)
    exact = cost.params(sample.model, structures, plan)
    with mixed(sample.model, structures, plan), gated(sample.model, structures, plan):
        masked = _forward(sample.model, sample.inputs)
    small = rewrite(sample.model, description, plan)
    cut = _forward(small, sample.inputs)
    apart = _apart(masked, cut)
    assert apart <= _nearly(sample), f"{apart:.1e} apart"
    assert exact == sum(p.numel() for p in small.parameters())
    assert exact == param_prices_total(small, discover(small, attention))
    again_plan = make_plan(discover(small, attention), lambda size: max(1, size - 1), seed=1)
    whole = materialize(copy.deepcopy(small))
    assert not ties_in(whole)
    assert _apart(cut, _forward(whole, sample.inputs)) <= 1e-12, "materialising changed it"
    small.float()
    inputs = make().inputs
    before, ties = _forward(small, inputs), ties_in(small)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        save(small, Path(scratch) / "tied")
        last = load(Path(scratch) / "tied").eval()
    assert ties_in(last) == ties, "other units are tied"
    _assert_survived(last, _weights(small), before, inputs)
    description = discover(last, attention)
    with suppress(PlanError):  # the second cut may leave nothing of a structure that shares
        expected = cost.params(last, description.structures, again_plan)
        smaller = rewrite(last, description, again_plan, verify=inputs)
        assert sum(p.numel() for p in smaller.parameters()) == expected


def param_prices_total(model: nn.Module, description: Description) -> float:
    """The total of a model's price list, in parameters."""
    return cost.param_prices(model, description.structures).total


@_check
def folders_round_trip(make: Make, attention: AttentionUnit) -> None:
    """Saved and loaded twice, by its own class and by AutoModel: the same bits of weights."""
    sample = make()
    description = discover(sample.model, attention)
    small = rewrite(sample.model, description, make_plan(description, _half))
    own = _weights(small)
    before = _forward(small, sample.inputs)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        first, second = Path(scratch) / "first", Path(scratch) / "second"
        save(small, first)
        again = load(first)
        again.save_pretrained(second)
        for model in (again, type(small).from_pretrained(second, trust_remote_code=False)):  # type: ignore[attr-defined]
            assert type(model) is type(small)
            _assert_survived(model, own, before, sample.inputs)
        by_auto = _found_by_auto(first)
        if not by_auto:
            make().model.save_pretrained(scratch)  # type: ignore[operator]
            assert not _found_by_auto(Path(scratch)), "AutoModel loads the dense model only"
            return
    compared = 0
    for name, parameter in by_auto.items():
        names = (name, f"{small.base_model_prefix}.{name}", f"model.{name}")
        stored = next((own[n] for n in names if n in own), None)
        if stored is not None:
            assert torch.equal(_bits(stored), _bits(parameter.detach())), f"{name} differs"
            compared += 1
    assert compared > 10, "AutoModel shares hardly a weight with the model"


def _found_by_auto(folder: Path) -> dict[str, Tensor]:
    """The weights that AutoModel finds in a folder.

    None where it does not know the config (ColPali's) or builds something else from it
    (Perceiver's), or looks for other names (LightOnOCR's).
    """
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if type(config) not in transformers.MODEL_MAPPING:
        return {}
    try:
        base, info = transformers.AutoModel.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=False
        )
    except (RuntimeError, VlpruneError):
        return {}
    assert not info["mismatched_keys"], "AutoModel found other shapes"
    return {n: p for n, p in base.named_parameters() if n not in info["missing_keys"]}


@_check
def a_second_cut_composes(make: Make, attention: AttentionUnit) -> None:
    """A cut model can be cut again, saved and loaded; masks still agree."""
    sample = _double(make())
    model: nn.Module = sample.model
    for keep in (lambda size: max(1, size - 1), _half):
        description = discover(model, attention)
        plan = make_plan(description, keep)
        with gated(model, description.structures, plan):
            masked = _forward(model, sample.inputs)
        model = rewrite(model, description, plan)
        assert _apart(masked, _forward(model, sample.inputs)) <= _nearly(sample)
    model.float()
    inputs = make().inputs
    before = _forward(model, inputs)
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        save(model, Path(scratch) / "twice")
        again = load(Path(scratch) / "twice")
    _assert_survived(again, _weights(model), before, inputs)


@_check
def gradients_reach_every_gate(make: Make, attention: AttentionUnit) -> None:
    """Every structure's gates get a finite gradient that is not all zero.

    If the forward computes the structure with gradients: SAM 2 does not when it follows a video.
    """
    sample = make()
    description = discover(sample.model, attention)
    structures = description.structures
    gates = ones(_busy(sample, description), requires_grad=True)
    learnable: set[str] = set()

    def note(name: str, *_: Any) -> None:
        if torch.is_grad_enabled():
            learnable.add(name)

    for structure in structures:
        module = sample.model.get_submodule(structure.gates[0].module)
        module.register_forward_pre_hook(partial(note, structure.name))
    torch.manual_seed(0)
    with gated(sample.model, structures, gates):
        outputs = tensors_of(sample.model(**sample.inputs))
        loss = sum((o[o.isfinite()].square().mean() for o in outputs if o.numel()), torch.zeros(()))
        if loss.requires_grad:
            loss.backward()
    for name, gate in gates.items():
        if name not in learnable:
            continue
        assert gate.grad is not None, f"no gradient reached {name}"
        assert gate.grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert gate.grad.abs().max() > 0, f"the gradient of {name} is zero"


@_check
def calibration_is_exact(make: Make, attention: AttentionUnit) -> None:
    """In float64: turned heads change nothing; a folded model is the cut one, nearer to dense."""
    sample = _double(make())
    model = sample.model
    dense = _forward(model, sample.inputs)
    other = recursively_apply(_mirrored, sample.inputs)
    batches = [sample.inputs, other]
    if attention == "qk_vo":  # the same under every attention unit: once is enough
        rotate(model, batches)
        apart = _apart(dense, _forward(model, sample.inputs))
        assert apart <= _nearly(sample), f"turning heads moved the outputs by {apart:.1e}"
    description = discover(model, attention)
    plan = make_plan(description, _half)
    whole = {s.name for s in description if s.kind == "experts"}  # which no repair follows
    plan = _plan_of(description, {n: units for n, units in plan.keep.items() if n not in whole})
    errors = fold(model, plan, batches)
    assert sum(errors.after.values()) <= sum(errors.before.values()), "the repair made it worse"
    folded = _forward(model, sample.inputs)
    with gated(model, description.structures, plan):
        masked = _forward(model, sample.inputs)
    if errors.kept:
        apart = _apart(folded, masked)
        assert apart <= _nearly(sample), f"units that are folded away still move it by {apart:.1e}"
    apart = _apart(masked, _forward(rewrite(model, description, plan), sample.inputs))
    assert apart <= _nearly(sample), f"{apart:.1e} apart"


@_check
def cut_model_trains(make: Make, attention: AttentionUnit) -> None:
    """A cut model takes a training step that changes its cut weights."""
    sample = make()
    description = discover(sample.model, attention)
    small = rewrite(sample.model, description, make_plan(description, _half)).train()
    names = [s.slots[0].param for s in _busy(sample, description)]
    parameters = {name: small.get_parameter(name) for name in names}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    torch.manual_seed(0)
    outputs = tensors_of(small(**sample.inputs))
    sum((o[o.isfinite()].square().mean() for o in outputs), torch.zeros(())).backward()
    optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.isfinite().all()
        assert not torch.equal(before[name], parameter), f"{name} did not learn"
