"""The house itself: who imports whom, what is public, what is documented."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vlprune

SOURCE = Path(vlprune.__file__).parent
ORDER = (
    "errors files facts device status structures cutting models architectures prices recipe "
    "methods folders training data tasks measuring reports testing commands __init__"
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
        "import sys, vlprune, vlprune.commands.main, vlprune.reports.report\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert heavy <= {'numpy'}, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented() -> None:
    assert dir(vlprune) == sorted(vlprune.__all__)  # ruff keeps the order of the list itself
    for name in vlprune.__all__:
        assert getattr(vlprune, name).__doc__, name
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


def test_no_file_is_called_utils() -> None:
    names = {p.stem.lower() for p in MODULES}
    assert not names & {"utils", "util", "helpers", "helper", "manager", "common", "misc"}


def test_the_readme_names_every_command() -> None:
    from vlprune.commands.main import app

    readme = (SOURCE.parent.parent / "README.md").read_text()
    for command in app.registered_commands:
        assert f"vlprune {command.callback.__name__}" in readme, command
