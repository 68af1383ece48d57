"""Measuring attention blocks: how many heads of which size, and where their rows and columns are.

Whatever its projections look like (apart, fused, parameters of one module), a block becomes the
same :class:`~vlprune.architectures.attention.Block`, or stays dense for a reason.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..cutting.padded import is_linear, linear_axes, stock_name
from ..cutting.wrappers import stock_class
from ..structures.shards import shape_of
from ..structures.units import owner_of
from . import layouts
from .attention import Block, Leave, Part, join
from .fused import row_order, source_of
from .layouts import NATIVE, PADDED, Native

__all__ = ["measure_multihead", "measure_projected", "native_of", "number_of"]


def measure_projected(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], tower: str
) -> Block:
    """The block at ``path`` whose projections are separate modules, or one fused module.

    Raises Leave if the block cannot be measured.
    """
    core_path = owner_of(join(path, (row.qkv or row.q or row.v[0]).removesuffix(".linear")))[0]
    core = modules[core_path]
    name = stock_name(core)
    for child in (row.q, row.k, row.qkv, *row.v, *row.o):
        if child and not is_linear(modules[join(path, child)]):
            kind = stock_class(modules[join(path, child)]).__name__
            raise Leave(f"its projection {child} is a {kind}, not a Linear")
    measure = _measure_fused if row.qkv else _measure_apart if row.k or row.v else _measure_queries
    q, k, v, numbers = measure(path, row, modules, core)
    native = native_of(core, name)
    columns = tuple(
        (join(path, f"{o}.weight"), linear_axes(modules[join(path, o)])[1]) for o in row.o
    )
    return Block(
        path=path,
        core_path=core_path,
        core=core,
        stock_name=name,
        native=native,
        tower=tower,
        q=q,
        k=k,
        v=v,
        columns=columns,
        gate=_output_gate(core_path, modules, numbers["heads"] * numbers["value_size"]),
        folds=tuple(name for x in q for name, _ in x.params) if native.fold else (),
        one_cache=False,
        **numbers,
    )


Parts = tuple["Part", ...]
Measured = tuple[Parts, Parts, Parts, dict[str, int]]
"""q, k, v, and the block's ``heads``, ``kv``, ``size`` and ``value_size``."""


def _part(path: str, child: str, modules: Mapping[str, nn.Module], start: int = 0) -> Part:
    """The rows of a projection, from ``start`` on."""
    module: Any = modules[join(path, child)]
    params = [(join(path, f"{child}.weight"), linear_axes(module)[0])]
    if module.bias is not None:
        params.append((join(path, f"{child}.bias"), 0))
    return Part(tuple(params), start, join(path, child))


def _output_gate(
    path: str, modules: Mapping[str, nn.Module], width: int
) -> tuple[tuple[str, int], ...]:
    """The rows of the projection that gates what the heads give, if the block has one.

    What it multiplies is zero where a unit is gone, whatever the gate is.
    """
    for name in layouts.OUTPUT_GATES:
        module = modules.get(join(path, name))
        if module is not None and is_linear(module) and _rows(path, name, modules) == width:
            return _part(path, name, modules).params
    return ()


def _rows(path: str, child: str, modules: Mapping[str, nn.Module]) -> int:
    module: Any = modules[join(path, child)]
    return shape_of(module.weight)[linear_axes(module)[0]]


def _measure_fused(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], core: nn.Module
) -> Measured:
    """Measure q, k and v stacked in one projection. Raises Leave if its rows are not known."""
    name, rows = stock_name(core), _rows(path, row.qkv, modules)
    order = row_order(core)
    if not order:
        raise Leave(f"the row order of the fused projection in {name} is not known")
    value_size = getattr(core, "value_dim", None)
    heads, size = number_of(core, layouts.HEAD_COUNTS), number_of(core, layouts.HEAD_SIZES)
    kv = number_of(core, layouts.KV_COUNTS)
    if size and not heads:  # only its config says how many
        heads = rows // size - 2 * kv if kv else rows // size // 3
    size, kv = size or (rows // 3 // heads if heads else 0), kv or heads
    value_size = value_size or size
    if not heads or not size or heads * size + kv * (size + value_size) != rows:
        raise Leave(f"its fused projection has {rows} rows, not q, k and v of its heads")
    numbers = {"heads": heads, "kv": kv, "size": size, "value_size": value_size}
    if order == "heads":
        if kv != heads or value_size != size:
            raise Leave(f"the row order of the fused projection in {name} is not known")
        return (_part(path, row.qkv, modules),), (), (), {**numbers, "wide": 3}
    starts = (0, heads * size, (heads + kv) * size)
    q, k, v = ((_part(path, row.qkv, modules, start),) for start in starts)
    return q, k, v, numbers


def _measure_apart(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], core: nn.Module
) -> Measured:
    """Measure separate projections; some blocks have only values. Raises Leave if that fails."""
    name, rows = stock_name(core), _rows(path, row.q or row.v[0], modules)
    size = number_of(core, layouts.HEAD_SIZES)
    if not size:
        counted = number_of(core, layouts.HEAD_COUNTS)
        if not counted or rows % counted:
            raise Leave(f"{name} does not say how many heads it has")
        size = rows // counted
    value_rows, out = _rows(path, (*row.v, row.k)[0], modules), modules[join(path, row.o[0])]
    columns = int(shape_of(out.weight)[linear_axes(out)[1]])
    heads, kv = rows // size, (_rows(path, row.k, modules) if row.k else value_rows) // size
    wide = 2 if row.k and rows == 2 * columns and _gates_itself(core) else 1
    heads //= wide
    if not kv or rows % (wide * size) or value_rows % kv or heads % kv:
        raise Leave(f"{rows} query and {value_rows} value rows are not heads of {size}")
    value_size = value_rows // kv
    if heads * value_size != columns:
        raise Leave(
            f"its {heads} heads give {heads * value_size} values, and its output takes {columns}"
        )
    _check_between(core, columns, (row.q, row.k, *row.v, *row.o), row.o)
    q, k, v = (
        tuple(
            _part(path, name, modules)
            for child in children
            for name in (child, f"{child}_global")  # Longformer's, for tokens that all others see
            if child and join(path, name) in modules
        )
        for children in ((row.q,), (row.k,), row.v)
    )
    numbers = {"heads": heads, "kv": kv, "size": size, "value_size": value_size, "wide": wide}
    return q, k, v, numbers


