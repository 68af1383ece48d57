"""Scripts in several processes on CPU (gloo), which find each other as under torchrun."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

HEAD = """
import json, os, sys
import torch, torch.distributed as dist
import vlprune
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from vlprune.cutting.difference import difference, tensors_of
from vlprune.testing import build
from vlprune.testing.conformance import make_plan

folder = sys.argv[1]
torch.set_num_threads(1)
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    dist.init_process_group("gloo")
result = {}

def sharded(model, wrap, **options):
    if world == 1:
        return model
    options["ignored_params"] = {p for p in model.parameters() if p.dim() == 0}
    for name, module in [*model.named_modules()][::-1]:
        layer = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
        linear = type(module) is nn.Linear and name != "lm_head"  # whose weight is the embedding's
        attention = "Attention" in type(module).__name__
        if name and {"layer": layer, "linear": linear, "attention": attention}.get(wrap):
            fully_shard(module, **options)
    return fully_shard(model, **options)

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def end():
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(result, file)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    # on a busy machine a thread of gloo may outlive the interpreter's end, which then aborts
    os._exit(0)
"""


def meeting(processes: int = 2, **more: Any) -> list[dict[str, Any]]:
    """The environment of each process, by which they find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    return [{**world, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]


def launch(python: Any, folder: Path, code: str, processes: int = 2) -> list[dict[str, Any]]:
    """What every process found."""
    path = [Path(__file__).parent]
    done = python.together([code] * processes, folder, path=path, env=meeting(processes))
    for one in done:
        assert one.returncode == 0, one.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
