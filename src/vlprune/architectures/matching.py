"""From a model to its description: match the table, measure the shapes, say what is left."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, did_you_mean
from ..layers import PaddedLinear, is_linear, linear_axes
from ..structure import AttentionUnit, Attr, Description, Gate, Slot, Structure
from ..units import owner_of
from . import layouts
from .layouts import ATTENTION, FFN, NATIVE, Native

__all__ = ["discover"]


def discover(model: nn.Module, attention: AttentionUnit = "head_dim") -> Description:
    """All structures of any model, and what stays dense and why.

    ``attention`` chooses the unit: ``"head_dim"`` (the same dimension of every head in q,
    k, v and o: UPop's), ``"qk_vo"`` (query-key and value-output dimensions apart) or
    ``"head"`` (whole heads; whole KV groups where queries share keys).

    Needs no data and does not run the model; works on meta tensors. The result depends on
    module names and shapes only, so calling it twice gives equal descriptions.
    """
    if attention not in get_args(AttentionUnit):
        raise UnsupportedError(
            f"attention must be one of {', '.join(get_args(AttentionUnit))}, not {attention!r}."
            f"{did_you_mean(str(attention), get_args(AttentionUnit))}"
        )
    return _Discovery(model, attention).run()


class _Leave(Exception):
    """This block stays dense; the message says why."""


class _Discovery:
    """One walk over the modules."""

    def __init__(self, model: nn.Module, attention: AttentionUnit) -> None:
        self.model, self.attention = model, attention
        self.modules = dict(model.named_modules())
        self.dense: dict[str, str] = {}
        self.taken: set[str] = set()
        self.shared = _shared_parameters(model)
        self.default_tower = _default_tower(model)

    def run(self) -> Description:
        structures: list[Structure] = []
        order: dict[str, int] = {}
        for path, module in _in_order(self.model):
            order[path] = len(order)
            for match in (self._attention, self._ffn):
                structures += match(path, module)
        structures.sort(key=lambda s: order[s.core or s.gates[0].module])
        self._explain_rest()
        return Description(tuple(structures), self.dense, self.attention)

    # -- attention ---------------------------------------------------------------------

    def _attention(self, path: str, module: nn.Module) -> list[Structure]:
        if isinstance(module, nn.MultiheadAttention):
            return self._guarded(path, lambda: self._multihead(path, module), ["", "out_proj"])
        for row in ATTENTION:
            names = [n for n in (row.q, row.k, row.qkv, *row.v, *row.o) if n]
            if all(_child(module, name) is not None for name in names):
                blocks = [_join(path, name) for name in names]
                if any(block in self.taken for block in blocks):
                    continue
                build = lambda row=row: self._projected(path, row)  # noqa: E731
                return self._guarded(path, build, names)
        return []

    def _guarded(self, path: str, build: Any, names: list[str]) -> list[Structure]:
        """The structures of one block, or none and the reason."""
        blocks = [_join(path, name) for name in names]
        try:
            if type(self.modules[path]).__name__ in layouts.DENSE:
                raise _Leave(layouts.DENSE[type(self.modules[path]).__name__])
            for block in blocks:
                if isinstance(self.modules[block], PaddedLinear):
                    raise _Leave("cut before with padded projections")
            found: list[Structure] = build()
            for structure in found:
                for slot in structure.slots:
                    if slot.param in self.shared:
                        raise _Leave(f"shares its weights with {self.shared[slot.param]}")
        except _Leave as reason:
            for block in blocks:
                self.dense[block] = str(reason)
            return []
        finally:
            self.taken.update(blocks)
        return found

    def _projected(self, path: str, row: layouts.Attention) -> list[Structure]:
        """Attention whose projections are modules of their own, or one fused module."""
        fused = bool(row.qkv)
        core_path = owner_of(_join(path, row.qkv or row.q or row.v[0]))[0]
        core = self.modules[core_path]
        name = _stock_name(core)
        for child in (row.q, row.k, row.qkv, *row.v, *row.o):
            if child and not is_linear(self.modules[_join(path, child)]):
                kind = type(self.modules[_join(path, child)]).__name__
                raise _Leave(f"its projection {child} is a {kind}, not a Linear")
        if fused and name not in layouts.FUSED_ORDER_KNOWN:
            raise _Leave(f"the row order of the fused projection in {name} is not known")
        first = row.qkv or row.q or row.v[0]
        out_axis, _ = linear_axes(self.modules[_join(path, first)])
        rows = self._weight(_join(path, first)).shape[out_axis]
        if fused:
            value_dim = getattr(core, "value_dim", None)
            size, count = _head_size(core, rows // 3, name)
            wide = value_dim or size
            if count * (2 * size + wide) != rows:
                raise _Leave(f"its fused projection has {rows} rows, not q, k and v of equal size")
            if self.attention == "head_dim" and wide != size:
                raise _Leave("its value heads have another size than its query heads")
            return self._structures(
                path,
                core_path,
                name,
                heads=count,
                kv=count,
                size=size,
                value_size=wide,
                q=[(row.qkv, 0)],
                k=[(row.qkv, count * size)],
                v=[(row.qkv, 2 * count * size)],
                o=list(row.o),
                kind_has_scores=True,
            )
        size, _ = _head_size(core, rows, name)
        kv_rows = self._weight(_join(path, row.v[0])).shape[0]
        if rows % size or kv_rows % size or (rows // size) % (kv_rows // size):
            raise _Leave(
                f"{rows} query rows and {kv_rows} value rows do not divide into heads of {size}"
            )
        return self._structures(
            path,
            core_path,
            name,
            heads=rows // size,
            kv=kv_rows // size,
            size=size,
            value_size=size,
            q=[(row.q, 0)] if row.q else [],
            k=[(row.k, 0)] if row.k else [],
            v=[(v, 0) for v in row.v],
            o=list(row.o),
            kind_has_scores=bool(row.q),
        )

    def _structures(
        self,
        path: str,
        core_path: str,
        name: str,
        *,
        heads: int,
        kv: int,
        size: int,
        value_size: int,
        q: list[tuple[str, int]],
        k: list[tuple[str, int]],
        v: list[tuple[str, int]],
        o: list[str],
        kind_has_scores: bool,
    ) -> list[Structure]:
        """The structures of one attention block, in the chosen unit."""
        native = NATIVE.get(name, Native(head=False, head_dim=False))
        core = self.modules[core_path]
        cross_head = self._normalises_across_heads(core, heads * size)
        group = heads // kv
        common: dict[str, Any] = {
            "tower": self._tower(path),
            "core": core_path if kind_has_scores else None,
        }

        def rows(child: str, start: int, repeat: int, inner: int) -> list[Slot]:
            return self._row_slots(_join(path, child), start, repeat, inner)

        def gate(child: str, start: int, repeat: int, inner: int) -> Gate:
            return Gate(_join(path, child), "output", start, repeat, inner)

        def columns(repeat: int, inner: int) -> list[Slot]:
            return [self._column_slot(_join(path, child), repeat, inner) for child in o]

        def make(
            suffix: str,
            kind: str,
            count: int,
            slots: list[Slot],
            gates: list[Gate],
            can: bool,
            share: float,
            attrs: list[Attr],
            folds: tuple[str, ...] = (),
        ) -> Structure:
            swap = (core_path, f"{native.swap}:{name}") if can and native.swap else None
            return Structure(
                name=path + suffix,
                kind=kind,
                size=count,
                slots=tuple(slots),
                gates=tuple(gates),
                attrs=tuple(attrs) if can else (),
                folds=folds if can else (),
                layout="native" if can else "padded",
                swap=swap,
                core_share=share,
                **common,
            )

        if self.attention == "head":
            slots = [s for c, b in q for s in rows(c, b, 1, group * size)]
            slots += [s for c, b in k for s in rows(c, b, 1, size)]
            slots += [s for c, b in v for s in rows(c, b, 1, value_size)]
            slots += columns(1, group * value_size)
            slots += [
                Slot(f"{core_path}.{leaf}", axis)
                for leaf, axis in native.per_head
                if native.head and _has_parameter(core, leaf)
            ]
            gates = [gate(c, b, 1, value_size) for c, b in v]
            if cross_head:  # the norm must see the missing heads as zeros in both models
                gates += [gate(c, b, 1, group * size) for c, b in q]
                gates += [gate(c, b, 1, size) for c, b in k]
            attrs = _attrs(core_path, core, layouts.HEAD_COUNTS, group)
            attrs += _attrs(core_path, core, layouts.KV_COUNTS, 1)
            attrs += _attrs(core_path, core, layouts.WIDTHS + native.widths, group * size)
            can = native.head and not cross_head
            return [make("", "attention", kv, slots, gates, can, 1.0, attrs)]

        repeat_o = heads
        if self.attention == "head_dim" or not q:
            parts = [(c, b, heads) for c, b in q] + [(c, b, kv) for c, b in (*k, *v)]
            slots = [s for c, b, n in parts for s in rows(c, b, n, 1)] + columns(repeat_o, 1)
            gates = [gate(c, b, n, 1) for c, b, n in parts]
            attrs = _attrs(core_path, core, (*layouts.HEAD_SIZES, "value_dim"), 1)
            attrs += _attrs(core_path, core, layouts.WIDTHS + native.widths, heads)
            if native.swap and not any(a.name == "value_dim" for a in attrs):
                attrs.append(Attr(core_path, "value_dim", 1))
            folds = self._fold(path, q) if native.fold else ()
            can = native.head_dim and not cross_head
            return [make("", "attention", size, slots, gates, can, 1.0, attrs, folds)]

        can = native.qk_vo and not cross_head
        qk_parts = [(c, b, heads) for c, b in q] + [(c, b, kv) for c, b in k]
        qk = make(
            ".qk",
            "attention_qk",
            size,
            [s for c, b, n in qk_parts for s in rows(c, b, n, 1)],
            [gate(c, b, n, 1) for c, b, n in qk_parts],
            can,
            0.5,
            _attrs(core_path, core, layouts.HEAD_SIZES, 1),
        )
        vo = make(
            ".vo",
            "attention_vo",
            value_size,
            [s for c, b in v for s in rows(c, b, kv, 1)] + columns(heads, 1),
            [gate(c, b, kv, 1) for c, b in v],
            can,
            0.5,
            [Attr(core_path, "value_dim", 1)],
        )
        return [qk, vo]

    def _multihead(self, path: str, module: Any) -> list[Structure]:
        """nn.MultiheadAttention: one parameter for q, k and v, never called as modules."""
        if module.in_proj_weight is None:
            raise _Leave("its keys or values have another width than its queries")
        if module.bias_k is not None or module.add_zero_attn:
            raise _Leave("it adds key and value biases of the full width")
        name, heads = _stock_name(module), module.num_heads
        size = module.head_dim
        wide = getattr(module, "value_dim", size)
        if self.attention == "head_dim" and wide != size:
            raise _Leave("its value heads have another size than its query heads")
        params = ["in_proj_weight"] + (["in_proj_bias"] if module.in_proj_bias is not None else [])
        starts = {"q": 0, "k": heads * size, "v": 2 * heads * size}
        swap = (path, f"{NATIVE[name].swap}:{name}")

        def part(parts: str, repeat: int, inner: dict[str, int]) -> tuple[list[Slot], list[Gate]]:
            slots = [
                Slot(_join(path, p), 0, starts[x], repeat, inner[x]) for x in parts for p in params
            ]
            gates = [
                Gate(path, "weight", starts[x], repeat, inner[x], tuple(params)) for x in parts
            ]
            return slots, gates

        def make(
            suffix: str,
            kind: str,
            count: int,
            slots: list[Slot],
            gates: list[Gate],
            share: float,
            attrs: tuple[Attr, ...],
        ) -> Structure:
            return Structure(
                path + suffix,
                kind,
                count,
                self._tower(path),
                tuple(slots),
                tuple(gates),
                attrs,
                swap=swap,
                core=path,
                core_share=share,
            )

        out = _join(path, "out_proj.weight")
        sizes = {"q": size, "k": size, "v": wide}
        head_dim, value_dim = Attr(path, "head_dim", 1), Attr(path, "value_dim", 1)
        if self.attention == "head":
            slots, _ = part("qkv", 1, sizes)
            _, gates = part("v", 1, sizes)
            attrs = (Attr(path, "num_heads", 1),)
            slots.append(Slot(out, 1, 0, 1, wide))
            return [make("", "attention", heads, slots, gates, 1.0, attrs)]
        single = dict.fromkeys("qkv", 1)
        if self.attention == "head_dim":
            slots, gates = part("qkv", heads, single)
            slots.append(Slot(out, 1, 0, heads, 1))
            return [make("", "attention", size, slots, gates, 1.0, (head_dim, value_dim))]
        qk_slots, qk_gates = part("qk", heads, single)
        vo_slots, vo_gates = part("v", heads, single)
        vo_slots.append(Slot(out, 1, 0, heads, 1))
        return [
            make(".qk", "attention_qk", size, qk_slots, qk_gates, 0.5, (head_dim,)),
            make(".vo", "attention_vo", wide, vo_slots, vo_gates, 0.5, (value_dim,)),
        ]

    def _normalises_across_heads(self, core: nn.Module, width: int) -> bool:
        norms = [getattr(core, n, None) for n in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")]
        weights = [getattr(norm, "weight", None) for norm in norms]
        size = _head_size(core, width, type(core).__name__)[0] if width else 0
        return any(isinstance(w, Tensor) and w.numel() not in (0, size) for w in weights)

    def _fold(self, path: str, q: list[tuple[str, int]]) -> tuple[str, ...]:
        module = self.modules[_join(path, q[0][0])]
        leaves = ("weight", "bias") if module.bias is not None else ("weight",)
        return tuple(_join(path, f"{q[0][0]}.{leaf}") for leaf in leaves)

    # -- FFN ---------------------------------------------------------------------------

    def _ffn(self, path: str, module: nn.Module) -> list[Structure]:
        found = []
        for row in FFN:
            names = [n for n in (row.gate, row.up, row.down) if n]
            if not all(_child(module, name) is not None for name in names):
                continue
            if any(_join(path, name) in self.taken for name in names):
                continue
            build = lambda row=row: [self._ffn_structure(path, module, row)]  # noqa: E731
            found += self._guarded(path, build, names)
        return found

    def _ffn_structure(self, path: str, module: nn.Module, row: layouts.Ffn) -> Structure:
        names = [n for n in (row.gate, row.up, row.down) if n]
        layers = [self.modules[_join(path, n)] for n in names]
        for child, layer in zip(names, layers, strict=True):
            if not is_linear(layer):
                raise _Leave(f"its projection {child} is a {type(layer).__name__}, not a Linear")
        up, down = layers[-2], layers[-1]
        up_out, up_in = (up.weight.shape[axis] for axis in linear_axes(up))
        down_out, down_in = (down.weight.shape[a] for a in linear_axes(down))
        size = up_out // 2 if row.fused else up_out
        if down_in != size:
            raise _Leave(f"{row.up} gives {up_out} values, {row.down} takes {down_in}")
        if up_in != down_out:
            raise _Leave("it changes the width: a projector, not an FFN")
        between = self._between(path, module, names, size)
        if between:
            raise _Leave(f"{between} sits between its projections and has their width")
        parts = [_join(path, n) for n in names[:-1]]
        repeat = 2 if row.fused else 1
        slots = [s for part in parts for s in self._row_slots(part, 0, repeat, 1)]
        slots.append(self._column_slot(_join(path, row.down), 1, 1))
        first = _join(path, row.up)
        if row.gate or (not row.fused and self._zero_stays_zero(path, row.up)):
            gates = (Gate(first),)
        else:
            gates = (Gate(_join(path, row.down), "input"),)
        return Structure(
            name=_join(path, row.gate or row.up),
            kind="ffn",
            size=size,
            tower=self._tower(path),
            slots=tuple(slots),
            gates=gates,
        )

    def _between(self, path: str, module: nn.Module, names: list[str], size: int) -> str:
        """The child whose own parameters have the hidden width, if any."""
        inside = {n.split(".")[0] for n in names}
        holder = owner_of(names[0])[0]
        nearby = module if not holder else self.modules[_join(path, holder)]
        for child, layer in nearby.named_children():
            if child in inside or (holder and _join(holder, child) in names):
                continue
            if any(
                p.dim() and p.shape[0] == size and size > 1 for p in layer.parameters(False)
            ) and (
                not is_linear(layer) and not _is_residual_norm(layer, self.modules, path, names)
            ):
                return f"{child} ({type(layer).__name__})"
        return ""

    def _zero_stays_zero(self, path: str, up: str) -> bool:
        """Whether the activation after ``up`` maps 0 to 0, so that gating before it is exact."""
        owner = self.modules[_join(path, owner_of(up)[0])]
        for name in ("activation_fn", "intermediate_act_fn", "act_fn", "act", "activation", "gelu"):
            activation = getattr(owner, name, None)
            if callable(activation):
                with torch.no_grad():
                    try:
                        zero = torch.zeros(1, device="cpu")
                        return bool(activation(zero).abs().max() == 0)
                    except Exception:
                        return False
        return False

    # -- shared ------------------------------------------------------------------------

    def _weight(self, path: str) -> Tensor:
        return self.modules[path].weight

    def _row_slots(self, path: str, start: int, repeat: int, inner: int) -> list[Slot]:
        module = self.modules[path]
        slots = [Slot(f"{path}.weight", linear_axes(module)[0], start, repeat, inner)]
        if getattr(module, "bias", None) is not None:
            slots.append(Slot(f"{path}.bias", 0, start, repeat, inner))
        return slots

    def _column_slot(self, path: str, repeat: int, inner: int) -> Slot:
        return Slot(f"{path}.weight", linear_axes(self.modules[path])[1], 0, repeat, inner)

    def _tower(self, path: str) -> str:
        return tower_of(path) or self.default_tower

    def _explain_rest(self) -> None:
        for path, module in self.modules.items():
            own = list(module.parameters(recurse=False))
            if not own or path in self.taken or path in self.dense:
                continue
            if any(path.startswith(taken + ".") for taken in self.taken if taken):
                continue
            self.dense[path or "(model)"] = _reason(module)


def tower_of(path: str) -> str:
    """``vision``, ``text``, ``cross``, ``fusion`` or ``decoder``, read off a module path."""
    for pattern, tower in _TOWERS:
        if re.search(pattern, path):
            return tower
    return ""


_TOWERS = (
    (r"cross_?att|encoder_attn|cross_modal", "cross"),
    (r"fusion|multimodal_model|qformer|text_enhancer|deformable_layer|connector", "fusion"),
    (r"vision|visual|image_model|image_encoder|backbone\.conv_encoder|backbone\.model", "vision"),
    (r"text_decoder", "decoder"),
    (r"text|language_model|transformer\.resblocks", "text"),
    (r"(^|\.)decoder\.", "decoder"),
    (r"(^|\.)model\.encoder\.", "encoder"),
)


def _default_tower(model: nn.Module) -> str:
    return {"pixel_values": "vision", "input_ids": "text"}.get(
        str(getattr(model, "main_input_name", "")), "model"
    )


# Blocks whose children are defined in another order than they run.
_ORDER = {
    "GroundingDinoEncoderLayer": ("fusion_layer", "text_enhancer_layer", "deformable_layer"),
    "MMGroundingDinoEncoderLayer": ("fusion_layer", "text_enhancer_layer", "deformable_layer"),
    "GroundingDinoDecoderLayer": ("self_attn", "encoder_attn_text", "encoder_attn"),
    "MMGroundingDinoDecoderLayer": ("self_attn", "encoder_attn_text", "encoder_attn"),
    "CLIPModel": ("vision_model", "text_model"),
    "SiglipModel": ("vision_model", "text_model"),
    "Siglip2Model": ("vision_model", "text_model"),
    "FlavaModel": ("image_model", "text_model", "multimodal_model"),
}


# Lists of layers that run in turn: one of each, then the next of each.
_IN_TURN = {"BridgeTowerModel": ("cross_modal_text_layers", "cross_modal_image_layers")}


def _in_order(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules once, parents first, children in the order in which they run."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        first = _ORDER.get(type(module).__name__, ())
        children = dict(module.named_children())
        lists = [n for n in _IN_TURN.get(type(module).__name__, ()) if n in children]
        for name in [
            *(n for n in first if n in children),
            *(n for n in children if n not in first),
        ]:
            if name not in lists:
                yield from walk(_join(path, name), children[name])
            elif name == lists[0]:
                for layers in zip(*(children[n].named_children() for n in lists), strict=False):
                    for list_name, (number, layer) in zip(lists, layers, strict=True):
                        yield from walk(_join(path, f"{list_name}.{number}"), layer)

    yield from walk("", model)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        found = module._modules.get(part)
        if found is None:
            return None
        module = found
    return module


def _stock_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Cut")


def _has_parameter(module: nn.Module, name: str) -> bool:
    try:
        return isinstance(module.get_parameter(name), nn.Parameter)
    except AttributeError:
        return False


def _head_size(core: nn.Module, width: int, name: str) -> tuple[int, int]:
    """(head size, heads) of ``width`` rows. Raises _Leave if the module does not say."""
    for attr in layouts.HEAD_SIZES:
        size = getattr(core, attr, None)
        if isinstance(size, int) and size > 0:
            return size, width // size
    for attr in layouts.HEAD_COUNTS:
        heads = getattr(core, attr, None)
        if isinstance(heads, int) and heads > 0 and width % heads == 0:
            return width // heads, heads
    raise _Leave(f"{name} does not say how many heads it has")


def _attrs(path: str, module: nn.Module, names: tuple[str, ...], per_unit: int) -> list[Attr]:
    return [
        Attr(path, name, per_unit) for name in names if isinstance(getattr(module, name, None), int)
    ]


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """{name: another name} for parameters that two modules hold."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    shared = {}
    for group in names.values():
        modules = {owner_of(name)[0] for name in group}
        if len(modules) > 1 and len({id(model.get_submodule(m)) for m in modules}) > 1:
            for name in group:
                shared[name] = next(other for other in group if other != name)
    return shared


def _is_residual_norm(
    layer: nn.Module, modules: dict[str, nn.Module], path: str, names: list[str]
) -> bool:
    """A norm of the residual width beside an FFN that happens to be just as wide."""
    down = modules[_join(path, names[-1])]
    width = down.weight.shape[linear_axes(down)[0]]  # type: ignore[index]
    return all(p.shape[0] == width for p in layer.parameters(False))


def _reason(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.Embedding) or "Embedding" in kind:
        return "embedding: never pruned"
    if "Norm" in kind:
        return "normalisation: as wide as the residual stream"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution: not a transformer block"
    if is_linear(module):
        return "a projection outside attention and FFN"
    return f"parameters of {kind} itself"
