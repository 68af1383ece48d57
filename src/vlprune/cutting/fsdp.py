"""Models whose weights torch's FSDP2 (``fully_shard``) has spread over processes.

FSDP2 leaves a model's modules as they are. Beside them it keeps one *unit* per sharded module, and
in it one entry per parameter, which gathers the parameter for a forward pass. A cut gathers one
parameter at a time, gives its smaller successor a new entry in the same unit, and leaves the rest
alone: hooks, process groups and what the user has set. torch has no public call for that, so this
file is the only one that knows how FSDP2 is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..structures.shards import is_dtensor, is_part

__all__ = [
    "Units",
    "by_fsdp",
    "class_in_unit",
    "computing_in",
    "end_sharding",
    "is_sharded",
    "is_unit",
    "know_the_root",
    "recover",
    "refuse_other_shards",
    "reshard",
]


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the model's weights out among them, by FSDP2 or DeepSpeed ZeRO-3."""
    return by_fsdp(model) or any(map(is_part, model.parameters()))


def by_fsdp(model: nn.Module) -> bool:
    """Whether FSDP2 shares the model's weights out, and gathers them in a forward pass."""
    return bool(_states(model)) or any(map(is_dtensor, model.parameters()))


def _states(model: nn.Module) -> list[Any]:
    """FSDP2's states of the model's modules, and of modules around it where torch knows them."""
    found: dict[int, Any] = {}
    for module in model.modules():
        read = getattr(module, "_get_fsdp_state", None)
        if read is not None:
            state = read()
            found.update({id(one): one for one in (state, *state._state_ctx.all_states)})
    return [*found.values()]


def _units(state: Any) -> list[Any]:
    units = getattr(state, "_fsdp_param_groups", None)
    if units is None:  # torch below 2.12 has one unit per module
        units = [state._fsdp_param_group] if state._fsdp_param_group else []
    return [*units]


def reshard(model: nn.Module) -> None:
    """Free gathered weights: FSDP2 leaves those of the root in place after a forward pass."""
    for state in _states(model):
        for module in state._modules:
            module.reshard()


def recover(model: nn.Module) -> None:
    """Make FSDP2 ready for the next forward pass after one that raised an error."""
    for state in _states(model):
        reset = getattr(state, "_reset_iter_state", None)
        if state._is_root and reset is not None:
            reset()
    reshard(model)


def refuse_other_shards(model: nn.Module) -> None:
    """Raise UnsupportedError for weights in parts that are not FSDP2's, or no longer whole inside.

    Those are weights of tensor parallelism, and weights that are sharded by a module around the
    model that has not run yet.
    """
    if not by_fsdp(model):
        return
    reshard(model)
    entries = Units(model).places
    for name, parameter in model.named_parameters():
        if not is_dtensor(parameter):
            continue
        if id(parameter) not in entries:
            raise UnsupportedError(
                f"{name} is a distributed tensor that no fully_shard of this model looks after: "
                "call fully_shard on the model itself, not on a module around it"
            )
        group, number = entries[id(parameter)]
        if group.fsdp_params[number].is_dtensor:
            raise UnsupportedError(
                f"{name} is split by tensor parallelism as well as by FSDP, which cannot be cut: "
                "compress the model under FSDP alone"
            )


class Units:
    """The entries of a sharded model's parameters: {id(parameter): (unit, number in it)}."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[int, tuple[Any, int]] = {
            id(entry.sharded_param): (unit, number)
            for state in _states(model)
            for unit in _units(state)
            for number, entry in enumerate(unit.fsdp_params)
        }

    def replace(self, old: nn.Parameter, new: nn.Parameter, undo: ExitStack) -> bool:
        """Put the whole parameter ``new`` in place of ``old``, in parts; False if ``old`` is whole.

        ``undo`` takes the call that puts ``old`` back.
        """
        if id(old) not in self.places:
            return False
        unit, number = self.places[id(old)]
        before = unit.fsdp_params[number]
        after = _entry(before, unit, new)
        unit.fsdp_params[number] = after
        before._post_load_hook_handle.remove()  # it would reshape the new parameter
        _refresh(unit)
        self.places[id(after.sharded_param)] = unit, number

        def put_back() -> None:
            after._post_load_hook_handle.remove()
            before._post_load_hook_handle = _on_load(before)
            unit.fsdp_params[number] = before
            before._setattr_on_modules(before.sharded_param)
            _refresh(unit)

        undo.callback(put_back)
        return True

    def follow(self, old: nn.Module, new: nn.Module, undo: ExitStack) -> None:
        """Let the entries of ``old``'s parameters look for them in ``new``, which replaces it."""
        for parameter in old._parameters.values():
            if id(parameter) in self.places:
                unit, number = self.places[id(parameter)]
                entry = unit.fsdp_params[number]
                _move(entry, new)
                undo.callback(_move, entry, old)


