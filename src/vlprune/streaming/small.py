"""A cut model without weights, and each of its weights computed from the dense one's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from ..cutting.rewrite import carry_out
from ..cutting.settle import Cut
from ..cutting.sharing.ties import WholeWeights
from ..folders.save import refuse_joined
from ..structures.record import write_record
from ..structures.units import owner_of, plain_name
from .source import Source

__all__ = ["SmallWeights", "cut_source"]


def cut_source(source: Source, cut: Cut) -> SmallWeights:
    """Cut a model that has no weights, in place; returns the weights of the small model.

    They have the bits that :func:`vlprune.cutting.rewrite.perform` gives to a model in memory.
    """
    model = source.model
    whole = WholeWeights(model, source.weights.__getitem__)
    with ExitStack() as undo:
        slices = carry_out(model, cut, undo)
        refuse_joined(model)
        write_record(model, cut.record, undo)
        undo.pop_all()
    positions = {
        f"{path}.{name}": values
        for path, module in model.named_modules()
        for name, values in module.__dict__.pop("expected_indices", {}).items()
    }

    def small(name: str) -> Tensor:
        if name in positions:
            return positions[name].to(model.get_buffer(name).dtype)
        plain = plain_name(name)
        weight = whole(plain).to(model.get_parameter_or_buffer(name).dtype)
        if plain in slices.index:
            weight = slices.of(plain, weight)
        if name != plain:
            path, _ = owner_of(name)
            axis = model.get_submodule(f"{path}.0").axis
            weight = weight.index_select(axis, positions[f"{path}.0.own"])
        return weight.contiguous()

    return SmallWeights(model, small)


def _first_of(name: str, converters: Sequence[Any]) -> str:
    """What a weight is called once it is saved; the same for all that become one."""
    for rule in converters:
        renamed, pattern = rule.rename_source_key(name)
        if pattern is not None:
            return str(renamed)
    return name


class SmallWeights(Mapping[str, Tensor]):
    """{name in the weight files: weight} of a model that has no weights in memory.

    ``weight`` gives the weight of a name in the model. The names in the files are those of
    ``save_pretrained``, which takes back what a load has renamed, merged or split.
    """

    def __init__(self, model: Any, weight: Callable[[str], Tensor]) -> None:
        self.model, self.weight = model, weight
        rules = [rule.reverse_transform() for rule in (model._weight_conversions or [])[::-1]]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        state, groups = model.state_dict(), dict[str, list[str]]()
        for name in state:
            groups.setdefault(_first_of(name, converters), []).append(name)
        self._origin: dict[str, tuple[str, ...]] = {}
        for names in groups.values():
            empty = {name: state[name].to("meta") for name in names}
            for saved in revert_weight_conversion(model, empty):
                self._origin[saved] = tuple(names)
        self._last: tuple[tuple[str, ...], Mapping[str, Tensor]] = ((), {})

    def __getitem__(self, name: str) -> Tensor:
        names = self._origin[name]
        if len(names) == 1 and not self.model._weight_conversions:
            return self.weight(names[0])
        if self._last[0] != names:
            self._last = (), {}  # two groups need not be in memory at a time
            real = {one: self.weight(one) for one in names}
            self._last = names, revert_weight_conversion(self.model, real)
        return self._last[1][name].contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._origin)

    def __len__(self) -> int:
        return len(self._origin)
