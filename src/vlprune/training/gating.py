"""The gates and hooks that a search puts into a model, and the object that owns them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.store import Originals
from ..cutting.first_batch import copied
from ..cutting.fsdp import reshard
from ..cutting.gates import gated
from ..cutting.padded import stock_name
from ..cutting.zero import loss_scale
from ..device import device_of
from ..errors import UnsupportedError
from ..structures.shards import scale_, shape_of
from ..structures.structure import Gate, Structure
from ..structures.units import spread
from .saved_names import in_own_names

__all__ = ["Gating"]


class Gating:
    """The gates of a search, and two hooks on the root of the model, from attach to detach.

    One hook keeps the first training batch, which the cut is proved on, lets gates follow the model
    to another device, and notes the factor by which a DeepSpeed engine scales the loss; the other
    lets a Trainer find the weights that transformers saves under other names. Copies and pickles
    of the model have neither gates nor working hooks.
    """

    def __init__(self, model: nn.Module, structures: Sequence[Structure], with_gates: bool) -> None:
        self.model, self.structures = model, structures if with_gates else ()
        self.gates = {s.name: torch.ones(s.size, requires_grad=True) for s in self.structures}
        self.first_batch: dict[str, Any] | None = None
        self.loss_scale = 1.0
        self.attached = self._translates = False
        self._hooks, self._in_place = ExitStack(), ExitStack()

    def attach(self) -> None:
        """Put everything in place. Raises UnsupportedError if another search has done so."""
        if self.attached:
            return
        self._refuse_another()
        before = self.model.register_forward_pre_hook(_BeforeForward(self), with_kwargs=True)
        self._hooks.callback(before.remove)
        self.translate_names()
        self._hooks.callback(self._in_place.close)
        self.attached = True
        try:
            self._in_place.enter_context(gated(self.model, self.structures, self.gates))
            self.follow()
        except BaseException:
            self.detach()
            raise

    def translate_names(self) -> None:
        """Let a Trainer find the weights of its checkpoints, also without gates, until detach."""
        if self._translates:
            return
        loading = self.model.register_load_state_dict_pre_hook(_BeforeLoading(self))
        self._hooks.callback(loading.remove)
        self._translates = True

    def detach(self) -> None:
        """Remove everything; the gates keep their values."""
        self._hooks.close()
        self._translates = False
        self.attached = False

    def _refuse_another(self) -> None:
        for module in self.model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, _Hook) and hook.owner is not None:
                    raise UnsupportedError(
                        "another Compressor is at work on this model: finish() it, or call its "
                        "detach(), first"
                    )

    def follow(self) -> None:
        """Move the gates to the model's device: a Trainer moves the model after they were made."""
        device = device_of(self.model)
        if all(gate.device == device for gate in self.gates.values()):
            return
        self._in_place.close()
        self.gates = {
            name: gate.detach().to(device).requires_grad_() for name, gate in self.gates.items()
        }
        self._in_place.enter_context(gated(self.model, self.structures, self.gates))

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Give gates new values, in place; absent ones stay as they are."""
        for name, new in values.items():
            self.gates[name].copy_(new)

    def take_gradients(self, scale: float = 1.0) -> dict[str, Tensor]:
        """The gates' gradients {structure: (size,)}, which start from zero again afterwards.

        ``scale`` is the factor that the loss was multiplied by, beside that of a DeepSpeed engine.
        """
        scale *= self.loss_scale
        taken = {n: g.grad.detach() for n, g in self.gates.items() if g.grad is not None}
        for gate in self.gates.values():
            gate.grad = None
        return {n: g / scale for n, g in taken.items()} if scale != 1 else taken

    @torch.no_grad()
    def empty_removed_units(self) -> None:
        """Set the weights of units whose gate is 0 to 0, as the gates already do in effect.

        A model that is saved without its gates then computes the same as with them, unless its
        units are whole experts: no weights keep a router from choosing one.
        """
        reshard(self.model)
        for structure in self.structures:
            stays = (self.gates[structure.name].detach() != 0).float()
            for gate in structure.gates if not bool(stays.all()) else ():
                for _name, weight, axis in self._gated_weights(gate):
                    scale_(weight, axis, spread(stays, gate, shape_of(weight)[axis]))

    @torch.no_grad()
    def write_into_weights(self, originals: Originals) -> None:
        """Multiply the weights by the gates, so that the model computes without them as with them.

        ``originals`` get the weights as they were. Nothing changes where all gates are open.
        """
        reshard(self.model)
        for structure in self.structures:
            values = self.gates[structure.name].detach()
            for gate in structure.gates if bool((values != 1).any()) else ():
                for name, weight, axis in self._gated_weights(gate):
                    originals.keep([f"{gate.module}.{name}"])
                    scale_(weight, axis, spread(values, gate, shape_of(weight)[axis]))

    def _gated_weights(self, gate: Gate) -> Iterator[tuple[str, Tensor, int]]:
        """The parameters that a gate acts on: name in its module, tensor, axis."""
        module = self.model.get_submodule(gate.module)
        leaves = {
            "output": ("weight", "bias"),
            "input": ("weight",),
            "weight": gate.params,
            "router": (),
        }
        for name in leaves[gate.at]:
            weight = module._parameters.get(name)
            if weight is None:
                continue
            dims = len(shape_of(weight))
            transposed = dims == 2 and stock_name(module) == "Conv1D"
            axis = int((gate.at == "input") != transposed) if dims > 1 else 0
            if dims == 3:  # experts: (experts, out, in), or what the gate says of them
                axis = 1 + int(gate.at == "input")
            yield name, weight, gate.axis if gate.at == "weight" else axis


class _Hook:
    """A hook that works for its owner; in a copy or a pickle of the model it does nothing."""

    def __init__(self, owner: Gating | None = None) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _BeforeForward(_Hook):
    """Called with the arguments of every forward pass of the whole model."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner = self.owner
        if owner is None or module is not owner.model:
            return
        owner.follow()
        if not torch.is_grad_enabled():  # generate() and evaluations are no training
            return
        if not torch.compiler.is_compiling():
            # before the backward pass: accelerate lets DeepSpeed step, and change it, right after
            owner.loss_scale = loss_scale(module)
        known, given = owner.first_batch, {n for n, v in kwargs.items() if v is not None}
        if known is None or known.keys() < given:  # one with pictures, after texts alone
            owner.first_batch = copied(module, args, kwargs)


class _BeforeLoading(_Hook):
    """Called with the state that is about to be loaded into the whole model, or a shard of it."""

    def __init__(self, owner: Gating | None = None) -> None:
        super().__init__(owner)
        self.waiting: dict[str, Tensor] = {}

    def __call__(self, module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        if self.owner is not None and module is self.owner.model and not prefix:
            in_own_names(module, state, self.waiting)
