"""The house itself: who imports whom, what is public, what is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import vlprune

SOURCE = Path(vlprune.__file__).parent
ORDER = (
    "errors files facts device processes status structures cutting models architectures prices "
    "recipe methods calibration folders training data tasks measuring streaming reports testing "
    "commands "
    "__init__"
).split()
"""Every package, below those that may import it."""
MODULES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    """The top-level module or package a file belongs to."""
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> set[str]:
    """Rooms of vlprune that a file imports, and the outside packages it imports at the top."""
    package = ["vlprune", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what only the type checker reads is no import
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            full = [*base, *(node.module.split(".") if node.module else [])]
            targets = [full] if len(full) > 1 else [[*full, a.name] for a in node.names]
            found |= {target[1] for target in targets if target[1] != "__version__"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_downwards_only(path: Path) -> None:
    own = room(path)
    above = {other for other in imports(path) if ORDER.index(other) > ORDER.index(own)}
    assert not above, f"{own} imports {above}, which stand above it in ORDER"


def test_the_order_names_every_package() -> None:
    assert set(ORDER) == {room(path) for path in MODULES}


def test_methods_know_no_architecture_and_no_transformers() -> None:
    for path in (SOURCE / "methods").rglob("*.py"):
        text = path.read_text()
        assert "transformers" not in text
        assert "architectures" not in imports(path)
    for path in (SOURCE / "architectures").rglob("*.py"):
        assert "methods" not in imports(path)


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vlprune, vlprune.commands.main, vlprune.reports.story\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert heavy <= {'numpy'}, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "line",
    ["inspect ./no", "compress no.yaml", "compress ./no --budget x", "cut no no.json", "bench no",
     "evaluate no", "sensitivity no", "export no --to x", "report no", "demo a=b"],
)  # fmt: skip
def test_mistakes_are_told_before_torch_is_loaded(line: str) -> None:
    code = (
        "import sys\nfrom vlprune.commands import main\n"
        f"sys.argv = ['vlprune', *{line!r}.split()]\n"
        "try: main.main()\nexcept SystemExit as stop: assert stop.code == 2, stop.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented() -> None:
    assert dir(vlprune) == sorted(vlprune.__all__)  # ruff keeps the order of the list itself
    for name in vlprune.__all__:
        assert getattr(vlprune, name).__doc__, name
    assert vlprune.compressor.CompressorCallback
    with pytest.raises(AttributeError):
        vlprune.nothing  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    name = "vlprune." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ names {public!r}, which is not there"


@pytest.mark.parametrize("package", sorted({p.parent for p in MODULES} - {SOURCE}), ids=str)
def test_every_package_names_its_files(package: Path) -> None:
    """In its README, or in that of the package around it."""
    told = next(p / "README.md" for p in (package, package.parent) if (p / "README.md").exists())
    assert len(told.read_text().splitlines()) < 45
    for path in package.iterdir():
        if path.suffix in (".py", ".html", ".css", ".js") and path.name != "__init__.py":
            assert f"`{path.name}`" in told.read_text(), f"{told} does not name {path.name}"


def test_no_underscore_name_is_imported_across_packages() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > 1:
                private = [one.name for one in node.names if one.name.startswith("_")]
                assert set(private) <= {"__version__"}, f"{path} imports {private}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_public_function_is_documented(path: Path) -> None:
    """By itself, or by the method it overrides; a tested family is documented by its name."""
    name = ".".join(["vlprune", *path.relative_to(SOURCE).with_suffix("").parts])
    module = importlib.import_module(name.removesuffix(".__init__"))
    silent = [where for where, value in public(module) if not inspect.getdoc(value)]
    families = ("families.py", "variants.py", "detectors.py", "experts.py")
    assert not silent or path.name in families, silent


def public(module: ModuleType) -> Iterator[tuple[str, object]]:
    """The public classes and functions that a module defines, and their methods."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", "") != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value
        for own, method in vars(value).items() if inspect.isclass(value) else ():
            named = inspect.isfunction(method) and method.__name__ != "<lambda>"  # else a field
            if named and not own.startswith("_"):
                yield f"{name}.{own}", method


def test_no_file_is_called_utils() -> None:
    names = {p.stem.lower() for p in MODULES}
    assert not names & {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def test_the_readme_names_every_command() -> None:
    from vlprune.commands.main import app

    readme = (SOURCE.parent.parent / "README.md").read_text()
    for command in app.registered_commands:
        assert f"vlprune {command.callback.__name__}" in readme, command
