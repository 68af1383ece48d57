"""Passes that pause: the same outputs, and nothing left behind however they end."""

from __future__ import annotations

import gc
from contextlib import ExitStack
from functools import partial
from typing import Any

import greenlet
import pytest
import torch
from torch import nn

from vlprune.architectures import discover
from vlprune.calibration.batches import batches_of
from vlprune.calibration.blocks import blocks_of
from vlprune.calibration.passes import calls_of, ready
from vlprune.calibration.session import fold, rotate
from vlprune.calibration.streams import streams
from vlprune.cutting.difference import tensors_of
from vlprune.errors import UnsupportedError
from vlprune.structures.plan import Plan
from vlprune.testing import build


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def alive() -> int:
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, greenlet.greenlet)]
    return sum(bool(one) for one in found if one is not greenlet.getcurrent())


@pytest.mark.parametrize("family", ["clip", "blip_captioning", "llava", "swin", "detr", "gpt2"])
def test_a_pass_that_pauses_gives_the_same_outputs(family: str) -> None:
    sample = build(family)
    model, structures = sample.model, discover(sample.model, "head_dim").structures
    batches = batches_of(model, [sample.inputs] * 2)
    outputs: dict[int, list[Any]] = {}
    calls = calls_of(model, batches)
    calls = [
        lambda n=n, call=call: outputs.setdefault(n, tensors_of(call()))  # type: ignore[misc]
        for n, call in enumerate(calls)
    ]
    with torch.no_grad():
        plain = tensors_of(model(**batches.inputs(model, 0)))
        paths = [b.path for b in blocks_of(model, structures, calls_of(model, batches)[:1])]
    own = hooks(model)  # transformers leaves some of its own
    assert len(paths) >= 2
    assert len(set(paths)) == len(paths)
    reached = []
    with streams(model, paths, calls) as passes:
        for path in paths:
            for one in passes:
                assert one.advance(path)
                assert one.at == path
            reached.append(path)
        for one in passes:
            one.resume()
            assert one.over
            assert not one.advance(paths[0])
    assert reached == paths
    for n in range(2):
        for a, b in zip(plain, outputs[n], strict=True):
            assert torch.equal(a, b)
    assert hooks(model) == own


@pytest.mark.parametrize(
    "error", [UnsupportedError, pytest.param(KeyboardInterrupt, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("where", ["inside a pass", "between passes", "at the end of another"])
def test_nothing_stays_behind_after_an_error(error: type[BaseException], where: str) -> None:
    sample = build("clip")
    model, before = sample.model, alive()
    blocks = ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1"]
    calls = calls_of(model, batches_of(model, [sample.inputs] * 3))

    def fail(*_: Any) -> None:
        raise error("stop")

    own = []
    if where == "inside a pass":
        own = [model.get_submodule(f"{blocks[0]}.mlp.fc1").register_forward_hook(fail)]
    elif where == "at the end of another":
        calls[1] = lambda: fail(model(**sample.inputs))

    def work() -> None:
        with streams(model, blocks, calls) as passes:
            for path in blocks:
                for one in passes:
                    one.advance(path)
            if where == "between passes":
                fail()
            passes[1].resume()

    with pytest.raises(error, match="stop"):
        work()
    for handle in own:
        handle.remove()
    assert hooks(model) == 0
    assert alive() == before
    assert torch.is_grad_enabled()
    with torch.no_grad():  # the model runs as ever, outside of any pass
        model(**sample.inputs)


def test_passes_that_never_start_end_as_well() -> None:
    sample = build("vit")
    with streams(sample.model, ["vit.layers.0"], [lambda: sample.model(**sample.inputs)]):
        pass
    assert hooks(sample.model) == 0


def test_a_block_that_a_pass_does_not_reach_is_passed_over() -> None:
    """A pass in which the picture is missing stands at the next block."""
    sample = build("llava")
    model = sample.model
    text = {"input_ids": sample.inputs["input_ids"] % 50 + 6}
    batches = batches_of(model, [sample.inputs, text])
    with ExitStack() as stack:
        blocks = ready(stack, model, discover(model, "head_dim").structures, batches)
        passes = stack.enter_context(
            streams(model, [b.path for b in blocks], calls_of(model, batches))
        )
        reached = {b.path: [one.advance(b.path) for one in passes] for b in blocks}
    for path, found in reached.items():
        assert found == [True, "language" in path]
    assert not model.training


@pytest.mark.parametrize("texts_first", [True, False])
def test_blocks_are_in_execution_order_whichever_batch_comes_first(texts_first: bool) -> None:
    sample = build("llava")
    text = {"input_ids": sample.inputs["input_ids"] % 50 + 6}
    given = [text, sample.inputs] if texts_first else [sample.inputs, text]
    batches = batches_of(sample.model, given)
    with ExitStack() as stack:
        structures = discover(sample.model, "head_dim").structures
        blocks = [b.path for b in ready(stack, sample.model, structures, batches)]
    assert ["vision" in path for path in blocks] == [True, True, False, False]


MODES = {
    "inference": torch.inference_mode,
    "gradients on": torch.enable_grad,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


def modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("mode", MODES)
def test_modes_that_a_forward_enters_stay_inside_it(mode: str) -> None:
    """SAM 2's forward runs in inference mode, others under autocast."""
    sample = build("vit")
    model: Any = sample.model
    inside, stock = [], model.forward

    def forward(**inputs: Any) -> Any:
        with MODES[mode]():
            output = stock(**inputs)
            inside.append(modes())
        return output

    model.forward = forward
    outside, call = modes(), partial(model, **sample.inputs)
    with streams(model, ["vit.layers.0", "vit.layers.1"], [call] * 2) as passes:
        waiting = modes()
        for path in ("vit.layers.0", "vit.layers.1"):
            for one in passes:
                one.advance(path)
                assert modes() == waiting
        passes[0].resume()
        assert modes() == waiting
    assert modes() == outside
    with MODES[mode](), torch.no_grad() if mode != "gradients on" else torch.enable_grad():
        assert inside == [modes()]


@pytest.mark.parametrize("mode", ["inference", "gradients on"])
def test_a_calibration_is_the_same_in_whatever_mode_a_forward_computes(mode: str) -> None:
    found = []
    for entered in (torch.no_grad, MODES[mode]):
        sample = build("vit")
        model: Any = sample.model
        stock = model.forward

        def forward(
            pixel_values: Any, entered: Any = entered, stock: Any = stock, **more: Any
        ) -> Any:
            with entered():
                return stock(pixel_values, **more)

        model.forward = forward
        outside = modes()
        rotate(model, [sample.inputs])
        plan = Plan({s.name: range(0, s.size, 2) for s in discover(model)})
        fold(model, plan, [sample.inputs])
        assert modes() == outside
        assert not any(p.is_inference() for p in model.parameters())
        found.append([p.detach().clone() for p in model.parameters()])
    for plain, other in zip(*found, strict=True):
        assert torch.equal(plain, other)