def _measure_queries(
    path: str, row: layouts.Attention, modules: Mapping[str, nn.Module], core: nn.Module
) -> Measured:
    """Measure a block that reads the keys and values of another layer. Raises Leave if that fails.

    Every query head counts by itself, since what they read is not the block's.
    """
    rows, size = _rows(path, row.q, modules), number_of(core, layouts.HEAD_SIZES)
    out = modules[join(path, row.o[0])]
    if not size or rows % size or shape_of(out.weight)[linear_axes(out)[1]] != rows:
        raise Leave(f"{rows} query rows are not what its output reads of heads of {size}")
    heads = rows // size
    numbers = {"heads": heads, "kv": heads, "size": size, "value_size": size}
    return (_part(path, row.q, modules),), (), (), numbers


def _gates_itself(core: nn.Module) -> bool:
    """Whether the query projection also gives a gate of the output: (heads, [query | gate])."""
    text = source_of(stock_class(core))
    return bool(re.search(r"-1,\s*self\.head_dim \* 2\), 2, dim=-1", text))


def _check_between(
    core: nn.Module, width: int, projections: tuple[str, ...], out: tuple[str, ...]
) -> None:
    """Raise Leave if a module between values and output has one number per column of the output.

    A norm there mixes all heads, so that a head that is zero is not a head that is absent. Layers
    that the forward calls before its value projection (a norm of the input, a convolution that
    makes keys and values fewer) or after its output projection (a norm of the sum with the input)
    are not between.
    """
    value = next(name for name in reversed(projections) if name not in out)
    names = {name.rpartition(".")[2] for name in projections}
    for child, layer in core.named_children():
        own = any(shape_of(p) == (width,) for p in layer.parameters(recurse=False))
        of_queries = child.startswith(("q_", "k_", "query", "key"))
        if own and child not in names and not of_queries and not is_linear(layer):
            if _runs_before(core, child, value) or all(_runs_before(core, o, child) for o in out):
                continue
            kind = stock_class(layer).__name__
            raise Leave(f"{child} ({kind}) sits between its values and its output projection")


def _runs_before(core: nn.Module, first: str, second: str) -> bool:
    """Whether the forward uses the child ``first`` only in statements before those of ``second``.

    False where the text of the forward cannot be read, or has loops.
    """
    tree = ast.parse(textwrap.dedent(source_of(stock_class(core).forward)))
    simple = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    if any(isinstance(node, ast.For | ast.While) for node in simple):
        return False
    ours, theirs = (
        [s.lineno for s in simple if not hasattr(s, "body") and _uses(s, name.rpartition(".")[2])]
        for name in (first, second)
    )
    return bool(ours) and bool(theirs) and max(ours) < min(theirs)


def _uses(statement: ast.stmt, name: str) -> bool:
    """Whether ``self.name`` is in the statement."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for node in ast.walk(statement)
    )


def measure_multihead(path: str, module: Any, tower: str) -> Block:
    """The block of an nn.MultiheadAttention, whose q, k and v are one parameter, not modules.

    Raises Leave if the block cannot be measured.
    """
    if module.in_proj_weight is None:
        raise Leave("its keys or values have another width than its queries")
    if module.bias_k is not None or module.add_zero_attn:
        raise Leave("it adds key and value biases of the full width")
    leaves = ["in_proj_weight"] + (["in_proj_bias"] if module.in_proj_bias is not None else [])
    params = tuple((join(path, leaf), 0) for leaf in leaves)
    heads, size = module.num_heads, module.head_dim
    starts = (0, heads * size, 2 * heads * size)
    q, k, v = (Part(params, start, path, by_weight=True) for start in starts)
    name = stock_name(module)
    return Block(
        path=path,
        core_path=path,
        core=module,
        stock_name=name,
        native=native_of(module, name),
        tower=tower,
        heads=heads,
        kv=heads,
        size=size,
        value_size=getattr(module, "value_dim", size),
        q=(q,),
        k=(k,),
        v=(v,),
        columns=((join(path, "out_proj.weight"), 1),),
    )


def native_of(core: nn.Module, name: str) -> Native:
    """The table's entry for the forward; PADDED for unknown classes, even under a known name."""
    known = stock_class(core).__module__.startswith(("transformers.", "torch.nn.", "vlprune."))
    return NATIVE.get(name, PADDED) if known else PADDED


def number_of(module: nn.Module, names: tuple[str, ...]) -> int:
    """The first of ``names`` that is a positive whole number on the module, else 0."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 0
