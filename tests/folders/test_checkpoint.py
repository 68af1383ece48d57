"""Folders: whole or not at all, and loaded by anything that loads Hugging Face models."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import vlprune
from small_models import small
from vlprune.errors import CheckpointError
from vlprune.testing import build
from vlprune.testing.conformance import make_plan


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_stock_files_and_the_plan(tmp_path: Path) -> None:
    model = small()
    vlprune.save(model, tmp_path / "m")
    files = set(contents(tmp_path / "m"))
    assert {"config.json", "model.safetensors", "plan.json"} <= files
    assert vlprune.Plan.load(tmp_path / "m" / "plan.json").keep
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["text_config"]["hidden_size"] == 24  # the dense model's config, untouched
    assert os.listdir(tmp_path) == ["m"]  # nothing left beside it


def test_from_pretrained_in_a_new_process(tmp_path: Path, python: Any) -> None:
    model = small("blip_captioning")
    vlprune.save(model, tmp_path / "m")
    count = sum(p.numel() for p in model.parameters())
    code = (
        "import vlprune, transformers\n"
        f"m = transformers.BlipForConditionalGeneration.from_pretrained({str(tmp_path / 'm')!r})\n"
        "print(sum(p.numel() for p in m.parameters()))"
    )
    done = python.run(code)
    assert done.stdout.strip() == str(count), done.stderr


def test_without_the_import_it_fails_loudly(tmp_path: Path, python: Any) -> None:
    vlprune.save(small(), tmp_path / "m")
    code = f"import transformers; transformers.CLIPModel.from_pretrained({str(tmp_path / 'm')!r})"
    done = python.run(code)
    assert done.returncode != 0
    assert "mismatch" in done.stderr


@pytest.mark.parametrize(
    "first",
    [
        "import transformers",
        pytest.param("import vlprune", marks=pytest.mark.slow),
        pytest.param("from transformers import CLIPModel", marks=pytest.mark.slow),
    ],
)
def test_the_order_of_imports_does_not_matter(tmp_path: Path, python: Any, first: str) -> None:
    vlprune.save(small(), tmp_path / "m")
    code = (
        f"{first}\nimport transformers, vlprune\n"
        f"m = transformers.AutoModel.from_pretrained({str(tmp_path / 'm')!r})\n"
        "assert m.vision_model.encoder.layers[0].mlp.fc1.out_features == 24"
    )
    if "transformers" in first:  # imported first, as it is in python's server
        done: Any = python.run(code)
    else:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sharded_half_precision_and_device_map(tmp_path: Path) -> None:
    model = small("llava")
    model.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").exists()
    again = vlprune.load(tmp_path / "m", dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).to(torch.bfloat16))
    assert again.half().float() is again


def test_a_tower_loads_alone(tmp_path: Path) -> None:
    model = small()
    vlprune.save(model, tmp_path / "m")
    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "m")
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter, model.vision_model.get_parameter(name))


@pytest.mark.parametrize("family", ["owlvit", "owlv2"])
def test_a_tower_that_is_a_plain_module_opens_alone(family: str, tmp_path: Path) -> None:
    """It has a config, but no name of its own that a record could start from."""
    model = small(family)
    vlprune.save(model, tmp_path / "m")
    name = {"owlvit": "OwlViT", "owlv2": "Owlv2"}[family]
    for part in ("Vision", "Text"):
        cls = getattr(transformers, f"{name}{part}Model")
        tower, told = cls.from_pretrained(tmp_path / "m", output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["mismatched_keys"]
        whole = model.state_dict()
        for key, weight in tower.state_dict().items():
            assert torch.equal(weight, whole[f"{family}.{key}"]), key


def test_a_base_folder_loads_into_a_head_class(tmp_path: Path) -> None:
    sample = build("vit")
    base = sample.model.vit
    description = vlprune.discover(base)
    vlprune.rewrite(base, description, make_plan(description, lambda size: size // 2))
    base.save_pretrained(tmp_path / "m")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "m", num_labels=5)
    assert torch.equal(model.vit.layers[0].mlp.fc1.weight, base.layers[0].mlp.fc1.weight)


def test_a_real_trainer_accepts_the_loaded_model(tmp_path: Path) -> None:
    vlprune.save(small("vit"), tmp_path / "m")
    model = vlprune.load(tmp_path / "m")
    before = model.vit.layers[0].attention.q_proj.weight.detach().clone()
    items = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 5} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "t"), max_steps=2, per_device_train_batch_size=4,
        report_to="none", use_cpu=True, disable_tqdm=True, save_steps=2, learning_rate=1e-2,
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=items).train()
    assert not torch.equal(before, model.vit.layers[0].attention.q_proj.weight)
    again = vlprune.load(tmp_path / "t" / "checkpoint-2")  # a Trainer checkpoint is a folder too
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_peft_goes_on_top(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    vlprune.save(small("vit"), tmp_path / "m")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"])
    peft.get_peft_model(vlprune.load(tmp_path / "m"), config)


def test_overwriting_replaces_and_keeps_foreign_files(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    small(seed=0).save_pretrained(folder, max_shard_size="20KB")
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "x").write_text("mine too")
    vlprune.save(small(seed=2), folder, extras={"report.json": "{}"})
    model = small(seed=1)
    vlprune.save(model, folder)
    assert not (folder / "report.json").exists()  # it was about another model
    again = vlprune.load(folder)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "logs" / "x").read_text() == "mine too"
    assert not (folder / "model.safetensors.index.json").exists()  # stale shards are gone


@pytest.mark.parametrize("when", ["weights", "plan"])
def test_a_full_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder = tmp_path / "m"
    vlprune.save(small(seed=0), folder)
    before = contents(folder)
    model = small(seed=1)
    full = OSError(errno.ENOSPC, "No space left on device")
    if when == "weights":
        monkeypatch.setattr(model, "save_pretrained", lambda *_a, **_k: (_ for _ in ()).throw(full))
    else:

        def refuse(self: Path, *args: Any, **kwargs: Any) -> int:
            self.touch()
            raise full

        monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CheckpointError, match="No space left on device; what was there before"):
        vlprune.save(model, folder)
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["m"]


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from small_models import small
import torch, vlprune
from vlprune.errors import CheckpointError

folder, seed, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
model = small(seed=seed)
old, new = (dict(small(seed=s).named_parameters()) for s in (1 - seed, seed))
if options.get("no links"):
    def refused(*_args, **_kwargs):
        raise OSError(1, "Operation not permitted")
    os.link = refused
events = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "open", "shutil.rmtree")
def state():
    shown = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir() if p.name[0] != ".")
    return shown, (folder / "config.json").exists() and (folder / "config.json").read_text()
shutil.copytree(folder, first := folder.parent / "first")
seen, last = [], None
for moment in range(10_000):
    shutil.rmtree(folder)
    shutil.copytree(first, folder)
    child = os.fork()
    if not child:
        calls = 0
        def watch(event, args):
            global calls
            if event in events and args and str(args[0]).startswith(str(folder)):
                calls += 1
                if calls > moment:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        try:
            vlprune.save(model, folder, max_shard_size="20KB" if options.get("shards") else "2GB")
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    before = sorted(map(str, folder.iterdir()))
    if state() == last and not os.WIFEXITED(status):
        seen.append(seen[-1])
        continue
    last = state()
    try:
        found = dict(vlprune.load(folder).named_parameters())
        which = [all(torch.equal(p, w[n]) for n, p in found.items()) for w in (old, new)]
        seen.append("old" if which[0] else "new" if which[1] else "neither")
    except CheckpointError as error:
        seen.append(str(error))
    assert before == sorted(map(str, folder.iterdir())), "loading changed the folder"
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
shutil.rmtree(first)
print(json.dumps(seen))
"""


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"shards": True}, marks=pytest.mark.slow),
        pytest.param({"no links": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new_model(
    tmp_path: Path, python: Any, options: dict[str, bool]
) -> None:
    folder = tmp_path / "m"
    vlprune.save(small(seed=0), folder)
    (folder / ".m.old").write_text("the user's")
    path = [Path(__file__).parent.parent]
    done = python.run(KILLED, folder, 1, json.dumps(options), path=path)
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(seen) > 15
    assert seen[0] == "old"
    assert seen[-1] == "new"
    unfinished = [one for one in seen if one not in ("old", "new")]
    if options.get("no links"):  # a moment between the weights and the config
        assert all("save again" in one for one in unfinished)
    else:
        assert not unfinished
    whole = {"config.json", "plan.json", "generation_config.json", ".m.old"}
    names = {path.name for path in folder.iterdir() if not path.name.endswith(".safetensors")}
    assert names - {"model.safetensors.index.json"} <= whole
    vlprune.save(small(seed=0), folder)
    assert {p.name for p in folder.iterdir()} <= whole | {"model.safetensors"}
    assert os.listdir(tmp_path) == ["m"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("precious")
    with pytest.raises(CheckpointError, match="is a file"):
        vlprune.save(small(), tmp_path / "m")
    assert (tmp_path / "m").read_text() == "precious"


def damaged(tmp_path: Path) -> Path:
    vlprune.save(small(), tmp_path / "m")
    return tmp_path / "m"


def edit_config(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_what_is_wrong_with_a_folder_is_one_sentence(tmp_path: Path) -> None:
    def fails(says: str) -> None:
        with pytest.raises(CheckpointError, match=says) as caught:
            vlprune.load(folder)
        assert "\n" not in str(caught.value)

    folder = tmp_path / "none"
    fails("there is no folder")
    folder = damaged(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails("damaged or cut short")
    weights.write_bytes(whole[:5])
    fails("damaged or cut short")
    weights.unlink()
    fails(r"lacks model\.safetensors.*never read")
    weights.write_bytes(whole)
    config = (folder / "config.json").read_text()
    edit_config(folder, lambda c: c.pop("quantization_config"))
    fails("no vlprune section")
    (folder / "config.json").write_text("{")
    fails("cannot read")
    (folder / "config.json").unlink()
    fails("not a model")
    (folder / "config.json").write_text(config)
    edit_config(folder, lambda c: c["quantization_config"].update(version=99))
    fails("another version")
    (folder / "config.json").write_text(config)
    edit_config(
        folder, lambda c: next(iter(c["quantization_config"]["keep"].values())).update(mask="!")
    )
    fails("damaged")
    (folder / "config.json").write_text(config)
    edit_config(
        folder, lambda c: next(iter(c["quantization_config"]["keep"].values())).update(kept=1)
    )
    fails("damaged")
    (folder / "config.json").write_text(config)
    edit_config(folder, lambda c: c["vision_config"].update(intermediate_size=64))
    fails("mixes files of two models")
    (folder / "config.json").write_text(config)
    vlprune.load(folder)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError, match="never read"):
        vlprune.load(folder)


def test_a_model_without_a_config_remembers_its_cut() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)
            self.act = nn.ReLU()

    model = Block()
    for keep in (6, 3):
        description = vlprune.discover(model)
        vlprune.rewrite(model, description, vlprune.Plan(keep={"fc1": tuple(range(keep))}))
    from vlprune.structures.record import read_record

    record = read_record(model)
    assert record is not None
    assert record.sizes == {"fc1": 8}
    assert record.plan.keep == {"fc1": (0, 1, 2)}
