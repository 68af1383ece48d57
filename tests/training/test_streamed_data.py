"""Data that arrive in a stream: no length, no index, one pass, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ranks import HEAD, launch

SCRIPT = (
    HEAD
    + """
import transformers
from torch.utils.data import IterableDataset

transformers.logging.set_verbosity_error()

class Stream(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        for number in range(10_000):
            pixels = torch.randn(3, 16, 16, generator=generator)
            yield {"pixel_values": pixels, "labels": number % 2}

class StopAfter5(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 5

def search(place, callbacks=(), resume=None):
    transformers.set_seed(0)
    model = build("vit").model
    compressor = vlprune.Compressor(model, vlprune.UPop(interval=2), {"params": 0.7})
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/{place}", max_steps=8, per_device_train_batch_size=4 // world,
        report_to="none", use_cpu=True, disable_tqdm=True, save_steps=1, learning_rate=1e-3,
        dataloader_num_workers=WORKERS, ddp_backend="gloo", accelerator_config=SPLIT)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Stream(),
                                   callbacks=[compressor.callback(), *callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return compressor

whole = search("whole")
search("parts", [StopAfter5()])
parts = search("parts", resume=True)
result["totals"] = [c.search.total.tolist() for c in (whole, parts)]
result["plans"] = [c.plan().to_json() for c in (whole, parts)]
small = [c.finish() for c in (whole, parts)]
result["params"] = sum(p.numel() for p in small[0].parameters())
result["same"] = all(map(torch.equal, small[0].parameters(), small[1].parameters()))
end()
"""
)


def searches(python: Any, folder: Path, workers: int, processes: int, split: str = "{}") -> Any:
    """A search in one go and one that is stopped and resumed, as every process saw them."""
    code = SCRIPT.replace("WORKERS", str(workers)).replace("SPLIT", split)
    folder.mkdir()
    return launch(python, folder, code, processes)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_search_on_a_stream_resumes_exactly(workers: int, tmp_path: Path, python: Any) -> None:
    (one,) = searches(python, tmp_path / "one", workers, 1)
    assert one["plans"][0] == one["plans"][1]
    assert one["totals"][0] == one["totals"][1]
    assert one["same"]


@pytest.mark.parametrize(
    "split",
    [
        pytest.param('{"dispatch_batches": True}', marks=pytest.mark.slow),
        '{"dispatch_batches": False}',
    ],
)
def test_several_processes_divide_a_stream(split: str, tmp_path: Path, python: Any) -> None:
    """Whether the first process reads for all, or each reads all and takes its part."""
    (one,) = searches(python, tmp_path / "one", 0, 1)
    for found in searches(python, tmp_path / "two", 0, 2, split):
        assert found["same"]
        assert found["plans"] == one["plans"]
        assert found["totals"][0] == found["totals"][1]
        assert found["totals"][0] == pytest.approx(one["totals"][0], rel=1e-3, abs=1e-5)
