"""What a model's folder holds: config, weights, processor, exports; and plans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from . import damage, seeds
from .cases import Case, Maker, Sound, cli, until_training
from .cell import frame_of
from .recipes import output


def plans(make: Maker) -> Case:
    """A damaged plan, loaded and cut by; or reported."""
    seed = make.rng.choice(["small", "shared"])
    path = make.room.user / "plan.json"
    shutil.copy(make.seeds / seed / "plan.json", path)
    what, names = make.hurt(path, "json")

    def call() -> None:
        import vlprune

        plan = vlprune.Plan.load(path)
        model = DENSE[seed]
        vlprune.rewrite(model, vlprune.discover(model, plan.attention), plan)

    return Case(call, what, names)


DENSE: dict[str, Any] = {}
"""The dense models of the seeds, loaded once: a fork cuts a copy."""


SECTION = "quantization_config"


def config(make: Maker) -> Case:
    """A damaged config.json, our section in it more often than the rest."""
    seed = make.rng.choice(["small", "shared", "sharded", "small/dense"])
    folder = make.folder(seed.partition("/")[0]) / seed.partition("/")[2]
    path = folder / "config.json"
    kind = make.rng.random()
    if isinstance(make, Sound):
        what, names = make.hurt(path, "json")
    elif kind < 0.45 and seed != "small/dense":
        body = json.loads(path.read_text())
        section, what, keys = damage.damage_tree(make.rng, body[SECTION])
        path.write_text(damage.dump(body | {SECTION: section}, "json"))
        names = [path.name, str(folder), *keys]
    elif kind < 0.55:
        body = json.loads(path.read_text())
        body |= make.rng.choice(STRANGE)
        path.write_text(json.dumps(body))
        what, names = "strange keys", [path.name, str(folder), *body]
    else:
        what, names = make.hurt(path, "json")
    return _on_folder(make, folder, f"{seed}: {what}", names)


STRANGE: tuple[dict[str, Any], ...] = (
    {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}},
    {"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil", "architectures": ["Evil"]},
    {"model_type": "evil"},
    {"architectures": ["PreTrainedModel"]},
    {"architectures": ["AutoModel"]},
    {"architectures": ["BertModel", 3]},
    {"architectures": ["__class__"]},
    {"architectures": ["pipeline"]},
    {"num_hidden_layers": 10**6},
    {"text_config": {"num_hidden_layers": 10**6}},
    {"vision_config": {"intermediate_size": 10**12}},
    {"vision_config": {"hidden_size": 10**6, "num_hidden_layers": 10**4}},
    {"_attn_implementation": "kernels-community/evil"},
    {"attn_implementation": "kernels-community/evil"},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"torch_dtype": "os.system"},
    {"dtype": "float64"},
    {"transformers_weights": "../evil.safetensors"},
    {"_name_or_path": "../outside"},
)


def _on_folder(make: Maker, folder: Path, what: str, names: list[str]) -> Case:
    """One of the commands that open a model's folder."""
    command = make.rng.choice(
        "inspect inspect config load load stock bench sensitivity evaluate".split()
    )
    if command == "load" and folder.name == "dense":
        command = "inspect"  # it has no plan
    what = f"{command} {what}"
    named = folder if make.rng.random() < 0.8 else Path("..") / folder.relative_to(make.room.root)
    names.append(str(named))
    if command == "load":
        return Case(lambda: bool(_vlprune().load(folder)), what, names)
    if command == "stock":
        return Case(lambda: _stock(folder), what, names, theirs=True)
    if command == "bench":
        real = make.rng.random() < 0.03
        options = ("--seconds", "0.001", "--batch-sizes", "1", "--json")
        return Case(_quickly(cli("bench", *options, "--", named), real), what, names,
                    json=True, starts=real)  # fmt: skip
    if command in ("sensitivity", "evaluate"):
        make.copy("scenes")
        recipe = make.room.user / "sound.yaml"
        form = "karpathy" if "shared" in what else "vqav2"
        task = "retrieval" if "shared" in what else "vqa"
        recipe.write_text(yaml.safe_dump(seeds.recipe_of(task, form)))
        return Case(cli(command, "--json", "--recipe", recipe, "--", named), what, names, json=True)
    more = ["--config-only"] if command == "config" else []
    shown = make.rng.random() < 0.5
    return Case(cli("inspect", *more, *(["--json"] if shown else []), "--", named), what, names,
                json=shown)  # fmt: skip


def _vlprune() -> Any:
    import vlprune

    return vlprune


def _stock(folder: Path) -> bool:
    """Plain transformers, after ``import vlprune``; its own refusals are not ours."""
    import transformers

    try:
        names = json.loads((folder / "config.json").read_bytes())["architectures"]
        return bool(getattr(transformers, names[0]).from_pretrained(folder))
    except Exception as error:
        if frame_of(error):
            raise
    return False


def _quickly(call: Callable[[], Any], real: bool) -> Callable[[], Any]:
    """A bench without a process of its own, unless ``real``, and without waiting for quiet."""

    def called() -> Any:
        from vlprune.measuring import bench

        bench.NOISE, bench.LEAST_ROUNDS, bench.MOST_ROUNDS = 1e9, 1, 2
        if not real:
            facts = {"disk_bytes": 1, "load_seconds": 1.0, "peak_bytes": 1, "peak_batch": 1}
            bench.alone = lambda *_: dict(facts)
        return call()

    return called


