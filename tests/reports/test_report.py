"""Reports: every form says the same, and the page draws itself in a real browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import vlprune
from mutations import check_message, mutated
from vlprune.commands.console import Plain
from vlprune.errors import CheckpointError
from vlprune.reports import blocks, screens
from vlprune.reports.card import model_card
from vlprune.reports.figures import curves
from vlprune.reports.markdown import markdown
from vlprune.reports.page import page
from vlprune.reports.read import read_report
from vlprune.reports.story import common_units, story
from vlprune.reports.terminal import show
from vlprune.reports.words import summary
from vlprune.testing import build

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose model shares weights between its towers."""
    folder = tmp_path_factory.mktemp("sharing") / "shared"
    model = build("clip").model
    description = vlprune.discover(model)
    compressor = vlprune.Compressor(model, vlprune.Magnitude(), {"params": 0.9})
    text = [s for s in description if s.tower == "text" and s.kind == "ffn"]
    plan = vlprune.Plan(
        keep=compressor.plan().keep, share={text[1].name: (text[0].name, range(0, 30, 2))}
    )
    compressor._plan = plan
    small = compressor.finish()
    vlprune.save(small, folder, extras={"report.json": json.dumps(compressor.report())})
    return folder


def test_layers_add_up_to_groups_and_groups_to_the_model(tiny_folder: Path, sharing: Path) -> None:
    for folder in (tiny_folder, sharing):
        report = read_report(folder)
        for group in report["groups"]:
            layers = [
                one
                for one in report["layers"]
                if (one["tower"], one["kind"]) == (group["tower"], group["kind"])
            ]
            assert len(layers) == group["structures"]
            for name in ("units", "kept", "shared"):
                assert sum(one[name] for one in layers) == group[name]
        saved = sum(g["params"]["before"] - g["params"]["after"] for g in report["groups"])
        assert saved == report["params"]["before"] - report["params"]["after"]
    assert any(one["source"] for one in read_report(sharing)["layers"])


def test_every_form_says_the_same(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    report = read_report(tiny_folder)
    reached = f"{100 * report['budget']['reached']:.1f} %"
    code, text, _ = run("report", str(tiny_folder))
    assert code == 0
    assert reached in text
    assert max(len(line) for line in text.splitlines()) <= 80
    code, body, _ = run("report", str(tiny_folder), "--json")
    assert json.loads(body)["budget"] == report["budget"]
    code, text, _ = run("report", str(tiny_folder), "--format", "markdown")
    assert reached in text
    assert "| tower | kind |" in text
    target = tmp_path / "report.html"
    code, stdout, stderr = run("report", str(tiny_folder), "-o", str(target))
    assert (code, stdout) == (0, ""), stderr
    assert reached in target.read_text()


def test_two_plans_are_compared_unit_by_unit(tiny_folder: Path) -> None:
    one = read_report(tiny_folder)
    other = copy.deepcopy(one)
    other["folder"] = "other"
    layer = max(one["layers"], key=lambda layer: layer["kept"])
    kept = other["keep"].get(layer["name"], list(range(layer["units"])))
    other["keep"][layer["name"]] = kept[1:]
    rows = common_units(one, other)
    assert sum(r["one"] - r["both"] for r in rows) == 1
    assert sum(r["other"] - r["both"] for r in rows) == 0
    text = markdown(story([one, other]))
    assert "The two plans" in text
    assert "Overview" in text
    other["fingerprint"] = "another"
    with pytest.raises(CheckpointError, match="not cut from models of one shape"):
        common_units(one, other)
    assert "The two plans" not in markdown(story([one, other]))


def test_mistakes_get_one_sentence(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    def refused(says: str, *args: str) -> None:
        code, stdout, stderr = run("report", *args)
        assert (code, stdout) == (2, ""), stderr
        assert says in " ".join(stderr.split())

    refused("holds no report.json", str(tmp_path))
    refused("there is no folder", str(tmp_path / "none"))
    refused("not 'htlm'. Did you mean 'html'?", str(tiny_folder), "--format", "htlm")
    refused("add -o report.html", str(tiny_folder), "--format", "html")
    refused("cannot write", str(tiny_folder), "-o", str(tmp_path / "none" / "a.html"))
    (tmp_path / "report.json").write_text("{")
    refused("cannot read", str(tmp_path))


def _scripts(text: str, kind: str) -> list[str]:
    return re.findall(rf"<script{kind}>(.*?)</script>", text, flags=re.DOTALL)


def test_a_browser_may_run_our_scripts_and_nothing_else(tiny_folder: Path) -> None:
    text = page([read_report(tiny_folder)])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["default-src"] == "'none'"
    assert "http" not in policy
    digests = [hashlib.sha256(script.encode()).digest() for script in _scripts(text, "")]
    assert len(digests) == 2
    assert rules["script-src"].split() == [
        f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests
    ]


def test_figures_are_json_whatever_a_report_holds(tiny_folder: Path) -> None:
    report = read_report(tiny_folder)
    report["history"] = {"search": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 0.5}]}
    report["layers"][0]["name"] = "</script><script>alert(1)</script><b>"

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = page([report])
    figures = _scripts(text, ' type="application/json"')
    drawn = [json.loads(figure, parse_constant=refuse) for figure in figures]
    (losses,) = [one for one in drawn if "Training loss" in str(one["layout"].get("title"))]
    assert losses["traces"][0]["y"] == [None, 0.5]
    assert "&lt;/script&gt;" in str(drawn)
    assert "<script>alert" not in text


