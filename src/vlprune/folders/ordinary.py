"""A cut model without vlprune: the stock class with a stock config, where one can express the cut.

Serving engines and plain transformers build every layer of a tower alike, from one number in
the config. A plan with one width per tower (``uniform=True``) may fit that. No table says which
number an architecture uses: candidates are changed, the architecture is built without weights, and
the shapes are compared. Not from either paper.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..architectures import discover_recorded
from ..cutting.routers import KEPT
from ..cutting.sharing.ties import is_shared
from ..errors import UnsupportedError
from ..structures.record import read_record
from ..structures.structure import Structure

__all__ = ["ordinary"]

WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "expert_ffn_hidden_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "ffn_dim",
    "hidden_dim",
    "n_inner",
    "d_ff",
    "mlp_ratio",
)
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads")
KV_HEADS = "num_key_value_heads"


def ordinary(model: Any) -> Any:
    """A new model of the stock class with the same weights, fully described by its config.

    Its folder loads in plain transformers, without ``import vlprune``, and in engines that build
    models from a config. The outputs are the same. An uncut model is returned as it is. Raises
    UnsupportedError, saying what the config cannot express, where the layers of a tower differ or
    no number in the config sets a width, and where weights are shared.
    """
    record = read_record(model)
    if record is None:
        return model
    if is_shared(model):
        raise UnsupportedError("shared weights have no ordinary form: call vlprune.materialize")
    cls = type(model)
    config = copy.deepcopy(model.config)
    _forget(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    every = discover_recorded(model, record.plan.attention, record.sizes)
    structures = [s for s in every if s.name in record.sizes]
    for kind in ("attention", "experts", "ffn"):
        for (tower, size), members in _groups(structures, kind).items():
            found = _say(cls, config, members, record.sizes, wanted)
            if found is None:
                was = record.sizes[members[0].name]
                raise UnsupportedError(
                    f"{cls.config_class.__name__} has no number for {kind} of the tower "
                    f"{tower or 'model'} that keeps {size} of {was} units in all layers"
                    f"{_advice(members[0].kind, record.plan.attention)}"
                )
            config = found
    shapes = _shapes(cls, config)
    different = [name for name, shape in wanted.items() if shapes.get(name) != shape]
    if different or len(shapes) != len(wanted):
        raise UnsupportedError(
            f"{cls.config_class.__name__} cannot say the shape of {(different or ['all'])[0]}: "
            "layers of one tower keep different numbers of units: compress with uniform=True"
        )
    plain = cls(config)
    state = model.state_dict()
    plain.load_state_dict({n: t for n, t in state.items() if not n.endswith(f".{KEPT}")})
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.to(next(model.parameters()).device, next(model.parameters()).dtype).train(
        model.training
    )


def _advice(kind: str, unit: str) -> str:
    if kind in ("ffn", "experts"):
        return (
            ", or several towers share one: compress with uniform=True, or leave the tower dense "
            "with skip"
        )
    if unit in ("head", "query_head"):
        return (
            "; it may derive the head size from its width, so that fewer heads would be larger "
            "ones: leave attention dense there with skip, or cut only FFNs"
        )
    return (
        '; cut whole heads (attention="head") where it has a head_dim of its own, or leave '
        "attention dense with skip"
    )


def _forget(config: Any) -> None:
    """Take the record out of a config and its sub-configs."""
    for one in _configs(config):
        if hasattr(one, "quantization_config"):
            del one.quantization_config


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None:
            yield from _configs(sub)


def _groups(structures: list[Structure], kind: str) -> dict[tuple[str, int], list[Structure]]:
    groups: dict[tuple[str, int], list[Structure]] = {}
    for s in structures:
        if s.kind.startswith(kind):
            groups.setdefault((s.tower, s.size), []).append(s)
    return groups


def _say(
    cls: Any,
    config: Any,
    members: list[Structure],
    sizes: Mapping[str, int],
    wanted: Mapping[str, tuple[int, ...]],
) -> Any:
    """A config that gives these structures the wanted shapes; None if no such config exists."""
    axes = {(slot.param, slot.axis) for s in members for slot in s.slots if slot.param in wanted}
    cores = tuple(f"{s.core}." for s in members if s.core)  # keys stay where only queries go
    params = {name for name in wanted if name.startswith(cores)}
    now, before = members[0].size, sizes[members[0].name]
    if members[0].kind == "experts":  # of which a unit has one in every group
        now, before = (members[0].slots[0].repeat * units for units in (now, before))
    if len({sizes[s.name] for s in members}) > 1:
        return None
    for number in range(len(list(_configs(config)))):
        for change in _changes(members[0].kind, before, now):
            tried = copy.deepcopy(config)
            try:
                if not change(list(_configs(tried))[number]):
                    continue
            except (TypeError, ValueError):  # a config that refuses the value
                continue
            shapes = _shapes(cls, tried)
            if all(shapes.get(name) == wanted[name] for name in params) and all(
                name in shapes and shapes[name][axis] == wanted[name][axis] for name, axis in axes
            ):
                return tried
    return None


def _changes(kind: str, before: int, now: int) -> Iterator[Any]:
    """Functions that change one number of a config, and return false if it has no such number."""
    if kind in ("ffn", "experts"):
        for name in WIDTHS if kind == "ffn" else EXPERT_COUNTS:

            def width(one: Any, name: str = name) -> bool:
                value = getattr(one, name, None)
                if name == "mlp_ratio" and value and getattr(one, "hidden_size", None):
                    if round(value * one.hidden_size) != before:
                        return False
                    one.mlp_ratio = now / one.hidden_size
                    return True
                if value != before:
                    return False
                setattr(one, name, now)
                return True

            yield width
        return

    def heads(one: Any, queries_only: bool) -> bool:
        name = next((n for n in HEADS if isinstance(getattr(one, n, None), int)), None)
        if name is None:
            return False
        count = getattr(one, name)
        kv = getattr(one, KV_HEADS, None) or count
        if before != (count // kv if queries_only else kv):
            return False
        if getattr(one, "head_dim", None) is None:
            one.head_dim = one.hidden_size // count
        setattr(one, name, kv * now if queries_only else count // kv * now)
        if getattr(one, KV_HEADS, None) is not None and not queries_only:
            setattr(one, KV_HEADS, now)
        return True

    yield partial(heads, queries_only=False)
    yield partial(heads, queries_only=True)


def _shapes(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """{parameter: shape} of ``cls`` under ``config``; empty if it cannot be built."""
    try:
        with torch.device("meta"):
            built: nn.Module = cls(copy.deepcopy(config))
    except Exception:
        return {}
    return {name: tuple(p.shape) for name, p in built.named_parameters()}
