"""The wheel: the whole package is inside, and the command runs from it, far from the source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from small_runs import TINY

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def sh(*words: object, cwd: Path) -> str:
    """What a command prints. It finds no source by PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the source."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    options = ("-q", "--no-deps", "--no-build-isolation", "-w", "dist")
    sh(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=copy)
    (path,) = (copy / "dist").glob("vlprune-*.whl")
    return path


def test_nothing_of_the_package_is_missing(wheel: Path) -> None:
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "vlprune").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }
    assert {"vlprune/py.typed", "vlprune/demo.yaml", "vlprune/recipes/upop/nlvr2.yaml"} <= files
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert not files - inside
    assert {name for name in inside if ".dist-info/" not in name} <= files


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, which borrows all other packages from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    options = ("-q", "--no-deps", "--no-index")
    sh(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    # a path in a .pth file is only added: editable installations there stay unknown
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_the_command_runs_far_from_the_source(installed: Path, tmp_path: Path) -> None:
    python, command = installed / "bin" / "python", installed / "bin" / "vlprune"
    place = sh(python, "-c", "import vlprune; print(vlprune.__file__)", cwd=tmp_path)
    assert Path(place).is_relative_to(installed)
    assert "compress" in sh(command, "--help", cwd=tmp_path)
    sh(command, "demo", "-o", "small", *TINY, cwd=tmp_path)
    assert (tmp_path / "small" / "model.safetensors").exists()
    recipe = Path(place.strip()).parent / "recipes" / "upop" / "imagenet-deit.yaml"
    sh(command, "compress", recipe, "--toy", "-o", "toy", cwd=tmp_path)
    assert (tmp_path / "toy" / "model.safetensors").exists()
