"""The command: parse, call, print. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ..errors import RecipeError, VlpruneError, did_you_mean
from ..files import plain, write_text
from ..folders.place import check_file
from ..reports import screens
from ..reports.terminal import show
from ..status import Progress
from .signals import received, stoppable

if TYPE_CHECKING:
    from ..recipe.spec import Recipe

app = typer.Typer(
    help="Make vision-language transformers smaller: a Hugging Face model in, a smaller one "
    "out, that from_pretrained loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Plain(Console):
    """A console that prints text as it is: names may hold markup, emoji codes or escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text without its control characters."""
        return super().render_str(plain(text), **options)


err = _Plain(stderr=True)
out = _Plain(soft_wrap=False)

FORMATS = ("text", "markdown", "json", "html")
Trust = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Open torch.export files, which run code when read."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda, cuda:1, ...; default: the recipe's, which is auto."),
]


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a hub name or, with --config-only, a model type such as clip."
        ),
    ],
    attention: Annotated[
        str, typer.Option(help="Attention unit: head_dim, qk_vo or head.")
    ] = "head_dim",
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Describe the architecture without weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show structures, units, parameters and MACs by tower and kind, and what stays dense.

    Example: vlprune inspect openai/clip-vit-base-patch32
    """
    from ..folders.checkpoint import open_model
    from ..measuring.inputs import made_up_inputs
    from .pipeline import describe

    loaded = open_model(model, config_only)
    try:
        inputs, problem = made_up_inputs(loaded), ""
    except Exception as error:  # a config may say anything
        inputs, problem = None, " ".join(str(error).split())[:300]
    description = describe(loaded, inputs, attention)
    description["macs_problem"] = description["macs_problem"] or problem
    if as_json:
        print(json.dumps(description))
        return
    show(screens.description(description), out)


@app.command()
def compress(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace the recipe's.")
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder for the result.")
    ] = Path("vlprune-output"),
    toy: Annotated[
        bool,
        typer.Option("--toy", help="A small new model and generated data: minutes, no downloads."),
    ] = False,
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Train or load a model, cut it, retrain it, evaluate it, and save it.

    Example: vlprune compress recipes/easy-vqa.yaml budget.params=0.3 -o small
    """
    from ..recipe.spec import load_recipe

    chosen = load_recipe(recipe, overrides or [], toy)
    _run(_on(device, chosen), output, as_json)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A folder with a model.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe with the data; default: the one in the folder.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace the recipe's.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="A JSON file for what the model says, as evaluation servers take it."),
    ] = None,
    device: Device = "",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a saved model on the test data of its recipe.

    Example: vlprune evaluate small --results answers.json
    """
    places = [folder / "recipe.yaml", folder.parent / "recipe.yaml"]  # the latter for an export
    found = recipe or next((place for place in places if place.exists()), places[0])
    from ..recipe.spec import load_recipe

    chosen = _on(device, load_recipe(found, overrides or []))
    from .pipeline import evaluate_folder

    metrics = evaluate_folder(folder, chosen, _Shown(), results, trust_remote_code)
    if as_json:
        print(json.dumps(metrics))
        return
    show(screens.measured(metrics), out)


