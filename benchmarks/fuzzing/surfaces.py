"""Where damage comes in: for each surface a sound input, its damage, and what is called on it."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import damage, seeds
from .cell import Accepted, Room

REPO = Path(__file__).parent.parent.parent
ODD_NAMES = (
    "a\x1b[31mb",
    "a\nb",
    "[bold]a[/b]",
    "a b",
    "-a",
    "é",
    "<b>a",
    "a|b",
    "$HOME",
    "a" * 200,
)


@dataclass
class Case:
    """One damaged input and what is called on it."""

    call: Callable[[], Any]
    what: str
    names: list[str]
    """What a message may name: the damaged file, its folder, its keys."""
    allowed: tuple[str, ...] = ()
    """Where in the room the call may write."""
    kept: tuple[str, ...] = ()
    """What it must leave as it is, there too."""
    json: bool = False
    starts: bool = False
    """Whether it starts processes of its own."""
    wrong: Callable[[Any], str] = field(default=lambda value: "")
    """What is wrong with the value that came back, if anything."""
    theirs: bool = False
    """Whether only what has a frame of vlprune is a finding: a call of another library."""
    must: bool = False
    """Whether refusing is wrong too."""


@dataclass(frozen=True)
class Maker:
    """What a case is made of."""

    rng: random.Random
    room: Room
    seeds: Path

    def copy(self, seed: str, name: str = "", where: str = "user") -> Path:
        """A seed, copied into the room."""
        target = self.room.root / where / (name or seed)
        shutil.copytree(self.seeds / seed, target, symlinks=True, dirs_exist_ok=True)
        return target

    def folder(self, seed: str) -> Path:
        """A copy under its own or, now and then, an odd name, with a stranger's code in it."""
        name = self.rng.choice(ODD_NAMES) if self.rng.random() < 0.08 else seed
        made = self.copy(seed, name)
        for code in ("evil", "torch", "json"):
            (made / f"{code}.py").write_text(damage.EVIL)
        return made

    def hurt(self, path: Path, form: str) -> tuple[str, list[str]]:
        """Damage one file; what was done, and what a message may name."""
        names, kind = [path.stem, str(path.parent)], self.rng.random()
        if kind < 0.12:
            return damage.damage_kind(self.rng, path, self.room.outside), names
        if kind < 0.24 or form == "bytes":
            return damage.damage_bytes(self.rng, path), names
        if form == "safetensors":
            return damage.damage_safetensors(self.rng, path), names
        if form == "image":
            return damage.damage_image(self.rng, path), names
        if form == "jsonl":
            return self._line(path), names
        what, keys = damage.damage_text(self.rng, path, form, self.rng.choice([1, 1, 1, 2, 3]))
        return what, names + keys

    def nudge(self, path: Path) -> tuple[str, list[str]]:
        """Change one number or switch of a recipe a little: most of these are to be accepted."""
        tree = yaml.safe_load(path.read_text())
        able = [p for p in damage.places(tree) if isinstance(damage.at(tree, p), int | float)]
        place = self.rng.choice(able)
        parent, last = damage.at(tree, place[:-1]), place[-1]
        old = parent[last]
        new = not old if isinstance(old, bool) else self.rng.choice([0, 1, 2, 3, 5])
        parent[last] = type(old)(self.rng.choice([old * new, old / 2, 1 / (1 + new)]))
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return f"{'.'.join(map(str, place))}: {old} -> {parent[last]}", [str(s) for s in place]

    def _line(self, path: Path) -> str:
        lines = path.read_text().splitlines()
        number = self.rng.randrange(len(lines))
        tree, what, _ = damage.damage_tree(self.rng, json.loads(lines[number]))
        lines[number] = damage.dump(tree, "json")
        path.write_text("\n".join(lines))
        return f"line {number}: {what}"


