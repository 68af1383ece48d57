"""How much a change inside the model changes its outputs, without labels.

A layer's squared error counts by what it does to the outputs: E |J e|^2, where J are the
derivatives of the outputs by the layer's output. For random r with independent entries of unit
variance, g = J^T r has E g g^T = J^T J, so one backward pass per batch serves every layer.
This is the Gauss-Newton matrix of "stay as you were", whose gradient is zero at the dense model;
its diagonal is used. Not from a paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cutting.difference import tensors_of
from ..cutting.gates import evaluating
from ..cutting.heads import head_outputs
from ..errors import DataError, UnsupportedError
from ..processes import add_up
from ..structures.structure import Structure
from ..structures.units import owner_of
from .backward import set_aside
from .batches import Batches
from .blocks import callable_projections, hooked
from .consumers import Rows, consumers_of, queries_of
from .moments import check_finite, first_of_all, flat
from .store import IN_MEMORY

__all__ = ["Influence", "influence_of", "main_outputs", "small_enough"]

EMBEDDINGS = ("image_embeds", "text_embeds", "audio_embeds")
LOGITS = ("logits", "pred_")


@dataclass(frozen=True)
class Influence:
    """What errors inside the model add to the relative squared error of its outputs.

    ``outputs`` {consumer module: (out,)}: per unit of mean squared error in each channel of the
    layer's output, at every token. ``scores`` {structure: (size,)}: when a query-key dimension is
    left out of the scores, one query at a time.
    """

    outputs: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]


def main_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors that a model is used for: embeddings if it names any, else logits, else all.

    Embeddings are one vector per item; logits include scores and boxes. Among hidden states, the
    last counts, together with the loss where labels are given; a pooled output only where there is
    nothing else.
    """
    if isinstance(output, Mapping):
        tensors = {name: t for name, t in output.items() if isinstance(t, Tensor)}
        vectors = {n: t for n, t in tensors.items() if n in EMBEDDINGS and t.dim() == 2}
        logits = {n: t for n, t in tensors.items() if n.startswith(LOGITS) or n.endswith("_score")}
        states = {n: t for n, t in tensors.items() if n in ("last_hidden_state", "loss")}
        for found in (vectors, logits, states):
            if found:
                return found
    return {f"output {number}": tensor for number, tensor in enumerate(tensors_of(output))}


