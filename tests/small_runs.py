"""A run of the demo that takes seconds, for tests that need a real folder."""

from __future__ import annotations

from pathlib import Path

import vlprune

TINY = [
    "data.train_items=12", "data.test_items=6", "train.steps=2", "search.steps=2",
    "retrain.steps=2", "train.batch_size=4", "search.batch_size=4", "retrain.batch_size=4",
    "budget.params=0.5", "model.width=32", "model.heads=2", "model.vision_layers=1",
    "model.image_size=32",
]  # fmt: skip
DEMO = str(Path(vlprune.__file__).parent / "demo.yaml")

KILLED = """
import os, signal, sys
from vlprune.commands.main import main
from vlprune.training.compressor import Compressor

step = Compressor.step
def killed(self, progress, **more):
    if progress == 0.75 and os.environ["RANK"] == "1":  # after the checkpoint at step 2
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, progress, **more)
if sys.argv.pop(1) == "kill":
    Compressor.step = killed
main()
"""
"""The command, in one of several processes: `kill` ends the second one in its search."""