class Sound(Maker):
    """Leaves every file as it is."""

    def hurt(self, path: Path, form: str) -> tuple[str, list[str]]:
        """Nothing."""
        return "nothing", [path.name]

    def nudge(self, path: Path) -> tuple[str, list[str]]:
        """Nothing."""
        return "nothing", [path.name]

    def folder(self, seed: str) -> Path:
        """A copy under its own name."""
        return self.copy(seed)


def cli(*argv: object) -> Callable[[], None]:
    """The command, in this process."""

    def call() -> None:
        from vlprune import cli as command

        sys.argv = ["vlprune", *map(str, argv)]
        command.main()

    return call


def until_training(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same, ended where a training would begin."""

    def called() -> Any:
        import transformers

        def accepted(*_: Any, **__: Any) -> None:
            raise Accepted

        transformers.Trainer.train = accepted
        return call()

    return called


# -- recipes ---------------------------------------------------------------------------------


def _output(make: Maker) -> tuple[str, ...]:
    """A place for the result where the user has files, beside such as we might call ours."""
    kept = []
    for name in (".result.old", ".result.partial", "result"):
        if name != "result" or make.rng.random() < 0.5:
            (make.room.out / name).mkdir()
            (make.room.out / name / "notes.txt").write_text("the user's own")
            kept.append(f"out/{name}/notes.txt")
    return tuple(kept)


def recipes(make: Maker) -> Case:
    """A damaged recipe; those that are accepted end where training would begin."""
    path, more = make.room.user / "recipe.yaml", []
    if make.rng.random() < 0.08:
        shutil.copy(make.rng.choice(sorted((REPO / "recipes").rglob("*.yaml"))), path)
        more = ["--toy"]
    else:
        task, form = make.rng.choice(seeds.FORMATS)
        make.copy("scenes")
        body = seeds.recipe_of(task, form if make.rng.random() < 0.5 else "")
        path.write_text(yaml.safe_dump(body, sort_keys=False))
    what, names = make.hurt(path, "yaml")
    kept = _output(make)
    call = cli("compress", path, "-o", "../out/result", *more)
    return Case(until_training(call), what, names, ("out/result",), kept)


def _known_keys() -> dict[str, Any]:
    """{dotted key: default} of all that a recipe may hold."""
    from vlprune.methods import METHODS
    from vlprune.recipe import Recipe, Training
    from vlprune.tasks import TASKS

    body = dataclasses.asdict(Recipe(task="vqa", budget={"params": 0.5}))
    body["method"] = {f.name: f.default for m in METHODS.values() for f in dataclasses.fields(m)}
    body["options"] = {k: v for task in TASKS.values() for k, v in _options(task).items()}
    body["retrain"] = dataclasses.asdict(Training())
    body["teacher"] = dict.fromkeys(("logits", "features", "similarities"), 1)
    found = {}
    for key, value in body.items():
        found[key] = value
        if isinstance(value, dict):
            found |= {f"{key}.{name}": one for name, one in value.items()}
    return found


def _options(task: Any) -> dict[str, Any]:
    takes = getattr(task, "takes", None)
    if takes is None:
        return task.defaults
    return {f.name: f.default for f in dataclasses.fields(takes)}


def overrides(make: Maker) -> Case:
    """A sound recipe and a ``key=value`` that is not."""
    task = make.rng.choice(list(seeds.SETTINGS))
    path = make.room.user / "recipe.yaml"
    path.write_text(yaml.safe_dump(seeds.recipe_of(task)))
    given, names = [], [path.name]
    for _ in range(make.rng.choice([1, 1, 2])):
        key, old = make.rng.choice(list(_known_keys().items()))
        old = None if old is dataclasses.MISSING else old
        more = tuple(f"@@{name}@@" for name in damage.RAW_YAML)
        value = damage.dump(damage.odd(make.rng, old, more), "yaml").removesuffix("...\n").strip()
        names += [*key.split("."), key]
        if make.rng.random() < 0.1:
            key = make.rng.choice([key + "x", key + ".x", "", ".", "\x1b[1m", "a.b.c", key[:-1]])
            names += [key, *key.split(".")]
        if isinstance(make, Sound):
            key, value = "seed", "1"
        given.append(f"{key}={value}"[:100_000].replace("\0", "\1"))  # no argument holds a NUL
        names += [given[-1][:60]] + ([value] if "/" in value or key.startswith("data.") else [])
    kept = _output(make)
    call = cli("compress", "-o", "../out/result", path, "--", *given)
    what = " ".join(text[:60] for text in given)
    return Case(until_training(call), ascii(what), names, ("out/result",), kept)


def runs(make: Maker) -> Case:
    """A recipe with another number in it, run to its end where it is accepted."""
    able = [task for task in seeds.SETTINGS if task != "captioning"]  # its metric starts Java
    task = make.rng.choice(able)
    path = make.room.user / "recipe.yaml"
    path.write_text(yaml.safe_dump(seeds.recipe_of(task), sort_keys=False))
    what, keys = make.nudge(path)
    call = cli("compress", path, "-o", "../out/result", "--json")
    return Case(call, what, [path.name, *keys], ("out/result",), _output(make), json=True)


# -- plans -----------------------------------------------------------------------------------


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


# -- folders ---------------------------------------------------------------------------------

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
    command = make.rng.choice("inspect inspect config load load stock bench scan evaluate".split())
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
    if command in ("scan", "evaluate"):
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
        from .cell import _frame

        if _frame(error):
            raise
    return False


def _quickly(call: Callable[[], Any], real: bool) -> Callable[[], Any]:
    """A bench without a process of its own, unless ``real``, and without waiting for quiet."""

    def called() -> Any:
        from vlprune import bench

        bench.NOISE, bench.LEAST_ROUNDS, bench.MOST_ROUNDS = 1e9, 1, 2
        if not real:
            facts = {"disk_bytes": 1, "load_seconds": 1.0, "peak_bytes": 1, "peak_batch": 1}
            bench._alone = lambda *_: dict(facts)
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
    return Case(call, f"compress {path.name}: {what}", named, ("out/result",), _output(make))


def weights(make: Maker) -> Case:
    """Damaged weights of a cut model: refused, or the very same numbers."""
    seed = make.rng.choice(WEIGHED)
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


# -- reports ---------------------------------------------------------------------------------

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
    from vlprune.report import model_card, read_report

    return len(model_card(read_report(folder), "Model"))


def _injected(page: Path) -> str:
    return "a page with a stranger's script" if damage.MARKUP in page.read_text() else ""


# -- data ------------------------------------------------------------------------------------


def data(make: Maker) -> Case:
    """Damaged annotations of every format, read by the task."""
    task, form = make.rng.choice(seeds.FORMATS)
    root = make.copy("scenes")
    files = sorted(
        {path for part in seeds.parts_of(form, str(root)) for path in _annotations(part)}
    )
    if not files:
        return images(make)
    path = make.rng.choice(files)
    lines = form in ("nlvr2", "nlvr1", "nlvr1-objects")
    what, names = make.hurt(path, "jsonl" if lines else "json")
    return _read(make, task, form, root, f"{form} {path.name}: {what}", names)


def images(make: Maker) -> Case:
    """Damaged pictures, opened by the task."""
    task, form = make.rng.choice(
        [("classification", "image-folder"), ("segmentation", "ade20k"), ("vqa", "easy-vqa"),
         ("retrieval", "coco-captions"), ("detection", "coco-instances")]
    )  # fmt: skip
    root = make.copy("scenes")
    part = seeds.parts_of(form, str(root))[0]
    places = [Path(place) for place in part.values() if Path(place).is_dir()]
    pictures = [
        p for place in places for p in sorted(place.rglob("*")) if p.suffix in (".jpg", ".png")
    ]
    path = make.rng.choice(pictures)
    if make.rng.random() < 0.06:
        path.rename(path.with_name(make.rng.choice(ODD_NAMES)[:100] + path.suffix))
        what, names = "odd name", [path.name, str(path.parent)]
    else:
        what, names = make.hurt(path, "image")
    return _read(make, task, form, root, f"{form} {path.name}: {what}", names)


def _annotations(part: Mapping[str, str]) -> list[Path]:
    found = [Path(value) for key, value in part.items() if key != "split"]
    files = [path for path in found if path.is_file()]
    return files + [p for path in found if path.is_dir() for p in path.rglob("*.json")]


def _read(make: Maker, task: str, form: str, root: Path, what: str, names: list[str]) -> Case:
    def call() -> list[str]:
        from vlprune.recipe import DataSpec, ModelSpec
        from vlprune.tasks import TASKS

        train, test = seeds.parts_of(form, str(root))
        model = ModelSpec(**seeds.SMALL["model"])
        options = seeds.SETTINGS[task][1].get("options", {})
        read = TASKS[task](
            model, DataSpec(format=form, train=train, test=test), make.room.out, options
        )
        made = []
        for items in (read.train, read.test):
            for start in range(0, len(items), 4):
                made += _not_finite(read.collate(list(items[start : start + 4]), random.Random(0)))
        return made

    def wrong(found: list[str]) -> str:
        return f"numbers that are not finite in {found[0]}" if found else ""

    return Case(call, what, names, wrong=wrong)


def _not_finite(batch: Any, name: str = "") -> list[str]:
    import torch

    if isinstance(batch, torch.Tensor):
        bad = batch.is_floating_point() and not bool(batch.isfinite().all())
        return [name] if bad else []
    pairs = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    if isinstance(batch, Mapping | list | tuple):
        return [bad for key, value in pairs for bad in _not_finite(value, f"{name}.{key}")]
    return []


# -- runs that go on ---------------------------------------------------------------------------


def checkpoints(make: Maker) -> Case:
    """Damaged files of a stopped run: it goes on, and ends with the same bits."""
    folder = make.copy("stopped", ".", "cwd")
    files = sorted(p for p in (folder / "out").rglob("*") if p.is_file())
    path = make.rng.choice(files)
    form = {".json": "json", ".safetensors": "safetensors"}.get(path.suffix, "bytes")
    what, names = make.hurt(path, form)
    whole, inside = make.seeds / "whole" / "out", folder / "out"

    def wrong(_: Any) -> str:
        for name in ("plan.json", "model.safetensors"):
            if (inside / name).read_bytes() != (whole / name).read_bytes():
                return f"{name} has other bits than a run that was never stopped"
        return ""

    name = str(path.relative_to(folder))
    return Case(cli("compress", "recipe.yaml", "-o", "out", "--json"), f"{name}: {what}",
                [*names, "out"], ("cwd/out",), json=True, wrong=wrong,
                must="checkpoints" in name)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """How cases of one kind are made, of what, and how many of 100 they are."""

    make: Callable[[Maker], Case]
    needs: tuple[str, ...]
    share: float
    slower: float = 1.0
    used: int = 1
    """How many sound cases touch all that is imported."""


WEIGHED = ("small", "shared", "sharded")
FOLDERS = ("scenes", "small", "shared", "sharded")
SURFACES: dict[str, Surface] = {
    "recipes": Surface(recipes, ("scenes",), 18, used=12),
    "overrides": Surface(overrides, (), 12, used=6),
    "runs": Surface(runs, (), 1, 3, used=0),
    "plans": Surface(plans, ("scenes", "small", "shared"), 10),
    "config": Surface(config, FOLDERS, 15, used=8),
    "processors": Surface(processors, ("scenes", "small"), 4),
    "weights": Surface(weights, FOLDERS, 8),
    "index": Surface(index, ("scenes", "small", "sharded"), 3),
    "exports": Surface(exports, ("scenes", "exported"), 2, used=4),
    "reports": Surface(reports, ("scenes", "small", "shared"), 10, used=6),
    "data": Surface(data, ("scenes",), 11, used=12),
    "images": Surface(images, ("scenes",), 5, used=4),
    "checkpoints": Surface(checkpoints, ("stopped", "whole"), 1, 3, used=0),
}