@app.command("scan", hidden=True)  # its name in earlier versions
@app.command()
def sensitivity(
    folder: Annotated[Path, typer.Argument(help="A folder with a trained model.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="A recipe with the data; default: in the folder, or the one above."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace the recipe's.")
    ] = None,
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Show which tower and kind can be cut how far, without training.

    Example: vlprune sensitivity demo-output/dense
    """
    places = [folder / "recipe.yaml", folder.parent / "recipe.yaml"]
    found = recipe or next((place for place in places if place.exists()), places[0])
    from ..recipe.spec import load_recipe

    chosen = _on(device, load_recipe(found, overrides or []))
    from .pipeline import scan_folder

    body = scan_folder(folder, chosen, _Shown())
    if as_json:
        print(json.dumps(body))
        return
    show(screens.sensitivity(body), out)


@app.command()
def bench(
    folder: Annotated[Path, typer.Argument(help="A folder with a model.")],
    against: Annotated[
        Path | None,
        typer.Option(help="The folder of the model to compare with; default: FOLDER/dense."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes, as in 1,8,32.")] = "1,8",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile as well: it takes minutes.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="Where both models run: auto, cpu, cuda, cuda:1, ...")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch takes.")] = 0,
    seconds: Annotated[
        float, typer.Option(help="About how long to measure a batch size and engine.")
    ] = 10.0,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the result in FOLDER/bench.json, for the report.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Time a model, next to the one it was made from: latency, throughput, memory, loading, MACs.

    Example: vlprune bench demo-output --batch-sizes 1,8,32 --compile
    """
    sizes = _numbers(batch_sizes)
    if save:
        check_file(folder / "bench.json")
    place = against or (folder / "dense" if (folder / "dense").is_dir() else None)
    err.print("loading torch and transformers", style="dim")
    from ..measuring.bench import bench as measure

    body = measure(
        folder,
        place,
        batch_sizes=sizes,
        compiled=compiled,
        device=device,
        threads=threads,
        seconds=seconds,
        trust_remote_code=trust_remote_code,
        progress=_Shown(),
    )
    if save:
        _write(folder / "bench.json", json.dumps(body, indent=1) + "\n")
    if as_json:
        print(json.dumps(body))
        return
    show(screens.timings(body), out)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A folder with a model.")],
    to: Annotated[str, typer.Option(help="onnx, torch-export or openvino.")] = "onnx",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The folder for the export; default: FOLDER/onnx."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize, by the runtime's own quantizer.")
    ] = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Export every stage that generate() needs.")
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A recipe whose data is traced; default: the one in FOLDER, if any."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model for a runtime, and check that it still answers as PyTorch does.

    Example: vlprune export demo-output --to onnx
    """
    found = recipe or (folder / "recipe.yaml" if (folder / "recipe.yaml").is_file() else None)
    from ..recipe.spec import load_recipe

    chosen = load_recipe(found, []) if found else None
    err.print("loading torch and transformers", style="dim")
    from .pipeline import export_folder

    facts = export_folder(
        folder,
        to,
        output,
        int8=int8,
        generation=generation,
        recipe=chosen,
        progress=_Shown(),
    )
    if as_json:
        print(json.dumps(facts))
        return
    show(screens.exported(facts), out)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `compress` filled.")],
    form: Annotated[
        str, typer.Option("--format", help="text, markdown, json or html; default: by -o.")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A file; default: the terminal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell and draw what became of the budget, one folder or several beside each other.

    Example: vlprune report demo-output -o report.html
    """
    from ..reports.markdown import markdown
    from ..reports.read import read_report
    from ..reports.story import story

    ending = {".html": "html", ".md": "markdown", ".json": "json"}
    chosen = "json" if as_json else form or ending.get(output.suffix if output else "", "text")
    if chosen not in FORMATS:
        raise RecipeError(
            f"a report is written as {', '.join(FORMATS)}, not {chosen!r}."
            f"{did_you_mean(chosen, FORMATS)}"
        )
    if output is not None:
        check_file(output)
    reports = [read_report(folder) for folder in folders]
    if chosen == "html":
        if output is None:
            raise RecipeError("a page needs a file: add -o report.html")
        from ..reports.page import page

        text = page(reports)
    elif chosen == "json":
        text = json.dumps(reports if len(reports) > 1 else reports[0], indent=1) + "\n"
    elif chosen == "markdown" or output is not None:
        text = markdown(story(reports))
    else:
        show(story(reports), out)
        return
    if output is None:
        print(text, end="")
        return
    _write(output, text)


