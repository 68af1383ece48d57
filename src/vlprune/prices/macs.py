"""MACs of a model, under a plan or gates, and of one unit; one multiply-add counts as 1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from ..cutting.gates import Gates, evaluating
from ..cutting.memories import forgetful
from ..cutting.padded import is_linear
from ..cutting.zero import running
from ..device import moved_to
from ..structures.plan import Plan
from ..structures.shards import shape_of
from ..structures.structure import Structure
from ..structures.units import named_weights, owner_of
from .params import at_least_of, kept_of
from .prices import Prices

__all__ = ["MacsProfile", "macs", "macs_of", "measure_macs"]


@dataclass(frozen=True)
class MacsProfile:
    """MACs of one forward pass of the dense model, split so that any cut can be priced.

    ``total`` counts the whole pass, ``unit`` one unit of each structure; ``sizes`` are the units
    of each structure, ``at_least`` experts that must stay; ``not_counted`` names operations that
    ran but have no known price.
    """

    total: int
    unit: Mapping[str, float]
    sizes: Mapping[str, int]
    not_counted: tuple[str, ...]
    at_least: Mapping[str, int] = field(default_factory=dict)

    @property
    def prices(self) -> Prices:
        """The profile as a price list."""
        fixed = self.total - sum(self.unit[n] * self.sizes[n] for n in self.unit)
        return Prices("macs", self.unit, self.sizes, fixed, self.unit, at_least=self.at_least)


def macs(
    model: nn.Module,
    structures: Sequence[Structure],
    example_inputs: Mapping[str, Any],
    plan_or_gates: Plan | Gates | None = None,
) -> int | Tensor:
    """Multiply-adds of one forward pass on ``example_inputs`` after the cut.

    An int for a plan or for None, a differentiable scalar for gates. The dense model runs once.
    """
    return macs_of(measure_macs(model, structures, example_inputs), structures, plan_or_gates)


def macs_of(
    profile: MacsProfile, structures: Sequence[Structure], choice: Plan | Gates | None
) -> int | Tensor:
    """As :func:`macs`, from a profile measured before, without running the model."""
    total: Any = float(profile.total)
    for structure in structures:
        total = total - profile.unit[structure.name] * (structure.size - kept_of(structure, choice))
    return total if isinstance(total, Tensor) else round(total)


# torch's flop registry has no formula for the fused attention kernel of CPUs and skips it in
# silence.
def _sdpa_cpu(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


# Nor has it one for the product of sorted tokens, each with its own expert's weights.
def _grouped_mm(tokens: Tensor, weights: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 2 * tokens.numel() * weights.shape[-1]


_EXTRA_FORMULAS: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _sdpa_cpu,
    "aten._grouped_mm": _grouped_mm,
    "transformers.grouped_mm_fallback": _grouped_mm,
}


_UNPRICED = ("grid_sampler", "fft", "cdist", "_native_multi_head")


class _Counter(TorchDispatchMode):
    """Adds up the multiply-adds of every operation, in total and inside the open cores."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.core: dict[str, int] = defaultdict(int)
        self.open: list[str] = []
        self.unpriced: set[str] = set()

    def watch(self, path: str, module: nn.Module) -> list[Any]:
        """Hooks that open the core ``path`` while ``module`` runs."""
        return [
            module.register_forward_pre_hook(lambda _m, _a: self.open.append(path)),
            module.register_forward_hook(lambda _m, _a, _o: self.open.remove(path)),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = func._overloadpacket
        formula = _EXTRA_FORMULAS.get(str(packet)) or flop_registry.get(packet)
        if formula is not None:
            done = formula(*args, **kwargs, out_val=output) // 2
            self.total += done
            for path in self.open:
                self.core[path] += done
        elif not str(packet).startswith(("aten.", "prim")) or any(
            name in str(packet) for name in _UNPRICED
        ):
            self.unpriced.add(str(packet))
        return output


@torch.no_grad()
def measure_macs(
    model: nn.Module, structures: Sequence[Structure], example_inputs: Mapping[str, Any]
) -> MacsProfile:
    """Run the dense model once, on its own device, and split its MACs by structure."""
    counter, by_projection = _Counter(), defaultdict[str, int](int)
    with ExitStack() as hooks:
        for handle in _projection_hooks(model, by_projection):
            hooks.callback(handle.remove)
        experts = _experts(model, structures)
        routers = {s.name: s.gates[0].module for s in structures if s.kind == "experts"}
        cores = {s.core for s in structures if s.core}
        inside = {
            c: [f"{c}.{n}" for n, _ in model.get_submodule(c).named_children()] for c in cores
        }
        for path in {
            *experts,
            *routers.values(),
            *cores,
            *(p for paths in inside.values() for p in paths),
        }:
            for handle in counter.watch(path, model.get_submodule(path)):
                hooks.callback(handle.remove)
        # the fast path's fused kernel has no formula
        hooks.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        with running(model), evaluating(model), forgetful(model), counter:
            model(**moved_to(model, example_inputs))
    by_core = {}
    for core in cores:  # without what its modules do: projections, or an indexer of tokens
        own = model.get_submodule(core)._parameters
        modules = sum(
            max(counter.core[path], _starting(path + ".", by_projection)) for path in inside[core]
        )
        fused = sum(_starting(f"{core}.{name}", by_projection) for name in own)
        by_core[core] = counter.core[core] - modules - fused
    shapes = {name: shape_of(p) for name, p in named_weights(model).items()}
    for path, names in experts.items():  # each in proportion to its size: all see the same tokens
        sizes_of = {name: math.prod(shapes[name][1:]) for name in names}
        for name, numbers in sizes_of.items():
            by_projection[name] = counter.core[path] * numbers // sum(sizes_of.values())
    unit = {
        # a token has as many experts as before, unless all experts compute on it
        s.name: (counter.core[routers[s.name]] + s.core_share * counter.core[s.core or ""]) / s.size
        if s.name in routers
        else _macs_per_unit(s, shapes, by_projection, by_core)
        for s in structures
    }
    sizes = {s.name: s.size for s in structures}
    not_counted = tuple(sorted(counter.unpriced))
    return MacsProfile(counter.total, unit, sizes, not_counted, at_least_of(structures))


def _starting(prefix: str, macs: Mapping[str, int]) -> int:
    return sum(done for name, done in macs.items() if name.startswith(prefix))


def _experts(model: nn.Module, structures: Sequence[Structure]) -> dict[str, list[str]]:
    """{module: its weights} of experts, which are no layers: (experts, out, in) each."""
    found: dict[str, list[str]] = defaultdict(list)
    for slot in (slot for structure in structures for slot in structure.slots):
        path, leaf = owner_of(slot.param)
        if len(shape_of(getattr(model.get_submodule(path), leaf))) == 3:
            found[path].append(slot.param)
    return found


def _projection_hooks(model: nn.Module, macs: dict[str, int]) -> Iterator[RemovableHandle]:
    """Hooks that add up the MACs of every projection that runs, by the name of its weight."""

    def linear(path: str, width_in: int, width_out: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            tokens = args[0].numel() // args[0].shape[-1]
            macs[path] += tokens * width_in * width_out

        return hook

    def multihead(path: str, module: Any) -> Callable[..., None]:
        def hook(_m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _o: Any) -> None:
            given = [*args, *(kwargs[n] for n in ("query", "key", "value")[len(args) :])]
            tokens = [x.numel() // x.shape[-1] for x in given[:3]]
            third = shape_of(module.in_proj_weight)[0] // 3
            for part, count in enumerate(tokens):  # q, k and v may see different lengths
                key = f"{path}.in_proj_weight@{part * third}"
                macs[key] += count * math.prod(shape_of(module.in_proj_weight)) // 3
            macs[f"{path}.out_proj.weight"] += tokens[0] * math.prod(
                shape_of(module.out_proj.weight)
            )

        return hook

    for path, module in model.named_modules():
        if is_linear(module):
            rows, columns = shape_of(module.weight)
            yield module.register_forward_hook(linear(f"{path}.weight", rows, columns))
        elif isinstance(module, nn.MultiheadAttention):
            yield module.register_forward_hook(multihead(path, module), with_kwargs=True)


def _macs_per_unit(
    structure: Structure,
    shapes: Mapping[str, Sequence[int]],
    by_projection: Mapping[str, int],
    by_core: Mapping[str, int],
) -> float:
    """A unit's MACs in its projections and, where a cut shrinks it, in the attention core."""
    price = 0.0
    for slot in structure.slots:
        rows = shapes[slot.param][slot.axis]
        done = by_projection.get(slot.param, 0)
        part = f"{slot.param}@{slot.start}"
        if done == 0 and part in by_projection:
            done, rows = by_projection[part], rows // 3
        price += done * slot.repeat * slot.inner / rows
    if structure.core and structure.layout == "native":
        price += by_core.get(structure.core, 0) * structure.core_share / structure.size
    return price