def influence_of(
    model: nn.Module,
    structures: Sequence[Structure],
    batches: Batches,
    outputs: Callable[[Any], Mapping[str, Tensor]] = main_outputs,
    advance: Callable[[int], None] = lambda done: None,
) -> Influence:
    """Estimate the influence of every consumer, and of query-key dimensions, on the outputs.

    Every tensor of ``outputs(model's output)`` counts the same, whatever its size and scale.
    """
    consumers = {c.module: c for s in structures for c in consumers_of(model, s)}
    squares: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    numbers, first = torch.Generator(), first_of_all(len(batches))
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(callable_projections(model, structures))
        stack.enter_context(_frozen(model))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(set_aside(model))

        without: set[str] = set()

        def watch(note: Note, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                without.add(type(_module).__name__)
                return output
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            output.register_hook(note(output.detach()))
            return output.clone()  # what comes next may change its input in place

        def squared(name: str, _values: Tensor) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                check_finite(grad)
                squares[name] = squares.get(name, 0) + flat(grad).double().square().sum(0)

            return hook

        def scored(structure: str, rows: Rows, values: Tensor) -> Callable[[Tensor], None]:
            def hook(grad: Tensor) -> None:
                check_finite(grad)
                pairs = (flat(values) * flat(grad)).double()
                change = pairs.square().sum(0).unflatten(0, (rows.heads, rows.size)).sum(0)
                scores[structure] = scores.get(structure, 0) + change

            return hook

        kinds = ("attention", "attention_qk", "attention_unturned")
        queries = {s.name: queries_of(model, s) for s in structures if s.kind in kinds}
        hooks = [
            (
                model.get_submodule(path).register_forward_hook,
                partial(watch, partial(squared, path)),
            )
            for path in consumers
        ]
        for name, rows in ((name, rows) for name, own in queries.items() for rows in own):
            seen = partial(watch, partial(scored, name, rows))
            if rows.module:
                module = model.get_submodule(rows.module)
                hooks.append((module.register_forward_hook, partial(_watch_rows, seen, rows)))
            else:
                owner = model.get_submodule(owner_of(rows.weight)[0])
                stack.enter_context(_watched_projection(owner, seen))
        stack.enter_context(hooked(hooks))
        for number in range(len(batches)):
            with head_outputs(model) as logits:
                given = outputs(_with_logits(batches.run(model, number), logits))
            made = [tensor for tensor in given.values() if tensor.requires_grad]
            if not made and without:
                raise UnsupportedError(
                    f"{type(model).__name__} computes its outputs without gradients (its forward "
                    "enters torch.no_grad or torch.inference_mode), so that no derivative says "
                    "what an error inside does to them: choose a method that needs none, such as "
                    "Magnitude"
                )
            if not made:
                raise DataError(
                    f"calibration batch {number} reaches no layer that could be pruned: give "
                    "batches like those that the model is used with"
                )
            numbers.manual_seed(first + number)
            parts = [_projected(t, numbers, batches, number) for t in made]
            loss = torch.stack([part.cpu() for part in parts]).sum() / len(parts) ** 0.5
            loss.backward()
            advance(1)
    return Influence(
        _mean(squares, {path: c.out for path, c in consumers.items()}, len(batches)),
        _mean(scores, {name: own[0].size for name, own in queries.items() if own}, len(batches)),
    )


def _with_logits(output: Any, logits: Sequence[Tensor]) -> Any:
    """A model's output with the logits that it does not name."""
    if not isinstance(output, Mapping) or not logits or any(n.startswith(LOGITS) for n in output):
        return output
    return {**output, "logits": logits[-1]}


Note = Callable[[Tensor], Callable[[Tensor], None]]
"""From the values of an output, the hook of its gradient."""

Watch = Callable[[nn.Module, Any, Tensor], Tensor]


def _watch_rows(watch: Watch, rows: Rows, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Watch the rows of a projection that are queries; of a fused one, they are a part."""
    queries = watch(module, args, rows.of(output))
    return queries if queries.shape == output.shape else rows.with_new(output, queries)


@contextmanager
def _watched_projection(owner: Any, watch: Callable[..., Tensor]) -> Iterator[None]:
    """Watch the queries of an nn.MultiheadAttention, which no module of its own computes."""

    def project(*given: Tensor) -> list[Tensor]:
        queries, *others = type(owner).project(owner, *given)
        return [watch(owner, given, queries), *others]

    owner.__dict__["project"] = project
    try:
        yield
    finally:
        owner.__dict__.pop("project", None)


def small_enough(
    model: nn.Module, batches: Batches, outputs: Callable[[Any], Mapping[str, Tensor]]
) -> Batches:
    """The batches in parts, so that a backward pass holds no more than half the model's bytes.

    At least one item at a time, and no less than 256 MiB. Batches whose tensors do not all have one
    row per item stay whole.
    """
    one = batches.split(1)
    if len(one) == len(batches):
        return batches
    held = 0

    def count(tensor: Tensor) -> None:
        nonlocal held
        held += tensor.numel() * tensor.element_size()

    with evaluating(model), _frozen(model), torch.enable_grad(), head_outputs(model) as logits:
        inputs = one.inputs(model, 0)
        layers = (module for module in model.modules() if isinstance(module, nn.Linear))
        wake = hooked((layer.register_forward_hook, _requiring_grad) for layer in layers)
        with wake, torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs(_with_logits(model(**inputs), logits))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return batches.split(max(1, max(IN_MEMORY, size // 2) // max(1, held)))


def _requiring_grad(_module: nn.Module, _args: Any, output: Any) -> Any:
    if not isinstance(output, Tensor) or output.requires_grad:  # a router may give two tensors
        return output
    return output.detach().requires_grad_()


def _mean(sums: Mapping[str, Tensor], shapes: Mapping[str, int], count: int) -> dict[str, Tensor]:
    """The sums divided by the number of batches; over all processes, where there are several.

    ``shapes`` has the length of every tensor that any process may have summed.
    """
    reached = add_up(torch.tensor([float(name in sums) for name in shapes], dtype=torch.float64))
    everywhere = float(add_up(torch.tensor(float(count), dtype=torch.float64)))
    device = next(iter(sums.values())).device if sums else torch.device("cpu")
    return {
        name: add_up(sums.get(name, torch.zeros(shapes[name], dtype=torch.float64, device=device)))
        / everywhere
        for name, some in zip(shapes, reached.tolist(), strict=True)
        if some
    }


def _projected(output: Tensor, numbers: torch.Generator, batches: Batches, number: int) -> Tensor:
    """The output times random numbers, in units of its own size; padding counts nothing."""
    noise = torch.randn(output.shape, generator=numbers).to(output.device, output.dtype)
    weights = batches.weights("text", number, output) if output.dim() == 3 else None
    if weights is not None:
        noise = noise * weights.reshape(*output.shape[:2], 1).to(noise.dtype)
    usable = output.isfinite()  # masked places may be minus infinity
    output = torch.where(usable, output, 0.0)
    count = usable.sum().clamp(min=1)
    size = (output.detach().double().square().sum() / count).sqrt().clamp(min=1e-12)
    return (output * noise).sum() / size.to(output.dtype) / count.to(output.dtype).sqrt()


class _frozen:
    """The model's parameters ask for no gradients while the block runs."""

    def __init__(self, model: nn.Module) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def __exit__(self, *_exc: object) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)
