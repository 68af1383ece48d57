"""Two processes on CPU (gloo): one plan, and that of one process with the same batch."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
import vlprune
from vlprune.testing import build

how, folder = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
model = build("vit").model.train()
compressor = vlprune.Compressor(model, vlprune.UPop(interval=2), {"params": 0.7})
run = model
if how == "ddp":
    run = torch.nn.parallel.DistributedDataParallel(model)
if how == "fsdp":
    from torch.distributed.fsdp import fully_shard
    for layer in model.vit.layers:
        fully_shard(layer)
    fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)
for step in range(8):
    pixels, labels = torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 2
    run(pixel_values=pixels[rank::world], labels=labels[rank::world]).loss.backward()
    compressor.step((step + 1) / 8)
    optimizer.step()
    optimizer.zero_grad()
if how == "apart" and rank == 1:
    compressor.search.total.neg_()  # as if this process had seen something else
result = {"plan": compressor.plan().to_json(), "total": compressor.search.total.tolist()}
try:
    compressor.finish()
    result["params"] = sum(p.numel() for p in model.parameters())
except vlprune.VlpruneError as error:
    result["error"] = str(error)
if how == "apart":  # the second process has no picture at two steps, and no batch at another
    sample = build("llava")
    parallel = torch.nn.parallel.DistributedDataParallel(
        sample.model, find_unused_parameters=True)
    text = {"input_ids": torch.full((2, 6), 7 + rank), "attention_mask": torch.ones(2, 6).long()}
    uneven = vlprune.Compressor(
        sample.model, vlprune.UPop(interval=1), {"params": 0.7}, attention="head")
    uneven.attach()
    for step in range(6):
        batch = text if rank == 1 and step in (1, 4) else sample.inputs
        run = sample.model if step == 2 else parallel
        if rank == 0 or step != 2:
            run(**batch, labels=batch["input_ids"]).loss.backward()
        uneven.step((step + 1) / 6)
    uneven.finish()
    result["uneven"] = uneven.plan().to_json(), uneven.search.total.tolist()
    result["notes"] = uneven.notes()
with open(f"{folder}/{how}-{rank}.json", "w") as file:
    json.dump(result, file)
if world > 1:
    dist.destroy_process_group()
# on a busy machine a thread of gloo may outlive the interpreter's end, which then aborts
os._exit(0)
"""


JSP = """
import json, os, sys, warnings
import torch, torch.distributed as dist
import vlprune
from small_models import clip

how, folder = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
model = clip((2, 2)).train()

def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, 60, (4, 6), generator=g), "return_loss": True,
            "pixel_values": torch.randn(4, 3, 16, 16, generator=g)}

if how == "fsdp":
    from torch.distributed.fsdp import fully_shard
    whole = {model.logit_scale}
    for tower in (model.text_model, model.vision_model):
        for layer in tower.encoder.layers:
            fully_shard(layer, ignored_params=whole)
    fully_shard(model, ignored_params=whole)

# two processes look at two batches in one structure step, each at its own
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    compressor = vlprune.Compressor(
        model, vlprune.JSP(every=1, learning_rate=0.05, match=True), {"params": 0.75},
        held_out=[batch(100 + i) for i in range(2)])
    compressor.attach()
    early = [str(one.message) for one in heard if "vlprune.rewrite" in str(one.message)]
run = torch.nn.parallel.DistributedDataParallel(model) if how == "ddp" else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(20):
    run(**batch(step if how == "alone" else 2 * step + rank)).loss.backward()
    compressor.step((step + 1) / 20)
    optimizer.step()
    optimizer.zero_grad()
plan = compressor.plan()
try:
    small = compressor.finish()
except vlprune.VlpruneError as refused:
    error = str(refused)
    out = f"{folder}/searched"
    vlprune.save(model, out, extras={"searched.json": plan.to_json()})
    dist.barrier()
    plan = vlprune.Plan.from_json(open(f"{out}/searched.json").read())
    small = type(model).__mro__[2].from_pretrained(out).train()  # without the class of FSDP2
    small = vlprune.rewrite(small, vlprune.discover(small, plan.attention), plan, batch(3))
else:
    error = ""
again = torch.nn.parallel.DistributedDataParallel(small) if how == "ddp" else small
again(**batch(7 + rank)).loss.backward()  # tied weights, also those of which nothing is stored
optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
optimizer.step()
result = {"plan": plan.to_json(), "params": sum(p.numel() for p in small.parameters()),
          "sum": sum(float(p.double().abs().sum()) for p in small.parameters()),
          "history": compressor.search.watched, "early": early, "error": error}
with open(f"{folder}/{how}-{rank}.json", "w") as file:
    json.dump(result, file)
if world > 1:
    dist.destroy_process_group()
# on a busy machine a thread of gloo may outlive the interpreter's end, which then aborts
os._exit(0)
"""


def launch(
    python: Any, folder: Path, how: str, processes: int, code: str = SCRIPT
) -> list[dict[str, Any]]:
    """What every process wrote. They find each other as under torchrun, by their environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    done = python.together(
        [code] * processes, how, folder, path=[Path(__file__).parent.parent], env=ranks
    )
    for one in done:
        assert one.returncode == 0, one.stderr[-3000:]
    return [json.loads((folder / f"{how}-{r}.json").read_text()) for r in range(processes)]


@pytest.fixture(scope="module")
def alone(python: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(python, tmp_path_factory.mktemp("alone"), "alone", 1)[0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_every_rank_decides_as_one_process_does(
    how: str, alone: dict[str, Any], tmp_path: Path, python: Any
) -> None:
    first, second = launch(python, tmp_path, how, 2)
    assert first["plan"] == second["plan"] == alone["plan"]
    assert first["total"] == second["total"]  # bit for bit
    one, two = torch.tensor(alone["total"]), torch.tensor(first["total"])
    assert float((one - two).norm() / one.norm()) < 1e-4
    assert first["params"] == second["params"] == alone["params"]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, python: Any) -> list[dict[str, Any]]:
    return launch(python, tmp_path_factory.mktemp("apart"), "apart", 2)


def test_ranks_that_disagree_are_stopped(apart: list[dict[str, Any]]) -> None:
    for result in apart:
        assert "different plans" in result["error"]


def test_ranks_whose_batches_differ_in_kind_agree(apart: list[dict[str, Any]]) -> None:
    """Without a picture no gradient reaches the vision tower, without a batch none at all."""
    first, second = apart
    assert first["uneven"] == second["uneven"]  # bit for bit
    assert first["notes"] == second["notes"] == []


@pytest.mark.slow
def test_every_rank_shares_alike(tmp_path: Path, python: Any) -> None:
    """One hypernetwork in two processes, whose held-out batches differ; then tied training."""
    first, second = launch(python, tmp_path, "ddp", 2, JSP)
    assert first["plan"] == second["plan"]
    assert json.loads(first["plan"])["share"]
    assert first["sum"] == second["sum"]  # the same tied weights after a step
    # the same with weights in parts, whose plan is applied after gathering
    parts = launch(python, tmp_path, "fsdp", 2, JSP)
    for one, other in zip(parts, (first, second), strict=True):
        assert one["plan"] == other["plan"]
        assert one["params"] == other["params"]
        for ours, theirs in zip(one["history"], other["history"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        assert len(one["early"]) == 1
        assert "cannot share weights" in one["error"]
    assert not first["early"]