def _entry(like: Any, unit: Any, parameter: nn.Parameter) -> Any:
    """An entry for a parameter that is whole in every process."""
    placement = like.fsdp_placement
    shards = getattr(like.mesh_info, "shard_mesh_size", 1)
    if placement.dim and parameter.shape[placement.dim] % shards:
        placement = type(placement)(0)  # FSDP2 splits other axes into equal parts only
    parameter.data = parameter.data.to(unit.device)
    made = type(like)(
        parameter,
        like._module_info,
        like.mesh_info,
        like.post_forward_mesh_info,
        like.device,
        lambda _: placement,
        like.mp_policy,
        unit.offload_policy,
    )
    made._param_fqn = like._param_fqn
    return made


def _on_load(entry: Any) -> Any:
    module = entry._module_info.module
    return module.register_load_state_dict_post_hook(lambda *_: entry.reset_sharded_param())


def _move(entry: Any, module: nn.Module) -> None:
    entry._post_load_hook_handle.remove()
    entry._module_info.module = module
    entry._post_load_hook_handle = _on_load(entry)


def _refresh(unit: Any) -> None:
    """Let the unit's next gathering use the sizes and dtypes of its entries as they are now."""
    for entry in unit.fsdp_params:
        entry.all_gather_outputs = []
        entry.__dict__.pop("_unsharded_param", None)
    unit._init_mp_dtypes()


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Gather weights in ``dtype`` while the block runs, whatever precision training uses."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    reshard(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    before: list[tuple[Any, str, Any]] = []
    outside = set(model.modules())
    with ExitStack() as gathered:
        try:
            for state in _states(model):
                before.append((state, "_mp_policy", state._mp_policy))
                state._mp_policy = policy
                for unit in _units(state):
                    before.append((unit, "mp_policy", unit.mp_policy))
                    unit.mp_policy = policy
                    _refresh(unit)
                if not outside & set(state._modules):  # a module around the model does not run
                    for module in state._modules:
                        gathered.callback(module.reshard)
                        module.unshard()
            yield
        finally:
            reshard(model)
            for owner, name, value in before:
                setattr(owner, name, value)
            for state in _states(model):
                for unit in _units(state):
                    _refresh(unit)


def know_the_root(module: nn.Module) -> None:
    """Let the units inside ``module`` know that it is their root, as its first forward would.

    Does nothing to a module on which ``fully_shard`` was not called.
    """
    if is_unit(module):
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]


def end_sharding(model: nn.Module) -> None:
    """Take ``fully_shard`` back: every process then holds all weights of an ordinary model.

    The parameters are new ones, in the dtype of the parts. All processes must call this. Does
    nothing to a model that FSDP2 has not sharded.
    """
    reshard(model)
    for state in _states(model):
        for unit in _units(state):
            for entry in unit.fsdp_params:
                parts = entry.sharded_param
                entry._post_load_hook_handle.remove()
                entry._setattr_on_modules(
                    nn.Parameter(parts.full_tensor().detach(), requires_grad=parts.requires_grad)
                )
            for handles in (
                unit._module_to_pre_save_state_dict_hook_handle,
                unit._module_to_pre_load_state_dict_hook_handle,
            ):
                for handle in handles.values():
                    handle.remove()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for module in state._modules:
            _forget(module)


def _forget(module: nn.Module) -> None:
    """Give the module the class that it had, and let ``fully_shard`` take it again."""
    from torch.distributed import _composable_state as known
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    known._module_state_mapping.pop(module, None)
    for key in (STATE_KEY, REGISTRY_KEY):
        module.__dict__.pop(key, None)
    bases = type(module).__mro__
    module.__class__ = bases[next(n for n, c in enumerate(bases) if c.__name__ == "FSDPModule") + 1]


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    return hasattr(module, "_get_fsdp_state")


def class_in_unit(module: nn.Module, target: type[nn.Module]) -> type[nn.Module]:
    """``target`` as the class of ``module``, which may be one that FSDP2 has given a class."""
    cls = type(module)
    if not is_unit(module):
        return target
    base = next(c for c in cls.__mro__ if c.__name__ == "FSDPModule")
    own: Mapping[str, Any] = {"__deepcopy__": cls.__deepcopy__}  # type: ignore[attr-defined]
    return type(f"FSDP{target.__name__}", (base, target), dict(own))