def _write(path: Path, text: str) -> None:
    """Write a file, all of it or nothing. Raises RecipeError."""
    write_text(path, text, RecipeError)
    err.print(f"Written to {path}.")


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder for the result.")
    ] = Path("demo-output"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace the demo's.")
    ] = None,
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Run the whole thing on generated scenes: nothing to download, minutes on two cores.

    Example: vlprune demo -o demo-output
    """
    from ..recipe.spec import load_recipe

    recipe = load_recipe(str(files("vlprune") / "demo.yaml"), overrides or [])
    _run(_on(device, recipe), output, as_json)


def _on(device: str, recipe: Recipe) -> Recipe:
    """The recipe, to be run on ``device`` where one is given."""
    return replace(recipe, device=device) if device else recipe


def _run(recipe: Recipe, output: Path, as_json: bool) -> None:
    err.print("loading torch and transformers", style="dim")
    from .pipeline import compress as run_recipe

    main_process = os.environ.get("RANK", "0") == "0"
    report = run_recipe(recipe, output, _Shown() if main_process else Progress())
    if not main_process:
        return
    if as_json:
        print(json.dumps(report))
        return
    show(screens.result(report, output), out)


def _numbers(text: str) -> tuple[int, ...]:
    """1,8,32 as numbers. Raises RecipeError."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise RecipeError(f"batch sizes are numbers of at least 1, as in 1,8,32, not {text!r}")
    return sizes


class _Shown(Progress):
    """Phases and bars on stderr; plain lines, a few a phase, where stderr is no terminal."""

    def phase(self, title: str) -> None:
        """A line for the phase that begins."""
        err.print(title, style="bold" if err.is_terminal else None)

    def note(self, text: str) -> None:
        """A line, as it is."""
        err.print(plain(text), markup=False, soft_wrap=True)

    @contextmanager
    def count(self, title: str, total: int) -> Iterator[Any]:
        """A bar that disappears when it is done."""
        if not err.is_terminal:
            yield _plain_lines(title, total)
            return
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Bars(*columns, console=err, transient=True) as bars:
            task = bars.add_task(plain(title), total=total, note="")

            def advance(done: int, note: str = "") -> None:
                bars.update(task, advance=done)
                if note:
                    bars.update(task, note=plain(note))

            yield advance


def _plain_lines(title: str, total: int) -> Any:
    """An advance function that prints a line at every quarter."""
    so_far, said, quarter = 0, "", 1

    def advance(done: int, note: str = "") -> None:
        nonlocal so_far, said, quarter
        so_far += done
        said = note or said
        if done and so_far * 4 >= total * quarter:
            quarter = so_far * 4 // total + 1
            err.print(f"  {title} {so_far}/{total} {said}".rstrip())

    return advance


def main() -> None:
    """The console script: user errors become one message and exit code 2.

    With ``--json`` stdout gets {"error": kind, "message": text, "problems": [one line each]}.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # a child process imports nothing from the working folder, which may be a stranger's
    os.environ["PYTHONSAFEPATH"] = "1"
    with stoppable():
        try:
            app()
        except BaseException as error:
            if received():
                _leave(received())
            if not isinstance(error, VlpruneError):
                raise
            err.print(f"vlprune: {error}", soft_wrap=True)
            if "--json" in sys.argv[1:]:
                problems = getattr(error, "problems", (str(error),))
                body = {"error": type(error).__name__, "message": str(error), "problems": problems}
                print(json.dumps(body))
            sys.exit(2)


def _leave(number: int) -> None:
    """End as asked to by a signal, at once: nothing that libraries do at exit is waited for."""
    if os.environ.get("RANK", "0") == "0":
        goes_on = "; the same command goes on from the last finished phase or checkpoint"
        with suppress(OSError):  # the terminal may be gone
            resumable = sys.argv[1:2] in (["compress"], ["demo"])
            err.print(f"vlprune: stopped{goes_on if resumable else ''}", soft_wrap=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)


if __name__ == "__main__":
    main()
