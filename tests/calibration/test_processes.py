"""Calibration in two processes (gloo): the same plan and weights as in one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import os, sys
import torch, torch.distributed as dist
import vlprune
from looped import batches
from vlprune.testing import build

how, folder = sys.argv[1], sys.argv[2]
torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
if how == "vit":  # every eighth batch is held out, in one process as in two
    model, given = build("vit").model.double(), batches(16, 4)
    given = given[16 // world * rank : 16 // world * (rank + 1)]
else:  # the second process sees no picture
    model, sample = build("llava").model.double(), build("llava").inputs
    texts = [{"input_ids": torch.full((2, 6), 7 + n)} for n in range(2)]
    pictures = [{**sample, "pixel_values": torch.randn_like(sample["pixel_values"])}] * 2
    given = texts if rank else pictures
compressor = vlprune.Compressor(model, vlprune.OBS(rotate=True), {"params": 0.7},
                                attention="qk_vo", calibration=given)
compressor.finish(verify=False)
torch.save((compressor.plan().to_json(), model.state_dict(), compressor.session.errors,
            compressor.session.notes()),
           f"{folder}/{rank}.pt")
if world > 1:
    dist.destroy_process_group()
# on a busy machine a thread of gloo may outlive the interpreter's end, which then aborts
os._exit(0)
"""


def launch(python: Any, how: str, folder: Path, processes: int) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes}
    ranks = [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    done = python.together(
        [SCRIPT] * processes, how, folder, path=[Path(__file__).parents[1]], env=ranks
    )
    for one in done:
        assert one.returncode == 0, one.stderr[-3000:]
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(processes)]


def test_two_processes_decide_and_repair_as_one(python: Any, tmp_path: Path) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
    (alone,) = launch(python, "vit", folders[0], 1)
    first, second = launch(python, "vit", folders[1], 2)
    assert first[0] == second[0] == alone[0]
    for name, tensor in alone[1].items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-6, atol=1e-8)
    assert first[2] == second[2]
    assert first[2].after == pytest.approx(alone[2].after, rel=1e-6)


def test_processes_whose_batches_differ_in_kind_agree(python: Any, tmp_path: Path) -> None:
    first, second = launch(python, "llava", tmp_path, 2)
    assert first[0] == second[0]
    assert all(torch.equal(tensor, second[1][name]) for name, tensor in first[1].items())
    assert not [note for note in first[3] if "reached" in note]
