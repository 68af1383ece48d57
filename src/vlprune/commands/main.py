"""The command: parse, call, print. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError, VlpruneError
from ..reports import screens
from ..reports.terminal import show
from ..status import Progress
from .arguments import (
    budget_of,
    check_alone,
    check_attention,
    check_choice,
    check_device,
    check_experts,
    check_file,
    check_folder,
    check_name,
    check_output,
    check_plan,
    check_size,
    check_stream,
    check_timing,
    check_untrained,
    check_whole,
    each,
    given,
    is_recipe,
    numbers_of,
    on,
    recipe_for,
    samples_of,
)
from .bars import Bars
from .console import err, out, write
from .signals import received, stoppable

if TYPE_CHECKING:
    from ..recipe.spec import Recipe
    from ..reports.blocks import Block

app = typer.Typer(
    help="Make vision-language transformers smaller: a Hugging Face model in, a smaller one "
    "out, that from_pretrained loads.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

FORMATS = ("text", "markdown", "json", "html")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value pairs that replace the recipe's.")
]
Output = Annotated[Path, typer.Option("-o", "--output", help="The folder for the result.")]
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
        str, typer.Option(help="Attention unit: head_dim, qk_vo, head or query_head.")
    ] = "head_dim",
    experts: Annotated[
        str, typer.Option(help="Unit of experts that are one parameter: neuron or expert.")
    ] = "neuron",
    config_only: Annotated[
        bool, typer.Option("--config-only", help="Describe the architecture without weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show structures, units, parameters and MACs by tower and kind, and what stays dense.

    Example: vlprune inspect openai/clip-vit-base-patch32
    """
    each(
        lambda: check_name(model),
        lambda: check_attention(attention),
        lambda: check_experts(experts),
    )
    from ..folders.opening import open_model
    from ..measuring.inputs import made_up_inputs
    from .pipeline.describe import describe

    loaded = open_model(model, config_only)
    try:
        inputs, problem = made_up_inputs(loaded), ""
    except Exception as error:  # a config may say anything
        inputs, problem = None, " ".join(str(error).split())[:300]
    description = describe(loaded, inputs, attention, experts)
    description["macs_problem"] = description["macs_problem"] or problem
    _show(description, screens.description(description), as_json)


