"""Sharded searches that stop and go on in other numbers of processes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import HEAD, launch

RESUME = (
    HEAD
    + """
from pathlib import Path
from transformers import ViTForImageClassification

def batch(step):
    generator = torch.Generator().manual_seed(step)
    return {"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)[rank::world],
            "labels": (torch.arange(8) % 2)[rank::world]}

start = Path(folder).parent / "start"
model = build("vit").model
if start.exists():
    model = ViTForImageClassification.from_pretrained(start)
model.train()
compressor = vlprune.Compressor(sharded(model, "layer"), vlprune.UPop(interval=2), {"params": 0.7})
if start.exists():
    compressor.restore(torch.load(start / "search.pt"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with compressor:
    for step in range(3 if start.exists() else 0, 3 if world == 2 else 6):
        model(**batch(step)).loss.backward()
        compressor.step((step + 1) / 6)
        optimizer.step()
        optimizer.zero_grad()
    if world == 2:
        vlprune.save(model, start)
        if rank == 0:
            torch.save(compressor.state(), start / "search.pt")
    result["plan"] = compressor.plan().to_json()
end()
"""
)

REFUSED = (
    HEAD
    + """
import vlprune.training.objective
from transformers import TrainerControl, TrainerState

def refused(call):
    try:
        call()
        return ""
    except vlprune.VlpruneError as error:
        return str(error)

whole_model, model = build("vit").model, sharded(build("vit").model, "layer")
pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
result["calibration"] = refused(lambda: vlprune.Compressor(
    model, vlprune.Magnitude(), {"params": 0.7}, calibration=[pixels]))

later = build("vit").model  # sharded after the Compressor was made
compressor = vlprune.Compressor(
    later, vlprune.Magnitude(), {"params": 0.7}, calibration=[pixels])
sharded(later, "layer")
result["calibration later"] = refused(compressor.finish)
result["not cut"] = refused(compressor.finish) == result["calibration later"]

inside = build("vit").model
fully_shard(vlprune.training.objective.Trainee(inside))
compressor = vlprune.Compressor(inside, vlprune.UPop(), {"params": 0.7})
result["around"] = refused(compressor.attach)

# the figure that weights are recognised by: one process writes it, all compare it
sums = {}
for name, one in [("whole", whole_model), ("parts", model)]:
    callback = vlprune.Compressor(one, vlprune.UPop(), {"params": 0.7}).callback()
    state = TrainerState(global_step=2, max_steps=4, save_steps=2)
    callback.on_step_end(None, state, TrainerControl())
    sums[name] = callback.state()["attributes"] if rank == 0 else None
    if name == "whole":
        summed_up = callback._figure(summed_up=True)
saved = [sums["parts"]]
dist.broadcast_object_list(saved)
result["same"] = refused(lambda: callback._check_weights(state, saved[0]))
if rank == 1:  # a shard that has not been loaded
    with torch.no_grad():
        next(p for p in model.parameters() if p.to_local().numel()).to_local().add_(1)
result["other"] = refused(lambda: callback._check_weights(state, saved[0]))
if rank == 0:
    result["sums"] = [summed_up, sums["parts"]["weights"]]
end()
"""
)


@pytest.mark.slow
def test_a_search_goes_on_in_another_number_of_processes(python: Any, tmp_path: Path) -> None:
    for name in ("alone", "two", "one", "four"):
        (tmp_path / name).mkdir()
    (alone,) = launch(python, tmp_path / "alone", RESUME, 1)
    launch(python, tmp_path / "two", RESUME, 2)  # the first half
    (one,) = launch(python, tmp_path / "one", RESUME, 1)
    four = launch(python, tmp_path / "four", RESUME, 4)
    assert [one, *four] == [alone] * 5


def test_what_sharded_weights_do_not_allow_is_refused(python: Any, tmp_path: Path) -> None:
    first, second = launch(python, tmp_path, REFUSED)
    for said in (first, second):
        assert "before fully_shard" in said["calibration"]
        assert "before fully_shard" in said["calibration later"]
        assert said["not cut"]
        assert "not on a module around it" in said["around"]
        assert said["same"] == ""
        assert "have not been loaded" in said["other"]
    assert first["sums"][1] == pytest.approx(first["sums"][0], rel=1e-9)