def processors(make: Maker) -> Case:
    """Damaged files of the processor, or of what generates."""
    folder = make.folder("small")
    names = ("tokenizer.json", "tokenizer_config.json", "processor_config.json",
             "generation_config.json")  # fmt: skip
    path = folder / make.rng.choice([name for name in names if (folder / name).exists()])
    what, named = make.hurt(path, "json")
    make.copy("scenes")
    recipe = make.room.user / "sound.yaml"
    recipe.write_text(
        yaml.safe_dump(seeds.recipe_of("vqa", "vqav2") | {"model": {"path": str(folder)}})
    )
    if make.rng.random() < 0.5:
        call = cli("evaluate", "--json", "--recipe", recipe, "--", folder)
        return Case(call, f"evaluate {path.name}: {what}", named, json=True)
    call = until_training(cli("compress", recipe, "-o", "../out/result"))
    return Case(call, f"compress {path.name}: {what}", named, ("out/result",), output(make))


def weights(make: Maker) -> Case:
    """Damaged weights of a cut model: refused, or the very same numbers."""
    seed = make.rng.choice(seeds.WEIGHED)
    folder = make.folder(seed)
    path = make.rng.choice(sorted(folder.glob("*.safetensors")))
    what, names = make.hurt(path, "safetensors")
    return _weighed(make, seed, folder, f"{seed}: {what}", names)


def index(make: Maker) -> Case:
    """A damaged index of weights."""
    folder = make.folder("sharded")
    path = folder / "model.safetensors.index.json"
    if make.rng.random() < 0.2 and not isinstance(make, Sound):
        body = json.loads(path.read_text())
        name = make.rng.choice(list(body["weight_map"]))
        source = folder / body["weight_map"][name]
        away = make.room.outside / "away.safetensors"
        shutil.copy(source, away)
        body["weight_map"][name] = make.rng.choice([str(away), "../../outside/away.safetensors"])
        path.write_text(json.dumps(body))
        what, names = "weights outside the folder", [path.name, away.name, str(folder)]
        return Case(lambda: _vlprune().load(folder) is not None, what, names,
                    wrong=lambda _: "weights outside the folder were read")  # fmt: skip
    what, names = make.hurt(path, "json")
    return _weighed(make, "sharded", folder, what, names)


def _weighed(make: Maker, seed: str, folder: Path, what: str, names: list[str]) -> Case:
    expected = json.loads((make.seeds / f"{seed}.digest.json").read_text())

    def wrong(found: Mapping[str, str]) -> str:
        other = [n for n in expected if found.get(n) != expected[n]]
        return f"{len(other)} damaged tensors were loaded" if other else ""

    return Case(lambda: seeds.digest_of(folder), what, names, wrong=wrong)


def exports(make: Maker) -> Case:
    """A damaged export."""
    folder = make.folder("exported")
    path = make.rng.choice(sorted(p for p in (folder / "onnx").iterdir() if p.is_file()))
    what, names = make.hurt(path, "json" if path.suffix == ".json" else "bytes")
    names += [str(folder)]
    make.copy("scenes")
    if make.rng.random() < 0.5:
        recipe = make.room.user / "sound.yaml"
        recipe.write_text(yaml.safe_dump(seeds.recipe_of("classification", "image-folder")))
        call = cli("evaluate", "--json", "--recipe", recipe, "--", folder / "onnx")
    else:
        options = ("--seconds", "0.001", "--batch-sizes", "1", "--json")
        call = _quickly(cli("bench", *options, "--", folder), False)
    return Case(call, f"{path.name}: {what}", names, json=True)


SHOWN = ("report.json", "report.json", "plan.json", "bench.json", "told/vlprune-export.json")


def reports(make: Maker) -> Case:
    """Damaged reports, in every form of ``report``."""
    folder = make.folder("small")
    path = folder / make.rng.choice(SHOWN)
    what, names = make.hurt(path, "json")
    if make.rng.random() < 0.03:
        for name in ("report.json", "plan.json"):
            make.hurt(folder / name, "json") if (folder / name).is_file() else None
    form = make.rng.choice("text markdown json html html card".split())
    folders = [folder]
    if make.rng.random() < 0.3:
        folders.append(make.copy("shared" if make.rng.random() < 0.5 else "small", "other"))
        make.rng.shuffle(folders)
    names += [str(folder)]
    if form == "card":
        return Case(lambda: _card(folder), f"card {path.name}: {what}", names)
    if form == "html":
        page = make.room.out / "page.html"
        call = cli("report", "-o", page, "--", *folders)
        return Case(call, f"html {path.name}: {what}", names, ("out/page.html",),
                    wrong=lambda _: _injected(page))  # fmt: skip
    call = cli("report", "--format", form, "--", *folders)
    return Case(call, f"{form} {path.name}: {what}", names, json=form == "json")


def _card(folder: Path) -> int:
    from vlprune.reports.card import model_card
    from vlprune.reports.read import read_report

    return len(model_card(read_report(folder), "Model"))


def _injected(page: Path) -> str:
    return "a page with a stranger's script" if damage.MARKUP in page.read_text() else ""