@app.command()
def compress(
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe in YAML; or a model to cut without training: a folder or a hub name."
        ),
    ],
    overrides: Overrides = None,
    output: Output = Path("vlprune-output"),
    toy: Annotated[
        bool,
        typer.Option("--toy", help="A small new model and generated data: minutes, no downloads."),
    ] = False,
    budget: Annotated[
        str, typer.Option(help="For a model: what stays of it, as in params=0.5 or macs=0.5.")
    ] = "",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For a model: unlabelled samples, a folder of images, a .jsonl or a .txt file."
        ),
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="For a model: how many samples to use; default: 256.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="For a model: obs, magnitude or random; default: obs.")
    ] = "",
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate/--no-rotate", help="For a model: turn heads to a better basis first."
        ),
    ] = False,
    attention: Annotated[
        str,
        typer.Option(help="For a model: head_dim, qk_vo, head or query_head; default: head_dim."),
    ] = "",
    experts: Annotated[
        str, typer.Option(help="For a model: neuron or expert (a whole one); default: neuron.")
    ] = "",
    max_shard_size: Annotated[
        str, typer.Option(help="For a model: the largest weight file; default: 2GB.")
    ] = "",
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="For a model: read weights layer by layer; default: if memory is too small.",
        ),
    ] = None,
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Cut a model: by a recipe that trains and evaluates it, or at once, on unlabelled samples.

    Example: vlprune compress recipes/easy-vqa.yaml budget.params=0.3 -o small

    Example: vlprune compress openai/clip-vit-base-patch32 --budget params=0.7 --calibration photos
    """
    from ..data.samples import left_out
    from ..recipe.spec import load_recipe

    for_models = given(
        budget=budget,
        calibration=calibration,
        items=items is not None,
        method=method,
        rotate=rotate,
        attention=attention,
        experts=experts,
        max_shard_size=max_shard_size,
        stream=stream,
        no_stream=stream is False,
    )
    if not is_recipe(source, for_models):
        left: Counter[str] = Counter()
        asked_budget, samples, *_ = each(
            lambda: budget_of(budget),
            lambda: samples_of(calibration, left, method),
            lambda: check_name(source),
            lambda: check_whole(256 if items is None else items, "--items", 10**6),
            lambda: check_untrained(method or "obs", rotate),
            lambda: check_attention(attention or "head_dim"),
            lambda: check_experts(experts or "neuron"),
            lambda: check_alone(
                [*(overrides or []), *given(toy=toy)],
                "cannot be given with a model, only with a recipe",
            ),
            lambda: check_size(max_shard_size),
            lambda: check_stream(stream, calibration),
            lambda: check_device(device),
            lambda: check_output(output),
        )
        err.print("loading torch and transformers", style="dim")
        from ..folders.save import SHARD
        from .pipeline.on_samples import compress_on_samples
        from .pipeline.streamed import compress_streaming
        from .pipeline.untrained import Asked

        asked = Asked(
            model=source,
            budget=asked_budget,
            samples=samples,
            source=calibration,
            items=256 if items is None else items,
            method={"name": method or "obs", **({"rotate": True} if rotate else {})},
            attention=attention or "head_dim",
            experts=experts or "neuron",
            device=device or "auto",
            left_out=left_out(left),
        )
        if calibration is None:  # no statistics, so the model need not be in memory
            report = compress_streaming(asked, output, Bars(), max_shard_size or SHARD)
        else:
            report = compress_on_samples(asked, output, Bars(), max_shard_size or SHARD, stream)
        _show(report, screens.result(report, output), as_json)
        return
    chosen, *_ = each(
        lambda: load_recipe(source, overrides or [], toy),
        lambda: check_alone(
            for_models,
            "cannot be given with a recipe: write budget.params=0.5, "
            "calibration.items=256, method.name=obs and so on after it instead",
        ),
        lambda: check_device(device),
        lambda: check_output(output),
    )
    _run(on(device, chosen), output, as_json)


@app.command()
def cut(
    model: Annotated[Path, typer.Argument(help="A folder with a model, of any size.")],
    plan: Annotated[Path, typer.Argument(help="A plan.json: which units stay, which are shared.")],
    output: Output = Path("vlprune-output"),
    max_shard_size: Annotated[
        str,
        typer.Option(help="The largest weight file; about as much memory is needed. Default: 2GB."),
    ] = "",
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Compare the masked and the cut model first."),
    ] = True,
    as_json: Json = False,
) -> None:
    """Carry out a plan on a model that may be larger than memory, file by file.

    Example: vlprune cut llava-7b plan.json -o small
    """
    each(
        lambda: check_folder(model),
        lambda: check_plan(plan),
        lambda: check_size(max_shard_size),
        lambda: check_output(output),
    )
    err.print("loading torch and transformers", style="dim")
    from ..folders.save import SHARD
    from .pipeline.cut import cut_folder

    body = cut_folder(
        model, plan, output, max_shard_size=max_shard_size or SHARD, verify=verify, progress=Bars()
    )
    _show(body, screens.cut(body), as_json)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A folder with a model.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe with the data; default: the one in the folder.")
    ] = None,
    overrides: Overrides = None,
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
    chosen, *_ = each(
        lambda: recipe_for(folder, recipe, overrides),
        lambda: check_folder(folder),
        lambda: check_device(device),
        lambda: check_file(results),
    )
    from .pipeline.evaluate import evaluate_folder

    metrics = evaluate_folder(folder, on(device, chosen), Bars(), results, trust_remote_code)
    _show(metrics, screens.measured(metrics), as_json)


@app.command("scan", hidden=True)  # its name in earlier versions
@app.command()
def sensitivity(
    folder: Annotated[Path, typer.Argument(help="A folder with a trained model.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="A recipe with the data; default: in the folder, or the one above."),
    ] = None,
    overrides: Overrides = None,
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Show which tower and kind can be cut how far, without training.

    Example: vlprune sensitivity demo-output/dense
    """
    chosen, *_ = each(
        lambda: recipe_for(folder, recipe, overrides),
        lambda: check_folder(folder),
        lambda: check_device(device),
    )
    from .pipeline.evaluate import scan_folder

    body = scan_folder(folder, on(device, chosen), Bars())
    _show(body, screens.sensitivity(body), as_json)


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
    sizes, *_ = each(
        lambda: numbers_of(batch_sizes),
        lambda: check_timing(threads, seconds, batch_sizes),
        lambda: check_folder(folder),
        lambda: check_folder(against),
        lambda: check_device(device),
        lambda: check_file(folder / "bench.json" if save and folder.is_dir() else None),
    )
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
        progress=Bars(),
    )
    if save:
        write(folder / "bench.json", json.dumps(body, indent=1) + "\n")
    _show(body, screens.timings(body), as_json)


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
    from ..folders.exported import FORMATS as EXPORTS
    from ..recipe.spec import load_recipe

    chosen, *_ = each(
        lambda: load_recipe(found) if found else None,
        lambda: check_name(str(folder)),
        lambda: check_choice(to, EXPORTS, "a model is exported to {}, not to {}."),
    )
    err.print("loading torch and transformers", style="dim")
    from .pipeline.exports import export_folder

    facts = export_folder(
        folder,
        to,
        output,
        int8=int8,
        generation=generation,
        recipe=chosen,
        progress=Bars(),
    )
    _show(facts, screens.exported(facts), as_json)


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
    _, _, _, *reports = each(
        lambda: check_choice(chosen, FORMATS, "a report is written as {}, not {}."),
        lambda: check_file(output),
        lambda: _check_is_shown(chosen, output),
        *(partial(read_report, folder) for folder in folders),
    )
    if chosen == "html":
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
    write(output, text)


