"""Folders of strangers: no code of theirs runs, nobody is asked, damage is one message."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vlprune
from mutations import check_message, mutated
from small_models import small
from vlprune.commands.pipeline.compress import compress
from vlprune.errors import CheckpointError, UnsupportedError, VlpruneError
from vlprune.folders.opening import guarded, open_config, open_model, open_processor
from vlprune.folders.place import check_file, check_place, staging, swap
from vlprune.folders.save import check_result
from vlprune.recipe.spec import load_recipe
from vlprune.reports.read import read_report
from vlprune.reports.story import story
from vlprune.testing import build

SOURCE = Path(vlprune.__file__).parent
BOMB = "open({!r}, 'w').write('this code was run')\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cut model."""
    return vlprune.save(small(), tmp_path_factory.mktemp("original") / "m")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def refused(call: Callable[[], Any], says: str, kind: Any = VlpruneError) -> str:
    with pytest.raises(kind, match=says) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    assert "\x1b" not in text
    return text


# -- code ----------------------------------------------------------------------------------

OPENERS = {"from_pretrained", "from_config", "get_config_dict"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_every_opening_call_says_that_no_code_runs(path: Path) -> None:
    tree = ast.parse(path.read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in OPENERS:
            assert id(node) in calls, f"{path.name}, line {node.lineno}: not called on the spot"
            said = {keyword.arg for keyword in calls[id(node)].keywords}
            door = path.name == "opening.py" and said == {None}  # **options, which say it
            inherits = ast.unparse(node.value) == "super()"
            assert "trust_remote_code" in said or door or inherits, f"{path.name}:{node.lineno}"


@pytest.fixture
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a question is asked."""

    def asked(*_args: object) -> str:
        pytest.fail("a question was asked")

    monkeypatch.setattr("builtins.input", asked)


AUTO_MAPS = {
    "config.json": {"AutoConfig": "bomb.Config", "AutoModel": "bomb.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["bomb.Tokenizer", None]},
    "processor_config.json": {"AutoProcessor": "bomb.Processor"},
    "preprocessor_config.json": {
        "AutoImageProcessor": "bomb.Image",
        "AutoProcessor": "bomb.Processor",
    },
    "generation_config.json": {"AutoModel": "bomb.Model"},
}


def test_code_of_a_folder_is_never_run(
    folder: Path, no_questions: None, capfd: pytest.CaptureFixture[str]
) -> None:
    bomb = BOMB.format(str(folder / "run"))
    names = ("bomb", "custom_generate/generate", "modeling_bomb", "configuration_bomb")
    for name in names:
        (folder / name).with_suffix(".py").parent.mkdir(exist_ok=True)
        (folder / name).with_suffix(".py").write_text(bomb)
    for name, mapping in AUTO_MAPS.items():
        path = folder / name
        body = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**body, "auto_map": mapping}))
    vlprune.load(folder)  # its class is transformers' own
    open_model(str(folder), config_only=True)
    with contextlib.suppress(VlpruneError):  # transformers may have classes of its own for it
        open_processor(folder)
    edit(folder / "config.json", lambda c: c.update(model_type="bomb", architectures=["Bomb"]))
    for config_only in (True, False):
        refused(lambda: open_model(str(folder), config_only), "code of its own")  # noqa: B023
    refused(lambda: vlprune.load(folder), "this transformers does not have")
    assert not (folder / "run").exists()
    assert capfd.readouterr().out == ""


def test_a_part_of_a_model_brings_no_code_either(tmp_path: Path, no_questions: None) -> None:
    config = build("llava").model.config.to_dict()
    config["text_config"] = {
        **build("vit").model.config.to_dict(),
        "auto_map": {"AutoModel": "bomb.Model", "AutoModelForCausalLM": "bomb.Model"},
        "_name_or_path": str(tmp_path),
        "architectures": None,
    }
    config["text_config"]["model_type"] = "siglip_vision_model_of_nobody"
    config["architectures"] = ["LlavaForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "bomb.py").write_text(BOMB.format(str(tmp_path / "run")))
    refused(lambda: open_model(str(tmp_path), config_only=True), "cannot open")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "stranger/kernel"),
        ("_attn_implementation", {"": "stranger/kernel:f"}),
        ("experts_implementation", "stranger/kernel"),
    ],
)
def test_kernels_of_repositories_are_not_fetched(folder: Path, key: str, value: object) -> None:
    edit(folder / "config.json", lambda c: c["text_config"].update({key: value}))
    refused(lambda: vlprune.load(folder), rf"config\.json: text_config\.{key}", UnsupportedError)


def test_adapters_and_other_quantizers_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    refused(lambda: vlprune.load(folder), "adapter_config.json", UnsupportedError)
    (folder / "adapter_config.json").unlink()
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    refused(lambda: open_model(str(folder)), "quantized with 'gptq'", UnsupportedError)


def test_modules_of_the_working_folder_are_not_imported(folder: Path, tmp_path: Path) -> None:
    """By the command or by a process that it starts."""
    names = ("torch", "json", "vlprune", "sitecustomize", "usercustomize", "transformers", "re")
    for name in names:
        (folder / f"{name}.py").write_text(BOMB.format(str(tmp_path / name)))
    script = tmp_path / "command.py"  # as pip writes one: its own folder comes first, not this
    script.write_text("from vlprune.commands.main import main\nmain()\n")
    for path in (str(SOURCE.parent), f"{os.pathsep}{SOURCE.parent}{os.pathsep}"):
        done = subprocess.run(
            [sys.executable, "-P", script, "bench", ".", "--batch-sizes", "1", "--seconds", "0.1"],
            cwd=folder if path == str(SOURCE.parent) else tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode in (0, 2), done.stderr
        assert "Traceback" not in done.stderr
    assert not [name for name in names if (tmp_path / name).exists()]


# -- weights -------------------------------------------------------------------------------


def test_weights_outside_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    weights = folder / "model.safetensors"
    os.rename(weights, outside)
    weights.symlink_to(outside)
    refused(lambda: vlprune.load(folder), "lies outside", CheckpointError)
    weights.unlink()
    index = folder / "model.safetensors.index.json"
    for name in ("../secret.safetensors", str(outside), "x/../../secret.safetensors"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
        refused(lambda: vlprune.load(folder), "lies outside", CheckpointError)
    index.unlink()
    os.rename(outside, weights)
    edit(folder / "config.json", lambda c: c.update(transformers_weights="../m2.safetensors"))
    refused(lambda: vlprune.load(folder), "lies outside", CheckpointError)


def test_a_snapshot_of_the_hub_cache_is_a_folder(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "x" / "blobs", tmp_path / "x" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        os.rename(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    vlprune.load(snapshot)


def test_any_flipped_bit_is_found(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for seed in range(30):
        position = random.Random(seed).randrange(8 * len(whole))
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        weights.write_bytes(flipped)
        try:
            vlprune.load(folder)
        except VlpruneError:
            continue
        pytest.fail(f"nobody noticed bit {position}")
    weights.write_bytes(whole)
    vlprune.load(folder)


def test_weights_of_another_model_of_that_shape_are_found(folder: Path, tmp_path: Path) -> None:
    other = small(seed=0)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    vlprune.save(other, tmp_path / "other")
    (folder / "model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    refused(lambda: vlprune.load(folder), "not those that were saved", CheckpointError)
    refused(lambda: transformers.CLIPModel.from_pretrained(folder), "not those that were saved")


def test_trained_on_and_saved_by_transformers_it_loads(folder: Path, tmp_path: Path) -> None:
    model = vlprune.load(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path / "trained")
    section = json.loads((tmp_path / "trained/config.json").read_text())["quantization_config"]
    assert "weights" not in section
    vlprune.load(tmp_path / "trained")
    vlprune.save(model, folder)
    vlprune.load(folder)
    model.save_pretrained(folder)  # over a folder with a digest
    vlprune.load(folder, dtype=torch.float16)


@pytest.mark.parametrize(("unit", "buffer"), [("qk_vo", ".rows"), ("head_dim", ".pairs")])
def test_index_buffers_are_those_of_the_plan(unit: str, buffer: str, tmp_path: Path) -> None:
    model = small("llava", attention=unit)
    folder = vlprune.save(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(buffer))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", lambda c: c["quantization_config"].pop("weights"))
    refused(lambda: vlprune.load(folder), "are not those of the plan", CheckpointError)


# -- damage --------------------------------------------------------------------------------

HUGE = [
    ("text_config.num_hidden_layers", 10**6),
    ("text_config.intermediate_size", 10**12),
    ("text_config.vocab_size", 10**15),
    ("vision_config.image_size", 10**9),
    ("num_hidden_layers", [10**6]),
    ("text_config.num_hidden_layers", "x"),
    ("text_config.hidden_size", -24),
    ("text_config.hidden_size", None),
    ("text_config.num_attention_heads", 0),
    ("num_labels", 10**9),
    ("text_config", []),
    ("text_config", "x"),
    ("vision_config.hidden_act", "no such thing"),
    ("architectures", "CLIPModel"),
    ("architectures", [1]),
    ("architectures", ["__doc__"]),
    ("quantization_config", 7),
    ("transformers_weights", 7),
]


@pytest.mark.parametrize(("key", "value"), HUGE, ids=lambda v: str(v)[:30])
def test_impossible_configs_are_refused_at_once(folder: Path, key: str, value: object) -> None:
    def change(config: Any) -> None:
        *path, last = key.split(".")
        for part in path:
            config = config[part]
        config[last] = value

    edit(folder / "config.json", change)
    for call in (lambda: vlprune.load(folder), lambda: open_model(str(folder), config_only=True)):
        with contextlib.suppress(VlpruneError):
            call()  # a label more or less builds a model all the same
    if not isinstance(value, str | list) and value not in (None, 0, 7):
        refused(lambda: vlprune.load(folder), "config.json|cannot load")


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
def test_any_mutation_of_a_models_json_loads_or_is_one_message(folder: Path, name: str) -> None:
    body = json.loads((folder / name).read_text())
    for seed in range(150 if name == "plan.json" else 60):
        changed, what = mutated(body, random.Random(seed))
        (folder / name).write_text(json.dumps(changed))
        try:
            if name == "plan.json":
                vlprune.Plan.load(folder / name)
            else:
                vlprune.load(folder)
        except Exception as error:
            check_message(error, what)


@pytest.mark.parametrize("body", [b"", b"[" * 100_000, b"{", b"\xff", b'"x"', b"9" * 5000])
def test_damaged_files_are_one_message(folder: Path, body: bytes) -> None:
    (folder / "generation_config.json").write_bytes(body)
    refused(lambda: vlprune.load(folder), "generation_config.json", CheckpointError)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_bytes(body)
    refused(lambda: vlprune.load(folder), "config.json", CheckpointError)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"]
)
def test_pipes_and_endless_files_are_refused_at_once(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(lambda: vlprune.load(folder), "regular file", CheckpointError)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(lambda: vlprune.load(folder), "regular file|lies outside", CheckpointError)


# -- places --------------------------------------------------------------------------------


def test_a_save_into_the_working_folder_a_link_and_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    real = os.rename

    def busy(source: Any, target: Any, **options: Any) -> None:
        if Path(source).is_dir() or Path(target).is_dir():
            raise OSError(16, "Device or resource busy")  # as of a mount point
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", busy)
    for place in (".", tmp_path / "link"):
        vlprune.save(model, place)
        vlprune.load(place)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = vlprune.save(small(), tmp_path / "m")
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o640}


def test_nothing_of_the_users_is_deleted(folder: Path) -> None:
    mine = [folder.with_name(".m.old"), folder.with_name(".m.partial"), folder / ".vlprune-mine"]
    mine += [folder / "onnx", folder / "checkpoints"]
    for path in mine:
        path.mkdir()
        (path / "precious").write_text("x")
    (folder / "onnx" / "vlprune-export.json").write_text('{"files": {"../precious": 1, "a": 2}}')
    (folder / "onnx" / "a").write_text("ours")
    (folder / "precious").write_text("x")
    (folder / "model-of-mine.safetensors").write_text("x")
    vlprune.load(folder)
    vlprune.save(small(seed=1), folder)
    assert all((path / "precious").exists() for path in mine)
    assert (folder / "precious").exists()
    assert (folder / "model-of-mine.safetensors").exists()
    assert not (folder / "onnx" / "a").exists()


def test_a_place_is_tried_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place, says in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "in", "is a file"),
        (tmp_path / "dangling", "link to nothing"),
        ("/proc/vlprune", "cannot write"),
        ("/sys/vlprune/deep", "cannot write"),
        (tmp_path / ("x" * 300), "cannot write|too long"),
        ("a\0b", "cannot write"),
    ]:
        refused(lambda: check_place(place), says, CheckpointError)  # noqa: B023
    refused(lambda: check_place(tmp_path, 2**60), "MiB left", CheckpointError)
    check_place(tmp_path / "new" / "deep", 1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]
    for path, says in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "x", "there is no folder"),
        ("/proc/x", "cannot write"),
        (tmp_path / "dangling", "link to nothing"),
    ]:
        refused(lambda: check_file(path), says, CheckpointError)  # noqa: B023
    check_file(tmp_path / "new")
    check_file("/dev/null")
    assert (tmp_path / "file").read_text() == "x"


def test_files_that_a_result_would_overwrite_are_refused_early(
    tmp_path: Path, folder: Path
) -> None:
    for name in ("README.md", "recipe.yaml", "report.json", "config.json"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}")
        refused(lambda: check_result(tmp_path / "mine"), name, CheckpointError)
        (tmp_path / "mine" / name).unlink()
    (tmp_path / "mine" / "notes").write_text("x")
    check_result(tmp_path / "mine")
    (tmp_path / "mine" / "dense").mkdir()
    (tmp_path / "mine" / "dense" / "config.json").write_text("{}")
    refused(lambda: check_result(tmp_path / "mine"), "dense", CheckpointError)
    check_result(folder)  # of vlprune


def test_a_load_during_a_save_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlprune.folders import load

    folder = tmp_path / "m"
    vlprune.save(small(), tmp_path / "done")
    slept = []
    with staging(folder) as staged:
        for path in (tmp_path / "done").iterdir():
            (staged / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(load.time, "sleep", slept.append)
        refused(lambda: vlprune.load(folder), "is being saved by another process")
        assert slept == list(load.WAITS)
        monkeypatch.setattr(load.time, "sleep", lambda _seconds: swap(staged))
        vlprune.load(folder)


def test_two_saves_at_once_leave_one_whole_model(tmp_path: Path, python: Any) -> None:
    code = """
import sys
from mutations import check_message, mutated
from small_models import small
import os, vlprune
model = small(seed=int(os.environ["SEED"]))
for _ in range(8):
    vlprune.save(model, sys.argv[1])
"""
    folder, path = tmp_path / "m", [Path(__file__).parent.parent]
    env = [{"SEED": 0}, {"SEED": 1}]
    for done in python.together([code, code], folder, path=path, env=env):
        assert done.returncode == 0, done.stderr
    vlprune.load(folder)
    assert not [p for p in folder.iterdir() if p.name.startswith(".vlprune")]


def test_what_a_report_reads_is_checked(folder: Path) -> None:
    (folder / "report.json").write_text('{"budget": {"what": "params", "asked": "x"}}')
    refused(lambda: story([read_report(folder)]), r"report\.json.*budget\.asked", CheckpointError)


@pytest.mark.parametrize("name", ["../outside/m", "x/../y", "a/b/c", "x1/", "~nobody", "a b", "/"])
def test_a_path_that_is_no_folder_is_not_looked_for_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = "no folder" if name != "/" else "config.json|no model"
    for call in (open_model, open_config):
        refused(lambda: call(name), wanted, CheckpointError)  # noqa: B023
    if name != "/":
        refused(lambda: open_processor(name), wanted, UnsupportedError)


def test_a_name_that_is_nowhere_is_no_broken_connection(tmp_path: Path) -> None:
    for call in (open_model, open_config, open_processor):
        refused(lambda: call("no-one/nothing"), "no such folder here, and nothing of that name")  # noqa: B023


def test_a_section_of_another_model_names_its_file(folder: Path) -> None:
    def renamed(body: Any) -> None:
        keep = body["quantization_config"]["keep"]
        keep["no.such.layer"] = keep.pop(next(iter(keep)))

    edit(folder / "config.json", renamed)
    refused(lambda: vlprune.load(folder), r"m/config.json: .*'no.such.layer'", CheckpointError)
    edit(folder / "config.json", lambda body: body["quantization_config"].update(keep={"a": 1}))
    refused(lambda: vlprune.load(folder), r"m/config.json: ", CheckpointError)


RECIPE = """
task: retrieval
budget: {params: 0.8}
method: {name: magnitude}
options: {queue: 8}
model: {width: 16, heads: 2, vision_layers: 1, text_layers: 1, image_size: 32}
data: {train_items: 8, test_items: 4}
train: {steps: 0}
search: {steps: 0}
retrain: {steps: 0}
threads: 1
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of a recipe, with its processor."""
    out = tmp_path_factory.mktemp("trained") / "m"
    (out.parent / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(out.parent / "recipe.yaml")
    compress(recipe, out)
    return out


PROCESSOR_DAMAGE: list[tuple[str, Callable[[Any], Any]]] = [
    ("size", lambda ip: ip.update(size={"shortest_edge": "x"})),
    ("mean", lambda ip: ip.update(image_mean=["a", "b", "c"])),
    ("small", lambda ip: ip.update(size={"height": 16, "width": 16}, crop_size=16)),
    ("one", lambda ip: ip.update(image_std=[1.0])),
]


@pytest.mark.parametrize("change", [c for _, c in PROCESSOR_DAMAGE], ids=dict(PROCESSOR_DAMAGE))
def test_a_processor_that_does_not_fit_is_one_message(
    change: Callable[[Any], Any], trained: Path, tmp_path: Path, run: Any
) -> None:
    shutil.copytree(trained, tmp_path / "m")
    path = tmp_path / "m" / "processor_config.json"
    edit(path, lambda body: change(body["image_processor"]))
    recipe = (trained / "recipe.yaml").read_text()
    (tmp_path / "m" / "recipe.yaml").write_text(recipe.replace("path: ''", f"path: {tmp_path}/m"))
    assert str(tmp_path) in (tmp_path / "m" / "recipe.yaml").read_text()
    for command in ("evaluate", "sensitivity"):
        code, stdout, stderr = run(command, str(tmp_path / "m"))
        assert (code, stdout) == (2, "")
        assert "Traceback" not in stderr
        assert stderr.strip().splitlines()[-1].startswith("vlprune: cannot ")
        assert str(tmp_path / "m") in stderr


def test_what_compiled_code_prints_is_no_result_and_no_escape_sequence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with guarded("x"):
        os.write(1, b"Ignored \x1b[1m option\n")
        print("and python's")
    os.write(1, b"the result\n")
    out, err = capfd.readouterr()
    assert out == "the result\n"
    assert "Ignored \\x1b[1m option" in err
    assert "and python's" in err
