"""FSDP2 in two processes on CPU (gloo): search, cut, train on and save, as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import HEAD, launch

SEARCH = (
    HEAD
    + """
METHODS = {"upop": vlprune.UPop(interval=2), "magnitude": vlprune.Magnitude(),
           "taylor": vlprune.Taylor()}

def search(method, wrap, first, **options):
    model = build("vit").model.train()
    if first:
        sharded(model, wrap, **options)
    compressor = vlprune.Compressor(model, METHODS[method], {"params": 0.7})
    if not first:
        sharded(model, wrap, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)

    def step(number, steps, compressor=None):
        pixels, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 2
        loss = model(pixel_values=pixels[rank::world], labels=labels[rank::world]).loss
        loss.backward()
        if compressor is not None:
            compressor.step((number + 1) / steps)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    with compressor:
        for number in range(6):
            step(number, 6, compressor)
        assert compressor.finish() is model
    parts = sum(hasattr(p, "full_tensor") for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(3):
        loss = step(number, 3)
    out = f"{folder}/{method}-{wrap}-{first}"
    vlprune.save(model, out, extras={"note.txt": str(rank)})
    proof = compressor.verification
    result[f"{method}-{wrap}"] = {
        "plan": compressor.plan().to_json(), "loss": loss, "parts": parts, "folder": out,
        "params": sum(p.numel() for p in model.parameters()), "dtype": proof.dtype,
        "report": compressor.report()["params"], "difference": proof.difference,
    }

search("upop", "layer", False)
search("magnitude", "linear", True)
search("taylor", "attention", True)
if world > 1:
    search("upop", "root", True, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
end()
"""
)

FAMILIES = (
    HEAD
    + """
import copy
from vlprune.cutting.fsdp import end_sharding

def hooks_of(module):
    return [len(held) for name, held in vars(module).items() if "_hooks" in name]

def forward(model, inputs):
    with torch.no_grad():
        return tensors_of(model(**inputs))

# scalars that stay whole; projections that are padded, and sharded each by itself; a forward of
# vlprune's own and a folded temperature in a sharded attention; rotary pairs and their norms;
# transposed weights; experts
for family, wrap in [("clip", "layer"), ("idefics2", "linear"), ("blip", "attention"),
                     ("qwen3_vl", "attention"), ("gpt2", "layer"), ("deepseek_v3", "layer")]:
    sample, other = build(family), build(family)
    model = sharded(sample.model, wrap)
    description = vlprune.discover(model)
    assert description == vlprune.discover(other.model), family
    plan = make_plan(description, lambda size: max(1, size // 2))
    before = [*map(id, model.parameters())]
    forward(model, sample.inputs)
    try:  # the second process fails, so the first puts everything back, too
        import vlprune.cutting.rewrite as cutting
        compare = cutting.compare
        def fails(*args):
            proof = compare(*args)
            if rank == 1:
                raise vlprune.errors.VerificationError("as if it differed")
            return proof
        cutting.compare = fails
        vlprune.rewrite(model, description, plan, verify=sample.inputs)
        error = ""
    except vlprune.VlpruneError as problem:
        error = str(problem)
    finally:
        cutting.compare = compare
    dense = difference(forward(other.model, other.inputs), forward(model, sample.inputs)).relative
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    same = before == [*map(id, model.parameters())]
    vlprune.rewrite(model, description, plan, verify=sample.inputs)
    vlprune.rewrite(other.model, description, plan)
    small = difference(forward(other.model, other.inputs), forward(model, sample.inputs)).relative
    state = {name: whole(t) for name, t in model.state_dict().items()}
    bits = all(torch.equal(t, state[name]) for name, t in other.model.state_dict().items())
    model.load_state_dict(model.state_dict())  # its hooks fit the small parameters
    again = difference(forward(other.model, other.inputs), forward(model, sample.inputs)).relative
    result[f"{family}-{wrap}"] = [error, same, dense, small, bits, again]

    end_sharding(model)
    left = [(type(one), hooks_of(one)) for one in model.modules()]
    clean = left == [(type(one), hooks_of(one)) for one in other.model.modules()]
    held = [whole(t) is t and torch.equal(t, other.model.state_dict()[name])
            for name, t in copy.deepcopy(model).state_dict().items()]
    model = sharded(model, wrap)  # as if nothing had been
    anew = difference(forward(other.model, other.inputs), forward(model, sample.inputs)).relative
    result[f"{family}-{wrap}"] += [clean, all(held), anew]

sample, other = build("clip"), build("clip")
model = sharded(sample.model, "layer")
make = lambda model, what: vlprune.Compressor(
    model, vlprune.Magnitude(), {what: 0.6}, example_inputs=sample.inputs)
plans = [make(one, "macs").plan().to_json() for one in (model, other.model)]
try:
    make(model, "latency")
except vlprune.VlpruneError as problem:
    result["prices"] = [plans[0] == plans[1], str(problem)]
end()
"""
)

FOUR = (
    HEAD
    + """
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import init_device_mesh

def accelerated(model, optimizer):
    accelerator = Accelerator(cpu=True)
    # on CPUs accelerate itself would choose DistributedDataParallel
    accelerator.state._shared_state.update(
        distributed_type=DistributedType.FSDP,
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["ViTLayer"], cpu_ram_efficient_loading=False))
    return accelerator.prepare(model, optimizer)

def two_by_two(model, optimizer):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    sharded(model, "layer", mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

for how, prepare in [("accelerate", accelerated), ("copies", two_by_two), ("alone", None)]:
    if (prepare is None) != (world == 1):
        continue
    model = build("vit").model.train()
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=2), {"params": 0.7})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if prepare:
        model, optimizer = prepare(model, optimizer)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 16, 16, generator=generator) for _ in range(4)]

    def step(pixels):
        labels = (torch.arange(8) % 2)[rank::world]
        model(pixel_values=pixels[rank::world], labels=labels).loss.backward()

    with compressor:
        for number, pixels in enumerate(batches):
            step(pixels)
            compressor.step((number + 1) / 4)
            optimizer.step()
            optimizer.zero_grad()
        compressor.remember_optimizer(optimizer)
        compressor.end()
        with torch.no_grad():
            masked = model(pixel_values=batches[0]).logits
    with torch.no_grad():  # the gates are gone, and the weights are as if they were not
        emptied = torch.equal(model(pixel_values=batches[0]).logits, masked)
    compressor.finish()
    with torch.no_grad():
        first = float((model(pixel_values=batches[0]).logits - masked).abs().max())
    before = [whole(p.detach()).clone() for p in model.parameters()]
    step(batches[0])
    optimizer.step()  # the optimizer of the search, which goes on with the small weights
    moved = all(not torch.equal(a, whole(p)) for a, p in zip(before, model.parameters()))
    result[how] = {"plan": compressor.plan().to_json(), "emptied": emptied, "apart": first,
                   "moved": moved, "dtype": compressor.verification.dtype}
