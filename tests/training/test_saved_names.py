"""A plain Trainer finds the weights of its checkpoints again, whatever names they have there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vlprune
from vlprune.testing import FAMILIES, build
from vlprune.testing.conformance import share_plan


def trainer(model: Any, folder: Path, callbacks: Any = (), **more: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, per_device_train_batch_size=1, seed=3, **more,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, callbacks=list(callbacks))


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers collects garbage after every shard, which takes most of the time here."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@torch.no_grad()
def spoil(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Other values for all weights; the state as it was before."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(7)
    return state


def shards_of(model: Any, folder: Path) -> set[str]:
    """Save the model in about four files; the names in them."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // 4)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    return set(index["weight_map"])


def loads(model: Any, folder: Path, attention: Any = "head_dim") -> None:
    """Check that the Trainer restores each bit from four files, and from one."""
    model.eval()
    names = shards_of(model, folder / "shards")
    sources = ["shards"]
    if not names <= model.state_dict().keys():
        model.save_pretrained(folder / "one")
        sources.append("one")
    compressor = vlprune.Compressor(model, vlprune.UPop(), {"params": 0.95}, attention=attention)
    resumed = trainer(model, folder / "out", [compressor.callback()])
    for source in sources:
        before = spoil(model)
        resumed._load_from_checkpoint(str(folder / source))
        now = model.state_dict()
        assert now.keys() == before.keys()
        assert [n for n in now if not now[n].equal(before[n])] == [], source
    compressor.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainer_loads_every_family(family: str, tmp_path: Path) -> None:
    loads(build(family).model, tmp_path)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("vit", "head_dim"), ("dinov2_swiglu", "head_dim"), ("llava", "head"), ("llava", "head_dim")],
)
def test_and_one_that_has_been_cut(family: str, attention: Any, tmp_path: Path) -> None:
    """Of llava the language model's heads can be cut natively, their dimensions only padded."""
    model = build(family).model
    vlprune.Compressor(model, vlprune.Magnitude(), {"params": 0.9}, attention=attention).finish()
    loads(model, tmp_path, attention)


@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu"])
def test_and_one_that_shares_weights(family: str, tmp_path: Path) -> None:
    model = build(family).model
    description = vlprune.discover(model)
    vlprune.rewrite(model, description, share_plan(model, description))
    assert any("parametrizations" in name for name in model.state_dict())
    loads(model, tmp_path)


class Stop(Exception):
    pass


class StopAt(transformers.TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise Stop


def loss_of(outputs: Any, _labels: Any, **_: Any) -> torch.Tensor:
    """Something that depends on all that a model returns."""
    values = outputs.values() if isinstance(outputs, dict) else outputs
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    return torch.stack([t.clamp(-9, 9).square().mean() for t in tensors]).sum()


def search(family: str, folder: Path, *callbacks: Any, resume: bool = False, cut: bool) -> Any:
    """A search in a plain Trainer, of a model that may have been cut before."""
    sample = build(family)
    attention: Any = "head" if family == "llava" else "head_dim"
    if cut:
        vlprune.Compressor(
            sample.model, vlprune.Magnitude(), {"params": 0.9}, attention=attention
        ).finish()
    compressor = vlprune.Compressor(
        sample.model, vlprune.UPop(interval=1), {"params": 0.8}, attention=attention
    )

    def batch(rows: list[int]) -> dict[str, Any]:
        scale = 1 + 0.1 * rows[0]
        return {k: v * scale if v.is_floating_point() else v for k, v in sample.inputs.items()}

    resumed = trainer(
        sample.model, folder, [compressor.callback(), *callbacks], max_steps=6, save_steps=2,
        learning_rate=1e-3, data_seed=0,
    )  # fmt: skip
    resumed.train_dataset, resumed.data_collator = list(range(6)), batch
    resumed.compute_loss_func = loss_of
    resumed.train(resume_from_checkpoint=resume)
    return compressor


@pytest.mark.parametrize("cut", [False, True], ids=["first-cut", "second-cut"])
@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu", "llava", "grounding_dino"])
def test_a_search_goes_on_to_the_same_bits(family: str, cut: bool, tmp_path: Path) -> None:
    whole = search(family, tmp_path / "whole", cut=cut)
    with pytest.raises(Stop):
        search(family, tmp_path / "stopped", StopAt(), cut=cut)
    resumed = search(family, tmp_path / "stopped", resume=True, cut=cut)
    assert resumed.search.steps == 6
    assert resumed.search.total.equal(whole.search.total)
    assert resumed.plan() == whole.plan()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert a.equal(b)