def _check_is_shown(form: str, output: Path | None) -> None:
    """Raise RecipeError for a page without a file: a terminal cannot show it."""
    if form == "html" and output is None:
        raise RecipeError("a page needs a file: add -o report.html")


@app.command()
def demo(
    output: Output = Path("demo-output"),
    overrides: Overrides = None,
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Run the whole thing on generated scenes: nothing to download, minutes on two cores.

    Example: vlprune demo -o demo-output
    """
    from ..recipe.spec import load_recipe

    chosen, *_ = each(
        lambda: load_recipe(str(files("vlprune") / "demo.yaml"), overrides or []),
        lambda: check_device(device),
        lambda: check_output(output),
    )
    _run(on(device, chosen), output, as_json)


def _show(body: Mapping[str, Any], blocks: Sequence[Block], as_json: bool) -> None:
    """The result of a command, for machines or for people."""
    if as_json:
        print(json.dumps(body))
    else:
        show(blocks, out)


def _run(recipe: Recipe, output: Path, as_json: bool) -> None:
    err.print("loading torch and transformers", style="dim")
    from .pipeline.compress import compress as run_recipe

    main_process = os.environ.get("RANK", "0") == "0"
    report = run_recipe(recipe, output, Bars() if main_process else Progress())
    if main_process:
        _show(report, screens.result(report, output), as_json)


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
            if lost := _lost_contact(error):
                _leave(0, f"another process of this run has ended or does not answer ({lost})")
            if not isinstance(error, VlpruneError):
                raise
            err.print(f"vlprune: {error}", soft_wrap=True)
            if "--json" in sys.argv[1:]:
                problems = getattr(error, "problems", (str(error),))
                body = {"error": type(error).__name__, "message": str(error), "problems": problems}
                print(json.dumps(body))
            sys.exit(2)


def _lost_contact(error: BaseException) -> str:
    """torch's words where another process is gone; imports nothing where there are no others."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "torch" not in sys.modules:
        return ""
    from ..processes import lost_contact

    return lost_contact(error)


def _leave(number: int, why: str = "stopped") -> None:
    """End as asked to by a signal, at once: nothing that libraries do at exit is waited for.

    Without a signal (0) another process of the run is gone. It may be the first one, so the second
    speaks, too.
    """
    if os.environ.get("RANK", "0") in ("0" if number else "01"):
        goes_on = "; the same command goes on from the last finished phase or checkpoint"
        with suppress(OSError):  # the terminal may be gone
            resumable = sys.argv[1:2] in (["compress"], ["cut"], ["demo"])
            err.print(f"vlprune: {why}{goes_on if resumable else ''}", soft_wrap=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number if number else 2)


if __name__ == "__main__":
    main()