def test_every_file_of_the_page_is_in_the_wheel() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["vlprune"]
    there = [path for path in Path(blocks.__file__).parent.iterdir() if path.is_file()]
    packed = {path.suffix for path in there} - {".py", ".md"}
    assert packed == {".html", ".css", ".js"}
    assert packed <= {Path(pattern).suffix for pattern in patterns}


@pytest.mark.parametrize("missing", ["jinja2", "plotly.offline"])
def test_a_page_without_its_libraries_says_what_to_install(
    missing: str, run: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    code, stdout, problem = run("report", str(tiny_folder), "-o", str(tmp_path / "r.html"))
    assert (code, stdout) == (2, "")
    assert "pip install 'vlprune[report]', or choose --format markdown" in problem
    assert not list(tmp_path.iterdir())


TABLE = blocks.Table(
    (
        blocks.Column("name", "model"),
        blocks.Column("params", "parameters", "count"),
        blocks.Column("kept", "what stays", "share"),
        blocks.Column("took", "median latency", "latency"),
        blocks.Column("change", "change of params", "count"),
    ),
    (
        {"took": 0.0123, "kept": 0.5, "params": 1234567, "name": "vision", "change": (4e6, 1e6)},
        {"params": 12, "name": "a/path/as/long/as/this/one/is/which/folds"},
    ),
)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [14, 24, 36, 60, 80, 200])
def test_nothing_is_cut_off_at_any_width(width: int, terminal: bool) -> None:
    text = _shown([TABLE], width, terminal)
    assert max(map(len, text.splitlines())) <= width
    dense = "".join(text.split())
    for column in TABLE.columns:
        assert all(word in dense for word in column.title.split())
    for number in ("1.23 M", "50.0 %", "12.3 ms", "4 M -> 1 M"):
        assert number in " ".join(text.split()) if width < 36 else number in text
    assert "…" not in text
    if width >= 60:
        assert len(text.splitlines()) <= 8  # a table
    assert ("─" in text) == (terminal and width >= 36)  # no lines in a list


