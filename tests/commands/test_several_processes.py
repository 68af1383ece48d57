"""Several processes, started by torchrun and by Accelerate: killed, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ranks import meeting
from small_runs import DEMO, KILLED, TINY

RECIPE = ["compress", DEMO, *TINY, "search.steps=4", "search.save_steps=2", "device=cpu"]

COMMAND = "import sys; from vlprune.commands.main import main; sys.exit(main())"

LAUNCHED = """
import json, os, sys
import torch
from accelerate import Accelerator, debug_launcher
import vlprune
from vlprune.testing import build

def loop(folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = build("vit").model.train()
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=2), {"params": 0.7})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    items = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": n % 2}
             for n in range(22)]  # the last batches are uneven
    run, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(items, batch_size=4, num_workers=1))
    with compressor:
        for step, batch in enumerate(loader):
            accelerator.backward(run(**batch).loss)
            compressor.step((step + 1) / len(loader))
            optimizer.step()
            optimizer.zero_grad()
        small = compressor.finish()
    if accelerator.is_main_process:
        vlprune.save(small, folder + "/small")
    with open(f"{folder}/{accelerator.process_index}.json", "w") as file:
        json.dump([accelerator.num_processes, compressor.plan().to_json()], file)

debug_launcher(loop, (sys.argv[1],), num_processes=2)
os._exit(0)
"""


def side_by_side(python: Any, *args: str) -> list[Any]:
    """The recipe in two processes that find each other as under torchrun, without its guard."""
    done: list[Any] = python.together([KILLED] * 2, *args, env=meeting())
    return done


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(
    python: Any, tmp_path: Path
) -> None:
    """... to the result that torchrun reaches without a stop."""
    first, second = side_by_side(python, "kill", *RECIPE, "-o", str(tmp_path / "killed"))
    assert second.returncode == -9
    assert first.returncode == 2, first.stderr[-2000:]
    said = [line for line in first.stderr.splitlines() if line.startswith("vlprune: ")]
    assert len(said) == 1
    assert "another process of this run has ended or does not answer" in said[0]
    assert "the same command goes on" in said[0]
    assert "Traceback" not in first.stderr
    for one in side_by_side(python, "run", *RECIPE, "-o", str(tmp_path / "killed")):
        assert one.returncode == 0, one.stderr[-2000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    torchrun += ["--nproc_per_node", "2", sys.executable, "-c", COMMAND]
    whole = subprocess.run(
        [*torchrun, *RECIPE, "-o", str(tmp_path / "whole")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert whole.returncode == 0, whole.stderr[-2000:]
    plans, weights = (
        [(tmp_path / run / name).read_bytes() for run in ("killed", "whole")]
        for name in ("plan.json", "model.safetensors")
    )
    assert plans[0] == plans[1]
    assert weights[0] == weights[1]


def test_a_loop_under_accelerate(python: Any, tmp_path: Path) -> None:
    """Two processes by its launcher, with a worker that loads data and uneven last batches."""
    import vlprune

    done = python.run(LAUNCHED, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == 2
    assert vlprune.load(tmp_path / "small").config.model_type == "vit"