end()
"""
)


@pytest.fixture(scope="module")
def searches(python: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one process, and of each of two that share the weights out."""
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    return [*launch(python, alone, SEARCH, 1), *launch(python, together, SEARCH)]


@pytest.mark.parametrize("case", ["upop-layer", "magnitude-linear", "taylor-attention"])
def test_sharded_weights_are_searched_cut_and_saved_as_whole_ones(
    case: str, searches: list[dict[str, Any]]
) -> None:
    import vlprune

    alone, first, second = (results[case] for results in searches)
    assert first["plan"] == second["plan"] == alone["plan"]
    assert (
        first["params"] == alone["params"] == alone["report"]["after"] == first["report"]["after"]
    )
    assert first["parts"] > 30  # the small model is spread as the large one was
    assert alone["parts"] == 0
    assert first["difference"] < 1e-12  # proved in float64
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(alone["loss"], rel=1e-4)
    models = [vlprune.load(result["folder"]) for result in (alone, first)]
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (Path(first["folder"]) / "note.txt").read_text() == "0"  # written by one process
    assert not [*Path(first["folder"]).glob("gathered")]


def test_a_cut_under_mixed_precision_is_proved_without_it(searches: list[dict[str, Any]]) -> None:
    assert searches[1]["upop-root"]["dtype"] == "float64"
    assert searches[1]["upop-root"]["difference"] < 1e-12


def test_sharded_models_of_every_kind_are_cut_or_put_back(python: Any, tmp_path: Path) -> None:
    first, second = launch(python, tmp_path, FAMILIES)
    same_plan, refused = first.pop("prices")
    assert same_plan, "another plan by MACs than in one process"
    assert "before fully_shard" in refused
    assert len(first) == 6
    for case, found in first.items():
        error, same, dense, small, bits, again, clean, held, anew = found
        assert "process 1 has failed" in error, case
        assert "as if it differed" in error, case
        assert same, f"{case}: other parameters than before the failed cut"
        assert dense < 1e-6, case
        assert small < 1e-6, case
        assert bits, f"{case}: other weights than those of a cut in one process"
        assert again < 1e-6, case
        assert clean, f"{case}: classes or hooks of FSDP2 are left when its sharding has ended"
        assert held, f"{case}: other weights when the sharding has ended"
        assert anew < 1e-6, case
        assert second[case][0].startswith("as if it differed"), case


@pytest.mark.slow
def test_four_processes_in_parts_and_copies_and_under_accelerate(
    python: Any, tmp_path: Path
) -> None:
    (alone,) = launch(python, tmp_path, FOUR, 1)
    ranks = launch(python, tmp_path, FOUR, 4)
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]
    for how in ("accelerate", "copies"):
        assert ranks[0][how]["plan"] == alone["alone"]["plan"], how
        assert ranks[0][how]["emptied"], how
        assert ranks[0][how]["apart"] < 1e-5, how
        assert ranks[0][how]["moved"], how
        assert ranks[0][how]["dtype"] == "float64", how