def _shown(parts: list[Any], width: int, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Plain(file=file, width=width, force_terminal=terminal, color_system=None)
    show(parts, console)
    return file.getvalue()


def test_cells_are_found_by_the_name_of_their_column() -> None:
    turned_round = blocks.Table(tuple(reversed(TABLE.columns)), TABLE.rows)
    lines = markdown([turned_round]).splitlines()
    assert lines[0] == "| change of params | median latency | what stays | parameters | model |"
    assert lines[1] == "| ---: | ---: | ---: | ---: | --- |"
    assert lines[2] == "| 4 M -> 1 M | 12.3 ms | 50.0 % | 1.23 M | vision |"
    assert lines[3].startswith("| - | - | - | 12 | a/path")


def test_all_views_show_every_cell_of_the_story(tiny_folder: Path, sharing: Path) -> None:
    reports = [read_report(tiny_folder), read_report(sharing)]
    told = story(reports)
    views = _shown(told, 1000), markdown(told), html.unescape(page(reports))
    for block in told:
        if isinstance(block, blocks.Table):
            cells = [blocks.cell(column, row) for row in block.rows for column in block.columns]
            for view in views:
                assert all(cell in view for cell in cells)


def test_the_screen_of_bench_names_models_and_failures() -> None:
    size = {"params": 1200, "macs": 5e6, "disk_bytes": 4800, "load_seconds": 0.5, "peak_bytes": 2e6}
    eager = {"engine": "eager", "batch": 1, "low": 0.09, "high": 0.12}
    body = {
        "conditions": {"device": "cpu", "threads": 2, "dtype": "float32", "torch": "2.13"},
        "folders": {"small": "a/folder", "dense": "a/folder/dense"},
        "models": {
            "small": size | {"peak_batch": 8},
            "dense": size | {"peak_batch": 8, "params": 2400, "macs": None},
        },
        "runs": [
            eager | {"model": "dense", "median": 0.11, "items_per_second": 9.09},
            eager | {"model": "small", "median": 0.1, "items_per_second": 1234.5},
            {"engine": "onnx", "batch": 1, "failed": "no such kernel"},
        ],
        "faster": [{"engine": "eager", "batch": 1, "times": 1.1, "low": 1.0, "high": 1.2}],
    }
    text = _shown(screens.timings(body), 80)
    assert max(map(len, text.splitlines())) <= 80
    told = " ".join(text.split())
    assert "On 2 CPU threads, float32, torch 2.13." in told
    assert "dense a/folder/dense 2.4 k - 4.8 kB 0.50 s 2 MB" in told
    assert "small a/folder 1.2 k 5 M 4.8 kB 0.50 s 2 MB" in told
    assert "eager 1 dense 110 ms (90-120) 9.1 -" in told
    assert "eager 1 small 100 ms (90-120) 1,234 6.17 G" in told
    assert "onnx, batch 1 failed: no such kernel." in told
    assert "eager, batch 1: 1.10 times as fast (1.00-1.20)." in told


def test_the_screen_of_export_says_on_what_it_was_checked() -> None:
    row = {"shapes": {"pixel_values": [2, 3, 32, 32]}, "difference": 1.2e-6, "compared": 0.75}
    facts = EXPORT | {"checked": [row], "model": "CLIPModel", "out": "a/onnx", "seconds": 3.4}
    told = " ".join(_shown(screens.exported(facts), 80).split())
    assert "CLIPModel as onnx in a/onnx: 10B, 3 s." in told
    assert "pixel_values 2x3x32x32 1e-06" in told
    assert "75.0 % of the values were finite and compared." in told
    stages = [{"stage": "decoder", "difference": 0.0, "compared": 1.0}]
    told = _shown(screens.exported(facts | {"checked": stages, "int8": True}), 80)
    assert "the stage decoder" in told
    assert "int8" in told
    assert "finite" not in told


def test_the_page_needs_no_network(tiny_folder: Path) -> None:
    text = page([read_report(tiny_folder)])
    outside = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=", outside)
    assert "@import" not in outside


def test_names_cannot_break_the_page(tiny_folder: Path) -> None:
    report = read_report(tiny_folder)
    report["folder"] = "<img src=x onerror=alert(1)>"
    text = re.sub(r"<script>.*?</script>", "", page([report, report]), flags=re.DOTALL)
    assert "<img" not in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize(("width", "pages"), [(1280, 1), (500, 1), (500, 2)])
def test_a_browser_draws_the_page(
    width: int, pages: int, tiny_folder: Path, sharing: Path, tmp_path: Path
) -> None:
    """Every plot is drawn, nothing is wider than the window, no script fails."""
    folders = [sharing] if pages == 1 else [tiny_folder, sharing]
    text = page([read_report(folder) for folder in folders])
    probe = (
        "<script>window.errors = []; addEventListener('error', e => errors.push(e.message));"
        "addEventListener('load', () => setTimeout(() => { document.title = JSON.stringify({"
        "errors, plots: document.querySelectorAll('.js-plotly-plot').length,"
        "drawn: document.querySelectorAll('.js-plotly-plot .main-svg').length,"
        "traces: document.querySelectorAll('.trace').length,"
        "over: [...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.querySelector("
        "'.main-svg').getBoundingClientRect().width > plot.parentElement.clientWidth + 1).length,"
        "wide: document.documentElement.scrollWidth - document.documentElement.clientWidth"
        "}); }, 1500));</script>"
    )
    place = tmp_path / "page.html"
    place.write_text(text.replace("<head>", "<head>" + probe, 1), encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu",
            f"--window-size={width},900", "--virtual-time-budget=8000", "--dump-dom",
            place.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    (title,) = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    facts = json.loads(title)
    assert facts["errors"] == []
    assert facts["plots"] >= 5
    assert facts["drawn"] >= facts["plots"]
    assert facts["traces"] >= facts["plots"]
    assert facts["over"] == 0
    assert facts["wide"] <= 0


def test_the_report_says_how_the_cut_was_proved(tiny_folder: Path) -> None:
    report = json.loads((tiny_folder / "report.json").read_text())
    assert "(float64)." in summary(report)
    report["verified"] |= {"dtype": "bfloat16", "kernel": "eager", "compared": 0.75}
    said = "(bfloat16, with eager attention in place of the model's own; 75.0% of the values are"
    assert said in summary(report)


def test_the_authors_cost_is_no_fraction_of_the_model(tiny_folder: Path) -> None:
    report = read_report(tiny_folder)
    told = {"tower": "vision", "name": "a", "shared": 0, "source": None}
    report["options"] = {"cost": "paper", "paper_ratio": 36.0}
    report["budget"] |= {"what": "params", "asked": 0.5, "reached": 0.65}
    report["layers"] = [
        {**told, "kind": "attention", "units": 10, "kept": 5},
        {**told, "kind": "ffn", "units": 40, "kept": 22},  # 198 of 400 go
    ]
    said = "p = 0.5 of the authors' prunable cost, removed 0.495 of it; 65.0 % of all params stay."
    assert f"Asked for {said}" in summary(report)
    assert "asked for p = 0.5 of the authors" in html.unescape(page([report]))
    report["options"]["paper_ratio"] = "many"  # as in a damaged report
    assert "Asked for 50.0 % of the params, reached 65.0 %." in summary(report)
    report["options"] = {"cost": "exact", "paper_ratio": 36.0}
    assert "Asked for 50.0 % of the params, reached 65.0 %." in summary(report)


@pytest.mark.parametrize("cost", ["paper", "exact"])
def test_the_report_says_what_p_means(cost: str) -> None:
    """Asked, removed of the prunable cost, and what stays of all parameters; and on the page."""
    sample = build("vit")
    method = vlprune.UPop(cost=cost, paper_ratio=8)
    compressor = vlprune.Compressor(sample.model, method, {"params": 0.7})
    batch = {**sample.inputs, "labels": torch.tensor([0, 1])}
    with compressor:
        for progress in (0.5, 1.0):
            sample.model(**batch).loss.backward()
            compressor.step(progress)
    compressor.finish()
    report = json.loads(json.dumps(compressor.report()))
    title = "What the search leaves of the "
    assert [f.label for f in curves(report) if f.label.startswith("What the")] == [
        title + ("authors' prunable cost" if cost == "paper" else "params")
    ]
    if cost == "exact":
        assert "prunable_cost" not in report["budget"]
        return
    price = {"attention": 8, "ffn": 1}
    whole, left = (
        sum(price[layer["kind"]] * layer[key] for layer in report["layers"])
        for key in ("units", "kept")
    )
    params = report["params"]
    said = report["budget"]["prunable_cost"]
    assert said == pytest.approx(
        {
            "p": 0.3,
            "removed": 1 - left / whole,
            "params_left": params["after"] / params["before"],
        }
    )
    assert abs(said["removed"] - 0.3) < 0.03 < abs(said["params_left"] - 0.7)
    assert f"removed {said['removed']:.3g} of it" in summary(report)


BENCH = {
    "conditions": {"device": "cpu", "threads": 2, "dtype": "float32", "torch": "2"},
    "folders": {"small": "m"},
    "models": {},
    "runs": [
        {"engine": "eager", "batch": 1, "model": "small", "median": 0.1, "items_per_second": 10.0},
        {"engine": "onnx", "batch": 1, "failed": "no"},
    ],
    "faster": [{"engine": "eager", "batch": 1, "times": 2.0, "of_ideal": 0.9}],
}
EXPORT = {
    "format": "onnx",
    "int8": False,
    "files": {"model.onnx": 10},
    "checked": [{"shapes": {}, "difference": 1e-6, "compared": 1.0}],
}


@pytest.fixture
def whole(tiny_folder: Path, tmp_path: Path) -> Path:
    """What a report reads, of a run with timings and an export."""
    folder = tmp_path / "whole"
    (folder / "onnx").mkdir(parents=True)
    for name in ("report.json", "plan.json"):
        shutil.copy(tiny_folder / name, folder)
    (folder / "bench.json").write_text(json.dumps(BENCH))
    (folder / "onnx" / "vlprune-export.json").write_text(json.dumps(EXPORT))
    return folder


@pytest.mark.parametrize("name", ["report.json", "bench.json", "onnx/vlprune-export.json"])
def test_any_damage_of_what_a_report_reads_is_one_message(whole: Path, name: str) -> None:
    body, told = json.loads((whole / name).read_text()), 0
    for seed in range(300):
        changed, what = mutated(body, random.Random(seed))
        (whole / name).write_text(json.dumps(changed))
        try:
            report = read_report(whole)
            markdown(story([report, {**report, "folder": "other"}]))
            if seed % 10 == 0:
                page([report])
        except Exception as error:
            told += 1
            check_message(error, what, f"{whole}/{name}")
    assert told > 100
    (whole / name).write_text(json.dumps({**body, "faster": 7, "budget": 7, "checked": 7}))
    key = {"report.json": "budget", "bench.json": "faster"}.get(name, "checked")
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: {key}: "):
        read_report(whole)


def test_names_print_as_text(run: Any, whole: Path, tmp_path: Path) -> None:
    evil = "[red]x[/nope] \x1b[31m\r :smile: <b>y</b> | `z` [a](javascript:b)"
    shown = "[red]x[/nope] \\x1b[31m\\r :smile: <b>y</b> | `z` [a](javascript:b)"
    body = json.loads((whole / "report.json").read_text())
    body["notes"] = [evil]
    body["method"] = evil
    body["groups"][0]["tower"] = evil
    (whole / "report.json").write_text(json.dumps(body))
    for arguments in ([], [str(whole)]):  # alone, and beside itself
        code, text, problem = run("report", str(whole), *arguments)
        assert (code, problem) == (0, "")
        assert "\x1b" not in text
        assert " ".join(shown.split()) in " ".join(text.split())
    code, text, _ = run("report", str(whole), "--format", "markdown")
    assert "\x1b" not in text
    assert "<b>" not in text.replace("\\<b>", "")
    (titles,) = [line for line in text.splitlines() if line.startswith("| tower | kind |")]
    (named,) = [line for line in text.splitlines() if line.startswith("| \\[red")]
    assert named.count(" | ") == titles.count(" | ")
    text = page([read_report(whole)])
    assert "<b>y</b>" not in text
    assert "\x1b" not in text
    code, _, problem = run("report", str(tmp_path / "[red]no[/]\x1b[31m"))
    assert (code, problem.strip()) == (
        2,
        f"vlprune: there is no folder {tmp_path}/[red]no[/]\\x1b[31m",
    )


def test_a_report_is_written_into_links_and_refused_where_it_cannot_be(
    run: Any, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "link.md").symlink_to(tmp_path / "real.md")
    (tmp_path / "real.md").write_text("old")
    assert run("report", str(whole), "-o", str(tmp_path / "link.md"))[0] == 0
    assert (tmp_path / "link.md").is_symlink()
    assert "budget" in (tmp_path / "real.md").read_text()
    for place in (tmp_path, tmp_path / "no" / "x.md", "/proc/x.md"):
        code, text, problem = run("report", str(whole), "-o", str(place))
        assert (code, text) == (2, "")
        assert len(problem.splitlines()) == 1
    assert run("report", str(whole), "-o", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


def test_the_card_has_results_as_the_hub_reads_them(whole: Path) -> None:
    report = read_report(whole)
    card = ModelCard(model_card(report, "BlipForQuestionAnswering"))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "visual-question-answering"
    assert card.data.tags == ["vlprune", "pruning"]
    results = {one.metric_type: one for one in card.data.eval_results}
    last = report["metrics"]["retrained"]
    assert {name: one.metric_value for name, one in results.items()} == last
    assert {one.task_type for one in results.values()} == {"visual-question-answering"}
    assert "# A smaller BlipForQuestionAnswering" in card.text
    assert "| retrained |" in card.text
    report["metrics"] = None  # of a loop of one's own
    card = ModelCard(model_card(report, "BlipForQuestionAnswering"))
    assert card.data.eval_results is None
    assert "MACs:" not in card.text


@pytest.mark.parametrize(
    "evil",
    ["a: [b", "x\n---\nlicense: evil", "'\"{}&*!|>%@`", "# no\n- item", "<b>y</b>", "~"],
)
def test_names_cannot_break_the_card(evil: str, whole: Path) -> None:
    report = read_report(whole)
    for key in ("task", "method", "device", "attention"):
        report[key] = evil
    report["versions"] = {evil: evil}
    report["options"] = {evil: evil}
    report["metrics"] = {
        stage: {evil: 0.5, **values} for stage, values in report["metrics"].items()
    }
    card = ModelCard(model_card(report, "Model"))
    assert card.data.license is None
    assert evil in {one.metric_type for one in card.data.eval_results}
    assert {one.task_type for one in card.data.eval_results} == {evil}
    assert "<b>" not in card.text.replace("\\<b>", "")
    titles = [line for line in card.text.splitlines() if line.startswith("#")]
    assert titles == ["# A smaller Model", "## How it was made", "## Limits"]
    (row,) = [line for line in card.text.splitlines() if line.startswith("| dense")]
    (head,) = [line for line in card.text.splitlines() if line.startswith("| model")]
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"(?<!\\)\|", head))
